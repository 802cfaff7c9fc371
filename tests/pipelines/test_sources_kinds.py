"""SQuAD's JSON and semantic roles, in CoNLL-U and in columns, as local files."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.data import data_folder
from pipelines.cli import main
from pipelines.schema import FetchSettings
from pipelines.sources import FetchedData, fetch
from pipelines.sources.propositions import spans_of
from ptv2_core.errors import DataError

QUESTION = {"id": "a1", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}]}
NO_ANSWER = {"id": "a2", "question": "When?", "answers": [], "is_impossible": True}


def read(root: Path, name: str, content: str, **options: Any) -> FetchedData:
    """Fetch one file as the train split."""
    (root / name).write_text(content, encoding="utf-8")
    values = {"source": "local", "path": name, **options}
    return fetch(FetchSettings.model_validate(values), root)


def refused(root: Path, name: str, content: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(root, name, content, **options)
    return str(caught.value)


def squad(*questions: Any, context: Any = "Ann slept.") -> str:
    article = {"title": "Ann", "paragraphs": [{"context": context, "qas": list(questions)}]}
    return json.dumps({"version": "v2.0", "data": [article]})


def test_squad_gives_a_record_a_question(tmp_path: Path) -> None:
    fetched = read(tmp_path, "d.json", squad(QUESTION, NO_ANSWER))
    common = {"title": "Ann", "context": "Ann slept."}
    assert fetched.splits["train"] == [
        ("d.json#a1", {**QUESTION, **common, "is_impossible": False}),
        ("d.json#a2", {**NO_ANSWER, **common}),
    ]
    assert fetched.provenance["files"]["train"]["rows"] == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "d.json:1, column 2: not valid JSON"),
        ("[]", "d.json#data: expected a list, as SQuAD has, got None"),
        ('{"data": [1]}', "d.json#data[0]: expected an object, got 1"),
        ('{"data": [{}]}', "d.json#data[0].paragraphs: expected a list, as SQuAD has, got None"),
        (squad(context=None), "d.json#data[0].paragraphs[0]: expected context to be text, got No"),
        (squad({"answers": []}), "d.json#data[0].paragraphs[0].qas[0]: expected an id, got None"),
        (squad({"id": "x"}), "d.json#x: expected answers to be a list, got None"),
        (squad(QUESTION, QUESTION), "d.json#a1: the id is there twice; each question needs its"),
        ('{"data": NaN}', "d.json: not usable JSON: NaN is not JSON"),
        (squad({**QUESTION, "question": "\ud800"}), "d.json: holds half of a surrogate pair"),
        (squad(), "d.json: the file holds no records"),
    ],
)
def test_a_broken_squad_file_is_one_error_with_its_place(
    content: str, expected: str, tmp_path: Path
) -> None:
    message = refused(tmp_path, "d.json", content)
    assert message.startswith(expected)
    assert "\n" not in message


COLUMNS = """\
Ann NNP - B-A0 O
gave VBD give.01 B-V O
it PRP - B-A1 O
to TO - O O
Bob NNP - B-A2 B-A0
sleeping VBG sleep.01 I-A2 B-V

Hello UH -
! . -

Hm UH
"""
BRACKETS = """\
Ann NNP * - (A0*) *
gave VBD * give (V*) *
it PRP * - (A1*) *
to TO * - * *
Bob NNP (PER*) - (A2* (A0*)
sleeping VBG * sleep *) (V*)

Hello UH * -
"""
DOCUMENT = """\
#begin document (x); part 000
x 0 0 Ann NNP (TOP(S* - - - - (PERSON) (ARG0*) * (3)
x 0 1 gave VBD * give 01 1 - * (V*) * -
x 0 2 it PRP * - - - - * (ARG1*) * -
x 0 3 sleeping VBG *)) sleep 02 1 - * * (V*) -

#end document
"""
RECORDS = [
    {
        "tokens": ["Ann", "gave", "it", "to", "Bob", "sleeping"],
        "predicate": 1,
        "tags": ["B-A0", "B-V", "B-A1", "O", "B-A2", "I-A2"],
        "roleset": "give.01",
    },
    {
        "tokens": ["Ann", "gave", "it", "to", "Bob", "sleeping"],
        "predicate": 5,
        "tags": ["O", "O", "O", "O", "B-A0", "B-V"],
        "roleset": "sleep.01",
    },
]


def test_role_columns_give_a_record_a_predicate_and_count_the_rest(tmp_path: Path) -> None:
    fetched = read(tmp_path, "d.srl", COLUMNS)
    assert fetched.splits["train"] == [("d.srl:2", RECORDS[0]), ("d.srl:6", RECORDS[1])]
    assert fetched.provenance["files"]["train"]["skipped"] == {"sentences without a predicate": 2}


def test_brackets_are_read_as_the_same_roles(tmp_path: Path) -> None:
    fetched = read(tmp_path, "d.txt", BRACKETS, format="srl")
    found = [record for _, record in fetched.splits["train"]]
    assert found == [{**RECORDS[0], "roleset": "give"}, {**RECORDS[1], "roleset": "sleep"}]
    assert fetched.provenance["files"]["train"]["skipped"] == {"sentences without a predicate": 1}


def test_columns_of_conll_2012_are_known_by_their_first_line(tmp_path: Path) -> None:
    fetched = read(tmp_path, "d.srl", DOCUMENT)
    first, second = (record for _, record in fetched.splits["train"])
    assert first["tokens"] == ["Ann", "gave", "it", "sleeping"]
    assert first["tags"] == ["B-ARG0", "B-V", "B-ARG1", "O"]
    assert (first["predicate"], second["predicate"]) == (1, 3)
    assert second["tags"] == ["O", "O", "O", "B-V"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            COLUMNS.replace("gave VBD give.01 B-V O", "gave VBD give.01 O O"),
            "d.srl:1: column 4 of this sentence has no V; mark the predicate in it",
        ),
        (
            COLUMNS.replace("sleep.01", "-"),
            "d.srl:1: expected one column of roles for each of 1 marked predicates, got 2",
        ),
        (
            COLUMNS.replace("it PRP - B-A1 O", "it PRP - B-A1"),
            "d.srl:3: expected 5 columns, as on line 1, got 4",
        ),
        (
            COLUMNS + "\nI PRP - A0\nran VBD run.01 B-V\n" + "\nI PRP - B-A0\nran VBD run.01 B-V\n",
            "d.srl:13: expected a role such as B-A0, I-A0 or O, got 'A0'",
        ),
        (
            BRACKETS.replace("*) (V*)", "* (V*)"),
            "d.srl:6: the bracket of A2 is not closed",
        ),
        (
            BRACKETS.replace("it PRP * - (A1*)", "it PRP * - *)"),
            "d.srl:3: expected brackets that are opened once and closed once, such as (A0* and *)",
        ),
        (
            DOCUMENT.replace("(V*) * -", "* * -"),
            "d.srl:2: column 12 of this sentence has no V",
        ),
        ("Ann NNP\nran VBD\n", "d.srl:1: expected columns of roles at the end of a line"),
    ],
)
def test_a_bad_role_column_is_one_error_with_its_place(
    content: str, expected: str, tmp_path: Path
) -> None:
    message = refused(tmp_path, "d.srl", content)
    assert message.startswith(expected)
    assert "\n" not in message


def conllu(*rows: str) -> str:
    """Return a sentence of CoNLL-U; a row is word, head, roleset and roles."""
    lines = ["# text = ..."]
    for number, row in enumerate(rows, start=1):
        form, head, *rest = row.split()
        lines.append("\t".join([str(number), form, *"____", head, "dep", "_", "_", *rest]))
    return "\n".join(lines) + "\n\n"


SENTENCE = conllu(
    "The 2 _ _ _",
    "man 5 _ ARG0 ARG0",
    "who 4 _ R-ARG0 _",
    "slept 2 sleep.01 V _",
    "saw 0 see.01 _ V",
    "Bob 5 _ _ ARG1",
)


def test_heads_of_arguments_become_spans(tmp_path: Path) -> None:
    extra = SENTENCE.replace("5\tsaw", "4-5\tsleptsaw\n4.1\tx\n5\tsaw", 1)
    published = SENTENCE.replace("\n\n", "\t\n\n")
    none = conllu("Hello 0") + conllu("Hm 0 _")
    for content in (SENTENCE, extra, published):
        fetched = read(tmp_path, "d.conllu", content + none)
        found = [(record["predicate"], record["tags"]) for _, record in fetched.splits["train"]]
        assert found == [
            (3, ["B-ARG0", "I-ARG0", "B-R-ARG0", "B-V", "O", "O"]),
            (4, ["B-ARG0", "I-ARG0", "I-ARG0", "I-ARG0", "B-V", "B-ARG1"]),
        ]
        skipped = fetched.provenance["files"]["train"]["skipped"]
        assert skipped == {"sentences without a predicate": 2}
    where, record = read(tmp_path, "d.conllu", SENTENCE).splits["train"][1]
    assert (where, record["roleset"], record["tokens"][1]) == ("d.conllu:6", "see.01", "man")


def test_an_argument_in_pieces_is_the_piece_with_its_head() -> None:
    # a b c d: d hangs on a, c is the predicate between them
    assert spans_of([2, 0, None, 0], {0: "A0", 2: "V"}, 2) == ["B-A0", "I-A0", "B-V", "O"]
    assert spans_of([1, 0, None], {0: "A0", 2: "V"}, 2) == ["B-A0", "I-A0", "B-V"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            SENTENCE.replace("see.01\t_\tV", "see.01\t_\tARG2"),
            "d.conllu:6: column 13, of the predicate 'saw' (see.01), has no V; mark the predicate",
        ),
        (
            SENTENCE.replace("sleep.01", "_"),
            "d.conllu:2: expected one column of roles for each of 1 words with a roleset, got 2",
        ),
        (
            conllu("a 9 x.01 V"),
            "d.conllu:2: expected the number of a word or 0 as the head, got '9'",
        ),
        (
            SENTENCE.replace("\t_\tARG1", "\tARG1"),
            "d.conllu:7: expected 13 columns, as on line 2, got 12",
        ),
        ("1 a b\n", "d.conllu: the file holds no records"),
        ("1\ta\tb\n", "d.conllu:1: expected 10 columns or more, divided by tabs, as CoNLL-U has"),
        (conllu("a 0"), "d.conllu: the file holds no records; 1 sentences without a predicate"),
    ],
)
def test_a_bad_proposition_is_one_error_with_its_place(
    content: str, expected: str, tmp_path: Path
) -> None:
    message = refused(tmp_path, "d.conllu", content)
    assert message.startswith(expected)
    assert "\n" not in message


def test_fetch_says_what_gave_no_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.srl").write_text(COLUMNS)
    shipped = (Path(__file__).resolve().parents[2] / "params.yaml").read_text()
    tasks = shipped.index("\ntasks:\n")
    (tmp_path / "params.yaml").write_text(
        shipped[:tasks] + "\ntasks:\n  roles:\n    fetch: {source: local, path: d.srl}\n"
        "    prepare: {kind: srl}\n    search: {}\n    train: {}\n"
    )
    monkeypatch.setattr(
        "sys.argv", ["ptv2", "fetch", "--task", "roles", "--workspace", str(tmp_path)]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert capsys.readouterr().out.splitlines() == [
        "fetched roles: 2 train records",
        "  train: 2 sentences without a predicate gave no record",
    ]


def _propositions(name: str, format_: str) -> list[dict[str, Any]]:
    folder = data_folder() / "up-ewt-srl"
    if not (folder / name).is_file():
        pytest.skip(f"the data sets are not at {data_folder()} (PTV2_BENCH_DATA)")
    values = {"source": "local", "path": str(folder / name), "format": format_}
    fetched = fetch(FetchSettings.model_validate(values), folder)
    return [record for _, record in fetched.splits["train"]]


@pytest.mark.parametrize(
    ("columns", "published", "count", "differ"),
    [
        ("valid.txt", "en_ewt-up-dev.conllu", 4977, 1),
        ("test.txt", "en_ewt-up-test.conllu", 4799, 0),
    ],
)
def test_spans_of_universal_propositions_agree_with_ready_ones(
    columns: str, published: str, count: int, differ: int
) -> None:
    ready, ours = _propositions(columns, "srl"), _propositions(published, "conllu")
    assert len(ready) == len(ours) == count

    def arguments(record: dict[str, Any]) -> list[str]:
        # the predicate's own span is not among what is learnt
        return ["O" if tag[2:] in ("V", "C-V") else tag for tag in record["tags"]]

    for key in ("tokens", "predicate", "roleset"):
        assert [record[key] for record in ready] == [record[key] for record in ours]
    different = [
        place for place in range(count) if arguments(ready[place]) != arguments(ours[place])
    ]
    assert len(different) == differ


def test_squad_as_published_is_read_whole() -> None:
    for name, count in (("squad-v1.1", 10570), ("squad-v2.0", 6078)):
        file = data_folder() / name / "validation.json"
        if not file.is_file():
            pytest.skip(f"the data sets are not at {data_folder()} (PTV2_BENCH_DATA)")
        values = {"source": "local", "path": str(file)}
        assert (
            len(fetch(FetchSettings.model_validate(values), file.parent).splits["train"]) == count
        )
