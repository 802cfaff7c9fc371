"""The service follows a real registry while it answers, and never mixes up who answered."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import mlflow
import pandas as pd
import pytest

from ptv2_core.errors import ArtifactError, DataError
from ptv2_core.evaluation.predict import Predictor
from ptv2_serving import golden
from ptv2_serving.answering import (
    Answer,
    BusyError,
    NotReadyError,
    ServingError,
    TaskStatus,
    TooLongError,
    UnknownTaskError,
)
from ptv2_serving.control import Registry
from ptv2_serving.engine.requests import Computed, Trial
from ptv2_serving.guard import Limits
from ptv2_serving.opening import ServiceConfig, open_service
from ptv2_serving.routes import share_of
from ptv2_serving.service import MAX_SHADOWS, PromptService, agrees
from ptv2_serving.tracking import StoreError
from tests.registry_parts import Workspace

pytestmark = pytest.mark.slow

Result = TypeVar("Result")
TEXTS = ["book a flight", "cancel the meeting on monday at noon please", "play", "call my taxi"]
TIMEOUT_S = 30.0


class Serving:
    """A workspace with three versions of `intents` and one of `slots`, and a service on it."""

    def __init__(self, root: Path) -> None:
        self.workspace = Workspace(root)
        for seed in range(3):
            self.workspace.register(test=0.9 - seed / 10, seed=seed)
        self.workspace.register("slots", kind="tagging", seed=7)
        self.registry = Registry(self.workspace.uri, root, who="tester")
        self.predictors = {
            ("intents", number): Predictor.load(
                self.workspace.stored(number) / "artifacts" / "prompt", precision="fp32"
            )
            for number in (1, 2, 3)
        }
        self.runner = asyncio.Runner()
        self.config = ServiceConfig(
            tracking_uri=self.workspace.uri,
            root=root,
            store=root / "store",
            device="cpu",
            precision="fp32",
            watch_s=0,
        )
        self.service: PromptService

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.runner.run(work)

    def open(self, **changes: Any) -> list[str]:
        config = ServiceConfig(**(vars(self.config) | changes))
        self.service, notes = self.run(open_service(config))
        return notes

    def ask(self, text: str = TEXTS[0], task: str = "intents", **how: Any) -> Answer:
        return self.run(self.asking(text, task, **how))

    async def asking(self, text: str = TEXTS[0], task: str = "intents", **how: Any) -> Answer:
        settings = {"request_id": "some", "timeout_s": TIMEOUT_S, **how}
        return await self.service.predict(task, [{"text": text}], **settings)

    def check(self, text: str, answer: Answer) -> None:
        predictor = self.predictors[(answer.prompt.task, answer.prompt.version)]
        (expected,) = predictor.predict([{"text": text}])
        (found,) = answer.predictions
        assert found["label"] == expected["label"]
        assert found["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)

    def restore(self) -> None:
        """Make the registry what it was: version 1 is the champion, and nothing beside it."""
        self.registry.stop_canary("intents", "test")
        self.registry.set_shadow("intents", None)
        self.registry.promote("intents:1")
        self.run(self.service.reload())


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    made = Serving(tmp_path_factory.mktemp("service"))
    assert made.open() == []
    yield made
    made.run(made.service.close())
    made.runner.close()


@pytest.fixture
def serving(opened: Serving) -> Iterator[Serving]:
    yield opened
    opened.restore()


def test_service_answers_with_the_champions(serving: Serving) -> None:
    for text in TEXTS:
        answer = serving.ask(text)
        assert (answer.prompt.version, answer.role) == (1, "champion")
        serving.check(text, answer)
    tags = serving.ask(TEXTS[0], "slots").predictions[0]["tags"]
    assert len(tags) == 3


def test_service_answers_as_mlflow_does_with_the_same_version(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    folder = serving.workspace.stored(1)
    # as MLflow's own server loads it
    model = mlflow.pyfunc.load_model(str(folder), model_config={"device": "cpu"})
    table = model.predict(pd.DataFrame({"text": TEXTS}))
    for text, label, score in zip(TEXTS, table["label"], table["score"], strict=True):
        (found,) = serving.ask(text).predictions
        # MLflow's model may run in bf16, where this machine multiplies it fast
        assert found["probabilities"][label] == pytest.approx(score, abs=0.02)
        assert found["probabilities"][label] == pytest.approx(
            max(found["probabilities"].values()), abs=0.02
        )


def test_service_tells_what_is_loaded(serving: Serving) -> None:
    intents, slots = serving.service.tasks()
    assert (intents.spec.name, slots.spec.name) == ("intents", "slots")
    assert intents.champion.version == 1
    assert (
        intents.champion.digest == serving.registry.routings()["intents"].versions[1].prompt_sha256
    )
    assert set(intents.example) == {"text"}
    status = serving.service.status()
    assert status.ready
    assert status.engines == 1
    assert status.backbone["precision"] == "float32"
    assert status.resident_bytes > 0


def test_service_swaps_when_the_alias_moves_and_keeps_the_earlier_one_warm(
    serving: Serving,
) -> None:
    swaps = serving.service.status().swaps
    serving.registry.promote("intents:2")
    assert serving.run(serving.service.reload()) == ["intents: champion 1 -> 2"]
    answer = serving.ask()
    assert answer.prompt.version == 2
    serving.check(TEXTS[0], answer)
    earlier = serving.ask(version=1)
    assert earlier.prompt.version == 1
    serving.check(TEXTS[0], earlier)
    status = serving.service.status()
    assert status.swaps == swaps + 1
    assert status.last_swap_s is not None
    assert status.resident == 3  # two of intents, one of slots
    assert serving.run(serving.service.reload()) == []


def test_service_goes_on_with_a_look_whose_asker_went_away(serving: Serving) -> None:
    async def asked_and_gone() -> None:
        asking = asyncio.create_task(serving.service.reload())
        await asyncio.sleep(0.001)
        asking.cancel()
        while serving.service.tasks()[0].champion.version != 2:
            await asyncio.sleep(0.01)

    serving.registry.promote("intents:2")
    serving.run(asyncio.wait_for(asked_and_gone(), TIMEOUT_S))
    status = serving.service.status()
    assert status.resident == 3  # two of intents, one of slots: nothing is left over


def test_service_loses_no_request_and_confuses_no_version_while_it_swaps(
    serving: Serving,
) -> None:
    async def asked_while_swapping() -> list[tuple[str, Answer]]:
        found: list[tuple[str, Answer]] = []
        ends = asyncio.Event()

        async def client(number: int) -> None:
            while not ends.is_set():
                text = TEXTS[(number + len(found)) % len(TEXTS)]
                found.append((text, await serving.asking(text, request_id=str(number))))

        clients = [asyncio.create_task(client(number)) for number in range(8)]
        for version in (2, 3, 1, 2, 1, 3):
            serving.registry.promote(f"intents:{version}")
            await serving.service.reload()
            await asyncio.sleep(0.02)
        ends.set()
        await asyncio.gather(*clients)
        return found

    found = serving.run(asked_while_swapping())
    assert {answer.prompt.version for _, answer in found} == {1, 2, 3}
    for text, answer in found:
        serving.check(text, answer)


def test_service_gives_a_canary_its_share_and_an_id_the_same_answerer(serving: Serving) -> None:
    serving.registry.set_canary("intents", 2, 30.0)
    changes = serving.run(serving.service.reload())
    assert changes == ["intents: canary none -> 2", "intents: canary share 0 -> 30"]
    ids = [f"request-{number}" for number in range(60)]
    for request_id in ids:
        answer = serving.ask(request_id=request_id)
        is_canary = share_of(request_id) < 30.0
        assert answer.role == ("canary" if is_canary else "champion")
        assert answer.prompt.version == (2 if is_canary else 1)
    assert 5 <= sum(share_of(one) < 30.0 for one in ids) <= 30


def test_service_counts_the_changes_of_what_it_tells_of_its_tasks(serving: Serving) -> None:
    def look() -> tuple[int, list[TaskStatus]]:
        serving.run(serving.service.reload())
        return serving.service.status().changes, serving.service.tasks()

    changes, told = look()
    assert look() == (changes, told)
    steps: list[Callable[[], object]] = [
        lambda: serving.registry.set_canary("intents", 2, 30.0),
        lambda: serving.registry.set_canary("intents", 2, 60.0),
        lambda: serving.registry.set_shadow("intents", 3),
        lambda: serving.registry.stop_canary("intents"),
    ]
    for step in steps:
        step()
        after, now = look()
        assert after > changes
        assert now != told
        changes, told = after, now
    assert look() == (changes, told)


def test_service_takes_a_failing_canary_back_and_tells_the_registry(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving.registry.set_canary("intents", 3, 50.0)
    serving.run(serving.service.reload())
    monkeypatch.setattr(serving.service, "_limits", Limits(min_requests=5))
    canary = serving.service._follower.routes["intents"].canary
    assert canary is not None
    compute = serving.service._engine.compute

    async def broken(slot: int, *args: Any, **settings: Any) -> Computed:
        if slot == canary.slot:
            raise ServingError("broken")
        return await compute(slot, *args, **settings)

    monkeypatch.setattr(serving.service._engine, "compute", broken)
    failed = 0
    for number in range(100):
        try:
            answer = serving.ask(request_id=str(number))
        except ServingError:
            failed += 1
            continue
        assert answer.prompt.version == 1
    assert failed == 5
    serving.run(asyncio.sleep(0.5))
    assert serving.registry.routings()["intents"].canary is None
    assert "taken back: 100% of its last 5 requests failed" in str(
        serving.service.tasks()[0].problem
    )
    line = serving.registry.history("intents")
    assert any("100% of its last 5" in one.reason for one in line)


def test_service_refuses_a_canary_whose_golden_inputs_have_other_answers(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = serving.service._engine.put

    async def turned(folder: Path, *, alone: bool, trial: Trial | None = None) -> int:
        assert trial is not None
        check = trial.check
        turning = replace(trial, check=lambda logits: check([-10 * own for own in logits]))
        return await put(folder, alone=alone, trial=turning)

    monkeypatch.setattr(serving.service._engine, "put", turned)
    monkeypatch.setattr(golden, "CLEAR_MARGIN", 0.0)
    serving.registry.set_canary("intents", 3, 50.0)
    assert serving.run(serving.service.reload()) == []
    assert "another answer here than in training" in str(serving.service.tasks()[0].problem)
    assert {serving.ask(request_id=str(number)).role for number in range(20)} == {"champion"}
    serving.run(asyncio.sleep(0.5))
    assert serving.registry.routings()["intents"].canary is None
    # set again, it is looked at again
    monkeypatch.undo()
    serving.run(serving.service.reload())
    serving.registry.set_canary("intents", 3, 50.0)
    assert serving.run(serving.service.reload())[0] == "intents: canary none -> 3"


def test_service_counts_where_a_shadow_disagrees(serving: Serving) -> None:
    serving.registry.set_shadow("intents", 2)
    serving.run(serving.service.reload())
    before = serving.service.status().disagreements.get("intents", (0, 0))
    expected = sum(
        serving.predictors[("intents", 1)].predict([{"text": text}])[0]["label"]
        != serving.predictors[("intents", 2)].predict([{"text": text}])[0]["label"]
        for text in TEXTS
    )
    for text in TEXTS:
        answer = serving.ask(text)
        assert answer.role == "champion"
    serving.run(asyncio.sleep(0.3))
    compared, different = serving.service.status().disagreements["intents"]
    assert (compared - before[0], different - before[1]) == (len(TEXTS), expected)


def test_service_keeps_what_it_has_when_a_new_version_is_damaged(
    serving: Serving, tmp_path: Path
) -> None:
    serving.workspace.register(test=0.2, seed=9)
    weights = serving.workspace.stored(4) / "artifacts" / "prompt" / "prompt.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    serving.registry.promote("intents:4")
    (line,) = serving.run(serving.service.reload())
    assert "sha256" in line
    assert serving.ask().prompt.version == 1
    assert "sha256" in str(serving.service.tasks()[0].problem)


def test_service_says_what_is_wrong_with_a_request(serving: Serving) -> None:
    with pytest.raises(UnknownTaskError, match="no prompt for the task 'weather' is loaded"):
        serving.ask(task="weather")
    with pytest.raises(UnknownTaskError, match="version 77 of 'intents' is not loaded"):
        serving.ask(version=77)
    with pytest.raises(DataError, match="input 1: expected a `text`"):
        serving.ask(" ")
    long = "book a flight " * 40
    with pytest.raises(TooLongError, match="more than the 32 tokens"):
        serving.ask(long, refuse_long=True)
    assert serving.ask(long).truncated == [True]
    assert serving.ask().truncated == [False]


def test_service_goes_on_when_the_registry_is_away(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = serving.workspace.root / "mlflow.db"
    moved = database.rename(database.with_suffix(".away"))
    try:
        (line,) = serving.run(serving.service.reload())
        assert line.startswith("the registry does not answer")
        assert serving.run(serving.service.reload()) == []  # it was told
        serving.run(asyncio.sleep(0.05))
        assert serving.service.status().stale_s > 0.04
        assert serving.ask().prompt.version == 1
    finally:
        moved.rename(database)


def test_service_follows_and_survives_whatever_is_wrong_with_a_look(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reload = serving.service._follower.reload
    looks = 0

    async def broken_once() -> list[str]:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise RuntimeError("a fault of ours")
        return await reload()

    async def followed() -> None:
        following = asyncio.create_task(serving.service.follow(0.01))
        while len(caplog.records) < 2:
            await asyncio.sleep(0.01)
        following.cancel()

    monkeypatch.setattr(serving.service._follower, "reload", broken_once)
    serving.registry.promote("intents:3")
    with caplog.at_level("INFO", "ptv2_serving"):
        serving.run(asyncio.wait_for(followed(), TIMEOUT_S))
    assert [record.getMessage() for record in caplog.records] == [
        "the registry's aliases could not be followed",
        "intents: champion 1 -> 3",
    ]


def test_service_starts_from_its_store_when_the_registry_is_away(tmp_path: Path) -> None:
    made = Serving(tmp_path)
    made.open()
    made.run(made.service.close())
    (tmp_path / "mlflow.db").rename(tmp_path / "gone.db")
    # an address that nobody listens at, as a server that is down
    notes = made.open(tracking_uri="http://127.0.0.1:9")
    assert len(notes) == 1
    assert "what was served last is served again" in notes[0]
    made.check(TEXTS[0], made.ask())
    made.run(made.service.close())
    made.runner.close()


def test_service_starts_with_the_last_good_version_of_a_task_whose_champion_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Serving(tmp_path)
    made.open()
    made.run(made.service.close())
    weights = made.workspace.stored(3) / "artifacts" / "prompt" / "prompt.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    made.registry.promote("intents:3")
    notes = made.open()
    assert len(notes) == 1
    assert notes[0].startswith("intents: version 1, served last, answers: ")
    assert "not a safetensors file" in notes[0]
    made.check(TEXTS[0], made.ask())
    assert made.service.tasks()[0].problem
    # nothing of it is lost to the next start, nor to one whose registry refuses
    made.run(made.service.reload())
    made.run(made.service.close())
    client = made.workspace.client()
    client.delete_model_version("intents", "3")
    client.set_registered_model_alias("intents", "champion", "2")
    client.delete_model_version_tag("intents", "2", "manifest_sha256")
    notes = made.open()
    assert notes[0].startswith("intents: what was served last is served again: champion: ")
    assert made.ask().prompt.version == 1
    made.run(made.service.close())

    def refuse(self: Registry, tasks: Any = None) -> Any:
        raise StoreError("not let in")

    monkeypatch.setattr(Registry, "routings", refuse)
    (note,) = made.open()
    assert "what was served last is served again (not let in)" in note
    assert made.ask().prompt.version == 1
    made.run(made.service.close())
    made.runner.close()


@pytest.mark.parametrize("fails", ["offline", "engine"])
def test_service_keeps_nothing_of_a_prompt_that_fails_one_of_both_checks(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    engine, loader = serving.service._engine, serving.service._follower._loader

    def refuse(*_: Any) -> None:
        raise ArtifactError("golden input 1 has another answer")

    with monkeypatch.context() as broken:
        if fails == "offline":
            broken.setattr(loader, "verify", refuse)
        else:
            broken.setattr("ptv2_serving.loading.check_decisions", refuse)
        before = (set(engine.sizes), _stored(serving))
        serving.workspace.register(test=0.3, seed=5)
        number = len(serving.workspace.client().search_model_versions("name = 'intents'"))
        serving.registry.promote(f"intents:{number}")
        assert serving.run(serving.service.reload()) == [
            "intents: golden input 1 has another answer"
        ]
        assert (set(engine.sizes), _stored(serving)) == before
        assert serving.ask().prompt.version == 1


def _stored(serving: Serving) -> set[str]:
    store = serving.config.store
    return {path.name for part in ("objects", "incoming") for path in (store / part).iterdir()}


def test_service_asks_no_more_shadows_side_by_side_than_it_should(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, let_go = 0, asyncio.Event()
    ask = serving.service._asker.ask

    async def waiting(resident: Any, role: Any, *args: Any, **how: Any) -> Answer:
        nonlocal asked
        if role == "shadow":
            asked += 1
            await let_go.wait()
        return await ask(resident, role, *args, **how)

    async def flooded() -> None:
        await asyncio.gather(*(serving.asking() for _ in range(50)))
        await asyncio.sleep(0.05)
        let_go.set()
        await asyncio.sleep(0.5)

    serving.registry.set_shadow("intents", 2)
    serving.run(serving.service.reload())
    monkeypatch.setattr(serving.service._asker, "ask", waiting)
    serving.run(flooded())
    assert asked == MAX_SHADOWS


def test_service_drains_what_it_took_and_takes_no_more(tmp_path: Path) -> None:
    made = Serving(tmp_path)
    made.open(tasks=("intents",))
    assert [status.spec.name for status in made.service.tasks()] == ["intents"]

    async def drained() -> list[Answer | BaseException]:
        tasks = [asyncio.create_task(made.asking(TEXTS[i % 4])) for i in range(50)]
        await asyncio.sleep(0)
        assert await made.service.drain(timeout_s=TIMEOUT_S)
        with pytest.raises(NotReadyError):
            await made.asking(TEXTS[0])
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = made.run(drained())
    assert all(isinstance(one, Answer) for one in found)
    assert not made.service.status().ready
    made.run(made.service.close())
    made.runner.close()


def test_service_refuses_to_start_without_anything_to_serve(tmp_path: Path) -> None:
    made = Serving(tmp_path)
    with pytest.raises(ServingError, match="no champion for the tasks weather; .*slots. Register"):
        made.open(tasks=("weather",))
    made.runner.close()


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ({"label": "a", "probabilities": {"a": 0.9}}, {"label": "a", "probabilities": {}}, True),
        ({"label": "a"}, {"label": "b"}, False),
        ({"value": 0.5}, {"value": 0.505}, True),
        ({"value": 0.5}, {"value": 0.6}, False),
        ({"tags": ["O"]}, {"tags": ["B-x"]}, False),
        ({"text": "", "start": None}, {"text": "", "start": None}, True),
    ],
)
def test_service_compares_answers_by_what_they_say(
    one: dict[str, Any], other: dict[str, Any], expected: bool
) -> None:
    assert agrees(one, other) is expected


def test_service_refuses_with_a_full_queue(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serving.service._engine

    async def flooded() -> list[Answer | BaseException]:
        many = [{"text": TEXTS[0]}] * 1500
        with monkeypatch.context() as nothing_is_given_out:
            nothing_is_given_out.setattr(engine, "_pump_soon", lambda: None)
            asked = [
                asyncio.create_task(
                    serving.service.predict("intents", many, request_id="x", timeout_s=TIMEOUT_S)
                )
                for _ in range(3)
            ]
            while sum(task.done() for task in asked) < 2:
                await asyncio.sleep(0.01)
        engine.on_free()
        return await asyncio.gather(*asked, return_exceptions=True)

    found = serving.run(asyncio.wait_for(flooded(), TIMEOUT_S))
    assert sum(isinstance(one, BusyError) for one in found) == 2
    assert sum(isinstance(one, Answer) for one in found) == 1
