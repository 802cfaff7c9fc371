"""What the registry says about a prompt in words: Markdown for its pages."""

from collections.abc import Mapping
from typing import Any

from pipelines.model_card import METHOD_TAG, Results, has_prompt
from ptv2_core.config import Method
from ptv2_core.data.tasks import TaskKind, TaskSpec
from ptv2_core.evaluation.inputs import LIST_FIELDS, NUMBER_FIELDS, TEXT_KINDS, input_fields
from ptv2_core.manifest import Manifest

GENERATED = "*Written by `ptv2`, and again with every version. Delete this line to keep your own.*"
"""The last line of a model's description; where a person removed it, the text is theirs."""

MAX_LABELS = 40
BYTES_PER_MB = 1_000_000

DOES: Mapping[TaskKind, str] = {
    "classification": "gives one label to {fields}",
    "regression": "gives a number to {fields}",
    "multiple_choice": "chooses what goes on with a text",
    "word_in_context": "says whether a word means the same in two sentences",
    "coreference": "says whether a pronoun stands for some words of its text",
    "multirc": "says whether an answer to a question about a paragraph is right",
    "record": "chooses the entity that fills the gap of a query about a passage",
    "tagging": "tags each token of {fields}",
    "srl": "tags the arguments of a predicate in a sentence",
    "qa": "finds the answer to a question in its context",
}
"""What a task of each kind does."""

NAMES: Mapping[Method, str] = {
    "ptv2": "prompt",
    "prompt_tuning": "prompt",
    "probe": "head",
    "finetune": "model",
}
"""What a method trains, in one word."""


def model_description(manifest: Manifest) -> str:
    """Return Markdown about a task: what it answers, its labels, its backbone."""
    task = manifest.task
    return "\n\n".join(
        [
            f"**{task.name}** {_does(task)}, scored by {task.metric}.",
            *_answers(task),
            f"{_newest(manifest)} The tag `{METHOD_TAG}` says of each version what was trained.",
            "The version in use has the alias `champion`; the newest candidate has `challenger`.",
            GENERATED,
        ]
    )


def _does(task: TaskSpec) -> str:
    fields = " and ".join(
        f"`{task.fields[key]}`" for key in ("text", "text_pair", "tokens") if key in task.fields
    )
    return DOES[task.kind].format(fields=fields or "a text")


def _answers(task: TaskSpec) -> list[str]:
    """Return what an input has, where its fields are not the source's own, and the labels."""
    found = []
    if task.kind not in TEXT_KINDS:
        *first, last = (f"`{name}`" for name in input_fields(task).needed)
        found.append(f"An input has {', '.join(first)} and {last}.")
    if task.labels:
        shown = ", ".join(f"`{label}`" for label in task.labels[:MAX_LABELS])
        rest = len(task.labels) - MAX_LABELS
        more = f" and {rest} more" if rest > 0 else ""
        name = "Tags" if task.form == "tokens" else "Labels"
        found.append(f"{name} ({len(task.labels)}): {shown}{more}.")
    return found


def _newest(manifest: Manifest) -> str:
    """Return what the version is that this description comes with."""
    backbone = _backbone(manifest)
    if manifest.method == "finetune":
        return (
            f"The newest version is a fine-tuned model of {_size(manifest)}: its backbone, made "
            f"from {backbone}, is its own and shared with no other task."
        )
    name = "a head alone" if manifest.method == "probe" else "one P-Tuning v2 prompt"
    return (
        f"The newest version is {name} for the frozen backbone {backbone}. The backbone's weights "
        "are not stored here."
    )


def run_description(results: Results) -> str:
    """Return Markdown about one training: a line that sums it up, then scores, size and make.

    MLflow's pages draw tables without any space between columns, so columns are aligned text.
    """
    manifest, evaluate, train = results.manifest, results.evaluate, results.train
    metric, rows = evaluate["metric"], results.num_rows["test"]
    dev, probe = evaluate.get("dev"), evaluate.get("probe")
    facts = [
        _make(manifest),
        f"learning rate {_number(manifest.training.get('learning_rate'))}, best after epoch "
        f"{train.get('best_epoch')} of {train.get('epochs')}",
        f"trained: {_trained(manifest, train)}",
        f"{_size(manifest)}, both files",
        f"scored on the backbone in {evaluate.get('number_format') or 'a format not noted'}",
    ]
    return "\n".join(
        [
            f"Test {metric} {_score(evaluate['test'])} ({rows:,} rows), dev {_score(dev)}",
            "",
            "```text",
            f"{metric:<24}{'dev':>12}{'test':>12}",
            f"{f'this {NAMES[manifest.method]}':<24}{_score(dev):>12}"
            f"{_score(evaluate['test']):>12}",
            f"{'linear probe, no prompt':<24}{_score(evaluate.get('probe_dev')):>12}"
            f"{_score(probe):>12}",
            "```",
            "",
            *(f"- {fact}" for fact in facts),
        ]
    )


def version_description(results: Results, version: int) -> str:
    """Return Markdown about one version: its training, how to get it and how to run it."""
    task = results.manifest.task.name
    return "\n".join(
        [
            run_description(results),
            "",
            f"Get the two files, checked against their digests (`{task}@champion` is the one in "
            "use):",
            "",
            "```sh",
            f"ptv2 pull {task}:{version} --to {task}-{NAMES[results.manifest.method]}",
            "```",
            "",
            "Or run it with MLflow:",
            "",
            "```python",
            f'model = mlflow.pyfunc.load_model("models:/{task}/{version}")',
            f"model.predict(pandas.DataFrame({_example(results.manifest)}))",
            "```",
        ]
    )


def _example(manifest: Manifest) -> str:
    cells = []
    for name in input_fields(manifest.task).needed:
        cell = '"..."'
        if name == "tokens":
            cell = '"words split on white space"'
        elif name in LIST_FIELDS:
            cell = '["...", "..."]'
        elif name in NUMBER_FIELDS:
            cell = "0"
        cells.append(f'"{name}": [{cell}]')
    return f"{{{', '.join(cells)}}}"


def _make(manifest: Manifest) -> str:
    """Return what it consists of."""
    backbone = _backbone(manifest)
    if manifest.method == "finetune":
        return f"fine-tuned from {backbone}, a backbone of its own that no other task shares"
    if not has_prompt(manifest):
        return f"a head alone, no prompt, on {backbone}"
    return f"prompt of {manifest.prompt.length} positions in {_depth(manifest)} of {backbone}"


def _depth(manifest: Manifest) -> str:
    num_layers = manifest.backbone["num_layers"]
    prompted = len(manifest.prompt.layer_indices(num_layers))
    return "every layer" if prompted == num_layers else f"{prompted} of {num_layers} layers"


def _backbone(manifest: Manifest) -> str:
    revision = manifest.backbone.get("revision")
    return f"`{manifest.backbone['name']}`" + (f" at `{revision[:12]}`" if revision else "")


def _trained(manifest: Manifest, train: Mapping[str, Any]) -> str:
    share = train.get("trainable_share")
    parameters = train.get("trainable_parameters")
    if share is None or parameters is None:
        return "not recorded"
    if manifest.method == "finetune":
        return f"{parameters:,} parameters, the whole backbone and the head"
    if not has_prompt(manifest):
        return f"{parameters:,} parameters, the head's"
    return f"{parameters:,} parameters, head included; the prompt is {share:.2%} of the backbone's"


def _size(manifest: Manifest) -> str:
    if manifest.size_bytes >= BYTES_PER_MB:
        return f"{manifest.size_bytes / BYTES_PER_MB:,.1f} MB"
    return f"{manifest.size_bytes / 1024:,.1f} KiB"


def _score(value: float | None) -> str:
    return "not scored" if value is None else f"{value:.4f}"


def _number(value: float | None) -> str:
    return "not recorded" if value is None else f"{value:.3g}"
