from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import GitRefInfo, GitRefs

from pipelines.errors import TemporaryError
from pipelines.sources.hub import read_pin
from pipelines.sources.hub_pin import Pinned, pin
from ptv2_core.errors import DataError

NEWEST = "a" * 40
CONVERTED = "b" * 40
OLD = "c" * 40
TEXT = (
    '# where it is\ndataset = "me/toy"\nconfig = "x"  # one of two\n\n[splits]\ntrain = "train"\n'
)


@dataclass
class FakeHub:
    """A hub with one data set, or with an error."""

    files: list[str] = field(default_factory=lambda: ["README.md", "x/train-0.parquet"])
    converts: bool = True
    error: Exception | None = None
    asked: list[tuple[str, str]] = field(default_factory=list)

    def list_repo_refs(self, repo_id: str, *, repo_type: str) -> GitRefs:
        self.asked.append((repo_id, repo_type))
        if self.error:
            raise self.error
        other = GitRefInfo(name="other", ref="refs/heads/other", target_commit=OLD)
        main = GitRefInfo(name="main", ref="refs/heads/main", target_commit=NEWEST)
        copy = GitRefInfo(name="parquet", ref="refs/convert/parquet", target_commit=CONVERTED)
        return GitRefs(branches=[other, main], converts=[copy] if self.converts else [], tags=[])

    def list_repo_files(self, repo_id: str, *, repo_type: str) -> list[str]:
        return self.files


def pin_file(folder: Path, text: str = TEXT) -> Path:
    path = folder / "toy.toml"
    path.write_text(text)
    return path


def test_pin_writes_the_newest_commit_and_keeps_the_rest(tmp_path: Path) -> None:
    path, hub = pin_file(tmp_path), FakeHub()
    done = pin(path, hub)
    assert done == Pinned(dataset="me/toy", ref="main", revision=NEWEST, previous=None)
    assert hub.asked == [("me/toy", "dataset")]
    config = 'config = "x"  # one of two\n'
    assert path.read_text() == TEXT.replace(config, f'{config}revision = "{NEWEST}"\n')
    assert read_pin(path, "toy.toml", tmp_path).revision == NEWEST


def test_pin_takes_the_parquet_copy_of_a_loading_script(tmp_path: Path) -> None:
    path = pin_file(tmp_path)
    done = pin(path, FakeHub(files=["toy.py", "README.md"]))
    assert (done.ref, done.revision) == ("refs/convert/parquet", CONVERTED)
    # a script of another name is not what `datasets` would run
    assert pin(path, FakeHub(files=["convert.py"]), update=True).revision == NEWEST
    with pytest.raises(DataError, match="is a loading script, which `datasets` no longer runs"):
        pin(path, FakeHub(files=["toy.py"], converts=False), update=True)


def test_pin_replaces_a_commit_only_when_asked(tmp_path: Path) -> None:
    text = TEXT.replace("\n\n", f'\nrevision = "{OLD}"\n\n')
    path = pin_file(tmp_path, text)
    with pytest.raises(DataError, match=f"is pinned to {OLD} already; --update"):
        pin(path, FakeHub())
    assert path.read_text() == text
    done = pin(path, FakeHub(), update=True)
    assert (done.revision, done.previous) == (NEWEST, OLD)
    assert path.read_text() == text.replace(OLD, NEWEST)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dataset = ", "not valid TOML"),
        ("", "dataset: expected the name of a data set, got None"),
        ('dataset = "me/toy"\n', "splits: expected a table"),
        ('datset = "x"\ndataset = "me/toy"\n[splits]\ntrain = "t"\n', "did you mean 'dataset'"),
    ],
)
def test_pin_refuses_a_wrong_file_and_leaves_it(text: str, expected: str, tmp_path: Path) -> None:
    path = pin_file(tmp_path, text)
    with pytest.raises(DataError) as caught:
        pin(path, FakeHub())
    assert expected in str(caught.value)
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_pin_of_a_file_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a pin file at .*no.toml, found nothing"):
        pin(tmp_path / "no.toml", FakeHub())


def test_pin_says_whether_trying_again_may_help(tmp_path: Path) -> None:
    path = pin_file(tmp_path)
    missing = RepositoryNotFoundError("404", response=Mock())
    with pytest.raises(DataError, match="expected a data set on the hub, got 'me/toy'") as caught:
        pin(path, FakeHub(error=missing))
    assert not isinstance(caught.value, TemporaryError)
    for error in (OfflineModeIsEnabled("offline"), HTTPError("no route")):
        with pytest.raises(TemporaryError, match="cannot reach me/toy.*HF_HUB_OFFLINE"):
            pin(path, FakeHub(error=error))
    assert path.read_text() == TEXT
