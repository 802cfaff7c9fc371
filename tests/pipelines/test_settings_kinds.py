"""The prepare section of each kind of task: customary fields, and keys that do not go together."""

from typing import Any, get_args

import pytest

from pipelines.checking import Found, check_section
from pipelines.extra_settings import CompareSettings, MultitaskSettings
from pipelines.schema import PrepareSettings, TaskPrepareSettings
from ptv2_core.data.fields import KIND_FIELDS, Fields
from ptv2_core.data.tasks import TaskKind

LEAST: dict[str, dict[str, Any]] = {
    "classification": {"text": "a", "label": "b"},
    "regression": {"text": "a", "label": "b"},
    "tagging": {"tokens": "a", "tags": "b"},
}


def check(model: Any = TaskPrepareSettings, **values: Any) -> tuple[Any, dict[str, str]]:
    """Return the section, or what is wrong by dotted key."""
    found: Found = []
    section = check_section(model, values, found)
    return section, {".".join(map(str, place)): message for place, message in found}


@pytest.mark.parametrize("kind", get_args(TaskKind))
def test_a_kind_needs_few_keys(kind: TaskKind) -> None:
    section, found = check(kind=kind, **LEAST.get(kind, {}))
    assert found == {}
    fields = section.record_fields().named()
    assert set(fields) >= set(KIND_FIELDS[kind].needed)
    for name, field in LEAST.get(kind, {}).items():
        assert fields[name] == field


def test_every_field_of_a_record_is_a_key() -> None:
    assert set(vars(Fields())) <= set(TaskPrepareSettings.model_fields)


def test_customary_names_are_taken_where_none_is_given() -> None:
    section, _ = check(kind="multiple_choice", text="start", choices="endings")
    fields = section.record_fields()
    assert (fields.text, fields.choices, fields.label) == ("start", ("endings",), "label")
    assert section.chosen_template() == "joined"
    assert check(kind="qa")[0].chosen_template() is None


@pytest.mark.parametrize(
    ("values", "key", "expected"),
    [
        ({"kind": "choice"}, "kind", "expected classification | regression | multiple_choice"),
        ({"kind": "regression", "text": "a"}, "label", "is required for kind: regression"),
        ({"kind": "qa", "text": "a"}, "text", "does not go with kind: qa, which reads question, "),
        ({"kind": "srl", "question": "q"}, "question", "which reads tokens, predicate and tags"),
        ({"kind": "multiple_choice", "choices": []}, "choices", "expected a list of fields, or"),
        ({"kind": "qa", "stride": 128, "max_length": 128}, "stride", "max_length (128), got 128"),
        ({"kind": "qa", "stride": -1}, "stride", "expected a whole number of tokens >= 0, got -1"),
        ({"kind": "coreference", "template": "stars"}, "template", "expected starred | prefix | r"),
        ({"kind": "srl", "template": "x"}, "template", "kind: srl, which has no choice of it"),
        ({"kind": "qa", "labels": ["a", "b"]}, "labels", "does not go with kind: qa, whose"),
        ({"kind": "multirc", "labels": ["a", "b"]}, "labels", "does not go with kind: multirc"),
        ({"kind": "srl", "labels": ["O", "O"]}, "labels", "all different, got ['O', 'O']"),
        ({"kind": "srl", "max_rows": 0}, "max_rows", "or one for each split, as {train: 1000}, g"),
        ({"kind": "srl", "max_rows": {"train": 0}}, "max_rows", "number of rows >= 1, got 0"),
        ({"kind": "srl", "max_rows": {"trian": 5}}, "max_rows.splits.trian", "did you mean 'train"),
    ],
)
def test_what_does_not_go_together_is_one_problem(
    values: dict[str, Any], key: str, expected: str
) -> None:
    section, found = check(**values)
    assert section is None
    assert list(found) == [key]
    assert expected in found[key]


def test_a_template_with_a_mask_goes_with_classification() -> None:
    given = {"kind": "classification", "text": "a", "label": "b"}
    section, found = check(**given, template="{text} It was {mask}.")
    assert not found
    assert section.chosen_template() == "{text} It was {mask}."
    assert (
        "expected a text with {text} and {mask}" in check(**given, template="{text}")[1]["template"]
    )


def test_rows_may_be_cut_in_each_split_by_itself() -> None:
    def rows(value: Any) -> list[int | None]:
        section, found = check(PrepareSettings, max_rows=value)
        assert not found
        return [section.rows_of("train"), section.rows_of("dev"), section.rows_of("test")]

    assert rows(None) == [None, None, None]
    assert rows(7) == [7, 7, 7]
    assert rows({"train": 7, "test": None}) == [7, None, None]


@pytest.mark.parametrize(
    ("model", "values", "key", "expected"),
    [
        (CompareSettings, {"train": {"ptv2": {"epoch": 1}}}, "train.ptv2.epoch", "unknown key; kn"),
        (CompareSettings, {"train": {"ptv2": {"epochs": 0}}}, "train.ptv2.epochs", "got 0"),
        (
            CompareSettings, {"train": {"ptv2": {"method": "probe"}}}, "train.ptv2.method",
            "a comparison sets this itself; leave it out",
        ),
        (
            CompareSettings, {"train": {"ptv2": {"init_from": "a"}}}, "train.ptv2.init_from",
            "a comparison sets this itself; leave it out",
        ),
        (
            MultitaskSettings, {"shared": {"a": {"tasks": ["b", "c"], "train": {"prompt": 4}}}},
            "shared.a.train.prompt", "expected a mapping of settings, got 4",
        ),
    ],
)  # fmt: skip
def test_what_is_laid_over_train_is_checked_with_the_file(
    model: Any, values: dict[str, Any], key: str, expected: str
) -> None:
    section, found = check(model, **values)
    assert section is None
    assert list(found) == [key]
    assert expected in found[key]
