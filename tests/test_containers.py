"""Dockerfile and compose.yaml name only what exists.

No container engine is needed: the files are read, and each path, stage, command, option, variable,
port and address in them is looked up where it must exist.
"""

import fnmatch
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FINAL_STAGES = ("train", "serve")
SERVED_BY_DEFAULT = {"postgres": "5432"}


@dataclass(frozen=True, kw_only=True)
class Stage:
    name: str
    parent: str
    steps: list[tuple[str, str]]

    def arguments(self, instruction: str) -> list[str]:
        return [text for name, text in self.steps if name == instruction]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def dockerfile() -> tuple[dict[str, str], dict[str, Stage]]:
    """Return the default of each ARG before the first FROM, and the stages by name."""
    text = re.sub(r"^#.*\n", "", read("Dockerfile"), flags=re.M)
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if not line.strip():
            continue
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            parent, _, name = rest.partition(" AS ")
            current = stages[name] = Stage(name=name, parent=parent, steps=[])
        elif current is None:
            arguments.update([rest.split("=", 1)])
        else:
            current.steps.append((instruction, rest))
    return arguments, stages


def lineage(stages: dict[str, Stage], name: str) -> list[Stage]:
    """Return the stage and the stages it is built from, the outermost first."""
    found = []
    while name in stages:
        found.append(stages[name])
        name = stages[name].parent
    return found[::-1]


def compose() -> dict[str, Any]:
    return yaml.safe_load(read("compose.yaml"))


def copied_from_context(stages: dict[str, Stage]) -> set[str]:
    copied = set()
    for stage in stages.values():
        for text in stage.arguments("COPY"):
            if "--from=" not in text:
                words = [word for word in text.split() if not word.startswith("--")]
                copied.update(words[:-1])
    return copied


def in_build_context(path: str) -> bool:
    """Say whether .dockerignore lets `path` in: the last pattern on it or on a parent decides."""
    parts = Path(path).parts
    prefixes = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
    included = True
    for line in read(".dockerignore").splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            if any(fnmatch.fnmatch(prefix, pattern) for prefix in prefixes):
                included = line.startswith("!")
    return included


def commands() -> dict[str, list[str]]:
    """Return every command line that runs in one of our own images, by where it stands."""
    found = {}
    _, stages = dockerfile()
    for name in FINAL_STAGES:
        found[f"Dockerfile {name} CMD"] = json.loads(stages[name].arguments("CMD")[-1])
        check = stages[name].arguments("HEALTHCHECK")[-1].partition("CMD ")[2]
        found[f"Dockerfile {name} HEALTHCHECK"] = json.loads(check)
    for name, service in compose()["services"].items():
        if "build" in service:
            if "command" in service:
                found[f"compose {name} command"] = service["command"]
            if "healthcheck" in service:
                found[f"compose {name} healthcheck"] = service["healthcheck"]["test"][1:]
    return {
        where: shlex.split(words[2].removeprefix("exec ")) if words[:2] == ["sh", "-c"] else words
        for where, words in found.items()
    }


def environment_names() -> set[str]:
    """Return the name of every variable that the images, the services and the Makefile set."""
    _, stages = dockerfile()
    assignments = " ".join(text for stage in stages.values() for text in stage.arguments("ENV"))
    names = set(re.findall(r"(?:^|\s)([A-Z][A-Z0-9_]*)=", assignments))
    for service in compose()["services"].values():
        names.update(service.get("environment", {}))
    names.update(re.findall(r"export ([A-Z][A-Z0-9_]*) :=", read("Makefile")))
    return names


def source_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


# --- Dockerfile ---------------------------------------------------------------------------------


def test_every_copied_path_exists_and_is_in_the_build_context() -> None:
    copied = copied_from_context(dockerfile()[1])
    assert {"pyproject.toml", "constraints.txt", "ptv2_core", "pipelines", "ptv2_serving"} <= copied
    missing = [path for path in sorted(copied) if not (ROOT / path).exists()]
    assert not missing
    assert not [path for path in sorted(copied - {"."}) if not in_build_context(path)]


def test_the_build_context_holds_the_workspace_and_no_secrets_or_results() -> None:
    for path in ("params.yaml", "dvc.yaml", "demo/intents.toml", ".dvc/config"):
        assert (ROOT / path).exists(), path
        assert in_build_context(path), path
    for path in (
        ".env",
        ".git/config",
        ".venv/bin/python",
        "mlflow.db",
        ".dvc/cache/files",
        "tests",
    ):
        assert not in_build_context(path), path


def test_stages_build_on_stages_defined_before_them() -> None:
    arguments, stages = dockerfile()
    assert set(FINAL_STAGES) <= set(stages)
    known: list[str] = []
    for stage in stages.values():
        if stage.parent in [f"${{{name}}}" for name in arguments]:
            default = arguments[stage.parent[2:-1]]
            assert re.search(r":\d+\.\d+\.\d+", default), f"{default} is not pinned"
        else:
            assert stage.parent in known
        for source in re.findall(r"--from=(\S+)", " ".join(stage.arguments("COPY"))):
            assert source in known
        known.append(stage.name)


@pytest.mark.parametrize("name", FINAL_STAGES)
def test_final_stages_run_as_a_user_and_report_their_health(name: str) -> None:
    _, stages = dockerfile()
    users = [user for stage in lineage(stages, name) for user in stage.arguments("USER")]
    assert users
    assert users[-1].split(":")[0] not in {"root", "0"}
    created = [step for stage in lineage(stages, name) for step in stage.arguments("RUN")]
    assert any(re.search(rf"useradd .*\b{users[-1]}$", step) for step in created)
    assert len(stages[name].arguments("HEALTHCHECK")) == 1
    assert "CMD [" in stages[name].arguments("HEALTHCHECK")[0]
    assert len(stages[name].arguments("CMD")) == 1


def test_serving_refuses_pickle_and_the_network() -> None:
    settings = " ".join(dockerfile()[1]["serve"].arguments("ENV"))
    assert "MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false" in settings
    assert "HF_HUB_OFFLINE=1" in settings


def test_dependencies_are_installed_before_the_source_is_copied() -> None:
    stages = dockerfile()[1]
    for name in ("build-train", "build-serve"):
        step, text = next(step for step in stages[name].steps if step[0] != "ARG")
        assert (step, "-c constraints.txt" in text) == ("RUN", True)
        before = [text for stage in lineage(stages, name)[:-1] for text in stage.arguments("COPY")]
        assert before == ["pyproject.toml constraints.txt ./"]


def test_stages_declare_the_build_arguments_they_use() -> None:
    """Docker hands them down from the stage before, Buildah and Podman before 2025 do not."""
    arguments = {"TORCH_INDEX_URL"}
    for stage in dockerfile()[1].values():
        declared = {text.partition("=")[0] for text in stage.arguments("ARG")}
        used = {name for text in stage.arguments("RUN") for name in re.findall(r"\$\{?(\w+)", text)}
        assert used & arguments <= declared, stage.name


def test_training_runs_the_code_of_the_workspace() -> None:
    stages = dockerfile()[1]
    assert " -e " in stages["build-train"].arguments("RUN")[0]
    assert stages["train"].arguments("WORKDIR") == stages["build"].arguments("WORKDIR")
    workspace = stages["train"].arguments("WORKDIR")[0]
    assert f".:{workspace}" in compose()["services"]["worker"]["volumes"]


# --- compose.yaml -------------------------------------------------------------------------------


def test_services_build_existing_targets() -> None:
    services = compose()["services"]
    assert {"postgres", "mlflow", "prefect", "worker", "serve"} == set(services)
    targets = {service["build"]["target"] for service in services.values() if "build" in service}
    assert targets == set(FINAL_STAGES)
    arguments = {arg for s in services.values() for arg in s.get("build", {}).get("args", {})}
    declared = " ".join(text for s in dockerfile()[1].values() for text in s.arguments("ARG"))
    assert arguments
    assert all(re.search(rf"\b{argument}\b", declared) for argument in arguments)


def test_services_wait_for_services_that_report_their_health() -> None:
    services = compose()["services"]
    stages = dockerfile()[1]
    edges = {
        (name, needed, how["condition"])
        for name, service in services.items()
        for needed, how in service.get("depends_on", {}).items()
    }
    assert ("worker", "prefect", "service_healthy") in edges
    for name, needed, condition in sorted(edges):
        assert needed in services, f"{name} waits for {needed}"
        assert condition == "service_healthy"
        target = services[needed].get("build", {}).get("target")
        assert "healthcheck" in services[needed] or stages[target].arguments("HEALTHCHECK")


def test_volumes_are_declared_used_and_writable() -> None:
    spec = compose()
    mounts = [mount for s in spec["services"].values() for mount in s.get("volumes", [])]
    assert mounts
    named = {mount.split(":")[0] for mount in mounts if not mount.startswith(".")}
    assert named == set(spec["volumes"])
    for mount in mounts:
        if mount.startswith("."):
            assert (ROOT / mount.split(":")[0]).exists(), mount
    # A named volume takes its owner from the folder of the image it is mounted on.
    folders = dict(mount.split(":")[:2] for mount in mounts)
    for name in ("mlartifacts", "prefect"):
        made = dockerfile()[1]["train"].arguments("RUN")
        assert any(f" {folders[name]}" in step for step in made)
    artifacts = f"--artifacts-destination={folders['mlartifacts']}"
    assert artifacts in spec["services"]["mlflow"]["command"]
    # with Prefect's leases in it
    assert spec["services"]["prefect"]["environment"]["PREFECT_HOME"] == folders["prefect"]


def test_addresses_name_a_service_its_port_and_its_database() -> None:
    services = compose()["services"]
    addresses = [
        address
        for service in services.values()
        for value in service.get("environment", {}).values()
        for address in re.findall(
            r"(?://|@)([a-z]+):(\d+)(?:/(\w+))?", re.sub(r"\$\{[^}]*\}", "", value)
        )
    ]
    assert {host for host, _, _ in addresses} == {"postgres", "mlflow", "prefect"}
    created = set(re.findall(r"CREATE DATABASE (\w+);", read("docker/postgres-init.sql")))
    for host, port, database in addresses:
        command = " ".join(services[host].get("command", []))
        served = SERVED_BY_DEFAULT.get(host) or re.search(r"--port[ =](\d+)", command).group(1)
        assert port == served
        assert database in created if host == "postgres" else database in {"", "api"}


def test_health_checks_ask_the_port_that_is_served() -> None:
    lines = {where: " ".join(words) for where, words in commands().items()}
    for server in ("compose mlflow", "compose prefect", "Dockerfile serve"):
        command = lines.get(f"{server} command") or lines[f"{server} CMD"]
        check = lines.get(f"{server} healthcheck") or lines[f"{server} HEALTHCHECK"]
        port = re.search(r"--port[ =](\d+)", command)
        assert port is not None
        assert f"127.0.0.1:{port.group(1)}/" in check
    worker = compose()["services"]["worker"]
    port = worker["environment"]["PREFECT_WORKER_WEBSERVER_PORT"]
    assert f"127.0.0.1:{port}/health" in lines["compose worker healthcheck"]


def test_substituted_variables_are_those_of_the_example() -> None:
    used = set(re.findall(r"\$\{([A-Z0-9_]+)", read("compose.yaml")))
    documented = set(re.findall(r"^([A-Z0-9_]+)=", read(".env.example"), flags=re.M))
    assert "POSTGRES_PASSWORD" in used
    assert used == documented


def test_server_of_prompts_lets_in_only_who_has_a_token() -> None:
    command = json.loads(dockerfile()[1]["serve"].arguments("CMD")[0])
    options = dict(word.removeprefix("--").split("=") for word in command if "=" in word)
    service = compose()["services"]["serve"]
    (name,) = service["secrets"]
    assert options["token-file"] == f"/run/secrets/{name}"
    assert compose()["secrets"][name]["file"] == "${PTV2_TOKENS:-./.tokens}"
    assert f"store:{options['store']}" in service["volumes"]
    made = dockerfile()[1]["serve"].arguments("RUN")
    assert any(options["store"] in step for step in made)
    ignored = subprocess.run(["git", "check-ignore", "-q", ".tokens"], cwd=ROOT, check=False)
    assert ignored.returncode == 0
    assert not in_build_context(".tokens")


def test_server_of_prompts_can_write_its_store_and_nothing_that_stays() -> None:
    service = compose()["services"]["serve"]
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    # torch ends without a folder for temporary files
    assert service["tmpfs"] == ["/tmp"]
    assert len(service["volumes"]) == 1


def test_no_secret_stands_in_clear() -> None:
    secrets = re.findall(r"(?:PASSWORD: |ptv2:)(\S+)", read("compose.yaml"))
    assert len(secrets) >= 3
    assert all(secret.startswith("${POSTGRES_PASSWORD:?") for secret in secrets)
    assert re.search(r"^POSTGRES_PASSWORD=$", read(".env.example"), flags=re.M)
    ignored = subprocess.run(["git", "check-ignore", "-q", ".env"], cwd=ROOT, check=False)
    assert ignored.returncode == 0


# --- what the commands and variables name ---------------------------------------------------------


def test_commands_are_console_scripts_of_installed_packages() -> None:
    found = commands()
    assert {"ptv2", "mlflow", "prefect", "python"} == {words[0] for words in found.values()}
    scripts = {point.name for point in importlib.metadata.entry_points(group="console_scripts")}
    scripts |= {"ptv2"} | {"python"}
    for where, words in found.items():
        assert words[0] in scripts, where
        if words[0] == "python":
            compile(words[2], where, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["mlflow", "prefect", "ptv2"])
def test_commands_take_the_options_we_give(tool: str) -> None:
    starts = {
        "mlflow": ["-m", "mlflow"],
        "prefect": ["-m", "prefect"],
        "ptv2": ["-c", "from pipelines.cli import main; main()"],
    }
    lines = [words[1:] for words in commands().values() if words[0] == tool]
    lines += re.findall(rf"^\t\$\(BIN\)/{tool} (.*)$", read("Makefile"), flags=re.M)
    assert lines
    colorless = {name: value for name, value in os.environ.items() if "COLOR" not in name}
    for line in lines:
        words = shlex.split(line) if isinstance(line, str) else line
        given = {word.split("=")[0] for word in words if word.startswith("-")}
        start = [word for word in words[:2] if re.fullmatch(r"[a-z]+", word)]
        reply = subprocess.run(
            [sys.executable, *starts[tool], *start, "--help"],
            cwd=ROOT, env={**colorless, "COLUMNS": "200"},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert reply.returncode == 0, reply.stderr
        known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", reply.stdout))
        assert known
        assert given - {"--help"} <= known, start


def test_environment_variables_are_read_by_somebody() -> None:
    import prefect.settings

    names = environment_names()
    assert {"MLFLOW_TRACKING_URI", "PREFECT_API_URL", "HF_HUB_OFFLINE"} <= names
    mlflow = "".join(
        map(source_of, ("mlflow.environment_variables", "mlflow.cli", "mlflow.utils.cli_args"))
    )
    readers = {
        "MLFLOW_": lambda name: f'"{name}"' in mlflow,
        "PREFECT_": lambda name: hasattr(prefect.settings, name),
        "DVC_": lambda name: f'"{name}"' in source_of("dvc.env"),
        "HF_": lambda name: f'"{name}"' in source_of("huggingface_hub.constants"),
        "DO_NOT_TRACK": lambda name: f'"{name}"' in source_of("mlflow.telemetry.utils"),
        # Of the system, Python, pip and the postgres image: documented there.
        "PIP_": lambda name: name in {"PIP_DISABLE_PIP_VERSION_CHECK", "PIP_NO_CACHE_DIR"},
        "PYTHON": lambda name: name in {"PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"},
        "POSTGRES_": lambda name: name in {"POSTGRES_USER", "POSTGRES_PASSWORD"},
        "HOME": lambda name: name == "HOME",
        "USER": lambda name: name == "USER",
        "PATH": lambda name: name == "PATH",
    }
    for name in sorted(names):
        assert any(name.startswith(prefix) and reads(name) for prefix, reads in readers.items()), (
            name
        )
