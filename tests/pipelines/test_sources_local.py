import datetime
import hashlib
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.schema import FetchSettings
from pipelines.sources import FetchedData, fetch
from ptv2_core.errors import DataError


def read(root: Path, path: str = "d", **options: Any) -> FetchedData:
    values = {"source": "local", "path": path, **options}
    return fetch(FetchSettings.model_validate(values), root)


def refused(root: Path, path: str = "d", **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(root, path, **options)
    return str(caught.value)


def write(root: Path, name: str, content: str | bytes) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def records(fetched: FetchedData, split: str = "train") -> list[tuple[str, dict[str, Any]]]:
    return fetched.splits[split]


def test_jsonl_as_superglue_has_it(tmp_path: Path) -> None:
    path = write(tmp_path, "d/train.jsonl", '{"a": "x\u2028y", "n": {"m": 1}}\r\n\n{"a": "z"}\n')
    write(tmp_path, "d/val.jsonl", '\ufeff{"a": "w"}')
    fetched = read(tmp_path)
    assert records(fetched) == [
        ("d/train.jsonl:1", {"a": "x\u2028y", "n": {"m": 1}}),
        ("d/train.jsonl:3", {"a": "z"}),
    ]
    assert records(fetched, "dev") == [("d/val.jsonl:1", {"a": "w"})]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert fetched.provenance["files"]["train"] == {
        "file": "d/train.jsonl",
        "sha256": digest,
        "rows": 2,
    }
    assert (fetched.provenance["source"], fetched.provenance["path"]) == ("local", "d")
    assert "test" not in fetched.splits


def test_csv_with_quotes_and_line_ends_inside(tmp_path: Path) -> None:
    write(tmp_path, "d/train.csv", 'text,label\n"a, ""b""\nc",x\n\nd,y\n')
    assert records(read(tmp_path)) == [
        ("d/train.csv:2", {"text": 'a, "b"\nc', "label": "x"}),
        ("d/train.csv:5", {"text": "d", "label": "y"}),
    ]


def test_tsv_takes_quotes_as_they_are(tmp_path: Path) -> None:
    write(tmp_path, "d/train.tsv", 'text\tlabel\n"open quote\tx\nb\ty\n')
    assert [record["text"] for _, record in records(read(tmp_path))] == ['"open quote', "b"]


def test_parquet_values_become_what_json_can_hold(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": ["a", "b"],
            "score": [1.5, float("nan")],
            "day": [datetime.date(2024, 1, 2), None],
            "price": [Decimal("1.10"), None],
            "tags": [["O", "B-X"], []],
            "meta": [{"n": 1}, {"n": 2}],
        }
    )
    (tmp_path / "d").mkdir()
    pq.write_table(table, tmp_path / "d" / "train.parquet")
    (where, first), (_, second) = records(read(tmp_path))
    assert where == "d/train.parquet:1"
    assert first == {
        "text": "a",
        "score": 1.5,
        "day": "2024-01-02",
        "price": "1.10",
        "tags": ["O", "B-X"],
        "meta": {"n": 1},
    }
    assert second["score"] is None


def test_conll_columns_become_sentences(tmp_path: Path) -> None:
    text = "-DOCSTART- -X- O O\n\nEU NNP x B-ORG\nrejects\tVBZ x O\r\n\n\nPeter NNP x B-PER\n"
    write(tmp_path, "d/train.conll", text)
    assert records(read(tmp_path)) == [
        ("d/train.conll:3", {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}),
        ("d/train.conll:7", {"tokens": ["Peter"], "tags": ["B-PER"]}),
    ]
    other = read(tmp_path, token_column=1, tag_column=0)
    assert records(other)[1][1] == {"tokens": ["NNP"], "tags": ["Peter"]}


def test_a_single_file_is_the_train_split(tmp_path: Path) -> None:
    write(tmp_path, "all.txt", "EU B-ORG\n")
    fetched = read(tmp_path, "all.txt", format="conll")
    assert list(fetched.splits) == ["train"]


def test_files_may_be_named(tmp_path: Path) -> None:
    for name in ("eng.train", "eng.testa", "eng.testb"):
        write(tmp_path, f"d/{name}", "EU B-ORG\n")
    files = {"train": "eng.train", "dev": "eng.testa", "test": "eng.testb"}
    fetched = read(tmp_path, "d/", format="conll", files=files)
    assert [record[0][0] for record in fetched.splits.values()] == [
        "d/eng.train:1",
        "d/eng.testa:1",
        "d/eng.testb:1",
    ]


def test_an_absolute_path_is_taken(tmp_path: Path) -> None:
    write(tmp_path, "elsewhere/train.csv", "a\n1\n")
    fetched = read(tmp_path / "root", str(tmp_path / "elsewhere"))
    assert fetched.provenance["files"]["train"]["rows"] == 1


def test_a_missing_path_names_itself(tmp_path: Path) -> None:
    assert (
        refused(tmp_path)
        == "expected a file or folder at d, found nothing there; mend fetch.path or fetch.files"
    )


def test_no_train_split_says_what_was_looked_for_and_found(tmp_path: Path) -> None:
    write(tmp_path, "d/dev.jsonl", "{}")
    message = refused(tmp_path)
    assert "no train split in d; looked for train.jsonl, train.ndjson, train.csv" in message
    assert "found dev.jsonl" in message
    assert "looked for train.csv, found" in refused(tmp_path, format="csv")


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("train.jsonl", "train.csv"), "train"),
        (("train.jsonl", "dev.jsonl", "validation.jsonl"), "dev"),
    ],
)
def test_a_split_under_two_names_is_refused(
    names: tuple[str, ...], split: str, tmp_path: Path
) -> None:
    for name in names:
        write(tmp_path, f"d/{name}", "{}")
    message = refused(tmp_path)
    assert message.startswith(f"expected one file for the {split} split, found d/")
    assert all(f"d/{name}" in message for name in names[-2:])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"files": {"train": "no.csv"}}, "expected a file at d/no.csv, found nothing there"),
        ({"files": {"train": "a.csv", "dev": "a.csv"}}, "expected different files for"),
        ({"files": {"train": "a.odd"}}, "cannot tell the format of d/a.odd from its name"),
        ({"path": "d/a.csv", "files": {"train": "a.csv"}}, "expected a folder at d/a.csv"),
        ({"files": {"train": "sub"}}, "expected a file at d/sub"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    options: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    write(tmp_path, "d/a.csv", "x\n1\n")
    write(tmp_path, "d/a.odd", "x\n1\n")
    (tmp_path / "d" / "sub").mkdir()
    assert expected in refused(tmp_path, **options)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("train.jsonl", b"", "d/train.jsonl: the file is empty; put records into it, or remove it"),
        ("train.jsonl", b"\n\n", "d/train.jsonl: the file holds no records"),
        ("train.csv", b"a,b\n", "d/train.csv: the file holds no records"),
        (
            "train.jsonl",
            b'{"a": 1}\n{"a": "\xff"}\n',
            "d/train.jsonl:2: expected UTF-8, but byte 8 of the line is 0xff",
        ),
        ("train.csv", "a,b\n1,2\n".encode("utf-16"), "looks like UTF-16"),
        ("train.jsonl", b'{"a": 1\n', "d/train.jsonl:1, column 8: not valid JSON: Expecting ','"),
        ("train.jsonl", b"[1]\n", "d/train.jsonl:1: expected a JSON object on each line, got an a"),
        ("train.jsonl", b'"a"\n', "got text"),
        ("train.jsonl", b"null\n", "got null"),
        ("train.jsonl", b"3\n", "got a number"),
        ("train.jsonl", b'{"a": 1, "a": 2}\n', "d/train.jsonl:1: not usable JSON: the key 'a' is "),
        ("train.jsonl", b'{"a": NaN}\n', "NaN is not JSON; write null"),
        ("train.jsonl", b'{"a": "\\ud800"}\n', "half of a surrogate pair"),
        ("train.jsonl", b"[" * 100_000, "d/train.jsonl:1: not usable JSON"),
        (
            "train.csv",
            b"a,b\n1,2\n3\n",
            "d/train.csv:3: expected 2 fields, as in the header, got 1",
        ),
        ("train.csv", b"a,a\n1,2\n", "d/train.csv:1: the header has 'a' twice"),
        (
            "train.csv",
            b'a,b\n1,2\n"x,3\n4,5\n',
            "d/train.csv:3: unexpected end of data; is a quote",
        ),
        (
            "train.tsv",
            b"a\tb\n1\t2\t3\n",
            "d/train.tsv:2: expected 2 fields, as in the header, got",
        ),
        ("train.conll", b"a B-X\nb\n", "d/train.conll:2: expected 2 columns, as on the first line"),
        ("train.conll", b"a\nb\n", "expected the token and its tag in different columns"),
        ("train.parquet", b"PAR1 and no more", "d/train.parquet: not a readable Parquet file"),
    ],
)
def test_a_broken_file_is_one_error_with_its_place(
    name: str, content: bytes, expected: str, tmp_path: Path
) -> None:
    write(tmp_path, f"d/{name}", content)
    assert expected in refused(tmp_path)


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    write(tmp_path, "d/train.conll", "a B-X\n")
    message = refused(tmp_path, tag_column=5)
    assert message == "d/train.conll:1: expected a column 5 (tag_column), got 2 columns"


def test_bytes_in_parquet_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "d" / "train.parquet")
    assert "d/train.parquet:1: holds bytes, which JSON cannot" in refused(tmp_path)


def test_ten_problems_of_each_file_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    write(tmp_path, "d/train.jsonl", "{\n" * 25 + "{}\n")
    write(tmp_path, "d/test.csv", "a,b\n1\n")
    message = refused(tmp_path)
    assert message.count("d/train.jsonl:") == 11
    assert "d/train.jsonl: and 15 more problems in this file" in message
    assert "d/test.csv:2: expected 2 fields" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_one_error(tmp_path: Path) -> None:
    write(tmp_path, "d/train.jsonl", "{}").chmod(0)
    assert "cannot read d/train.jsonl: Permission denied" in refused(tmp_path)
