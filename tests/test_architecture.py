"""The import rules of docs/design.md, read from the code."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ptv2_core.model.backbones.families import model_types

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ptv2_core", "pipelines", "ptv2_serving")
CORE_VENDORS = {"numpy", "torch", "transformers", "safetensors"}

# vendor -> the only modules that may import it
VENDORS = {
    "prefect": {
        "pipelines.compare_flow",
        "pipelines.flows",
        "pipelines.prefect_session",
        "pipelines.sweep.engines",
        "pipelines.sweep.flow",
        "pipelines.sweep.pool",
        "pipelines.sweep.trial_flow",
        "pipelines.watch_flow",
    },
    "dvc": {"pipelines.dag"},
    "optuna": {
        "pipelines.study",
        "pipelines.study_plots",
        "pipelines.study_pruners",
        "pipelines.sweep.proxy",
        "pipelines.sweep.storages",
        "pipelines.sweep.trials",
    },
    "cryptography": {"ptv2_serving.objects", "ptv2_serving.signing", "ptv2_serving.store"},
    "yaml": {"pipelines.apply_yaml", "pipelines.settings"},
    "datasets": {"pipelines.sources.hub"},
    "mlflow": {
        "pipelines.mlflow_sweep",
        "pipelines.registry",
        "pipelines.mlflow_model",
        "pipelines.mlflow_runs",
        "ptv2_serving.audit",
        "ptv2_serving.control",
        "ptv2_serving.resolving",
        "ptv2_serving.sources",
        "ptv2_serving.tracking",
        "ptv2_serving.wishes",
    },
}

# package of the core -> packages of the core that it may import
CORE_ARROWS = {
    "errors": set[str](),
    "bounded": {"errors"},
    "config": {"errors"},
    "files": {"errors"},
    "machine": set[str](),
    "parallel": set[str](),
    "data": {"errors", "config", "files"},
    "model": {"errors", "config", "files", "data.tasks"},
    "manifest": {"errors", "bounded", "config", "files", "data.tasks"},
    "artifact": {"errors", "bounded", "config", "files", "manifest", "data.tasks", "model"},
    "interchange": {
        "errors",
        "bounded",
        "config",
        "files",
        "manifest",
        "artifact",
        "data",
        "model",
        "evaluation",
    },
    "evaluation": {
        "errors",
        "config",
        "files",
        "parallel",
        "manifest",
        "data",
        "model",
        "artifact",
    },
    "training": {"errors", "config", "files", "parallel", "data", "model", "evaluation"},
}


def modules(*packages: str) -> dict[str, Path]:
    """Return the modules of packages by name."""
    found = {}
    for package in packages:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = file
    return found


def imports(file: Path) -> Iterator[str]:
    """Yield every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_architecture_has_modules_to_check() -> None:
    assert len(modules("ptv2_core")) > 20
    assert len(modules("pipelines")) > 15
    assert len(modules("ptv2_serving")) > 1


def test_core_imports_only_its_four_vendors() -> None:
    allowed = CORE_VENDORS | {"ptv2_core"} | set(sys.stdlib_module_names)
    for name, file in modules("ptv2_core").items():
        foreign = {found.split(".")[0] for found in imports(file)} - allowed
        assert not foreign, f"{name} imports {foreign}"


def test_core_arrows_go_down() -> None:
    seen = set()
    for name, file in modules("ptv2_core").items():
        parts = name.split(".")
        if len(parts) == 1:
            continue
        seen.add(parts[1])
        allowed = CORE_ARROWS[parts[1]] | {parts[1]}
        for found in imports(file):
            if found.startswith("ptv2_core."):
                target = found.removeprefix("ptv2_core.")
                is_allowed = any(f"{target}.".startswith(f"{place}.") for place in allowed)
                assert is_allowed, f"{name} imports {found}"
    assert seen == set(CORE_ARROWS)


def test_core_insides_of_transformers_are_in_one_place() -> None:
    backbones = "ptv2_core.model.backbones"
    for name, file in modules("ptv2_core").items():
        found = {entry for entry in imports(file) if entry.startswith("transformers.")}
        if name.startswith(backbones) or name == "ptv2_core.model.attention":
            continue
        assert found <= {"transformers.BatchEncoding", "transformers.PreTrainedTokenizerBase"}, name


def test_architectures_are_named_in_one_place() -> None:
    names = "|".join(map(re.escape, model_types()))
    # `bert-large` is a set of the paper's settings, and no architecture
    named = re.compile(rf"(?<![\w-])({names})(?![\w-])")
    inside = ("ptv2_core.model.backbones.", "ptv2_core.model.attention")
    found = {
        f"{name}: {word!r}"
        for name, file in modules(*PACKAGES).items()
        if not name.startswith(inside)
        for word in _words(file)
        if named.search(word)
    }
    assert not found
    assert any(map(named.search, _words(modules("ptv2_core")[f"{inside[0]}families"])))


def _words(file: Path) -> Iterator[str]:
    """Yield the names and strings of a file, docstrings left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    # a string that stands alone is a docstring
    told = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in told:
            yield node.value
        for key in ("id", "attr", "arg", "name"):
            word = getattr(node, key, None)
            if isinstance(word, str):
                yield word


@pytest.mark.parametrize("vendor", sorted(VENDORS))
def test_vendor_is_known_to_its_modules_alone(vendor: str) -> None:
    users = {
        name
        for name, file in modules(*PACKAGES).items()
        if any(found.split(".")[0] == vendor for found in imports(file))
    }
    assert users
    assert users <= VENDORS[vendor]


def test_environment_is_read_in_settings_alone() -> None:
    readers = {
        name
        for name, file in modules(*PACKAGES).items()
        if {"os.environ", "os.getenv"} & set(_attributes(file))
    }
    assert readers == {"pipelines.settings"}


def _attributes(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


ADAPTERS = ("dag", "study", "registry")


def test_adapters_do_not_import_each_other() -> None:
    files = modules("pipelines")
    for adapter in ADAPTERS:
        others = {f"pipelines.{other}" for other in (*ADAPTERS, "flows") if other != adapter}
        for found in imports(files[f"pipelines.{adapter}"]):
            assert not any(f"{found}.".startswith(f"{other}.") for other in others), found


def test_serving_knows_nothing_of_the_pipelines() -> None:
    forbidden = {"pipelines", "prefect", "dvc", "optuna", "datasets"}
    for name, file in modules("ptv2_serving").items():
        assert not {found.split(".")[0] for found in imports(file)} & forbidden, name


def test_nothing_imports_tests() -> None:
    for name, file in modules(*PACKAGES).items():
        assert not any(found.split(".")[0] == "tests" for found in imports(file)), name


def loaded_by(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has after running `code`."""
    script = f"import sys\n{code}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(done.stdout.split())


def test_help_loads_neither_torch_nor_prefect() -> None:
    code = (
        "import contextlib, io\n"
        "from pipelines.cli import main\n"
        "sys.argv = ['ptv2', '--help']\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):\n"
        "    main()\n"
        "assert 'register' in out.getvalue()"
    )
    loaded = loaded_by(code)
    assert "typer" in loaded
    heavy = {"torch", "prefect", "transformers", "mlflow", "optuna", "dvc", "datasets", "pydantic"}
    assert not loaded & heavy


def test_tasks_and_examples_load_no_torch() -> None:
    loaded = loaded_by(
        "import ptv2_core.data.tasks, ptv2_core.data.examples, ptv2_core.data.parsing"
    )
    assert "ptv2_core" in loaded
    assert not loaded & {"torch", "transformers", "numpy"}


@pytest.mark.slow
def test_stages_load_no_library_that_they_do_not_use() -> None:
    loaded = loaded_by("import pipelines.stages.register, pipelines.registry")
    assert "ptv2_core" in loaded
    assert not loaded & {"torch", "transformers", "optuna", "scipy"}
    loaded = loaded_by("import pipelines.stages.train")
    assert "torch" in loaded
    assert "optuna" not in loaded


def test_core_imports_without_the_orchestration() -> None:
    blocked = ("mlflow", "prefect", "dvc", "optuna", "datasets", "pydantic", "typer", "rich")
    names = [name for name in modules("ptv2_core") if name]
    code = "\n".join(
        [f"sys.modules.update(dict.fromkeys({blocked!r}))", *(f"import {name}" for name in names)]
    )
    assert "torch" in loaded_by(code)
