import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from transformers import BertConfig

from benchmarks import lengths, limit, ours, peers, stack
from benchmarks.lengths import BATCH_SIZE, MAX_LENGTH, SOURCES, Sentences, sentences
from benchmarks.measure import PROMPT_LENGTH, Setting
from benchmarks.memory import measure_memory
from benchmarks.shapes import backbone_folder, bert_tokenizer
from benchmarks.train import main

RATIOS = {
    "paper_recipe",
    "peft_default",
    "peft_tuned",
    "peft_autocast",
    "finetune_tuned",
    "top_third_cached",
    "share_of_limit",
}
WAY = {
    "key",
    "name",
    "variant",
    "seconds",
    "rounds",
    "tokens_per_s",
    "share_of_limit",
    "peak_bytes",
    "step_bytes",
}
TABLE = {
    "shape",
    "lengths",
    "origin",
    "tokens",
    "gflop",
    "gflop_unpadded",
    "gemm_gflop_per_s",
    "limit_seconds",
    "ratios",
    "ways",
}


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PTV2_BENCH_DATA", str(tmp_path / "none"))


@pytest.mark.slow
@pytest.mark.usefixtures("no_data")
def test_the_command_writes_figures_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, picture = tmp_path / "figures.json", tmp_path / "figures.svg"
    words = ["--shape", "tiny", "--rounds", "2", "--sentences", "40", "--no-memory"]
    main([*words, "--json", str(file), "--plot", str(picture)])
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    assert set(figures) == {"ratios", "ratios_of", "settings", "machine", "tables"}
    assert set(figures["ratios"]) == RATIOS
    assert all(value > 0 for value in figures["ratios"].values())
    assert figures["ratios_of"] == {"shape": "tiny", "lengths": "rte"}
    assert [table["lengths"] for table in figures["tables"]] == list(SOURCES)
    keys = [way.key for way in (*peers.WAYS, *ours.ways())]
    assert len(set(keys)) == len(keys)
    for table in figures["tables"]:
        assert set(table) == TABLE
        assert [way["key"] for way in table["ways"]] == keys
        assert "documented" in table["origin"]
        for way in table["ways"]:
            assert set(way) == WAY
            assert len(way["rounds"]) == 2
    ElementTree.parse(picture)
    assert "share of the limit" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("key", ["paper_recipe", ours.ALL_LAYERS])
def test_memory_is_that_of_another_process(key: str, tmp_path: Path) -> None:
    rows = sentences("rte", 8, bert_tokenizer())
    setting = Setting(folder=backbone_folder("tiny", tmp_path), sentences=rows)
    memory = measure_memory(setting, key, "")
    assert 0 <= memory.step_bytes < memory.peak_bytes


@pytest.mark.usefixtures("no_data")
def test_rows_without_the_data_have_the_documented_lengths() -> None:
    rows = sentences("rte", 640, bert_tokenizer())
    assert rows.lengths.max() == MAX_LENGTH
    assert np.median(rows.lengths) == pytest.approx(SOURCES["rte"].quantiles[10], abs=2)
    assert rows.lengths.mean() == pytest.approx(66.5, abs=2)


@pytest.mark.bench_data
@pytest.mark.parametrize("name", SOURCES)
def test_documented_lengths_are_those_of_the_data(name: str) -> None:
    real = sentences(name, 640, bert_tokenizer())
    assert "training pairs" in real.origin
    source = SOURCES[name]
    known = np.interp(
        (np.arange(640) + 0.5) / 640, np.linspace(0, 1, len(source.quantiles)), source.quantiles
    )
    off = np.abs(real.lengths - known.clip(max=MAX_LENGTH))
    # between the shortest row and the shortest twentieth a straight line is a rough guess
    assert off[32:].max() <= 4
    assert off.max() <= 10


@pytest.mark.usefixtures("no_data")
def test_every_order_has_every_row_once() -> None:
    rows = sentences("boolq", 70, bert_tokenizer())
    for batches in (rows.in_random_order(), rows.grouped()):
        assert sorted(row for batch in batches for row in batch) == list(range(70))
        assert all(len(batch) <= BATCH_SIZE for batch in batches)
    spans = sorted(
        (rows.lengths[batch].min(), rows.lengths[batch].max()) for batch in rows.grouped()
    )
    assert all(left[1] <= right[0] for left, right in zip(spans, spans[1:], strict=False))


def test_limit_counts_the_products_of_one_layer() -> None:
    # one layer is the first and, for [CLS], the last: H = 4, I = 8, two rows of three tokens
    config = BertConfig(
        hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    rows, tokens, keys = 2, 3, 3 + PROMPT_LENGTH
    keys_and_values = 2 * 2 * rows * tokens * 4 * 4
    query = 2 * rows * 4 * 4
    after = 2 * rows * (4 * 4 + 2 * 4 * 8)
    attention = 2 * 2 * rows * keys * 4
    forward = keys_and_values + query + after + attention
    backward = after + attention / 2 + 2 * 2 * rows * PROMPT_LENGTH * 4
    flop = limit.step_flop(config, [(rows, tokens)], first_token=True)
    assert flop == forward + backward


def test_limit_without_padding_is_lower_and_every_token_counts() -> None:
    config = BertConfig()
    rows = Sentences(
        name="made",
        origin="made",
        rows=[
            lengths.Sentence(input_ids=[5] * length, token_type_ids=[0] * length, label=0)
            for length in (10, 20)
        ],
    )
    padded = limit.step_flop(config, limit.bucket_shapes(rows), first_token=False)
    assert padded > limit.step_flop(config, limit.row_shapes(rows), first_token=False)
    whole = limit.step_flop(config, [(2, 20)], first_token=False)
    assert padded == whole
    # 85 million weights, a product forward and one backward for most of them
    weights = 12 * (4 * 768**2 + 2 * 768 * 3072)
    assert math.isclose(whole, 4 * 40 * weights, rel_tol=0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("no_data")
def test_stack_measures_each_number_of_trials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "stack.json"
    words = ["stack", "--shape", "tiny", "--trials", "1,3", "--steps", "2", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", [*words, "--json", str(file)])
    stack.main()
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert set(figures) == {"shape", "machine", "stacks"}
    assert [found["trials"] for found in figures["stacks"]] == [1, 3]
    assert all(found["trial_steps_per_s"] > 0 for found in figures["stacks"])
    assert "1.00x" in capsys.readouterr().out
