"""What a hot swap takes: from the moved alias seen to the first answer, and where the time goes."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serve_load import percentile_ms
from benchmarks.serve_parts import LocalRegistry, Prompts, names, seed_of
from ptv2_core.manifest import WEIGHTS_FILE, load_manifest
from ptv2_serving.backbone import Verifier
from ptv2_serving.control import Registry
from ptv2_serving.objects import Objects
from ptv2_serving.opening import ServiceConfig, open_service
from ptv2_serving.tracking import MANIFEST_TAG, SHA256_TAG

SWAPPED = "task-0000"
OTHERS = 9


@dataclass(frozen=True, kw_only=True)
class Swapped:
    """What swaps took, in seconds.

    Attributes:
        file_bytes: Of the prompt that moves.
        whole_s: Of each swap, from the moved alias seen to the first answer.
        reload_s: Likewise, with the look at the registry that saw it.
        parts_s: What a swap consists of, each measured by itself, a list a part.
    """

    file_bytes: int
    whole_s: list[float]
    reload_s: list[float]
    parts_s: Mapping[str, list[float]]

    def to_mapping(self) -> dict[str, Any]:
        """Return the figures as the JSON has them."""
        return {
            "swaps": len(self.whole_s),
            "median_ms": percentile_ms(self.whole_s, 50),
            "p95_ms": percentile_ms(self.whole_s, 95),
            "with_look_ms": percentile_ms(self.reload_s, 50),
            "file_bytes": self.file_bytes,
            "parts_ms": {
                name: statistics.median(seconds) * 1e3 for name, seconds in self.parts_s.items()
            },
        }


def register(registry: LocalRegistry, prompts: Prompts, *, swaps: int) -> None:
    """Register one task with a version a swap, and a few beside it."""
    for number in range(swaps + 1):
        registry.add(prompts, SWAPPED, seed=seed_of(SWAPPED, number))
    for task in names(OTHERS + 1)[1:]:
        registry.add(prompts, task, seed=seed_of(task))


async def swap(registry: LocalRegistry, scratch: Path, *, swaps: int) -> Swapped:
    """Move an alias again and again, each time to a version that is not on this machine yet.

    Args:
        registry: What `register` filled.
        scratch: For the local stores.
        swaps: How many.
    """
    config = ServiceConfig(
        tracking_uri=registry.uri, store=scratch / "store", watch_s=0, device="cpu"
    )
    service, notes = await open_service(config)
    assert not notes, notes
    whole, reloads = [], []
    try:
        for version in range(2, swaps + 2):
            registry.move(SWAPPED, version)
            began = time.perf_counter()
            await service.reload()
            reloads.append(time.perf_counter() - began)
            seconds = service.status().last_swap_s
            assert seconds is not None, "an alias that moved is a swap"
            whole.append(seconds)
        assert service.status().swaps == swaps
    finally:
        await service.close()
    return Swapped(
        file_bytes=(registry.folder(SWAPPED, 1) / WEIGHTS_FILE).stat().st_size,
        whole_s=whole,
        reload_s=reloads,
        parts_s=_parts(registry, scratch, swaps),
    )


def _parts(registry: LocalRegistry, scratch: Path, swaps: int) -> dict[str, list[float]]:
    """Time what a swap does before the engine is told, a version after the other."""
    wishes = Registry(registry.uri)
    objects = Objects(scratch / "parts", tracking_uri=registry.uri)
    verifier = Verifier()
    found: dict[str, list[float]] = {}
    for number in range(1, swaps + 2):
        version = wishes.resolve(f"{SWAPPED}:{number}")
        fetched = _timed(found, "fetch", lambda: objects.fetch(version, lambda *_: None))  # noqa: B023
        manifest = load_manifest(fetched.path)
        make = lambda: verifier.predictor(fetched.path, manifest)  # noqa: B023, E731
        predictor = _timed(found, "make a predictor", make)
        _timed(found, "golden inputs in fp32", predictor.verify_golden)
    # the first one loads the backbone
    return {name: seconds[1:] for name, seconds in found.items()}


def _timed(found: dict[str, list[float]], name: str, work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    result = work()
    found.setdefault(name, []).append(time.perf_counter() - began)
    return result


def looks(root: Path, *, tasks: Sequence[int], times: int) -> list[dict[str, Any]]:
    """Time looks at a registry with more and more tasks, when nothing has moved.

    Args:
        root: An empty folder.
        tasks: How many there are at each measurement, fewest first.
        times: How often it is looked.
    """
    registry = LocalRegistry(root)
    wishes, there, found = Registry(registry.uri), 0, []
    tags = {SHA256_TAG: "0" * 64, MANIFEST_TAG: "0" * 64}
    for count in tasks:
        for task in names(count)[there:]:
            registry.client.create_registered_model(task)
            registry.client.create_model_version(task, source=str(root), tags=tags)
            registry.move(task, 1)
        there = count
        assert len(wishes.routings()) == count
        seconds: dict[str, list[float]] = {}
        for _ in range(times):
            _timed(seconds, "look", wishes.routings)
        found.append({"tasks": count, "ms": percentile_ms(seconds["look"], 50)})
    return found
