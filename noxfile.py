"""`make test-versions`: what touches Transformers, under the oldest and the newest supported one.

Each version has an environment of its own under .nox, made once and brought up to date after that.
"""

import os
import shlex
import tomllib
from pathlib import Path

import nox
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent
EXTRAS = "pipelines,dashboard,serving,demo,dask,postgres,dev"
# Transformers says which versions of these it takes, and each of its releases says another thing
NOT_LOCKED = {"transformers", "tokenizers", "huggingface-hub"}
TESTS = (
    "tests/core",
    "tests/serving/test_engine.py",
    "tests/pipelines/test_backbones_command.py",
    "tests/pipelines/test_chain_families.py",
    "tests/pipelines/test_interchange_cli.py",
)
REPORT = "import transformers; print(transformers.__version__, end='')"

nox.needs_version = ">=2025"
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True

tested: list[str] = []


def supported() -> Requirement:
    """Return what pyproject.toml says of Transformers."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [Requirement(text) for text in project["dependencies"]]
    return next(one for one in found if one.name == "transformers")


def oldest() -> Requirement:
    """Return the lower end of that range alone."""
    (lower,) = (one.version for one in supported().specifier if one.operator == ">=")
    return Requirement(f"transformers=={lower}")


def write_constraints(path: Path) -> Path:
    """Write constraints.txt without what depends on the version of Transformers."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text(
        "".join(one for one in lines if canonicalize_name(one.split("==")[0]) not in NOT_LOCKED),
        encoding="utf-8",
    )
    return path


@nox.session
@nox.parametrize("version", ["oldest", "newest"])
def transformers(session: nox.Session, version: str) -> None:
    """Run the tests under one version of Transformers; after `--`: others, or options of pytest."""
    constraints = write_constraints(Path(session.virtualenv.location) / "constraints.txt")
    wanted = oldest() if version == "oldest" else supported()
    more = shlex.split(os.environ.get("PIP_ARGS", ""))
    # of what is there already, pip replaces only what is named here: an older Transformers
    session.install(
        "--upgrade", "--constraint", str(constraints), *more, "-e", f".[{EXTRAS}]", str(wanted)
    )
    found = session.run("python", "-c", REPORT, silent=True)
    session.log(f"Transformers {found}, the {version} of {supported()}")
    names_tests = any((ROOT / one.split("::")[0]).exists() for one in session.posargs)
    chosen = session.posargs if names_tests else [*TESTS, *session.posargs]
    session.run(
        "python", "-m", "pytest", "-n", "auto", "--dist", "loadfile", "-m", "not long", *chosen,
        env={"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    tested.append(str(found))
    session.log(f"passed under Transformers {' and '.join(tested)}")
