"""What the tests of PEFT's format are built from: prompts, adapters, and both sides' logits."""

import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ptv2_core.artifact import Weights, save_artifact
from ptv2_core.config import HeadConfig, PromptConfig
from ptv2_core.data.batching import Batch, collate
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.interchange.importing import task_of
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.backbones.tokenizing import load_tokenizer
from ptv2_core.model.heads import LinearHead, reading_for
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.model.prompts import PromptBank, make_prompt
from tests.tiny import open_backbone

Folder = Callable[[str], Path]

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
# cases of family_parts
DECODERS = ("gpt2", "opt", "llama", "qwen3", "glm", "glm4")
AUTO = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}
TYPES = {
    "classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "tagging": "TOKEN_CLS",
    "qa": "QUESTION_ANS",
}
LABELS: dict[str, tuple[str, ...]] = {
    "classification": ("alarm", "flight", "song"),
    "tagging": ("O", "B-city", "I-city"),
    "regression": (),
    "qa": (),
}
TEXTS = ("book", "play a song for anna", "move the meeting at noon to friday please")


def a_task(kind: str, *, has_pairs: bool = False) -> TaskSpec:
    return task_of("tiny", kind, LABELS[kind], has_pairs=has_pairs)  # type: ignore[arg-type]


def inputs_of(task: TaskSpec) -> list[dict[str, Any]]:
    """Return inputs of several lengths."""
    if task.kind == "tagging":
        return [{"tokens": text.split()} for text in TEXTS]
    if task.kind == "qa":
        return [{"question": "call bob", "context": text} for text in TEXTS]
    if task.kind == "multiple_choice":
        return [{"text": "book a taxi", "options": list(TEXTS)}]
    pair = {"text_pair": "not on monday"} if "text_pair" in task.fields else {}
    return [{"text": text, **pair} for text in TEXTS]


def batch_of(predictor: Predictor) -> Batch:
    """Return all rows of the inputs as one padded batch."""
    split = predictor.codec.encode(inputs_of(predictor.task)).split
    batch = collate(split, split.rows_of(range(len(split.unit_lengths))))
    assert not batch.token_mask.all(), "rows differ in length"
    return batch


def ours(predictor: Predictor) -> tuple[Batch, Tensor]:
    """Return a padded batch, and our logits for it."""
    batch = batch_of(predictor)
    with torch.no_grad():
        return batch, predictor.model(batch.input_ids, batch.token_mask, batch.token_type_ids)


def theirs(model: PeftModel, batch: Batch, *, token_types: bool = True) -> Tensor:
    """Return PEFT's logits for a batch, `[B, C]` or `[B, T, C]`."""
    types = {"token_type_ids": batch.token_type_ids} if token_types else {}
    with torch.no_grad():
        answer = model(input_ids=batch.input_ids, attention_mask=batch.token_mask.long(), **types)
    if "start_logits" in answer:
        return torch.stack([answer.start_logits, answer.end_logits], dim=-1)
    return answer.last_hidden_state if "last_hidden_state" in answer else answer.logits


def assert_equal(found: Tensor, expected: Tensor, batch: Batch) -> None:
    """Compare logits, those of padding left out."""
    assert found.shape == expected.shape
    if found.dim() == 3:
        found, expected = found[batch.token_mask], expected[batch.token_mask]
    assert expected.std() > 0.05, "a test of constants would show nothing"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def prompt_of(
    folder: Path,
    backbone_folder: Path,
    task: TaskSpec,
    *,
    reads: Any = "cls",
    prompt: PromptConfig | None = None,
    token_types: bool = True,
    has_bias: bool = True,
) -> Path:
    """Save a random prompt with a random head; returns `folder`."""
    prompt = prompt or PromptConfig(length=5)
    backbone = open_backbone(backbone_folder)
    shape, location = backbone.spec.shape, locate(str(backbone_folder))
    head = LinearHead(32, task.num_outputs, reads=reading_for(task.form, reads), seed=3)
    num_outputs = task.num_outputs
    bias = torch.linspace(-1, 1, num_outputs) if has_bias else torch.zeros(num_outputs)
    head.start_at(head.linear.weight * 10, bias)
    made = make_prompt(shape, prompt, seed=7)
    model = PromptedModel(backbone, PromptBank(shape, [(made, prompt)]), [head])
    model.eval()
    tokenizer = load_tokenizer(location, words=task.form == "tokens")
    predictor = Predictor(model, tokenizer, task, max_length=32, stride=4, token_types=token_types)
    inputs = inputs_of(task)
    save_artifact(
        folder,
        Weights.of(model),
        task=task,
        method="ptv2",
        prompt=prompt,
        head=HeadConfig(reads=reads),
        backbone=backbone.spec.to_mapping(),
        tokenizer_digest=location.tokenizer_digest(),
        encoding={"max_length": 32, "stride": 4, "token_types": token_types},
        decoding={},
        training={},
        provenance={},
        metrics={},
        golden=[
            {"input": given, "logits": logits.tolist()}
            for given, logits in zip(inputs, predictor.logits(inputs), strict=True)
        ],
    )
    return folder


def _as_peft_knows_it(model: Any) -> Any:
    """Return a model whose forward names the argument that PEFT 0.21 looks for.

    Transformers 5.24 calls it `cache`, and PEFT's prefix tuning refuses to run with that.
    """
    for one in (model, model.base_model):
        forward = one.forward
        signature = inspect.signature(forward)
        if "cache" not in signature.parameters or "past_key_values" in signature.parameters:
            continue

        def run(*given: Any, _forward: Any = forward, **named: Any) -> Any:
            if "past_key_values" in named:
                named["cache"] = named.pop("past_key_values")
            return _forward(*given, **named)

        past = inspect.Parameter("past_key_values", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        named = list(signature.parameters.values())
        kept = [one for one in named if one.kind != inspect.Parameter.VAR_KEYWORD]
        run.__signature__ = inspect.Signature([*kept, past.replace(default=None)])  # type: ignore[attr-defined]
        one.forward = run
    return model


def load_peft(folder: Path, backbone_folder: Path, task: TaskSpec) -> PeftModel:
    """Load a folder as a user of PEFT does."""
    auto = AUTO[json.loads((folder / "adapter_config.json").read_text())["task_type"]]
    sized = {"num_labels": task.num_outputs} if task.kind != "qa" else {}
    with warnings.catch_warnings():
        # of a key of the adapter that found no place, above all
        warnings.simplefilter("error", UserWarning)
        base = _as_peft_knows_it(auto.from_pretrained(backbone_folder, **sized))
        return PeftModel.from_pretrained(base, folder).eval()


def peft_of(
    folder: Path, backbone_folder: Path, task: TaskSpec, task_type: str | None = None, **more: Any
) -> PeftModel:
    """Save what PEFT itself makes, with a random prompt and head; returns the model."""
    task_type = task_type or TYPES[task.kind]
    sized = {"num_labels": task.num_outputs} if task_type in ("SEQ_CLS", "TOKEN_CLS") else {}
    with torch.random.fork_rng():
        torch.manual_seed(11)
        base = _as_peft_knows_it(AUTO[task_type].from_pretrained(backbone_folder, **sized))
        config = PrefixTuningConfig(task_type=task_type, num_virtual_tokens=6, **more)
        model = get_peft_model(base, config).eval()
    model.save_pretrained(folder)
    return model


def change_config(folder: Path, **values: Any) -> None:
    """Edit adapter_config.json in place."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Edit adapter_model.safetensors in place."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def run_readme(folder: Path) -> dict[str, Any]:
    """Run the README's code; returns its names."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found: dict[str, Any] = {}
    load = PeftModel.from_pretrained

    def loaded(model: Any, *given: Any, **named: Any) -> Any:
        return load(_as_peft_knows_it(model), *given, **named)

    with patch.object(PeftModel, "from_pretrained", loaded):
        exec(code.replace("THIS FOLDER", str(folder)), found)
    return found
