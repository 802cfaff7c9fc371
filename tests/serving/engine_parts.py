"""An engine with prompts of several tasks, and what says which answers are right."""

import asyncio
from pathlib import Path
from typing import Any

import torch

from ptv2_core.config import Device, Precision
from ptv2_core.evaluation.codec import Asked
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.model.backbones.locating import locate
from ptv2_serving.engine.engine import Engine, EngineConfig
from ptv2_serving.engine.forward import BackboneChoice
from ptv2_serving.engine.requests import Computed
from tests.tiny import tiny_artifact, tiny_backbone

TEXTS = ["book a flight", "cancel the meeting on monday at noon please", "play", "call my taxi"]


class Served:
    """An engine with prompts of several tasks, and the predictors that say what is right."""

    def __init__(
        self,
        root: Path,
        *,
        precision: Precision = "fp32",
        device: Device = "cpu",
        choice: type[BackboneChoice] = BackboneChoice,
        **settings: Any,
    ) -> None:
        self.folder = tiny_backbone(root / "backbone")
        self.prompts = {
            name: tiny_artifact(root / name, self.folder, kind=kind, seed=seed)
            for seed, (name, kind) in enumerate(
                [("one", "classification"), ("two", "tagging"), ("three", "classification")]
            )
        }
        self.predictors = {
            name: Predictor.load(path, device="cpu", precision=precision)
            for name, path in self.prompts.items()
        }
        self.engine = Engine(
            choice(
                name=str(self.folder),
                revision=None,
                digest=locate(str(self.folder)).digest(),
                device=device,
                precision=precision,
                language_model=False,
            ),
            EngineConfig(**settings),
        )
        self.slots: dict[str, int] = {}
        self.runner = asyncio.Runner()

    async def start(self) -> None:
        await self.engine.start()
        for name, path in self.prompts.items():
            self.slots[name] = await self.engine.put(path, alone=False)

    def asked(self, name: str, text: str) -> Asked:
        return self.predictors[name].codec.encode([{"text": text}])

    async def whole(self) -> None:
        """Wait until no process is missing."""
        async with asyncio.timeout(60.0):
            while self.engine.num_ready < self.engine.config.processes:
                await asyncio.sleep(0.02)

    async def ask(self, name: str, text: str, **settings: Any) -> Computed:
        split = self.asked(name, text).split
        return await self.engine.compute(self.slots[name], split, **{"timeout_s": 30.0, **settings})

    def check(self, name: str, text: str, found: Computed, *, tolerance: float = 1e-5) -> None:
        predictor = self.predictors[name]
        own = predictor.codec.logits_by_input(self.asked(name, text), found.logits)
        for expected, got in zip(predictor.logits([{"text": text}]), own, strict=True):
            torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def questions(count: int) -> list[tuple[str, str]]:
    names = ["one", "two", "three"]
    return [(names[i % 3], TEXTS[i % len(TEXTS)]) for i in range(count)]
