"""The peers of the serving benchmark: they answer rows of one task at a time.

Letters: B rows, T tokens, P prompt length, L layers, N heads, D head size, C classes.

All compute what ours computes, in the same number format, on as many threads, from texts that are
encoded beforehand. Of PEFT and of the copies the faster attention is taken, and of the copies our
own packed backbone where that is faster still.
"""

import gc
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import peft
import torch
import transformers
from torch import Tensor, nn

from benchmarks.serve_parts import memory_of
from ptv2_core.artifact import load_weights
from ptv2_core.config import PromptConfig
from ptv2_core.manifest import load_manifest
from ptv2_core.model.backbones.base import Encoded
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.heads import read
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.model.prompts import NoPrompt, PromptBank
from ptv2_serving.engine.forward import BackboneChoice, Forward, Row

ATTENTIONS = ("sdpa", "eager")
PACKED = "our packed backbone"
# answers of a variant to see whether it is the fastest; a third of them warm it up
TRIED = 60

IdsArray = npt.NDArray[np.int64]
LogitsArray = npt.NDArray[np.float32]


class Way(Protocol):
    """Answers rows of one length, all of one task.

    Attributes:
        key: Names it in the JSON.
        name: Names it in the table.
        variant: Which of its variants was the fastest.
    """

    key: str
    name: str
    variant: str

    def answer(self, slot: int, ids: IdsArray) -> LogitsArray:
        """Return logits `[B, C]` of rows `[B, T]`."""
        ...


Kind = TypeVar("Kind", bound=Way)


class Ours:
    """Our own forward without the engine: a batch is one request, or what one task has waiting."""

    key = "one_at_a_time"
    name = "one request at a time, our forward"
    variant = ""

    def __init__(self, choice: BackboneChoice, folders: Sequence[Path]) -> None:
        """Load the backbone and all prompts."""
        self.forward = Forward(choice.load())
        for slot, folder in enumerate(folders):
            self.forward.put(slot, folder)

    def answer(self, slot: int, ids: IdsArray) -> LogitsArray:
        """Return logits `[B, C]` of rows `[B, T]`."""
        rows = [Row(slot, own.astype(np.int32), None, -1) for own in ids]
        return np.stack(self.forward.run(rows))


class Peft:
    """PEFT's prefix tuning, an adapter a task, `set_adapter` before each request.

    The heads are applied outside of PEFT, which is less work than its own `modules_to_save`.
    """

    key = "peft_switch"
    name = "PEFT prefix tuning, set_adapter a request"

    def __init__(self, choice: BackboneChoice, folders: Sequence[Path], attention: str) -> None:
        """Load the backbone with Transformers and give it all prompts."""
        base, dtype = _transformers_model(choice, attention)
        self.variant = f"{attention} attention"
        self.heads = [_head(folder) for folder in folders]
        self.reads = load_manifest(folders[0]).head.reads
        for slot, folder in enumerate(folders):
            manifest = load_manifest(folder)
            settings = peft.PrefixTuningConfig(
                task_type="FEATURE_EXTRACTION",
                num_virtual_tokens=manifest.prompt.length,
                inference_mode=True,
            )
            if slot == 0:
                self.model = peft.get_peft_model(
                    base, settings, adapter_name="0", autocast_adapter_dtype=False
                )
            else:
                self.model.add_adapter(str(slot), settings)
            prompt = load_weights(folder, manifest).prompt  # [L, 2, N, P, D]
            assert prompt is not None, "the benchmark's prompts are deep"
            flat = prompt.permute(3, 0, 1, 2, 4).flatten(1)  # [P, L * 2 * N * D]
            encoder = self.model.prompt_encoder[str(slot)]
            encoder.embedding.weight = nn.Parameter(flat.to(dtype), requires_grad=False)
        self.model.eval()

    @torch.inference_mode()
    def answer(self, slot: int, ids: IdsArray) -> LogitsArray:
        """Return logits `[B, C]` of rows `[B, T]`."""
        self.model.set_adapter(str(slot))
        tokens = torch.from_numpy(ids)
        mask = torch.ones_like(tokens)
        found = self.model(input_ids=tokens, attention_mask=mask)
        return _logits(self.heads[slot], self.reads, found, mask)


class Copies:
    """A model a task, all in one process, as full fine-tuning gives them; they have no prompt.

    Attributes:
        num_bytes: What they take, all of them together.
    """

    key = "copies"
    name = "a fine-tuned copy a task"

    def __init__(self, choice: BackboneChoice, folders: Sequence[Path], attention: str) -> None:
        """Load as many models as there are prompts."""
        gc.collect()
        before = memory_of(os.getpid()).pss
        self.reads = load_manifest(folders[0]).head.reads
        self.variant = f"{attention} attention" if attention in ATTENTIONS else attention
        self.models = [_copy(choice, attention) for _ in folders]
        self.heads = [_head(folder) for folder in folders]
        self.num_bytes = memory_of(os.getpid()).pss - before

    @torch.inference_mode()
    def answer(self, slot: int, ids: IdsArray) -> LogitsArray:
        """Return logits `[B, C]` of rows `[B, T]`."""
        model, tokens = self.models[slot], torch.from_numpy(ids)
        if isinstance(model, PromptedModel):
            mask = torch.ones_like(tokens, dtype=torch.bool)
            encoded = model.encode(tokens, mask, None, slots=0)
            return _numpy(self.heads[slot](read(encoded, self.reads)))
        mask = torch.ones_like(tokens)
        found = model(input_ids=tokens, attention_mask=mask)
        return _logits(self.heads[slot], self.reads, found, mask)


def fastest_peft(choice: BackboneChoice, folders: Sequence[Path], ids: IdsArray) -> Peft:
    """Return PEFT with the attention that answers one row sooner."""
    return _fastest(lambda name, some: Peft(choice, some, name), ATTENTIONS, folders, ids)


def fastest_copies(choice: BackboneChoice, folders: Sequence[Path], ids: IdsArray) -> Copies:
    """Return the copies in the variant that answers one row sooner."""
    return _fastest(
        lambda name, some: Copies(choice, some, name), (*ATTENTIONS, PACKED), folders, ids
    )


def _fastest(
    make: Callable[[str, Sequence[Path]], Kind],
    variants: Sequence[str],
    folders: Sequence[Path],
    ids: IdsArray,
) -> Kind:
    seconds = {}
    for name in variants:
        tried = make(name, folders[:1])
        for place in range(TRIED):
            if place == TRIED // 3:
                started = time.perf_counter()
            tried.answer(0, ids[:1])
        seconds[name] = time.perf_counter() - started
    return make(min(seconds, key=seconds.__getitem__), folders)


def grouped(slots: Sequence[int]) -> Mapping[int, list[int]]:
    """Return the places of each task's rows, tasks in order of their first row."""
    found: OrderedDict[int, list[int]] = OrderedDict()
    for place, slot in enumerate(slots):
        found.setdefault(slot, []).append(place)
    return found


def _copy(choice: BackboneChoice, attention: str) -> nn.Module:
    if attention in ATTENTIONS:
        return _transformers_model(choice, attention)[0]
    backbone = choice.load()
    nothing = PromptBank(backbone.spec.shape, [(NoPrompt(), PromptConfig())])
    model = PromptedModel(backbone, nothing, [])
    model.eval()
    return model


def _transformers_model(choice: BackboneChoice, attention: str) -> tuple[nn.Module, torch.dtype]:
    """Return Transformers' own model in the number format that ours chooses."""
    ours = load_backbone(choice.name, device="cpu", precision=choice.precision, packs=False)
    model = transformers.AutoModel.from_pretrained(
        choice.name, attn_implementation=attention, dtype=ours.dtype
    )
    return model.eval(), ours.dtype


def _head(folder: Path) -> nn.Linear:
    weights = load_weights(folder, load_manifest(folder))
    classes, hidden = weights.head_weight.shape
    head = nn.utils.skip_init(nn.Linear, hidden, classes)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        head.weight.copy_(weights.head_weight)
        head.bias.copy_(weights.head_bias)
    linear: nn.Linear = head.requires_grad_(False)
    return linear


def _logits(head: nn.Linear, reads: Any, found: Any, mask: Tensor) -> LogitsArray:
    """Read Transformers' output as ours is read, in fp32."""
    encoded = Encoded(
        hidden=found.last_hidden_state.float(),
        pooled=found.pooler_output.float(),
        token_mask=mask.bool(),
    )
    return _numpy(head(read(encoded, reads)))


def _numpy(logits: Tensor) -> LogitsArray:
    found: LogitsArray = logits.float().numpy()
    return found
