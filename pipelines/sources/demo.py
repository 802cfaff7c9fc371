"""The `demo` source: small data sets generated from grammars that are read and edited by hand.

A grammar is a TOML file with a `kind`, a `seed`, and one table for each split: how many `rows`, the
`templates`, and the `values` (lists of words) that fill their placeholders. No template and no
value may stand in two splits, so a score on test is a score on sentences never seen.

`{city}` takes a value of the list `city`; `{from_city:city}` does so under another name. One name
keeps its value within a row, two names never share one. Each kind adds one key:

- `intents`: `labels`. `{want}` is filled from the list of the row's label, `{other}` from
  those of one to three other labels: "a, b or c".
- `entailment`: `labels`. A template is a table: premises, and for each label its hypotheses.
- `slots`: `slots`, the placeholders that are tagged. Templates are cut at spaces.

The same file gives the same rows everywhere: of `random.Random` only `random()` is used, the one
method whose sequence Python promises to keep.
"""

import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from ptv2_core.data.examples import SPLITS
from ptv2_core.errors import DataError

NAMES_KEY = {"intents": "labels", "entailment": "labels", "slots": "slots"}
"""The kinds, and the key that each one adds."""
MAX_DRAWS_A_ROW = 50
"""Draws for one new row before the grammar is called too small for its number of rows."""

MAX_OTHERS = 3
"""Intents that a row names without wanting them, at most; there is always one."""

_PLACEHOLDER = re.compile(r"\{([a-z_]+)(?::([a-z_]+))?\}")

Record = dict[str, Any]
Template = str | dict[str, list[str]]


@dataclass(frozen=True, kw_only=True)
class Split:
    """What one split is generated from."""

    rows: int
    templates: list[Any]
    """Of type `Template`, once the grammar is checked."""
    values: dict[str, list[str]]


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """The content of a grammar file."""

    kind: str
    seed: int
    names: list[str]
    """The labels, or the slots that are tagged."""
    splits: dict[str, Split]


def generate(path: Path) -> dict[str, list[Record]]:
    """Generate the rows of a grammar file.

    Args:
        path: The grammar.

    Returns:
        The records of train, dev and test; no two of them have the same text.

    Raises:
        DataError: The grammar is broken, or too small for the rows it asks for.
    """
    grammar = read_grammar(path)
    seen: set[str] = set()
    rows: dict[str, list[Record]] = {}
    for name, split in grammar.splits.items():
        draws = _DRAWS[grammar.kind](grammar, split, Random(f"{grammar.seed} {name}"))
        rows[name] = []
        for _, record in zip(range(split.rows * MAX_DRAWS_A_ROW), draws, strict=False):
            text = repr([record[key] for key in record if key not in ("label", "tags")]).casefold()
            if text not in seen:
                seen.add(text)
                rows[name].append(record)
            if len(rows[name]) == split.rows:
                break
        else:
            raise DataError(
                f"{path}: {name}.rows: expected {split.rows} different rows, but the grammar gave "
                f"only {len(rows[name])}; add templates or values, or ask for fewer rows"
            )
    return rows


# Drawing rows ------------------------------------------------------------------------------------


def _pick(rng: Random, options: list[Any]) -> Any:
    return options[int(rng.random() * len(options))]


def _deal(rng: Random, options: list[Any]) -> Iterator[Any]:
    """Deal the options for ever, each one once before any comes again."""
    while True:
        yield from sorted(options, key=lambda _: rng.random())


def _choose(rng: Random, values: dict[str, list[str]], template: Template) -> dict[str, str]:
    """Choose a value for each name in the template, none twice from one list."""
    left: dict[str, list[str]] = {}
    chosen: dict[str, str] = {}
    for name, lexicon in placeholders(template).items():
        options = left.setdefault(lexicon, list(values[lexicon]))
        chosen[name] = options.pop(int(rng.random() * len(options)))
    return chosen


def _render(text: str, chosen: dict[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda match: chosen[match[1]], text)


def _draw_intents(grammar: Grammar, split: Split, rng: Random) -> Iterator[Record]:
    """Sentences that name several intents; the template says which of them is wanted."""
    templates = {label: _deal(rng, split.templates) for label in grammar.names}
    for label in _deal(rng, grammar.names):
        left = [name for name in grammar.names if name != label]
        phrases = []
        for _ in range(min(1 + int(rng.random() * MAX_OTHERS), len(left))):
            other = left.pop(int(rng.random() * len(left)))
            phrases.append(_pick(rng, split.values[other]))
        *first, last = phrases
        others = f"{', '.join(first)} or {last}" if first else last
        template = next(templates[label])
        values = split.values | {"want": split.values[label], "other": [others]}
        yield {"text": _render(template, _choose(rng, values, template)), "label": label}


def _draw_entailment(grammar: Grammar, split: Split, rng: Random) -> Iterator[Record]:
    """Pairs of sentences; every label has the same premises and hypotheses of its own."""
    templates = {label: _deal(rng, split.templates) for label in grammar.names}
    for label in _deal(rng, grammar.names):
        template = next(templates[label])
        chosen = _choose(rng, split.values, template)
        premise, hypothesis = _pick(rng, template["premise"]), _pick(rng, template[label])
        pair = {"premise": _render(premise, chosen), "hypothesis": _render(hypothesis, chosen)}
        yield {**pair, "label": label}


def _draw_slots(grammar: Grammar, split: Split, rng: Random) -> Iterator[Record]:
    """Sentences cut at spaces, with IOB2 tags on the values of the placeholders that are slots."""
    for template in _deal(rng, split.templates):
        chosen = _choose(rng, split.values, template)
        tokens: list[str] = []
        tags: list[str] = []
        for part in template.split():
            match = _PLACEHOLDER.fullmatch(part)
            words = chosen[match[1]].split() if match else [part]
            tokens += words
            if match and match[1] in grammar.names:
                tags += [f"B-{match[1]}"] + [f"I-{match[1]}"] * (len(words) - 1)
            else:
                tags += ["O"] * len(words)
        yield {"tokens": tokens, "tags": tags}


_DRAWS: dict[str, Callable[[Grammar, Split, Random], Iterator[Record]]] = {
    "intents": _draw_intents,
    "entailment": _draw_entailment,
    "slots": _draw_slots,
}


# Reading and checking a grammar ------------------------------------------------------------------


def sentences(template: Template) -> list[str]:
    """List the sentences of a template, in the order of the file."""
    return (
        [template] if isinstance(template, str) else [s for part in template.values() for s in part]
    )


def placeholders(template: Template) -> dict[str, str]:
    """Map the names in a template, in order, to the value lists that fill them.

    A list is named once: `{a:person}` where the name first stands, `{a}` after that.
    """
    lists: dict[str, str] = {}
    for match in _PLACEHOLDER.finditer("\n".join(sentences(template))):
        lists.setdefault(match[1], match[2] or match[1])
    return lists


def read_grammar(path: Path) -> Grammar:
    """Read a grammar file and check all of it.

    Raises:
        DataError: The file cannot be read, or keys are missing, unknown, of another type, at odds
            with each other, or shared by two splits. The message lists them all.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{path}: expected a grammar in TOML, got: {error}") from error
    problems = list(_shape_problems(content))
    if not problems:
        grammar = Grammar(
            kind=content["kind"],
            seed=content["seed"],
            names=content[NAMES_KEY[content["kind"]]],
            splits={name: Split(**content[name]) for name in SPLITS},
        )
        problems = [p for name in SPLITS for p in _template_problems(grammar, name)]
        problems += _overlaps(grammar)
    if problems:
        raise DataError.collected([f"{path}: {problem}" for problem in problems])
    return grammar


def _is_texts(value: object) -> bool:
    """Whether this is a list of texts, not empty, none of them blank or there twice."""
    if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
        return False
    return 0 < len(value) == len(set(value))


def _shape_problems(content: dict[str, Any]) -> Iterator[str]:
    """Say which keys are missing, unknown or of another type than the grammar's kind wants."""
    kind = content.get("kind")
    if kind not in list(NAMES_KEY):
        yield f"kind: expected one of {', '.join(NAMES_KEY)}, got {kind!r}"
        return
    expected = {"kind", "seed", NAMES_KEY[kind], *SPLITS}
    for key in sorted(content.keys() ^ expected):
        yield f"{key}: {'missing' if key in expected else 'unknown'} key"
    if type(content.get("seed", 0)) is not int:
        yield f"seed: expected an integer, got {content['seed']!r}"
    names: Any = content.get(NAMES_KEY[kind])
    if not _is_texts(names) or (kind != "slots" and len(names) == 1):
        yield f"{NAMES_KEY[kind]}: expected a list of different names, got {names!r}"
        return
    for name in SPLITS:
        if name in content:
            yield from _split_shape_problems(name, content[name], kind, names)


def _split_shape_problems(name: str, split: Any, kind: str, names: list[str]) -> Iterator[str]:
    """Say which keys of one split are missing, unknown or of another type than wanted."""
    keys = {"rows", "templates", "values"}
    if not isinstance(split, dict) or split.keys() != keys:
        yield f"{name}: expected a table of {', '.join(sorted(keys))}, got {split!r:.60}"
        return
    rows, templates, values = split["rows"], split["templates"], split["values"]
    if type(rows) is not int or rows < 1:
        yield f"{name}.rows: expected an integer above 0, got {rows!r}"
    if not isinstance(values, dict):
        yield f"{name}.values: expected a table of lists, got {values!r}"
    else:
        for lexicon in (key for key, texts in values.items() if not _is_texts(texts)):
            yield f"{name}.values.{lexicon}: expected different texts, got {values[lexicon]!r}"
    if kind != "entailment" and not _is_texts(templates):
        yield f"{name}.templates: expected a list of different sentences, got {templates!r}"
    elif kind == "entailment":
        keys = {"premise", *names}
        for number, table in enumerate(templates if isinstance(templates, list) else [None]):
            lists = isinstance(table, dict) and table.keys() == keys
            if not lists or not all(map(_is_texts, table.values())):
                place = f"{name}.templates[{number}]"
                yield f"{place}: expected lists named {', '.join(sorted(keys))}, got {table!r}"


def _template_problems(grammar: Grammar, name: str) -> Iterator[str]:
    """Say which templates ask for lists of values that the split lacks or that are too short."""
    split = grammar.splits[name]
    sizes = {lexicon: len(values) for lexicon, values in split.values.items()}
    if grammar.kind == "intents":
        for label in (label for label in grammar.names if label not in sizes):
            yield f"{name}.values.{label}: missing list of the label {label!r}"
        phrases = [text for label in grammar.names for text in split.values.get(label, [])]
        for text in sorted({text for text in phrases if phrases.count(text) > 1}):
            yield f"{name}.values: {text!r} stands in the lists of two labels"
        sizes |= {"want": 1, "other": 1}
    for number, template in enumerate(split.templates):
        place = f"{name}.templates[{number}]"
        used = list(placeholders(template).values())
        for lexicon in dict.fromkeys(used):
            if lexicon not in sizes:
                yield f"{place}: unknown list {lexicon!r}; expected one of {', '.join(sizes)}"
            elif used.count(lexicon) > sizes[lexicon]:
                yield f"{place}: {used.count(lexicon)} values of {lexicon!r}, got {sizes[lexicon]}"
        for text in sentences(template):
            if "{" in (rest := _PLACEHOLDER.sub("", text)) or "}" in rest:
                yield f"{place}: expected placeholders like {{name:list}}, got {text!r}"
        if grammar.kind == "intents" and "want" not in used:
            yield f"{place}: expected {{want}}, got {template!r}"
        if grammar.kind == "slots" and re.search(r"\S\{|\}\S", template):
            yield f"{place}: expected placeholders between spaces, got {template!r}"


def _overlaps(grammar: Grammar) -> Iterator[str]:
    """Say which sentences and values stand in two splits; names and case make no difference."""
    places: dict[str, str] = {}
    for name, split in grammar.splits.items():
        found = {
            text: f"{name}.values.{key}" for key, texts in split.values.items() for text in texts
        }
        for number, template in enumerate(split.templates):
            lists = placeholders(template)
            for text in sentences(template):
                anonymous = _render(text, {key: f"{{{lists[key]}}}" for key in lists})
                found[anonymous] = f"{name}.templates[{number}]"
        for text, place in found.items():
            first = places.setdefault(" ".join(text.casefold().split()), place)
            if first.split(".")[0] != name:
                yield f"{place}: {text!r} already stands in {first}; splits must share nothing"
