"""The demo source: its three data sets are honest, and a broken grammar is named."""

import hashlib
import json
import re
from collections import Counter
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from pipelines.sources import demo
from ptv2_core.errors import DataError

GRAMMARS = Path(__file__).parents[2] / "demo"
NAMES = ("intents", "entailment", "slots")
DIGESTS = {
    "intents": "8787628b405d7f8f041128d0f3a322f1d3cc2ae864dc1e8ab07880c2d683c3eb",
    "entailment": "f19e070d522c3ba39398989aa5b8eb869710d7b724d6a92e1ca174636be5b30d",
    "slots": "4fa14f9992b9bab3bee6a9b2591f19b34ab095e75b00ec42a39cc11f1f8a8c59",
}
"""sha256 of each data set as JSON: another digest is another data set, on purpose or not."""

SMALL = """
kind = "intents"
seed = 1
labels = ["go", "stay"]
[train]
rows = 2
templates = ["{want}, not {other}"]
values = {go = ["leave"], stay = ["remain"]}
[dev]
rows = 2
templates = ["{want} rather than {other}"]
values = {go = ["depart"], stay = ["wait"]}
[test]
rows = 2
templates = ["don't {other}, {want}"]
values = {go = ["go away"], stay = ["stay here"]}
"""


@cache
def rows(name: str) -> dict[str, list[dict[str, Any]]]:
    return demo.generate(GRAMMARS / f"{name}.toml")


@cache
def grammar(name: str) -> demo.Grammar:
    return demo.read_grammar(GRAMMARS / f"{name}.toml")


def text_of(record: dict[str, Any]) -> str:
    if "tokens" in record:
        return " ".join(record["tokens"])
    return record["text"] if "text" in record else f"{record['premise']} | {record['hypothesis']}"


def digest(data: dict[str, list[dict[str, Any]]]) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def write(folder: Path, text: str) -> Path:
    path = folder / "grammar.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", NAMES)
def test_same_rows_every_time_and_everywhere(name: str) -> None:
    again = demo.generate(GRAMMARS / f"{name}.toml")
    assert digest(again) == digest(rows(name)) == DIGESTS[name]


@pytest.mark.parametrize("name", NAMES)
def test_splits_have_the_rows_asked_for_and_no_text_twice(name: str) -> None:
    data = rows(name)
    assert list(data) == ["train", "dev", "test"]
    assert {split: len(data[split]) for split in data} == {
        split: content.rows for split, content in grammar(name).splits.items()
    }
    assert len(data["train"]) >= 1000
    assert min(len(data["dev"]), len(data["test"])) >= 200
    texts = [text_of(record).casefold() for records in data.values() for record in records]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize(
    ("name", "keys", "num_labels"),
    [("intents", ["text", "label"], 12), ("entailment", ["premise", "hypothesis", "label"], 2)],
)
def test_labels_are_complete_and_balanced(name: str, keys: list[str], num_labels: int) -> None:
    for records in rows(name).values():
        assert all(list(record) == keys for record in records)
        counts = Counter(record["label"] for record in records)
        assert set(counts) == set(grammar(name).names)
        assert len(counts) == num_labels
        assert min(counts.values()) > 0.8 * max(counts.values())


def test_tags_are_iob2_and_every_slot_is_in_every_split() -> None:
    assert len(grammar("slots").names) == 8
    for records in rows("slots").values():
        assert all(list(record) == ["tokens", "tags"] for record in records)
        for record in records:
            assert len(record["tokens"]) == len(record["tags"])
            for before, tag in zip(["O", *record["tags"]], record["tags"], strict=False):
                assert tag == "O" or tag[:2] in ("B-", "I-")
                assert tag[:2] != "I-" or before in (f"B-{tag[2:]}", tag)
        found = {tag[2:] for record in records for tag in record["tags"] if tag != "O"}
        assert found == set(grammar("slots").names)


@pytest.mark.parametrize("name", NAMES)
def test_no_template_and_no_value_of_one_split_is_in_another(name: str) -> None:
    splits = grammar(name).splits.values()
    for one, other in combinations(splits, 2):
        values = [{v for values in split.values.values() for v in values} for split in (one, other)]
        assert not values[0] & values[1]
        sentences = [
            {sentence for template in split.templates for sentence in demo.sentences(template)}
            for split in (one, other)
        ]
        assert not sentences[0] & sentences[1]


def test_generated_spans_of_one_split_are_not_in_another() -> None:
    spans: dict[str, set[str]] = {}
    for split, records in rows("slots").items():
        spans[split] = set()
        for record in records:
            marked = " ".join(
                f"<{tag[0]}>{token}"
                for token, tag in zip(record["tokens"], record["tags"], strict=True)
            )
            found = re.findall(r"<B>\S+(?: <I>\S+)*", marked)
            spans[split] |= {re.sub("<[BI]>", "", span) for span in found}
    for one, other in combinations(spans.values(), 2):
        assert not one & other


@pytest.mark.parametrize("name", NAMES)
def test_every_generated_row_comes_from_its_own_split(name: str) -> None:
    for split, content in grammar(name).splits.items():
        every = {v for values in content.values.values() for v in values}
        filler = f"(?:{'|'.join(sorted(map(re.escape, every), key=len, reverse=True))})"
        several = f"{filler}(?:(?:, {filler})* or {filler})?"
        patterns = [
            re.compile(several.join(map(re.escape, re.split(r"\{[^}]*\}", sentence))))
            for template in content.templates
            for sentence in demo.sentences(template)
        ]
        for record in rows(name)[split][:30]:
            for text in text_of(record).split(" | "):
                assert any(pattern.fullmatch(text) for pattern in patterns), text


def test_names_in_a_row_get_different_values() -> None:
    cities = grammar("slots").splits["train"].values["city"]
    for record in rows("slots")["train"]:
        text = text_of(record)
        assert not any(re.search(rf"\b{city}\b.*\b{city}\b", text) for city in cities)


def test_small_grammar(tmp_path: Path) -> None:
    data = demo.generate(write(tmp_path, SMALL))
    assert sorted(map(text_of, data["test"])) == [
        "don't go away, stay here",
        "don't stay here, go away",
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seed = 1\n", "", "seed: missing key"),
        ("seed = 1\n", "seed = 1\nspeed = 2\n", "speed: unknown key"),
        ("seed = 1\n", "seed = true\n", "seed: expected an integer, got True"),
        ('kind = "intents"', 'kind = "poems"', "kind: expected one of .*got 'poems'"),
        ('labels = ["go", "stay"]', "labels = []", "labels: expected a list of different names"),
        ("[dev]\nrows = 2", "[dev]\nrows = 0", r"dev\.rows: expected an integer above 0, got 0"),
        ("[dev]\nrows = 2\n", "[dev]\n", "dev: expected a table of rows, templates, values"),
        ('go = ["depart"]', "go = []", r"dev\.values\.go: expected different texts"),
        ('go = ["depart"]', 'go = ["wait"]', r"dev\.values: 'wait' stands in the lists of two"),
        ('go = ["depart"], ', "", r"dev\.values\.go: missing list of the label 'go'"),
        ("{want} rather", "{want:wish} rather", r"dev\.templates\[0\]: unknown list 'wish'"),
        ("{want} rather", "{Want} rather", r"dev\.templates\[0\]: expected placeholders like"),
        ("{want} rather", "go rather", r"dev\.templates\[0\]: expected \{want\}"),
        ("{want} rather than", "{want}, not", r"dev\.templates\[0\]: .*stands in train\.templates"),
        ('go = ["depart"]', 'go = ["Remain"]', r"dev\.values\.go: .*stands in train\.values\.stay"),
        ("[dev]\nrows = 2", "[dev]\nrows = 3", r"dev\.rows: expected 3 different rows.*only 2"),
        ("[dev]", "[dev", "expected a grammar in TOML"),
    ],
)
def test_broken_grammar_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SMALL
    path = write(tmp_path, SMALL.replace(old, new))
    with pytest.raises(DataError, match=re.escape(str(path)) + ".*" + message):
        demo.generate(path)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL.replace("seed = 1\n", "").replace("rows = 2", "rows = -1"))
    with pytest.raises(DataError, match="4 problems"):
        demo.generate(path)


def test_absent_grammar_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent.toml: expected a grammar"):
        demo.generate(tmp_path / "absent.toml")


def test_entailment_template_needs_every_label(tmp_path: Path) -> None:
    text = (GRAMMARS / "entailment.toml").read_text(encoding="utf-8")
    path = write(tmp_path, text.replace("\nnot_entailment = ", "\nmaybe = ", 1))
    with pytest.raises(DataError, match=r"train\.templates\[0\]: expected lists named entailment"):
        demo.generate(path)


def test_slot_placeholders_stand_alone(tmp_path: Path) -> None:
    text = (GRAMMARS / "slots.toml").read_text(encoding="utf-8")
    path = write(tmp_path, text.replace("{to_city:city} this week", "{to_city:city}, now", 1))
    with pytest.raises(DataError, match=r"train\.templates\[0\]: .*between spaces"):
        demo.generate(path)


def test_a_list_has_a_value_for_each_name(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL.replace("{want} rather", "{a:stay} {b:stay} {want} rather"))
    with pytest.raises(DataError, match=r"dev\.templates\[0\]: .*2 values of 'stay', got 1"):
        demo.generate(path)
