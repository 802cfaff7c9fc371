"""What goes through Prefect to a worker: no password, and nothing that is not checked."""

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import PipelineError
from pipelines.sweep import orders
from pipelines.sweep.job import Job
from pipelines.sweep.orders import packed, unpacked
from pipelines.sweep.training import Order

SERVER = "postgresql+psycopg2://ptv2{}@10.0.0.5:5432/studies"
URL = SERVER.format(":s3cret%3Aw%2Frd")


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Order:
    """An order in a workspace that is there."""
    monkeypatch.delenv("PTV2_STORAGE", raising=False)
    folder = tmp_path / ".ptv2" / "sweeps" / "intents" / "a-study"
    folder.mkdir(parents=True)
    (folder / "params.yaml").touch()
    job = Job(
        params_file=str(folder / "params.yaml"),
        root=str(tmp_path),
        task="intents",
        params={"prompt_length": 4, "learning_rate": 0.01},
        checkpoint=str(folder / "trial-3.safetensors"),
    )
    return Order(
        url=URL, study="a-study", search="{}", number=3, job=job, retries=2, is_finalist=False
    )


def through_prefect(order: Order) -> Any:
    return json.loads(json.dumps(packed(order)))


@pytest.mark.parametrize("url", [URL, f"{SERVER.format('')}?password=s3cret"])
def test_orders_travel_without_the_password_which_the_worker_has(
    url: str, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = through_prefect(replace(order, url=url))
    assert "s3cret" not in json.dumps(sent)
    assert sent["url"] == SERVER.format("")
    monkeypatch.setenv("PTV2_STORAGE", URL.replace("+psycopg2", ""))
    assert unpacked(sent) == order


def test_orders_of_a_database_without_a_password_need_nothing_of_the_worker(order: Order) -> None:
    open_order = replace(order, url=SERVER.format(""))
    assert unpacked(through_prefect(open_order)) == open_order


def test_orders_of_another_database_are_refused_and_no_password_is_shown(
    order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PTV2_STORAGE", URL.replace("studies", "others"))
    with pytest.raises(PipelineError, match="expected the database of the sweep") as caught:
        unpacked(through_prefect(order))
    assert "s3cret" not in str(caught.value)
    assert "10.0.0.5:5432/others" in str(caught.value)


def test_orders_of_another_version_are_refused(order: Order) -> None:
    sent = through_prefect(order)
    for changed in ({**sent, "new": 1}, {**sent, "job": {"task": "intents"}}, {"job": sent["job"]}):
        with pytest.raises(PipelineError, match="expected an order of this version of ptv2"):
            unpacked(changed)


@pytest.mark.parametrize("key", ["params_file", "checkpoint"])
@pytest.mark.parametrize("path", ["/etc/passwd", "{root}/.ptv2/sweeps/../../mine"])
def test_orders_that_name_other_files_are_refused(key: str, path: str, order: Order) -> None:
    elsewhere: dict[str, Any] = {key: path.format(root=order.job.root)}
    wrong = replace(order, job=replace(order.job, **elsewhere))
    with pytest.raises(PipelineError, match="expected a file in .*sweeps, got"):
        unpacked(through_prefect(wrong))


def test_orders_of_a_workspace_that_is_not_here_are_refused(order: Order) -> None:
    Path(order.job.params_file).unlink()
    with pytest.raises(PipelineError, match="at the same path on all machines, on a disk that"):
        unpacked(through_prefect(order))


def test_orders_of_a_sqlite_study_are_for_workers_that_reach_its_proxy(
    order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orders, "PROXY_S", 0.0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        proxied = replace(order, url=f"grpc://127.0.0.1:{listener.getsockname()[1]}")
        sent = through_prefect(proxied)
        with pytest.raises(PipelineError, match="a SQLite study is for workers on the machine of"):
            unpacked(sent)
        listener.listen()
        assert unpacked(sent) == proxied
