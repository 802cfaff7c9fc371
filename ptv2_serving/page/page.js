"use strict";

// Everything a server or a person says becomes a text node, never HTML.
const $ = (id) => document.getElementById(id);
const POLL_MS = 2000;
// between two looks at the list of tasks while nothing tells that it changed: it can be long
const LIST_MS = 30000;
const MAX_POINTS = 150;
const LONG = new Set(["text", "text_pair", "context", "paragraph", "passage", "premise", "sentence1", "sentence2"]);
const NAMES = { text_pair: "second text" };
const state = { tasks: [], task: null, token: "", history: [], loaded: "", seen: "", listed: "", listedAt: 0 };

function make(tag, properties = {}, ...children) {
  const { className, ...attributes } = properties;
  const node = document.createElement(tag);
  if (className) node.className = className;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

async function call(path, body) {
  const headers = state.token ? { Authorization: `Bearer ${state.token}` } : {};
  const options = { headers };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["Content-Type"] = "application/json";
  }
  const response = await fetch(path, options);
  const content = await response.json();
  if (response.ok) return { content, headers: response.headers };
  if (response.status === 401) askForToken();
  throw new Error(content.detail || `The server answered with status ${response.status}.`);
}

function askForToken() {
  if (!$("token-form").hidden) return;
  $("token-form").hidden = false;
  $("token").focus();
}

function say(words, kind) {
  if ($("state").textContent !== words) $("state").textContent = words;
  $("state").className = `state ${kind}`;
}

// the form

function fieldsOf(task) {
  const { needed, optional, text } = task.inputs;
  const names = text ? ["text", ...(needed.includes("text_pair") ? ["text_pair"] : [])] : needed;
  return [...names.map((name) => ({ name, needed: true })), ...(text ? [] : optional.map((name) => ({ name, needed: false })))];
}

function kindOf(task, name) {
  const example = task.example[name];
  if (Array.isArray(example) || ["tokens", "choices", "entities"].includes(name)) return "list";
  return typeof example === "number" || /^(start|end)\d$|_index$|^predicate$/.test(name) ? "number" : "text";
}

function showFields(task) {
  state.task = task;
  $("task-note").textContent = noteOf(task);
  const parts = fieldsOf(task).flatMap(({ name, needed }) => {
    const id = `field-${name}`;
    const kind = kindOf(task, name);
    const isLong = kind === "list" || LONG.has(name);
    const input = make(isLong ? "textarea" : "input", { id, name, "data-kind": kind, spellcheck: "false", ...(isLong ? { rows: kind === "list" ? 4 : 3 } : { autocomplete: "off" }) });
    if (kind === "number") input.type = "number";
    input.required = needed;
    const hint = [kind === "list" ? "one a line" : "", needed ? "" : "optional"].filter(Boolean).join(", ");
    return [make("label", { for: id }, NAMES[name] || name.replace(/_/g, " "), ...(hint ? [make("span", { className: "hint" }, ` (${hint})`)] : [])), input];
  });
  $("fields").replaceChildren(...parts);
  fill(task.example);
}

function noteOf(task) {
  const prompt = `version ${task.champion.version}`;
  const what = { rows: `${task.labels.length} labels`, values: "a number", options: "one of the choices", tokens: "a tag for each word", spans: "a part of the context" }[task.form];
  return `${task.kind.replace(/_/g, " ")}: ${what}, by ${prompt}`;
}

function fill(example) {
  for (const input of $("fields").querySelectorAll("input, textarea")) {
    let value = example[input.name];
    if (value === undefined && input.name === "text" && Array.isArray(example.tokens)) value = example.tokens.join(" ");
    input.value = Array.isArray(value) ? value.join("\n") : value ?? "";
  }
}

function read() {
  const values = {};
  for (const input of $("fields").querySelectorAll("input, textarea")) {
    const { kind } = input.dataset;
    if (!input.value.trim() && !input.required) continue;
    if (kind === "list") values[input.name] = input.value.split("\n").map((line) => line.trim()).filter(Boolean);
    else values[input.name] = kind === "number" ? Number(input.value) : input.value;
  }
  return values;
}

async function ask(event) {
  event.preventDefault();
  const task = state.task;
  if (!task || $("send").disabled || !$("form").reportValidity()) return;
  const input = read();
  $("send").disabled = true;
  $("answer").setAttribute("aria-busy", "true");
  $("error").hidden = true;
  const began = performance.now();
  try {
    const { content, headers } = await call(`/v1/tasks/${encodeURIComponent(task.name)}/predict`, { input });
    showAnswer(content, input, headers.get("Server-Timing") || "", performance.now() - began);
    showCurl(task, input);
  } catch (error) {
    $("answer").replaceChildren();
    $("error").textContent = error instanceof TypeError ? "The server does not answer." : error.message;
    $("error").hidden = false;
  } finally {
    $("send").disabled = false;
    $("answer").setAttribute("aria-busy", "false");
  }
}

// the answer

function showAnswer(content, input, timing, tookMs) {
  const prediction = content.predictions[0];
  const parts = drawn(prediction, input);
  if (content.truncated[0]) parts.push(make("p", { className: "note" }, "The input was longer than the task takes, and was cut."));
  const computed = /compute;dur=([\d.]+)/.exec(timing);
  const facts = [
    ["task", content.task],
    ["version", `${content.version}${content.role === "champion" ? "" : ` (${content.role})`}`],
    ["digest", make("code", { title: content.digest }, content.digest.slice(0, 12))],
    ["computed in", computed ? `${Number(computed[1]).toFixed(1)} ms` : "–"],
    ["round trip", `${tookMs.toFixed(0)} ms`],
  ];
  parts.push(make("dl", { className: "who" }, ...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)))));
  $("answer").replaceChildren(...parts);
}

function drawn(prediction, input) {
  if (prediction.probabilities && prediction.label !== undefined) {
    return [headline(prediction.label), bars(Object.entries(prediction.probabilities), prediction.label)];
  }
  if (prediction.value !== undefined) return [headline(Number(prediction.value).toFixed(3))];
  if (prediction.options) {
    const shares = prediction.options.map((option, place) => [option, prediction.probabilities[place]]);
    return [headline(prediction.text), bars(shares, prediction.text)];
  }
  if (prediction.tokens) return [tagged(prediction)];
  return inContext(prediction, String(input.context ?? ""));
}

function headline(words) {
  return make("p", { className: "headline" }, words);
}

function bars(shares, best) {
  const sorted = [...shares].sort((one, other) => other[1] - one[1]).slice(0, 8);
  const items = sorted.map(([name, share]) => {
    const filled = make("span", { className: "fill" });
    filled.style.width = `${(100 * share).toFixed(1)}%`;
    return make("li", name === best ? { className: "best" } : {}, filled, make("span", {}, name), make("span", { className: "share" }, `${(100 * share).toFixed(1)} %`));
  });
  const list = make("ol", { className: "bars", "aria-label": "Probabilities" }, ...items);
  if (sorted.length === shares.length) return list;
  return make("div", {}, list, make("p", { className: "note" }, `and ${shares.length - sorted.length} less likely ones`));
}

function tagged({ tokens, spans }) {
  const kinds = [...new Set(spans.map((span) => span.type))];
  const text = make("p", { className: "text" });
  let at = 0;
  for (const span of spans) {
    text.append(tokens.slice(at, span.start).join(" "), at < span.start ? " " : "");
    const color = `c${kinds.indexOf(span.type) % 6}`;
    text.append(make("mark", { className: color }, tokens.slice(span.start, span.end).join(" "), make("small", {}, span.type)), " ");
    at = span.end;
  }
  text.append(tokens.slice(at).join(" "));
  if (spans.length) return text;
  return make("div", {}, text, make("p", { className: "note" }, "No span was found."));
}

function inContext(prediction, context) {
  if (prediction.start === null || prediction.start === undefined) return [headline("The context holds no answer.")];
  // places count characters, of which JavaScript may need two units
  const letters = Array.from(context);
  const [before, after] = [letters.slice(0, prediction.start).join(""), letters.slice(prediction.end).join("")];
  const parts = [headline(prediction.text), make("p", { className: "text plain" }, before, make("mark", {}, prediction.text), after)];
  const others = (prediction.n_best || []).map((one) => [one.text || "no answer", one.score]);
  if (others.length > 1) parts.push(bars(others, prediction.text));
  return parts;
}

function showCurl(task, input) {
  const body = JSON.stringify({ input }).replace(/'/g, "'\\''");
  const token = state.token ? " \\\n  -H 'Authorization: Bearer TOKEN'" : "";
  $("curl").textContent = `curl ${location.origin}/v1/tasks/${task.name}/predict${token} \\\n  -H 'Content-Type: application/json' \\\n  -d '${body}'`;
  $("request").hidden = false;
}

// what is loaded, and how it goes

async function loadTasks() {
  const seen = state.seen;
  const { content } = await call("/v1/tasks");
  [state.listed, state.listedAt] = [seen, Date.now()];
  state.tasks = content.tasks;
  const text = JSON.stringify(content.tasks);
  if (text === state.loaded) return;
  state.loaded = text;
  showLoaded(content.tasks);
  const chosen = state.task && state.task.name;
  $("task").replaceChildren(...content.tasks.map((task) => make("option", { value: task.name }, task.name)));
  const found = content.tasks.find((task) => task.name === chosen);
  $("task").disabled = $("send").disabled = !content.tasks.length;
  if (found) {
    $("task").value = found.name;
    state.task = found;
    $("task-note").textContent = noteOf(found);
  } else if (content.tasks.length) showFields(content.tasks[0]);
}

function showLoaded(tasks) {
  const version = (prompt) => (prompt ? String(prompt.version) : "–");
  const rows = tasks.map((task) => {
    const canary = task.canary ? `${task.canary.version} (${task.canary_share} %)` : "–";
    const warm = task.warm.map((prompt) => prompt.version).join(", ") || "–";
    const row = make("tr", {},
      make("th", { scope: "row" }, task.name), make("td", {}, task.kind.replace(/_/g, " ")), make("td", {}, `version ${version(task.champion)}`),
      make("td", {}, make("code", { title: task.champion.digest }, task.champion.digest.slice(0, 12))),
      make("td", {}, canary), make("td", {}, version(task.shadow)), make("td", {}, warm), make("td", { className: "number" }, task.max_length));
    if (!task.problem) return [row];
    return [row, make("tr", {}, make("td", { colspan: "8", className: "problem" }, `${task.name}: ${task.problem}`))];
  });
  const none = make("tr", {}, make("td", { colspan: "8" }, "No prompt is loaded."));
  $("loaded").replaceChildren(...(rows.length ? rows.flat() : [none]));
}

async function loadStatus() {
  const { content } = await call("/v1/status");
  state.seen = `${content.swaps} ${content.resident.prompts}`;
  say(content.ready ? "ready" : content.reason || "not ready", content.ready ? "good" : "bad");
  const { name, precision, device } = content.backbone;
  $("backbone").textContent = `One frozen encoder answers every task: ${[name, precision, device].filter(Boolean).join(", ")}.`;
  number("p50", content.latency.p50_ms, "ms");
  number("p95", content.latency.p95_ms, "ms");
  number("requests", content.latency.requests);
  number("queue", content.queue.rows, `of ${content.queue.limit.toLocaleString("en")}`);
  number("rows", content.batches.rows);
  number("tasks-per-batch", content.batches.tasks);
  const size = (content.resident.bytes / 1e6).toFixed(1);
  const stale = content.stale_s > 60 ? `; the registry last answered ${Math.round(content.stale_s)} s ago` : "";
  $("resident").textContent = `${content.resident.prompts} prompts take ${size} MB beside the encoder${stale}.`;
  state.history.push([content.latency.p50_ms, content.latency.p95_ms]);
  if (state.history.length > MAX_POINTS) state.history.shift();
  drawChart();
}

function number(id, value, unit = "") {
  if (value === null || value === undefined) return $(id).replaceChildren("–");
  const shown = Number.isInteger(value) ? value.toLocaleString("en") : value.toFixed(value < 10 ? 2 : 1);
  $(id).replaceChildren(shown, ...(unit ? [" ", make("small", {}, unit)] : []));
}

function drawChart() {
  const most = Math.max(1, ...state.history.flat().map((value) => value ?? 0));
  const lines = ["p50", "p95"].map((name, place) => {
    const points = state.history.map((values, at) => [at, values[place]]).filter(([, value]) => value !== null);
    const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    line.setAttribute("class", name);
    const step = 600 / Math.max(1, state.history.length - 1);
    line.setAttribute("points", points.map(([at, value]) => `${(at * step).toFixed(1)},${(86 - (80 * value) / most).toFixed(1)}`).join(" "));
    return line;
  });
  $("chart").replaceChildren(...lines);
  $("scale").textContent = `highest: ${most.toFixed(1)} ms`;
}

async function poll() {
  try {
    await loadStatus();
    if (state.seen !== state.listed || Date.now() - state.listedAt > LIST_MS) await loadTasks();
  } catch (error) {
    say(error instanceof TypeError ? "the server does not answer" : error.message.slice(0, 60), "bad");
  }
  setTimeout(poll, document.hidden ? 5 * POLL_MS : POLL_MS);
}

$("form").addEventListener("submit", ask);
$("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask(event);
});
$("example").addEventListener("click", () => state.task && fill(state.task.example));
$("task").addEventListener("change", () => {
  showFields(state.tasks.find((task) => task.name === $("task").value));
  $("answer").replaceChildren(make("p", { className: "empty" }, "Nothing asked yet."));
  $("request").hidden = $("error").hidden = true;
});
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.token = $("token").value.trim();
  $("token-form").hidden = true;
  $("token").value = "";
  loadStatus().then(loadTasks).then(() => $("task").focus(), () => {});
});
poll();
