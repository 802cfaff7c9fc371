"""What the serving benchmark serves: random prompts, texts of a known length, a registry.

Letters: T tokens, P prompt length.
"""

import asyncio
import hashlib
import os
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from ptv2_core.artifact import Weights, save_artifact
from ptv2_core.config import HeadConfig, PromptConfig, TrainConfig
from ptv2_core.data.tasks import METRICS, TaskSpec
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.files import sha256_file
from ptv2_core.manifest import MANIFEST_FILE, WEIGHTS_FILE, load_manifest
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.backbones.locating import Location, locate
from ptv2_core.model.backbones.tokenizing import load_tokenizer
from ptv2_core.model.heads import LinearHead, reading_for
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.model.prompts import PromptBank, make_prompt
from ptv2_serving.engine.forward import BackboneChoice
from ptv2_serving.tracking import MANIFEST_TAG, PROMPT_PATH, SHA256_TAG

MAX_LENGTH = 128
LABELS = ("alarm", "book", "cancel", "play", "search", "weather")
TAGS = ("O", "B-place", "I-place", "B-time", "I-time")
# as many as `ptv2 run` stores
GOLDEN_INPUTS = 4
GOLDEN_TOKENS = 16
# a new head hardly prefers a label; these do, so that another prompt's answer is another answer
HEAD_SCALE = 20.0
SMAPS = "/proc/{}/smaps_rollup"

Result = TypeVar("Result")
Kind = Literal["classification", "tagging"]


@dataclass(frozen=True, kw_only=True)
class Like:
    """What a prompt is like.

    Attributes:
        kind: Of its task.
        prompt_length: P.
        max_length: Tokens of a row at most.
    """

    kind: Kind = "classification"
    prompt_length: int
    max_length: int = MAX_LENGTH


class Texts:
    """Makes texts that are exactly so many tokens long."""

    def __init__(self, location: Location) -> None:
        """Choose words that are one token each."""
        tokenizer = load_tokenizer(location)
        self.words = sorted(
            word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha()
        )

    def make(self, tokens: int, count: int, *, seed: int) -> list[str]:
        """Return `count` texts of T tokens each, the two special ones included."""
        draw = np.random.default_rng(seed)
        chosen = draw.integers(len(self.words), size=(count, tokens - 2))
        return [" ".join(self.words[place] for place in row) for row in chosen]


class Prompts:
    """Makes artifacts of random prompts on a backbone: speed does not depend on the values."""

    def __init__(self, backbone: Path, *, prompt_length: int) -> None:
        """Load the backbone in fp32, in which golden logits are computed.

        Args:
            backbone: Its folder.
            prompt_length: P.
        """
        self.like = Like(prompt_length=prompt_length)
        self.location = locate(str(backbone))
        self.backbone: Backbone = load_backbone(str(backbone), device="cpu", precision="fp32")
        self.config = TrainConfig(prompt=PromptConfig(length=prompt_length))
        self.texts = Texts(self.location)
        self._tokenizer = load_tokenizer(self.location)

    def save(
        self,
        folder: Path,
        task: str,
        *,
        seed: int,
        golden: int = GOLDEN_INPUTS,
        like: Like | None = None,
    ) -> Path:
        """Write the artifact of a prompt that `seed` draws; returns `folder`.

        Args:
            folder: Where to.
            task: Its name.
            seed: Draws prompt and head.
            golden: How many golden inputs it has.
            like: What it is like; None: as this maker's `prompt_length` says.
        """
        like = like or self.like
        spec = task_of(task, like.kind)
        shape, config = self.backbone.spec.shape, PromptConfig(length=like.prompt_length)
        reads = reading_for(spec.form, self.backbone.spec.reads)
        head = LinearHead(self.backbone.spec.hidden_size, spec.num_outputs, reads=reads, seed=seed)
        head.start_at(head.linear.weight * HEAD_SCALE, head.linear.bias)
        bank = PromptBank(shape, [(make_prompt(shape, config, seed=seed), config)])
        model = PromptedModel(self.backbone, bank, [head])
        model.eval()
        predictor = Predictor(model, self._tokenizer, spec, max_length=like.max_length)
        inputs = [{"text": text} for text in self.texts.make(GOLDEN_TOKENS, golden, seed=seed)]
        logits = predictor.logits(inputs) if inputs else []
        save_artifact(
            folder,
            Weights.of(model),
            task=spec,
            method="ptv2",
            prompt=config,
            head=HeadConfig(reads=self.backbone.spec.reads),
            backbone=self.backbone.spec.to_mapping(),
            tokenizer_digest=self.location.tokenizer_digest(),
            encoding={"max_length": like.max_length},
            decoding={},
            training={**TrainConfig(prompt=config).to_mapping(), "study": None, "trial": None},
            provenance={},
            metrics={},
            golden=[
                {"input": given, "logits": own.tolist()}
                for given, own in zip(inputs, logits, strict=True)
            ],
        )
        return folder

    def choice(self, precision: Any = "auto") -> BackboneChoice:
        """Return the backbone as an engine loads it."""
        return BackboneChoice(
            name=self.backbone.spec.name,
            revision=None,
            digest=self.backbone.spec.digest,
            device="cpu",
            precision=precision,
            language_model=False,
        )


def task_of(name: str, kind: Kind = "classification") -> TaskSpec:
    """Return a task that gives a text, or each of its words, one of a few labels."""
    if kind == "tagging":
        labels, fields = TAGS, {"tokens": "tokens", "tags": "tags"}
    else:
        labels, fields = LABELS, {"text": "text", "label": "label"}
    return TaskSpec(name=name, kind=kind, labels=labels, fields=fields, metric=METRICS[kind])


def names(count: int) -> list[str]:
    """Return so many names of tasks."""
    return [f"task-{number:04}" for number in range(count)]


class LocalRegistry:
    """MLflow's registry in a SQLite file, with versions whose files lie beside it."""

    def __init__(self, root: Path) -> None:
        """Make an empty one in `root`."""
        from mlflow import MlflowClient

        self.root = root
        self.uri = f"sqlite:///{root}/mlflow.db"
        self.client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    def add(self, prompts: Prompts, task: str, *, seed: int, like: Like | None = None) -> int:
        """Register another version of a task, the first as its champion; returns its number."""
        source = self.root / "versions" / f"{task}-{seed}"
        folder = prompts.save(source / PROMPT_PATH, task, seed=seed, like=like)
        if not self.client.search_registered_models(filter_string=f"name = '{task}'"):
            self.client.create_registered_model(task)
        version = self.client.create_model_version(
            task,
            source=str(source),
            tags={
                SHA256_TAG: sha256_file(folder / WEIGHTS_FILE),
                MANIFEST_TAG: sha256_file(folder / MANIFEST_FILE),
            },
        )
        number = int(version.version)
        if number == 1:
            self.move(task, 1)
        return number

    def move(self, task: str, version: int) -> None:
        """Make a version the champion."""
        self.client.set_registered_model_alias(task, "champion", str(version))

    def folder(self, task: str, version: int) -> Path:
        """Return where a version's artifact lies."""
        source = self.client.get_model_version(task, str(version)).source
        return Path(str(source)) / PROMPT_PATH


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of one or more processes, in bytes.

    Attributes:
        pss: Pages, each divided by how many processes share it.
        private: Pages of one process alone.
    """

    pss: int
    private: int


def memory_of(*pids: int) -> Memory:
    """Return what processes have in memory now; Linux alone tells it."""
    totals: dict[str, int] = {}
    for pid in pids:
        for line in Path(SMAPS.format(pid)).read_text(encoding="ascii").splitlines()[1:]:
            name, _, rest = line.partition(":")
            totals[name] = totals.get(name, 0) + int(rest.split()[0]) * 1024
    return Memory(pss=totals["Pss"], private=totals["Private_Clean"] + totals["Private_Dirty"])


def cpu_seconds(*pids: int) -> float:
    """Return the processor time that processes took so far; Linux alone tells it."""
    ticks = 0
    for pid in pids:
        # after the name, which may hold spaces
        rest = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        ticks += int(rest[11]) + int(rest[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def offline(folder: Path, backbone: Backbone) -> Predictor:
    """Return what answers by itself, for an artifact on a backbone that is loaded."""
    location = locate(backbone.spec.name)
    return Predictor.of(folder, load_manifest(folder), backbone, load_tokenizer(location))


def run_on_loop(work: Coroutine[Any, Any, Result]) -> Result:
    """Run on the event loop that `ptv2 serve` uses."""
    from ptv2_serving.run import new_event_loop

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)


def seed_of(*parts: object) -> int:
    """Return a seed that these words always have."""
    data = ":".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "big")
