import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from pipelines.errors import TemporaryError
from pipelines.schema import FetchSettings
from pipelines.sources import FetchedData, fetch
from ptv2_core.errors import DataError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPLITS = '[splits]\ntrain = "train"\n'


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pin(root: Path, text: str) -> None:
    (root / "pin.toml").write_text(text)


def read(root: Path) -> FetchedData:
    settings = FetchSettings.model_validate({"source": "hub", "path": "pin.toml"})
    return fetch(settings, root)


def refused(root: Path, text: str | None = None) -> str:
    if text is not None:
        pin(root, text)
    with pytest.raises(DataError) as caught:
        read(root)
    return str(caught.value)


def mirror(root: Path, split: str, columns: dict[str, list[Any]]) -> None:
    """Write one split of a local mirror with typed features, as the hub's Parquet files have."""
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "B-X"])),
            "meta": {"kind": datasets.ClassLabel(names=["k0", "k1"])},
        }
    )
    (root / "mirror").mkdir(exist_ok=True)
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(root / "mirror" / f"{split}.parquet")


def test_class_numbers_become_names_wherever_they_are(tmp_path: Path) -> None:
    columns = {
        "text": ["a", "b"],
        "label": [1, 0],
        "tags": [[0, 1], []],
        "meta": [{"kind": 1}, {"kind": 0}],
    }
    mirror(tmp_path, "train", columns)
    mirror(tmp_path, "validation", {key: values[:1] for key, values in columns.items()})
    pin(tmp_path, f'dataset = "mirror"\n{SPLITS}dev = "validation"\n')
    fetched = read(tmp_path)
    assert fetched.splits["train"] == [
        (
            "mirror#train:1",
            {"text": "a", "label": "yes", "tags": ["O", "B-X"], "meta": {"kind": "k1"}},
        ),
        ("mirror#train:2", {"text": "b", "label": "no", "tags": [], "meta": {"kind": "k0"}}),
    ]
    assert [where for where, _ in fetched.splits["dev"]] == ["mirror#validation:1"]
    digest = hashlib.sha256((tmp_path / "pin.toml").read_bytes()).hexdigest()
    assert fetched.provenance == {
        "source": "hub",
        "path": "pin.toml",
        "files": {
            "train": {"file": "pin.toml", "sha256": digest, "rows": 2, "split": "train"},
            "dev": {"file": "pin.toml", "sha256": digest, "rows": 1, "split": "validation"},
        },
        "dataset": "mirror",
        "config": None,
        "revision": None,
    }
    json.dumps(fetched.splits)


def test_a_hidden_label_is_refused_with_its_place(tmp_path: Path) -> None:
    columns = {"text": ["a"], "label": [-1], "tags": [[]], "meta": [{"kind": 0}]}
    mirror(tmp_path, "train", columns)
    message = refused(tmp_path, f'dataset = "mirror"\n{SPLITS}')
    assert message == (
        "mirror#train:1: expected a class from 0 to 1, got -1 (the labels of this split are hidden)"
    )


def test_a_folder_of_json_lines_is_a_data_set_too(tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "train.jsonl").write_text('{"a": "x"}\n')
    pin(tmp_path, f'dataset = "mirror"\n{SPLITS}')
    assert read(tmp_path).splits["train"] == [("mirror#train:1", {"a": "x"})]
    message = refused(tmp_path, 'dataset = "mirror"\n[splits]\ntrain = "training"\n')
    assert message.startswith("pin.toml: cannot load mirror split 'training': Unknown split")
    message = refused(tmp_path, f'dataset = "mirror"\nconfig = "rte"\n{SPLITS}')
    assert "cannot load mirror rte split 'train': BuilderConfig 'rte' not found" in message
    (tmp_path / "mirror" / "train.jsonl").write_text('{"a": ')
    assert "cannot load mirror" in refused(tmp_path, f'dataset = "mirror"\n{SPLITS}')


def test_a_hub_that_cannot_be_reached_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    pin(tmp_path, f'dataset = "nobody/nothing"\nrevision = "{COMMIT}"\n{SPLITS}')
    with pytest.raises(TemporaryError, match="cannot reach nobody/nothing.*HF_HUB_OFFLINE"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dataset = ", "pin.toml: not valid TOML"),
        ("", "dataset: expected the name of a data set, got None"),
        (f'dataset = "x/y"\n{SPLITS}', "revision: expected the 40 hexadecimal digits"),
        (f'dataset = "x/y"\nrevision = "main"\n{SPLITS}', "cannot change, got 'main'"),
        (f'dataset = "."\nrevision = "{COMMIT}"\n{SPLITS}', "does not apply to a local folder"),
        (f'dataset = "x/y"\nconfig = 3\nrevision = "{COMMIT}"\n{SPLITS}', "config: expected text"),
        (f'dataset = "x/y"\nrevison = "{COMMIT}"\n{SPLITS}', "did you mean 'revision'"),
        (f'dataset = "x/y"\nrevision = "{COMMIT}"\n', "splits: expected a table such as"),
        (f'dataset = "x/y"\nrevision = "{COMMIT}"\n[splits]\ndev = "d"\n', "splits: expected a ta"),
        (
            f'dataset = "x/y"\nrevision = "{COMMIT}"\n{SPLITS}val = "v"\n',
            "splits.val: expected one",
        ),
        (f'dataset = "x/y"\nrevision = "{COMMIT}"\n{SPLITS}dev = 3\n', "splits.dev: expected one"),
    ],
)
def test_a_wrong_pin_file_is_one_error(text: str, expected: str, tmp_path: Path) -> None:
    assert expected in refused(tmp_path, text)


def test_a_missing_pin_file_is_one_error(tmp_path: Path) -> None:
    assert refused(tmp_path) == "expected a pin file at pin.toml, found nothing there"


def test_all_problems_of_a_pin_file_come_at_once(tmp_path: Path) -> None:
    message = refused(tmp_path, 'dataset = ""\nbogus = 1\n')
    assert message.startswith("4 problems in the data:")
