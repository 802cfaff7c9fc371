"""pyproject.toml, constraints.txt, Makefile, .ci/run and the documents agree with each other."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ptv2_core.model.backbones.families import TESTED_VERSIONS

ROOT = Path(__file__).resolve().parents[1]
MAKE_TARGETS = {
    "setup",
    "demo",
    "test",
    "test-all",
    "test-versions",
    "test-faults",
    "check",
    "format",
    "bench",
    "bench-train",
    "bench-sweep",
    "bench-serve",
    "bench-load",
    "bench-soak",
    "up",
    "containers",
    "clean",
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pyproject() -> dict[str, Any]:
    return tomllib.loads(read("pyproject.toml"))


def minor(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def extras_of_make() -> str:
    (extras,) = re.findall(r"^EXTRAS := ([a-z,]+)$", read("Makefile"), flags=re.M)
    assert "-e '.[$(EXTRAS)]'" in read("Makefile")
    return str(extras)


def run(*words: str) -> str:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout


def test_extras_that_are_installed_exist() -> None:
    groups = [*re.findall(r"\.\[([a-z,]+)\]", read("Dockerfile")), extras_of_make()]
    named = {extra for group in groups for extra in group.split(",")}
    # a cluster of Ray and libraries for a card are for those who have one
    named |= {"ray", "quantized"}
    assert named == set(pyproject()["project"]["optional-dependencies"])


def test_constraints_lock_every_dependency_within_its_range() -> None:
    lines = [line for line in read("constraints.txt").splitlines() if not line.startswith("#")]
    assert len(lines) > 100
    # Names and exact versions: no hash, address or build, so that the file fits every machine.
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.!]+", line)]
    locked = {canonicalize_name(name): version for name, version in (x.split("==") for x in lines)}
    project = pyproject()["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(text) for group in groups for text in group]
    assert len(requirements) > 20
    for requirement in requirements:
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} and {version}"


def test_versions_of_transformers_that_are_tested_are_those_that_are_allowed() -> None:
    (spec,) = (text for text in pyproject()["project"]["dependencies"] if "transformers" in text)
    (locked,) = re.findall(r"^transformers==(\d+\.\d+)\.", read("constraints.txt"), flags=re.M)
    oldest, newest = TESTED_VERSIONS
    assert spec == f"transformers>={oldest}"
    # the lock may wait for others, such as PEFT, to follow the newest
    assert minor(oldest) <= minor(locked) <= minor(newest)
    # `make test-versions` gives each an environment with the same extras
    (extras,) = re.findall(r'^EXTRAS = "([a-z,]+)"$', read("noxfile.py"), flags=re.M)
    assert extras == extras_of_make()
    tests = re.findall(r'^    "(tests/.+)",$', read("noxfile.py"), flags=re.M)
    assert "tests/core" in tests
    assert all((ROOT / name).exists() for name in tests)


def test_the_command_is_declared() -> None:
    assert pyproject()["project"]["scripts"] == {"ptv2": "pipelines.cli:main"}


def test_every_dependency_says_who_uses_it() -> None:
    lines = [
        line
        for line in read("pyproject.toml").splitlines()
        if re.match(r'    "[\w-]+[<>=~]=', line)
    ]
    assert len(lines) > 20
    assert not [line for line in lines if "# used by: " not in line]


def test_make_prints_its_targets() -> None:
    listed = set(re.findall(r"^  make ([a-z-]+) +\S", run("make"), flags=re.M))
    assert listed - {"help"} == MAKE_TARGETS


@pytest.mark.parametrize("target", sorted(MAKE_TARGETS))
def test_make_knows_how_to_reach_each_target(target: str) -> None:
    assert run("make", "--dry-run", target).strip()


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = run("bash", ".ci/run", "--command").strip()
    assert command in read("README.md").splitlines()
    tool, target = command.split()
    assert (tool, target) == ("make", "test")
    assert "make demo" in read("README.md")


def test_targets_named_in_the_documents_exist() -> None:
    text = "".join(map(read, ("README.md", "CONTRIBUTING.md", "compose.yaml")))
    named = set(re.findall(r"(?:`|^#?\s*|\| )make ([a-z-]+)", text, flags=re.M))
    assert {"test", "setup", "up"} <= named
    assert named <= MAKE_TARGETS


def test_modules_that_make_runs_exist() -> None:
    modules = set(re.findall(r"python -m (\w+)", read("Makefile"))) - {"pip", "pytest", "venv"}
    assert modules == {"benchmarks"}
    assert (ROOT / "benchmarks" / "__main__.py").is_file()
