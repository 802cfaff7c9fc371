"""Tiny backbones, saved once for all tests of the core."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.core.family_parts import tiny_family
from tests.tiny import tiny_backbone


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a model type to the folder of its tiny backbone."""
    made: dict[str, Path] = {}

    def folder(model_type: str = "bert") -> Path:
        if model_type not in made:
            made[model_type] = tiny_backbone(tmp_path_factory.mktemp(model_type), model_type)
        return made[model_type]

    return folder


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a case of `family_parts` to the folder of its tiny backbone."""
    made: dict[str, Path] = {}

    def folder(case: str) -> Path:
        if case not in made:
            made[case] = tiny_family(tmp_path_factory.mktemp(case), case)
        return made[case]

    return folder
