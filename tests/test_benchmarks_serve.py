"""The arithmetic of the serving benchmark and its fleet, and peers that answer what we answer."""

import json
import time
from collections import OrderedDict
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from benchmarks import fleet
from benchmarks.fleet import Costs, Machine, hit_rate, move, plan, simulate, sustained
from benchmarks.serve import QUICK, TOKENS, USUAL, Table, ratio
from benchmarks.serve_budget import LEAST, Budget, scaled
from benchmarks.serve_costs import fit
from benchmarks.serve_http import _head
from benchmarks.serve_parts import Prompts, Texts, names, seed_of
from benchmarks.serve_rates import (
    MIXED,
    ONE_TASK,
    ROUNDED,
    Measured,
    Served,
    by_task,
    differences,
    make_rows,
    one_by_one,
    waits,
)
from benchmarks.serve_report import drawn
from benchmarks.serve_soak import MOVED, Champions, growth, loop_lag
from benchmarks.serve_ways import Copies, LogitsArray, Ours, Peft, grouped
from ptv2_core.model.backbones.locating import locate
from ptv2_serving.engine.engine import EngineConfig
from tests.tiny import tiny_backbone

COSTS = Costs(
    fixed_s=2e-3,
    row_s=5e-5,
    token_s=2e-5,
    http_s=5e-4,
    prompt_bytes=600_000,
    file_bytes=1_200_000,
    prompt_load_s=4e-3,
    look_s=5e-3,
    look_task_s=2e-5,
    swap_s=0.04,
    backbone_bytes=200_000_000,
)


class Counted:
    """A way that answers nothing, and remembers what it was asked."""

    key, name, variant = "counted", "counted", ""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def answer(self, slot: int, ids: Any) -> LogitsArray:
        self.asked.append((slot, len(ids)))
        return np.zeros((len(ids), 2), dtype=np.float32)


def test_a_request_waits_for_those_of_all_other_clients() -> None:
    assert waits([1.0, 2.0, 3.0, 4.0], 1) == [1.0, 2.0, 3.0, 4.0]
    assert waits([1.0, 2.0, 3.0, 4.0], 3) == [1.0, 3.0, 6.0, 9.0]


def test_rows_of_one_task_that_wait_together_are_one_batch(tmp_path: Path) -> None:
    prompts = Prompts(tiny_backbone(tmp_path / "backbone"), prompt_length=2)
    rows = make_rows(prompts, tokens=5, count=8, tasks=3)
    assert rows.ids.shape == (8, 5)
    assert grouped([4, 1, 4, 4]) == {4: [0, 2, 3], 1: [1]}
    way = Counted()
    _, latencies = by_task(way, rows, clients=4)
    firsts, seconds = grouped(rows.slots[:4]), grouped(rows.slots[4:])
    assert way.asked == [
        (slot, len(places)) for part in (firsts, seconds) for slot, places in part.items()
    ]
    assert len(latencies) == 8
    way = Counted()
    _, latencies = one_by_one(way, rows, clients=4)
    assert way.asked == [(slot, 1) for slot in rows.slots]
    assert len(latencies) == 8


def test_texts_have_the_tokens_that_were_asked_for(tmp_path: Path) -> None:
    texts = Texts(locate(str(tiny_backbone(tmp_path / "backbone"))))
    made = texts.make(7, 3, seed=1)
    assert made == texts.make(7, 3, seed=1)
    assert [len(text.split()) for text in made] == [5, 5, 5]
    assert seed_of("a", 1) != seed_of("a", 2)


@pytest.mark.slow
def test_peers_answer_what_our_engine_answers(tmp_path: Path) -> None:
    prompts = Prompts(tiny_backbone(tmp_path / "backbone"), prompt_length=3)
    folders = [prompts.save(tmp_path / name, name, seed=n) for n, name in enumerate(names(3))]
    choice = prompts.choice("fp32")
    served = Served(choice, EngineConfig())
    try:
        served.put(folders)
        rows = make_rows(prompts, tokens=6, count=12, tasks=3)
        ways = [Ours(choice, folders), *(Peft(choice, folders, name) for name in ("sdpa", "eager"))]
        for way in ways:
            assert differences(served, [way], rows, requests=12)[way.key] < 1e-5
        # another prompt gives another answer, so that agreeing means something
        assert differences(served, ways[:1], rows.only(1), requests=12)["one_at_a_time"] < 1e-5
        asked, others = served.ask(rows.only(1), 4)[2], served.ask(rows.only(2), 4)[2]
        assert np.abs(np.stack(asked) - np.stack(others)).max() > 0.1
    finally:
        served.close()
    copies = [Copies(choice, folders, name) for name in ("sdpa", "our packed backbone")]
    first, second = (way.answer(2, rows.ids) for way in copies)
    assert np.abs(first - second).max() < 1e-4


def test_ratio_is_the_median_of_the_rounds() -> None:
    ours, peer = Measured(), Measured()
    for one, other in ((1.0, 2.0), (1.0, 4.0), (2.0, 3.0)):
        ours.add(one, [0.1] * 12)
        peer.add(other, [0.2] * 12)
    assert ratio(ours, peer) == 2.0
    assert ours.rate == 12.0
    assert peer.p95 == pytest.approx(200.0)


def measured(per_s: float) -> Measured:
    return Measured(per_s=[per_s] * 3, p95_ms=[1e5 / per_s] * 3)


def test_table_has_a_ratio_for_each_peer_and_length() -> None:
    ways = {
        MIXED: measured(90),
        ONE_TASK: measured(100),
        ROUNDED: measured(120),
        "peft_switch": measured(30),
    }
    table = Table(
        prompt_length=16,
        precision="bfloat16",
        variants={},
        differences={},
        copies_bytes=1,
        measured={16: ways, 32: {**ways, ONE_TASK: measured(90)}, 64: ways},
    )
    assert table.ratios() == {
        "peft_switch_t16": 3.0,
        "peft_switch_t32": 3.0,
        "peft_switch_t64": 3.0,
        "single_task_t16": 0.9,
        "single_task_t32": 1.0,
        "single_task_t64": 0.9,
        "single_task": 0.9,
        "int8_peft_switch_t16": 4.0,
        "int8_peft_switch_t32": 4.0,
        "int8_peft_switch_t64": 4.0,
        "int8_t16": 120 / 90,
        "int8_t32": 120 / 90,
        "int8_t64": 120 / 90,
    }


@pytest.mark.parametrize("slowness", [0.5, 1.0, 1.5, 3.0])
def test_budget_holds_whatever_the_speed_and_leaves_nothing_out(slowness: float) -> None:
    now = [1000.0]
    budget = Budget(QUICK.seconds, USUAL, clock=lambda: now[0])
    shares = []
    for name, usual in USUAL.items():
        with budget.part(name) as share:
            now[0] += slowness * (usual.fixed_s + usual.scaled_s * share)
            shares.append(share)
    assert list(budget.seconds) == list(USUAL)
    assert min(shares) >= LEAST
    assert now[0] - 1000.0 < 480.0
    assert bool(budget.shortened) == (slowness > 1)
    assert all(share < 1 for share in budget.shortened.values())


def test_budget_without_an_end_shortens_nothing() -> None:
    budget = Budget(None, USUAL, clock=lambda: 1e9)
    for name in USUAL:
        with budget.part(name) as share:
            assert share == 1.0
    assert budget.shortened == {}


def test_budget_has_every_part_of_the_quick_form() -> None:
    tables = {f"P = {length}, T = {tokens}" for length in QUICK.lengths for tokens in TOKENS}
    assert tables <= set(USUAL)
    assert QUICK.seconds is not None
    assert sum(usual.fixed_s + usual.scaled_s for usual in USUAL.values()) < QUICK.seconds
    assert [scaled(20, share, least=5) for share in (1.0, 0.5, 0.1)] == [20, 10, 5]
    assert scaled(3, 0.1, least=5) == 3


def test_costs_of_batches_are_fitted() -> None:
    parts = (0.004, 0.0003, 0.00002)
    shapes = [(1, 16), (8, 16), (64, 16), (4, 32), (16, 64)]
    times = {(rows, t): parts[0] + rows * (parts[1] + t * parts[2]) for rows, t in shapes}
    assert fit(times) == pytest.approx(parts)
    # a part that would be negative is none
    without = {(rows, t): 0.004 + rows * (t * 3e-5 - 1e-5) for rows, t in shapes}
    assert fit(without)[1] == 0.0


def test_growth_is_that_of_the_second_half() -> None:
    looks = [(0.0, 1e6), (10.0, 5e6), (20.0, 8e6), (30.0, 8e6), (40.0, 8e6), (50.0, 8e6)]
    assert growth(looks) == pytest.approx(
        {"first_mb": 1.0, "last_mb": 8.0, "most_mb": 8.0, "slope_mb_per_hour": 0.0}, abs=1e-6
    )
    rising = [(10.0 * n, 1e6 * n) for n in range(6)]
    assert growth(rising)["slope_mb_per_hour"] == pytest.approx(360.0)


def test_soak_moves_to_warm_versions_and_to_others_and_checks_who_answers() -> None:
    champions = Champions()
    champions.check("task-0000", 1, 0.0)
    moves = [champions.move(number) for number in range(4 * MOVED)]
    first = [version for task, version in moves if task == "task-0000"]
    second = [version for task, version in moves if task == "task-0001"]
    assert (first, second) == ([2, 1, 2, 1], [2, 3, 1, 2])
    # of those that go to and fro, the first move of each loads
    assert (champions.warm, champions.loaded) == (15, 25)
    now = time.perf_counter()
    for version in (2, 1):
        champions.check("task-0001", version, now + 5)
    assert champions.wrong == 0
    assert champions.slowest_s == pytest.approx(5, abs=1)
    champions.check("task-0001", 3, now)
    champions.check("task-0049", 2, now)
    assert champions.to_mapping()["wrong_versions"] == 2


def test_soak_says_how_late_the_loop_was() -> None:
    lines = ('{le="0.1"} 90.0', '{le="1.0"} 99.0', '{le="+Inf"} 100.0')
    text = "\n".join(f"ptv2_loop_lag_seconds_bucket{line}" for line in lines)
    assert loop_lag(text) == {"looks": 100, "over_0.1_s": 10, "over_1.0_s": 1}


def test_answer_of_a_server_is_read() -> None:
    raw = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 12\r\nConnection: close\r\n\r\n"
    assert _head(raw) == (503, {"content-length": "12", "connection": "close"})


def test_fleet_queue_waits_as_long_as_theory_says() -> None:
    # one row a batch makes it M/D/1, whose mean wait is rho / (2 mu (1 - rho))
    single = Costs(**{**vars(COSTS), "fixed_s": 0.0, "row_s": 0.0, "token_s": 1e-5})
    service = single.batch_s(1, 1024)
    assert single.full(1024) == 1
    queue = simulate(single, 0.5 / service, 1024, requests=50_000)
    assert queue.rows == 1.0
    assert queue.mean_s == pytest.approx(service * (1 + 0.5 / (2 * (1 - 0.5))), rel=0.03)
    low, high = (simulate(COSTS, load * COSTS.most_per_s(32), 32) for load in (0.2, 0.9))
    assert low.rows < high.rows <= COSTS.full(32)
    assert low.p95_s < high.p95_s


def test_fleet_sustains_less_where_prompts_have_to_be_loaded() -> None:
    whole, missing = (sustained(COSTS, 32, miss=miss) for miss in (0.0, 0.3))
    assert missing < 0.7 * whole < whole < COSTS.most_per_s(32)
    assert simulate(COSTS, whole, 32).p95_s <= fleet.P95_S


def test_fleet_hit_rate_is_that_of_a_cache() -> None:
    tasks, kept = 200, 40
    shares = 1.0 / np.arange(1, tasks + 1)
    asked = np.random.default_rng(0).choice(tasks, size=40_000, p=shares / shares.sum())
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for task in asked.tolist():
        hits += task in cache
        cache[task] = None
        cache.move_to_end(task)
        if len(cache) > kept:
            cache.popitem(last=False)
    assert hit_rate(tasks, kept) == pytest.approx(hits / len(asked), abs=0.02)
    assert hit_rate(tasks, tasks) == 1.0


def test_fleet_is_limited_by_cores_then_by_memory() -> None:
    machine = Machine(cores=16, memory_bytes=64 * 2**30)
    small = plan(COSTS, machine, tasks=50, per_s=500.0, tokens=32)
    assert (small.shards, small.limit, small.machines) == (1, "cores", 2)
    machine = Machine(cores=16, memory_bytes=32 * 2**30)
    large = plan(COSTS, machine, tasks=10_000, per_s=100_000.0, tokens=32)
    assert large.shards > 1
    assert large.limit == "looks at the registry; memory, so shards; then cores"
    assert large.memory_bytes <= machine.memory_bytes
    assert large.engines >= 100_000 / COSTS.most_per_s(32)
    # 100,000 requests of 0.5 ms each, by processes that are busy for 0.7 of the time
    assert large.servers == 72
    assert large.looks_busy == pytest.approx(72 / 2.0 * (5e-3 + 2e-5 * 10_000))


def test_fleet_follows_a_moved_alias_within_a_look_and_a_swap() -> None:
    fast = Machine(network_bytes_s=10**15)
    one = move(COSTS, fast, servers=1, watch_s=2.0)
    assert one.first_s == one.last_s == pytest.approx(1.0 + COSTS.swap_s, rel=0.1)
    many = move(COSTS, fast, servers=100, watch_s=2.0)
    assert many.half_s == pytest.approx(1.0 + COSTS.swap_s, rel=0.1)
    assert many.last_p99_s <= 2.0 + COSTS.swap_s + 1e-6
    # where the network is the limit, the last server waits for all files before its own
    slow = move(COSTS, Machine(network_bytes_s=10**7), servers=100, watch_s=2.0)
    assert slow.last_s >= slow.served_s == pytest.approx(12.0)


def test_fleet_and_tables_are_drawn_from_the_figures_of_the_docs() -> None:
    figures = json.loads(fleet.FIGURES.read_text(encoding="utf-8"))
    file = StringIO()
    console = Console(width=125, file=file)
    console.print(drawn(figures))
    console.print(fleet.drawn(Costs.of(figures), Machine(), tokens=32))
    text = file.getvalue()
    assert "Shortened" not in text
    console.print(drawn({**figures, "plan": {"seconds": 450}, "shortened": {"looks": 0.5}}))
    assert "Shortened, to end within 7.5 minutes: looks: 50%" in file.getvalue()
    for words in ("set_adapter", "hot swaps", "One engine process", "10,000", "hit rate"):
        assert words in text
    for tokens in (16, 32, 64):
        for peer in ("one_at_a_time", "peft_switch", "copies"):
            assert figures["ratios"][f"{peer}_t{tokens}"] > 0
    assert figures["bank_1000_bytes"] > 0
    assert figures["swap_ms"] > 0
    assert figures["ratios"]["single_task"] > 0
    assert figures["ratios"]["tasks_1000_vs_10"] > 0
