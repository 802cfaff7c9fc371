"""The README of an exported prompt: how PEFT loads it."""

import json
from collections.abc import Mapping, Sequence

from ptv2_core.interchange.folder import AdapterConfig
from ptv2_core.interchange.heads import TaskType
from ptv2_core.manifest import Manifest
from ptv2_core.model.backbones.task_models import Tables
from ptv2_core.model.backbones.tokenizing import Change

AUTO_MODELS: Mapping[TaskType, str] = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


# through token embeddings, which PEFT does hand on
_WITH_TYPES = """
def embedded(input_ids, token_type_ids):
    encoder = backbone.base_model
    types = encoder.{types}.weight
    return encoder.{words}(input_ids) + types[token_type_ids] - types[0]

# model(inputs_embeds=embedded(input_ids, token_type_ids), attention_mask=attention_mask)
"""


# A column, not a bias: PEFT would drop a bias without a word where these lines are left out.
_WITH_COLUMN = """
class Score(torch.nn.Linear):
    def forward(self, states):
        return torch.nn.functional.linear(states, self.weight[:, :-1], self.weight[:, -1])

backbone.{layer} = Score({inputs}, {outputs}, bias=False)
"""


def readme(
    manifest: Manifest,
    config: AdapterConfig,
    notes: tuple[str, ...],
    *,
    tables: Tables | None = None,
    pad_token_id: int | None = None,
    column_layer: str | None = None,
    changes: Sequence[Change] = (),
) -> str:
    """Return the text, Markdown with the front matter of a model hub.

    Args:
        manifest: Of the prompt.
        config: What was written for PEFT.
        notes: Sentences to add.
        tables: The backbone's, where PEFT drops token types that the prompt was trained with.
        pad_token_id: The token that rows are padded with, where the backbone's own configuration
            does not name it and a head needs it.
        column_layer: The layer of the head whose bias is a column of its weight.
        changes: Of the backbone's tokenizer, before it makes rows.
    """
    task, auto = manifest.task, AUTO_MODELS[config.task_type]
    arguments = [json.dumps(config.base_model)]
    if config.revision is not None:
        arguments.append(f"revision={json.dumps(config.revision)}")
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        if task.labels:
            names = [json.dumps(label, ensure_ascii=False) for label in task.labels]
            written = ", ".join(f"{place}: {name}" for place, name in enumerate(names))
            arguments.append(f"id2label={{{written}}}")
        else:
            arguments.append("num_labels=1")
    if pad_token_id is not None:
        arguments.append(f"pad_token_id={pad_token_id}")
    column = ""
    if column_layer is not None:
        width = manifest.backbone["hidden_size"] + 1
        column = _WITH_COLUMN.format(layer=column_layer, inputs=width, outputs=task.num_outputs)
    tokenizer: list[str] = []
    if changes:
        named = ", ".join(arguments[: 1 if config.revision is None else 2])
        tokenizer = ["", f"tokenizer = AutoTokenizer.from_pretrained({named})"]
    for change in changes:
        tokenizer += [f"# {change.what}", *change.code]
    imports = {
        *(["import torch"] if column else []),
        "from peft import PeftModel",
        f"from transformers import {auto}{', AutoTokenizer' if changes else ''}",
        *(line for change in changes for line in change.imports),
    }
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {json.dumps(config.base_model)}",
        "---",
        "",
        f"# {task.name}",
        "",
        f"A prompt of {config.prompt_length} positions in each of {config.num_layers} layers, "
        f"written by ptv2 from {manifest.sha256[:12]} (sha256 of prompt.safetensors).",
        "",
        "```python",
        *sorted(imports, key=lambda line: (line.startswith("from"), line)),
        "",
        f"backbone = {auto}.from_pretrained({', '.join(arguments)})",
        *column.splitlines(),
        'model = PeftModel.from_pretrained(backbone, "THIS FOLDER").eval()',
        *(_WITH_TYPES.format(**vars(tables)).splitlines() if tables else ()),
        *tokenizer,
        "```",
        "",
        f"- The backbone's weights have the digest {manifest.backbone['digest']}.",
        f"- Rows have at most {manifest.encoding['max_length']} tokens, padded on the right.",
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(lines) + "\n"
