"""The trunk cache: what it holds, what it saves, and what it survives."""

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from ptv2_core.data.batching import collate
from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.files import fsync_path
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.training import trunk
from ptv2_core.training.learner import Learner
from ptv2_core.training.sources import Source
from ptv2_core.training.trunk import TrunkCache, TrunkStates
from tests.core.processes import CONTEXT, Child
from tests.core.training_parts import Bench, assert_equal, epoch_rows, settings, weights
from tests.core.workers import (
    count_runs,
    fill_beside_another,
    fill_until_killed,
    train_on_a_full_disk,
)
from tests.tiny import MODELS, encode_for, examples_of, open_backbone, task_of, tiny_backbone

Folder = Callable[[str], Path]

LIMIT = 1 << 30
UPPER = {"prompt": {"length": 4, "layers": 2}}


@pytest.fixture
def bench(backbone_folder: Folder) -> Bench:
    """Return a bench of its own: tests put hooks on its backbone."""
    return Bench(backbone_folder("bert"))


@pytest.fixture
def cache(tmp_path: Path) -> TrunkCache:
    """Return an empty cache in `tmp_path / "trunk"`."""
    return TrunkCache(tmp_path / "trunk", limit_bytes=LIMIT)


def of(cache: TrunkCache, backbone: Backbone, split: EncodedSplit, depth: int = 1) -> TrunkStates:
    """Return states that must be there."""
    states = cache.states(backbone, split, depth)
    assert states is not None
    return states


def names(folder: Path) -> set[str]:
    """Return the names of the states' files in a cache."""
    return {file.name for file in folder.glob("*.npy")}


def leftovers(folder: Path) -> list[str]:
    """Return the files of a cache that are neither states nor locks."""
    return [file.name for file in folder.iterdir() if file.suffix not in (".npy", ".lock")]


def row_of(split: EncodedSplit, row: int) -> Tensor:
    """Return the token ids `[1, T]` of one row."""
    own = split.input_ids[split.offsets[row] : split.offsets[row + 1]]
    return torch.from_numpy(own.astype(np.int64))[None]


def other_rows(folder: Path, count: int, seed: int) -> EncodedSplit:
    """Return other rows of the same task."""
    return encode_for(folder, examples_of("classification", count, seed=seed), task_of())


# What it holds


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("model_type", sorted(MODELS))
def test_trunk_states_equal_the_backbone_run_on_each_row_alone(
    backbone_folder: Folder, cache: TrunkCache, model_type: str, depth: int
) -> None:
    bench = Bench(backbone_folder(model_type), rows=(20, 5))
    plain = AutoModel.from_pretrained(bench.folder)
    states = of(cache, bench.backbone, bench.train, depth)
    assert states.values.shape == (len(bench.train.input_ids), 32)
    whole = states.batch(np.arange(20), 12)
    assert whole.num_layers == depth
    for row, got in enumerate(whole.hidden):
        ids = row_of(bench.train, row)
        length = ids.shape[1]
        real = torch.ones_like(ids, dtype=torch.bool)
        ours = bench.backbone.trunk(ids, real, None, num_layers=depth).hidden[0]
        with torch.no_grad():
            theirs = plain(input_ids=ids, output_hidden_states=True).hidden_states[depth][0]
        torch.testing.assert_close(got[:length], ours, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[:length], theirs, atol=1e-5, rtol=1e-5)
        assert torch.equal(got[length:], torch.zeros(12 - length, 32))


# bf16 keeps 8 bits: sums in another order differ by about 2**-8 of values around 1
@pytest.mark.parametrize(("precision", "atol"), [("fp32", 1e-5), ("bf16", 3e-2)])
@pytest.mark.parametrize("layers", [2, (2,)])
def test_trunk_gives_the_logits_of_a_forward_from_the_tokens(
    backbone_folder: Folder,
    cache: TrunkCache,
    layers: Any,
    precision: Literal["fp32", "bf16"],
    atol: float,
) -> None:
    bench = Bench(backbone_folder("bert"))
    bench.backbone = load_backbone(str(bench.folder), precision=precision, device="cpu")
    model = bench.model(settings(prompt={"length": 4, "layers": layers})).eval()
    depth = model.bank.first_layer(0)
    states = of(cache, bench.backbone, bench.train, depth)
    rows = np.array([5, 3, 17, 40])
    batch = collate(bench.train, rows)
    width = batch.input_ids.shape[1]
    kept = states.batch(rows, width)
    assert kept.hidden.dtype == bench.backbone.dtype
    with torch.no_grad():
        wanted = model(batch.input_ids, batch.token_mask)
        got = model(batch.input_ids, batch.token_mask, trunk=kept)
        swapped = model(batch.input_ids, batch.token_mask, trunk=states.batch(rows[::-1], width))
    torch.testing.assert_close(got, wanted, atol=atol, rtol=0.0)
    assert (swapped - wanted).abs().max() > 2 * atol


def test_trunk_reads_the_second_text_of_a_pair(backbone_folder: Folder, cache: TrunkCache) -> None:
    bench = Bench(backbone_folder("bert"), rows=(12, 6))
    types = bench.train.token_type_ids.copy()
    types[bench.train.offsets[1:] - 1] = 1
    paired = replace(bench.train, token_type_ids=types)
    plain, pairs = of(cache, bench.backbone, bench.train), of(cache, bench.backbone, paired)
    batch = collate(paired, np.arange(12))
    assert batch.token_type_ids is not None
    wanted = bench.backbone.trunk(
        batch.input_ids, batch.token_mask, batch.token_type_ids, num_layers=1
    ).hidden
    got = pairs.batch(np.arange(12), wanted.shape[1]).hidden
    mask = batch.token_mask
    torch.testing.assert_close(got[mask], wanted[mask], atol=1e-5, rtol=1e-5)
    assert np.abs(plain.values - pairs.values).max() > 1e-2


# What it saves


@pytest.mark.parametrize("kind", ["classification", "tagging"])
def test_trunk_training_with_it_gives_the_losses_of_one_without(
    backbone_folder: Folder, cache: TrunkCache, kind: str
) -> None:
    bench = Bench(backbone_folder("bert"), kind)
    config = settings(**UPPER, head={"dropout": 0.1})
    _, without = bench.run(config)
    _, with_it = bench.run(config, trunk=cache)
    assert [r.train_loss for r in with_it] == pytest.approx(
        [r.train_loss for r in without], abs=1e-5
    )
    for got, wanted in zip(epoch_rows(with_it), epoch_rows(without), strict=True):
        assert got == pytest.approx(wanted, abs=1e-5)


def test_trunk_training_is_bitwise_the_same_with_a_cold_and_a_warm_cache(
    bench: Bench, tmp_path: Path
) -> None:
    config = settings(prompt={"length": 4, "layers": 2, "dropout": 0.2}, head={"dropout": 0.1})
    cold, cold_reports = bench.run(config, trunk=TrunkCache(tmp_path / "one", limit_bytes=LIMIT))
    warm, warm_reports = bench.run(config, trunk=TrunkCache(tmp_path / "one", limit_bytes=LIMIT))
    again, _ = bench.run(config, trunk=TrunkCache(tmp_path / "two", limit_bytes=LIMIT))
    assert [r.train_loss for r in cold_reports] == [r.train_loss for r in warm_reports]
    assert epoch_rows(cold_reports) == epoch_rows(warm_reports)
    assert_equal(weights(warm), weights(cold))
    assert_equal(weights(again), weights(cold))


@pytest.mark.parametrize(("layers", "depth"), [(2, 1), ([2], 2)])
def test_trunk_lower_layers_are_run_once(
    bench: Bench, cache: TrunkCache, layers: Any, depth: int
) -> None:
    config = settings(prompt={"length": 4, "layers": layers})
    runs = [count_runs(bench, layer) for layer in range(3)]
    bench.run(config)
    bare = [len(one) for one in runs]
    bench.run(config, trunk=cache)
    cold = [len(one) for one in runs]
    bench.run(config, trunk=cache)
    warm = [len(one) for one in runs]
    assert bare == [2 * (4 + 1)] * 3  # epochs of four batches and one of dev
    # filling the cache: one batch of each split
    assert [cold[layer] - bare[layer] for layer in range(depth)] == [2] * depth
    assert [warm[layer] - cold[layer] for layer in range(depth)] == [0] * depth
    assert all(warm[layer] - cold[layer] == bare[layer] for layer in range(depth, 3))


@pytest.mark.parametrize(
    "changes",
    [{"prompt": {"length": 4}}, {"prompt": {"length": 4, "layers": [0, 2]}}]
    + [{**UPPER, "backbone_dropout": True}],
)
def test_trunk_is_not_used_where_nothing_below_the_prompt_is_alike(
    bench: Bench, cache: TrunkCache, tmp_path: Path, changes: dict[str, Any]
) -> None:
    without, _ = bench.run(settings(**changes))
    with_it, _ = bench.run(settings(**changes), trunk=cache)
    assert_equal(weights(with_it), weights(without))
    assert not (tmp_path / "trunk").exists()


# Keys


def test_trunk_is_kept_by_rows_depth_precision_and_backbone(
    bench: Bench, cache: TrunkCache, tmp_path: Path
) -> None:
    folder = tmp_path / "trunk"
    other = open_backbone(tiny_backbone(tmp_path / "other", seed=1))
    rough = load_backbone(str(bench.folder), precision="bf16", device="cpu")
    asked: list[tuple[Backbone, EncodedSplit, int]] = [
        (bench.backbone, bench.train, 1),
        (bench.backbone, bench.dev, 1),
        (bench.backbone, bench.train, 2),
        (rough, bench.train, 1),
        (other, bench.train, 1),
    ]
    for count, (backbone, split, depth) in enumerate(asked, start=1):
        of(cache, backbone, split, depth)
        assert len(names(folder)) == count
    kept = names(folder)
    for backbone, split, depth in asked:
        of(cache, backbone, split, depth)
    of(cache, open_backbone(bench.folder), other_rows(bench.folder, 60, 60), 1)
    assert names(folder) == kept
    assert not leftovers(folder)


# Room


def equal_splits(folder: Path) -> list[EncodedSplit]:
    """Return three splits of the same size and other tokens."""
    first = other_rows(folder, 20, 1)
    return [replace(first, input_ids=(first.input_ids + shift) % 40) for shift in (0, 1, 2)]


def file_of(folder: Path, cache: TrunkCache, backbone: Backbone, split: EncodedSplit) -> Path:
    """Ask for states and return the file that this made."""
    before = names(folder)
    of(cache, backbone, split)
    (made,) = names(folder) - before
    return folder / made


def test_trunk_longest_unused_states_make_room(bench: Bench, tmp_path: Path) -> None:
    splits = equal_splits(bench.folder)
    size = len(splits[0].input_ids) * 32 * 4
    folder = tmp_path / "trunk"
    cache = TrunkCache(folder, limit_bytes=2 * size + 1000)
    oldest = file_of(folder, cache, bench.backbone, splits[0])
    newer = file_of(folder, cache, bench.backbone, splits[1])
    os.utime(oldest, (1, 1))
    os.utime(newer, (2, 2))
    of(cache, bench.backbone, splits[0])  # used again: now the other one is the longest unused
    reader = of(cache, bench.backbone, splits[1])
    os.utime(newer, (2, 2))
    wanted = reader.batch(np.arange(20), 12).hidden.clone()
    newest = file_of(folder, cache, bench.backbone, splits[2])
    assert names(folder) == {oldest.name, newest.name}
    assert sum((folder / name).stat().st_size for name in names(folder)) <= 2 * size + 1000
    # the file is gone, but not for who has it mapped
    assert torch.equal(reader.batch(np.arange(20), 12).hidden, wanted)


def test_trunk_that_passes_the_limit_is_not_kept(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "trunk"
    size = len(bench.train.input_ids) * 32 * 4
    runs = count_runs(bench, 0)
    small = TrunkCache(folder, limit_bytes=size - 1)
    assert small.states(bench.backbone, bench.train, 1) is None
    assert not runs
    assert not folder.exists()
    assert TrunkCache(folder, limit_bytes=size).states(bench.backbone, bench.train, 1) is not None


def test_trunk_that_passes_the_limit_leaves_what_is_there(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "trunk"
    cache = TrunkCache(folder, limit_bytes=len(bench.dev.input_ids) * 32 * 4)
    kept = file_of(folder, cache, bench.backbone, bench.dev)
    wanted, _ = bench.run(settings(**UPPER))
    got, _ = bench.run(settings(**UPPER), trunk=cache)
    assert names(folder) == {kept.name}
    assert_equal(weights(got), weights(wanted))


@pytest.mark.parametrize("moment", ["written", "opened"])
def test_trunk_removed_by_another_at_once_is_read_all_the_same(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    folder = tmp_path / "trunk"
    cache = TrunkCache(folder, limit_bytes=LIMIT)
    wanted = of(TrunkCache(tmp_path / "other", limit_bytes=LIMIT), bench.backbone, bench.train)

    def then_removed(made: Any) -> Any:
        for name in names(folder):
            (folder / name).unlink()
        return made

    if moment == "written":
        sync = fsync_path
        monkeypatch.setattr(trunk, "fsync_path", lambda path: then_removed(sync(path)))
    else:
        of(cache, bench.backbone, bench.train)
        load = np.load
        monkeypatch.setattr(np, "load", lambda *a, **k: then_removed(load(*a, **k)))
    states = of(cache, bench.backbone, bench.train)
    assert np.array_equal(states.values, wanted.values)
    assert not names(folder)


# Damage


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def other_shape(file: Path) -> None:
    values = np.load(file)
    np.save(file, values[:-1])


def other_format(file: Path) -> None:
    values = np.load(file)
    np.save(file, values.astype(np.float64))


def no_array(file: Path) -> None:
    file.write_bytes(b"not an array, and longer than a header of one" * 100)


def pickled(file: Path) -> None:
    np.save(file, np.array([{"a": 1}], dtype=object))


@pytest.mark.parametrize("damage", [cut, empty, other_shape, other_format, no_array, pickled])
def test_trunk_damaged_file_is_computed_anew(
    bench: Bench, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "trunk"
    cache = TrunkCache(folder, limit_bytes=LIMIT)
    file = file_of(folder, cache, bench.backbone, bench.train)
    whole = file.read_bytes()
    damage(file)
    assert file.read_bytes() != whole
    states = of(cache, bench.backbone, bench.train)
    assert file.read_bytes() == whole
    assert states.values.tobytes() == whole[-states.values.nbytes :]
    assert not leftovers(folder)


def test_trunk_failed_fill_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "trunk"
    model: Any = bench.backbone.model

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    hook = model.encoder.layer[0].register_forward_hook(fail)
    cache = TrunkCache(folder, limit_bytes=LIMIT)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.states(bench.backbone, bench.train, 1)
    assert not names(folder)
    assert not leftovers(folder)
    hook.remove()
    of(cache, bench.backbone, bench.train)


@pytest.mark.parametrize("owner_and_name", [(Path, "mkdir"), (Path, "open"), (os, "fsync")])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_trunk_full_disk_at_any_moment_is_no_error(
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner_and_name: tuple[Any, str],
    code: int,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    folder = tmp_path / "trunk"
    monkeypatch.setattr(*owner_and_name, full)
    assert TrunkCache(folder, limit_bytes=LIMIT).states(bench.backbone, bench.train, 1) is None
    monkeypatch.undo()
    assert not folder.exists() or not (names(folder) or leftovers(folder))


# Other processes


def test_trunk_killed_writer_leaves_no_harm(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "trunk"
    for num_runs in (1, 4):
        child = Child(fill_until_killed, bench.folder, folder, num_runs)
        assert child.receive() == num_runs
        # it holds a part, and the lock
        (left,) = leftovers(folder)
        assert left.endswith(".tmp")
        assert not names(folder)
        child.kill()
        assert leftovers(folder) == [left]
    states = of(TrunkCache(folder, limit_bytes=LIMIT), bench.backbone, bench.train)
    assert not leftovers(folder)
    fresh = of(TrunkCache(tmp_path / "other", limit_bytes=LIMIT), bench.backbone, bench.train)
    assert np.array_equal(states.values, fresh.values)


def test_trunk_two_processes_at_once_compute_it_once(bench: Bench, tmp_path: Path) -> None:
    barrier = CONTEXT.Barrier(2)
    children = [
        Child(fill_beside_another, bench.folder, tmp_path / "trunk", barrier) for _ in range(2)
    ]
    said = [child.receive() for child in children]
    assert sorted(runs for runs, _ in said) == [0, 1]
    assert said[0][1] == said[1][1]
    states = of(TrunkCache(tmp_path / "two", limit_bytes=LIMIT), bench.backbone, bench.train)
    assert states.values.tobytes() == said[0][1]


@pytest.mark.parametrize("size", [0, 4096])
def test_trunk_training_goes_on_where_the_disk_is_full(
    bench: Bench, tmp_path: Path, size: int
) -> None:
    folder = tmp_path / "trunk"
    child = Child(train_on_a_full_disk, bench.folder, folder, size)
    was_used, rows = child.receive()
    assert not was_used
    _, reports = bench.run(settings(**UPPER))
    assert rows == epoch_rows(reports)
    assert not names(folder)
    assert not leftovers(folder)


def test_trunk_counts_what_others_are_writing(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "trunk"
    one, other, _ = equal_splits(bench.folder)
    size = len(one.input_ids) * 32 * 4
    cache = TrunkCache(folder, limit_bytes=size + size // 2)
    inside: list[object] = []

    def ask(*_: object) -> None:
        # the first key's room is reserved before its first layer is run
        if not inside:
            inside.append(True)
            inside.append(
                TrunkCache(folder, limit_bytes=size + size // 2).states(
                    open_backbone(bench.folder), other, 1
                )
            )

    hook = bench.backbone.model.encoder.layer[0].register_forward_pre_hook(ask)  # type: ignore[union-attr]
    of(cache, bench.backbone, one)
    hook.remove()
    assert inside == [True, None]
    assert len(names(folder)) == 1


def test_trunk_removes_what_a_killed_writer_of_other_rows_left(
    bench: Bench, tmp_path: Path
) -> None:
    folder = tmp_path / "trunk"
    folder.mkdir()
    left = folder / f"{'0' * 32}.abcdefgh.tmp"
    left.write_bytes(bytes(10 * LIMIT // 1024))
    size = len(bench.train.input_ids) * 32 * 4
    of(TrunkCache(folder, limit_bytes=2 * size), bench.backbone, bench.train)
    assert leftovers(folder) == []
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2 * size


def test_trunk_of_a_training_is_kept_whole_or_not_at_all(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "trunk"
    size = len(bench.train.input_ids) * 32 * 4
    config = settings(**UPPER)
    bench.run(config, trunk=TrunkCache(folder, limit_bytes=size + 100))
    assert not folder.exists()


def test_trunk_files_are_for_all_that_may_read_the_workspace(
    bench: Bench, cache: TrunkCache, tmp_path: Path
) -> None:
    before = os.umask(0o022)
    try:
        of(cache, bench.backbone, bench.dev)
    finally:
        os.umask(before)
    (file,) = (tmp_path / "trunk").glob("*.npy")
    assert file.stat().st_mode & 0o777 == 0o644


def test_trunk_is_shared_by_rows_of_other_labels(
    bench: Bench, cache: TrunkCache, tmp_path: Path
) -> None:
    relabelled = replace(bench.dev, labels=bench.dev.labels[::-1].copy())
    of(cache, bench.backbone, bench.dev)
    of(cache, bench.backbone, relabelled)
    assert len(names(tmp_path / "trunk")) == 1


def test_trunk_changes_the_fingerprint_of_a_training(bench: Bench, cache: TrunkCache) -> None:
    config = settings(**UPPER)

    def fingerprint(trunk: TrunkCache | None) -> str:
        source = Source(slot=0, task=bench.task, train=bench.train, dev=bench.dev)
        learner = Learner(bench.model(config), [source], config=config, trunk=trunk)
        return learner.fingerprint()

    assert fingerprint(None) == fingerprint(None)
    assert fingerprint(cache) != fingerprint(None)
