"""`ptv2 backbones`."""

import json

from typer.testing import CliRunner

from pipelines.cli import app
from ptv2_core.model.backbones.families import FAMILIES, TESTED_VERSIONS, model_types

RUNNER = CliRunner(env={"COLUMNS": "240"})


def test_backbones_json_has_every_family_and_what_it_supports() -> None:
    result = RUNNER.invoke(app, ["backbones", "--json"])
    assert result.exit_code == 0
    found = {row["name"]: row for row in json.loads(result.output)["families"]}
    assert list(found) == [family.name for family in FAMILIES]
    assert sorted(name for row in found.values() for name in row["model_types"]) == model_types()
    keys = {
        "name", "model_types", "kinds", "verbalizer", "depth", "trunk_cache",
        "first_token_last_layer", "max_length", "position_table", "reads", "is_causal",
        "tested_transformers", "note", "first_position",
    }  # fmt: skip
    assert all(set(row) == keys for row in found.values())
    assert all("qa" in row["kinds"] and row["depth"] for row in found.values())
    assert found["BERT"]["first_token_last_layer"]
    assert found["BERT"]["verbalizer"]
    assert found["GPT-2"]["reads"] == "last"
    assert found["MPNet"]["reads"] == "cls"
    assert found["ModernBERT"]["position_table"] is False
    places = {name: row["first_position"] for name, row in found.items() if row["first_position"]}
    assert places == {"RoBERTa": "pad_token_id + 1", "MPNet": 2}
    assert found["OPT"]["tested_transformers"] == list(TESTED_VERSIONS)


def test_backbones_table_names_every_family_and_model_type() -> None:
    result = RUNNER.invoke(app, ["backbones"])
    assert result.exit_code == 0
    for family in FAMILIES:
        assert family.name in result.output
        assert all(name in result.output for name in family.model_types)
    assert "relative bias between tokens" in result.output
    assert "512 of 514" in result.output
    assert "tested with Transformers {} to {}".format(*TESTED_VERSIONS) in result.output
