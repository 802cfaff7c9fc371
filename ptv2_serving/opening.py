"""Start a service: what the registry wishes, or what was last known; the backbone; every prompt."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ptv2_core.config import Device, Precision
from ptv2_core.errors import ArtifactError, PTv2Error
from ptv2_serving.answering import ServingError
from ptv2_serving.backbone import Verifier
from ptv2_serving.control import Registry
from ptv2_serving.engine.engine import Engine, EngineConfig
from ptv2_serving.engine.forward import BackboneChoice
from ptv2_serving.loading import Loader
from ptv2_serving.objects import Objects
from ptv2_serving.routing import Routing
from ptv2_serving.service import PromptService
from ptv2_serving.signing import read_public_key
from ptv2_serving.tracking import StoreError
from ptv2_serving.wishes import is_broken


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """What a service serves, and how.

    Attributes:
        tasks: Which; empty: all that the registry has a champion for.
        tracking_uri: The registry.
        root: Relative SQLite files lie under it.
        store: Folder of the local store.
        backbone: Where the backbone is on this machine, if not under the name that the prompts
            were trained with.
        precision: Number format of the frozen weights while answering.
        device: Where to answer.
        engines: Processes that compute.
        threads: Of each of them.
        public_key: PEM file; prompts that its owner did not sign are refused. None: takes all.
        queue_rows: Rows that wait at most.
        token_budget: Padded tokens of a batch at most.
        batch_rows: Rows of a batch at most.
        warm: Earlier prompts of each task that stay loaded.
        watch_s: Seconds between two looks at the registry's aliases; 0: none.
    """

    tasks: tuple[str, ...] = ()
    tracking_uri: str
    root: Path = Path()
    store: Path
    backbone: str | None = None
    precision: Precision = "auto"
    device: Device = "auto"
    engines: int = 1
    threads: int = 1
    public_key: Path | None = None
    queue_rows: int = 2048
    token_budget: int = 1024
    batch_rows: int = 64
    warm: int = 1
    watch_s: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What is told while a service starts.

    Attributes:
        step: Takes a sentence about what begins now, and of how many parts it is, where known.
        done: Takes the name of each part that is done.
    """

    step: Callable[[str, int | None], None] = lambda _, __: None
    done: Callable[[str], None] = lambda _: None


async def open_service(
    config: ServiceConfig, progress: Progress | None = None
) -> tuple[PromptService, list[str]]:
    """Return a service that answers, and what a person should know about it, a line each.

    A registry that does not answer, or a champion that cannot be used, is no reason to stay down:
    what was served last, and is in the local store, is served again.

    Raises:
        ServingError: There is nothing to serve, or the backbone cannot be loaded.
        StoreError: The registry is away, or refuses, and nothing is known of it.
        ArtifactError: No prompt can be served, and why.
    """
    told = progress or Progress()
    key = None if config.public_key is None else read_public_key(config.public_key)
    objects = Objects(
        config.store, tracking_uri=config.tracking_uri, root=config.root, public_key=key
    )
    registry = Registry(config.tracking_uri, config.root)
    told.step("asking the registry which versions answer", None)
    known, damage = _known(config, objects)
    routings, notes = _wished(config, registry, known, damage)
    verifier = Verifier(config.backbone)
    loader = Loader(objects, verifier)
    told.step("fetching and verifying prompts", len(routings))
    loop = asyncio.get_running_loop()
    try:
        problem = await loop.run_in_executor(None, _fetch_all, loader, routings, known, told)
    except BaseException:
        loader.close()  # or its thread would download on
        raise
    if not verifier.is_open:
        raise ServingError(f"no prompt can be served: {problem}")
    choice = _choose_backbone(config, verifier)
    verifier.settle()
    engine = Engine(
        choice,
        EngineConfig(
            processes=config.engines,
            threads=config.threads,
            token_budget=config.token_budget,
            batch_rows=config.batch_rows,
            queue_rows=config.queue_rows,
        ),
    )
    service = PromptService(engine, loader, registry, tasks=config.tasks or None, warm=config.warm)
    try:
        told.step(f"loading {choice.name} in {config.engines} process(es)", None)
        await engine.start()
        told.step("loading prompts", len(routings))
        lines = await service.adopt(routings, known=known, told=told.done)
        if not service.tasks():
            raise ServingError(f"no prompt can be served: {'; '.join(lines)}")
    except BaseException:
        await service.close()
        raise
    problems = [f"{task}: {problem}" for task, problem in service.problems().items()]
    return service, [*notes, *problems]


def _known(config: ServiceConfig, objects: Objects) -> tuple[dict[str, Routing], str]:
    """Return what was served last of the tasks to serve, and why it cannot be read."""
    try:
        known = objects.last_known()
    except ArtifactError as error:
        return {}, str(error)
    wanted = config.tasks or tuple(known)
    return {task: known[task] for task in wanted if task in known}, ""


def _wished(
    config: ServiceConfig, registry: Registry, known: Mapping[str, Routing], damage: str
) -> tuple[dict[str, Routing], list[str]]:
    """Return what should be served, and what to tell about it."""
    try:
        routings = registry.routings(config.tasks or None)
    except StoreError as error:
        if damage:
            raise ArtifactError(f"{damage}. The registry: {error}") from error
        if not known:
            raise
        return dict(known), [
            f"the registry does not answer; what was served last is served again ({error})"
        ]
    notes = []
    for task, problem in registry.problems.items():
        if task in known and task not in routings and is_broken(problem):
            routings[task] = known[task]
            problem = f"what was served last is served again: {problem}"
        notes.append(f"{task}: {problem}")
    missing = [task for task in config.tasks if task not in routings]
    if missing or not routings:
        what = f"the tasks {', '.join(missing)}" if missing else "any task"
        said = "; ".join([f"the registry has no champion for {what}", *notes]).rstrip(".")
        raise ServingError(
            f"{said}. Register a prompt (`ptv2 run`), or set the alias "
            "(`ptv2 promote TASK:VERSION`)."
        )
    return routings, notes


def _fetch_all(
    loader: Loader, routings: Mapping[str, Routing], known: Mapping[str, Routing], told: Progress
) -> str:
    """Fetch and verify every prompt; return what is wrong with some of the champions.

    The first that can be used says which backbone this server has; all together, what of it is
    loaded.
    """
    problems = []
    for task, routing in routings.items():
        wished = [one for one in (routing, known.get(task)) if one is not None]
        for version in dict.fromkeys(one.versions[one.champion] for one in wished):
            try:
                loader.prefetch(version)
            except PTv2Error as error:
                problems.append(f"{task}: {error}")
            else:
                break
        told.done(task)
    for routing in routings.values():
        for number in (routing.canary, routing.shadow):
            if number is not None:
                # what is wrong with one is told when it is to be loaded
                with suppress(PTv2Error):
                    loader.prefetch(routing.versions[number])
    return "; ".join(problems)


def _choose_backbone(config: ServiceConfig, verifier: Verifier) -> BackboneChoice:
    """Return the backbone of the prompts, as the engine should load it."""
    spec = verifier.backbone.spec
    return BackboneChoice(
        name=spec.name,
        revision=spec.revision,
        digest=spec.digest,
        device=config.device,
        precision=config.precision,
        language_model=verifier.backbone.language_model is not None,
    )
