"""`ptv2 doctor`: what a run would find here. Looks only: writes nothing, and downloads nothing."""

import importlib.metadata
import os
import platform
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

import psutil
import torch

from pipelines.paths import TaskPaths
from pipelines.settings import (
    Environment,
    Settings,
    TaskSettings,
    load_settings,
    read_environment,
)
from pipelines.threads import available_cores, chosen_threads, set_up_torch, threads_by_user
from ptv2_core.config import Device, Precision, PromptConfig
from ptv2_core.errors import BackboneError, ConfigError
from ptv2_core.machine import measure_gemm_rate
from ptv2_core.model.backbones.loading import (
    choose_device,
    choose_precision,
    default_reading,
    locate_offline,
    precision_reason,
)
from ptv2_core.model.backbones.locating import Location
from ptv2_core.model.backbones.rounding import rounding_of
from ptv2_core.model.backbones.tokenizing import load_tokenizer
from ptv2_serving.tracking import StoreError, check_answers, resolve_uri, shown, sqlite_path

State = Literal["ok", "note", "problem"]

PACKAGES = (
    "ptv2",
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "optuna",
    "mlflow",
    "prefect",
    "dvc",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXPECTED_PREFECT = "expected http(s)://HOST:PORT/api"
TIMEOUT_S = 3.0
LITTLE_DISK_BYTES = 2**30
CLEARLY_FASTER = 1.2
"""A ratio of two measured rates; below it they may differ by chance."""

LEARNING_RATES = {"embedding": (5e-3, 2e-1), "mlp": (1e-4, 2e-2)}
"""Where prompts learned on one task or another (docs/optimisation.md, configs/paper.yaml)."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        section: The part of the report.
        name: What was looked at.
        value: What was found.
        state: `note`: worth knowing; `problem`: a run would fail, or do something else than asked.
        hint: What to do about it.
    """

    section: str
    name: str
    value: str
    state: State = field(default="ok", kw_only=True)
    hint: str = field(default="", kw_only=True)


def examine(root: Path) -> list[Finding]:
    """Look at everything that a run in a workspace depends on.

    Args:
        root: The workspace, which is also the current folder, as for a stage.
    """
    environment = read_environment()
    settings, found = _settings(root / "params.yaml")
    with ThreadPoolExecutor() as pool:
        # a server that is away is waited for; meanwhile there is other work
        servers = [
            pool.submit(_registry, root, settings, environment),
            pool.submit(_prefect, environment.prefect_api_url),
        ]
        found += _machine(root, settings)
        found += _versions()
        if settings is not None:
            found += _backbone(settings)
            found += [_data(root, task) for task in settings.tasks.values()]
        found += _dvc(root)
        return found + [server.result() for server in servers]


def verdict(problems: int) -> str:
    """Return the line that ends the report."""
    if not problems:
        return "no problems"
    many = "1 problem" if problems == 1 else f"{problems} problems"
    return f"{many}; mend what says problem, then run `ptv2 doctor` again"


def _settings(path: Path) -> tuple[Settings | None, list[Finding]]:
    try:
        settings = load_settings(path)
    except ConfigError as error:
        hint = "backbone and data are not looked at without it"
        finding = Finding("settings", path.name, str(error), state="problem", hint=hint)
        return None, [finding]
    tasks = f"sound; tasks: {', '.join(settings.tasks)}"
    return settings, [Finding("settings", path.name, tasks)]


# The machine


def _machine(root: Path, settings: Settings | None) -> Iterator[Finding]:
    section = "machine"
    yield Finding(section, "cores", f"{available_cores()} of {os.cpu_count()}")
    memory = psutil.virtual_memory()
    value = f"{_gib(memory.total)}, {_gib(memory.available)} available"
    yield Finding(section, "memory", value)
    yield _disk(root)
    yield _threads(settings)
    wanted: Device = settings.backbone.device if settings else "auto"
    try:
        device = choose_device(wanted)
        value = f"{device.type} ({_device_reason(wanted, device)})"
        yield Finding(section, "device", value)
    except BackboneError as error:
        yield Finding(section, "device", str(error), state="problem")
        device = choose_device()
    precision: Precision = settings.backbone.precision if settings else "auto"
    chosen = choose_precision(precision, device)
    name = next(name for name, dtype in DTYPES.items() if dtype == chosen)
    try:
        rounding = rounding_of(precision, device)
        shown = name if rounding is None else f"{precision}, else {name}"
        value = f"{shown} ({precision_reason(precision, device)})"
        if rounding == "int8":
            hint = "for answering alone: `ptv2 train` will refuse it on a CPU"
            yield Finding(section, "precision", value, state="problem", hint=hint)
        else:
            yield Finding(section, "precision", value)
    except BackboneError as error:
        yield Finding(section, "precision", str(error), state="problem")
    yield from _rates(name, device)


def _disk(root: Path) -> Finding:
    free = shutil.disk_usage(root).free
    value = f"{_gib(free)} free in {root.absolute()}"
    if free >= LITTLE_DISK_BYTES:
        return Finding("machine", "disk", value)
    hint = "data, results and the registry may not fit"
    return Finding("machine", "disk", value, state="note", hint=hint)


def _threads(settings: Settings | None) -> Finding:
    side_by_side = min(settings.run.concurrency, len(settings.tasks)) if settings else 1
    try:
        alone = set_up_torch()
    except ConfigError as error:
        return Finding("machine", "threads", str(error), state="problem")
    value = f"{alone} for a stage alone"
    if side_by_side > 1:
        each = chosen_threads(side_by_side)
        value += f", {each} each for {side_by_side} side by side (run.concurrency)"
    if threads_by_user() is None:
        return Finding("machine", "threads", value)
    value += "; set by OMP_NUM_THREADS"
    if alone * side_by_side <= available_cores():
        return Finding("machine", "threads", value)
    hint = "more threads than cores; unset OMP_NUM_THREADS for a share each"
    return Finding("machine", "threads", value, state="note", hint=hint)


def _device_reason(wanted: Device, device: torch.device) -> str:
    if wanted != "auto":
        return "set by backbone.device"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"auto: {properties.name}, {_gib(properties.total_memory)}"
    if device.type != "cpu":
        return "auto: the GPU of this machine"
    if torch.version.cuda is None:
        return "auto: this PyTorch is built without CUDA"
    return f"auto: this PyTorch, built for CUDA {torch.version.cuda}, finds no GPU"


def _rates(chosen: str, device: torch.device) -> Iterator[Finding]:
    """Measure both number formats; says so where the one that is chosen is the slower one."""
    rates: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, dtype in DTYPES.items():
        try:
            rates[name] = measure_gemm_rate(dtype, device)
        except (RuntimeError, TypeError) as error:  # a format that the device does not have
            refused[name] = str(error).partition("\n")[0]
    threads = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    for name in DTYPES:
        title = f"GEMM {name}"
        if name in refused:
            yield Finding("machine", title, refused[name], state="note")
            continue
        value = f"{rates[name] / 1e9:,.0f} GFLOP/s{threads}"
        faster = [n for n, rate in rates.items() if rate > CLEARLY_FASTER * rates[name]]
        if name == chosen and faster:
            hint = f"{faster[0]} is faster here than {name}, which is chosen (backbone.precision)"
            yield Finding("machine", title, value, state="note", hint=hint)
        else:
            yield Finding("machine", title, value)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "python", platform.python_version())
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            hint = "a whole run needs it: `pip install 'ptv2[pipelines]'`"
            yield Finding("versions", package, "not installed", state="note", hint=hint)
        else:
            yield Finding("versions", package, version)


# The backbone


def _backbone(settings: Settings) -> Iterator[Finding]:
    section, wanted = "backbone", settings.backbone
    try:
        location = locate_offline(wanted.name, wanted.revision)
    except (BackboneError, OSError, ValueError) as error:
        yield Finding(section, "name", str(error), state="problem")
        return
    if location is None:
        value = f"{wanted.name} at {wanted.revision}: not on this machine yet"
        hint = "the first stage that needs it downloads it"
        yield Finding(section, "name", value, state="note", hint=hint)
        return
    yield Finding(section, "name", wanted.name)
    yield Finding(section, "folder", str(location.folder.absolute()))
    try:
        yield _digest(location, wanted.digest)
        load_tokenizer(location)
        yield Finding(section, "tokenizer", location.tokenizer_digest())
        yield Finding(section, "head reads", _reading(location, settings))
        yield Finding(section, "prompt starts", _start(settings))
        yield _learning_rates(settings)
    except (BackboneError, OSError, ValueError) as error:
        yield Finding(section, "files", str(error), state="problem")


def _digest(location: Location, wanted: str | None) -> Finding:
    found = location.digest()
    if wanted is not None and wanted != found:
        hint = f"other weights than backbone.digest, {wanted}: restore the files, or change it"
        return Finding("backbone", "digest", found, state="problem", hint=hint)
    if wanted is None and Path(location.name).is_dir():
        hint = "set backbone.digest to it: DVC does not watch the folder"
        return Finding("backbone", "digest", found, state="note", hint=hint)
    hint = "as backbone.digest says" if wanted else ""
    return Finding("backbone", "digest", found, hint=hint)


def _reading(location: Location, settings: Settings) -> str:
    reads = f"{default_reading(location)}, as its files say"
    own = [
        f"{task.name}: {task.train.head.reads}"
        for task in settings.tasks.values()
        if task.train.head.reads != "auto"
    ]
    return f"{reads}; train.head.reads sets {', '.join(own)}" if own else reads


def _start(settings: Settings) -> str:
    """Say what gives prompts their first values, and so their scale."""
    by_start: dict[str, list[str]] = {}
    for task in settings.tasks.values():
        if task.train.method == "ptv2":
            by_start.setdefault(_start_of(task.train.prompt), []).append(task.name)
    said = [f"{start}: {', '.join(names)}" for start, names in by_start.items()]
    return "; ".join(said) or "no task trains a prompt in every layer"


def _start_of(prompt: PromptConfig) -> str:
    """Say how one prompt starts."""
    is_own = prompt.start == "backbone" and prompt.reparameterization != "mlp"
    place = "at its own keys and values for training words" if is_own else "at random"
    if prompt.start_attention is None:
        return place
    return f"{place}, with {prompt.start_attention:.0%} of the attention"


def _learning_rates(settings: Settings) -> Finding:
    """Note tasks whose learning rate is far from where any task of the documentation learned."""
    odd = []
    for task in settings.tasks.values():
        train = task.train
        low, high = LEARNING_RATES[train.prompt.reparameterization]
        if train.method == "ptv2" and not low <= train.learning_rate <= high:
            odd.append(
                f"{task.name}: {train.learning_rate:g}, expected {low:g} to {high:g} "
                f"({train.prompt.reparameterization})"
            )
    if not odd:
        return Finding("backbone", "learning rates", "where prompts learn")
    hint = "too low learns nothing, too high forgets it; docs/optimisation.md has the figures"
    return Finding("backbone", "learning rates", "; ".join(odd), state="note", hint=hint)


# The workspace


def _data(root: Path, task: TaskSettings) -> Finding:
    source = task.fetch.path
    if not (root / source).exists():
        value = f"{source} is not there"
        hint = f"put the records there, or mend tasks.{task.name}.fetch.path"
        return Finding("data", task.name, value, state="problem", hint=hint)
    paths = TaskPaths(root=root, task=task.name)
    folders = {"fetched": paths.raw, "prepared": paths.prepared, "trained": paths.prompt}
    done = [word for word, folder in folders.items() if folder.is_dir()]
    missing = [word for word, folder in folders.items() if not folder.is_dir()]
    value = f"{source}: {', '.join(done)}" if done else source
    if not missing:
        return Finding("data", task.name, value)
    value += f"; not yet {', '.join(missing)}"
    return Finding("data", task.name, value, state="note", hint=f"`ptv2 run --task {task.name}`")


def _dvc(root: Path) -> Iterator[Finding]:
    file = root / "dvc.yaml"
    if file.is_file():
        yield Finding("dvc", "stages", str(file.absolute()))
    else:
        value = f"no dvc.yaml in {root.absolute()}"
        hint = "`ptv2 run` works through it: take the one of this project"
        yield Finding("dvc", "stages", value, state="problem", hint=hint)
    # DVC too looks for it in the folders above
    folder = root.absolute()
    found = next((f / ".dvc" for f in (folder, *folder.parents) if (f / ".dvc").is_dir()), None)
    if found is not None:
        yield Finding("dvc", "repository", str(found))
    else:
        value, hint = "not initialised", "`dvc init` in a git repository, or `dvc init --no-scm`"
        yield Finding("dvc", "repository", value, state="problem", hint=hint)


# Servers


def _registry(root: Path, settings: Settings | None, environment: Environment) -> Finding:
    section, name = "servers", "registry"
    if environment.mlflow_tracking_uri:
        uri, key = environment.mlflow_tracking_uri, "MLFLOW_TRACKING_URI"
    elif settings is not None:
        uri, key = settings.register.tracking_uri, "register.tracking_uri"
    else:
        value = "MLFLOW_TRACKING_URI is not set, and params.yaml cannot be read"
        return Finding(section, name, value, state="note")
    try:
        resolved = resolve_uri(uri, root=root)
        check_answers(resolved, timeout_s=TIMEOUT_S)
    except StoreError as error:
        return Finding(section, name, str(error), state="problem")
    except (HTTPException, ValueError):  # their texts may quote what is secret in an address
        value = f"{key} is no address of a registry, or another kind of server is there"
        return Finding(section, name, value, state="problem")
    file = sqlite_path(resolved) if resolved.startswith("sqlite") else None
    if file is not None and not file.exists():
        value, hint = f"{shown(uri)} ({key}): not there yet", "the first `register` makes it"
        return Finding(section, name, value, state="note", hint=hint)
    how = "there" if file is not None else "answers"
    return Finding(section, name, f"{shown(uri)} ({key}): {how}")


def _prefect(url: str | None) -> Finding:
    section, name = "servers", "prefect"
    if url is None:
        value = "a temporary server for each run (PREFECT_API_URL is not set)"
        return Finding(section, name, value)
    try:
        problem, where = _unhealthy(url), f"{shown(url)} (PREFECT_API_URL)"
    except (HTTPException, ValueError):
        where = "PREFECT_API_URL"
        problem = f"{EXPECTED_PREFECT}, and a Prefect server there"
    if problem is None:
        return Finding(section, name, f"{where}: answers")
    value = f"{where}: {problem}"
    hint = "start it, mend the address, or unset it for a temporary server for each run"
    return Finding(section, name, value, state="problem", hint=hint)


def _unhealthy(url: str) -> str | None:
    """Return what is wrong with a Prefect server; None where it answers."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return EXPECTED_PREFECT
    # urllib takes a name and password in the address for a part of the host
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    try:
        with urllib.request.urlopen(f"{bare.rstrip('/')}/health", timeout=TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        # a server that asks who we are is there
        return None if error.code in (401, 403) else f"HTTP {error.code} {error.reason}"
    except OSError as error:
        return f"does not answer: {getattr(error, 'reason', error)}"
