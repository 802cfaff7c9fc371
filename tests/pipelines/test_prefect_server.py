"""The Prefect servers of a workspace: what they still know after they were killed."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Pending

from pipelines.prefect_server import home_of, temporary_server
from tests.pipelines.processes import processes

pytestmark = pytest.mark.slow


@contextmanager
def served(root: Path) -> Iterator[SyncPrefectClient]:
    """Start a server and yield its client; the server is killed."""
    with temporary_server(root) as url, temporary_settings({PREFECT_API_URL: url}):
        with get_client(sync_client=True) as client:
            yield client
        for pid, command in processes(root).items():
            if "prefect server start" in command and "guarded.py" not in command:
                os.kill(pid, signal.SIGKILL)


def begin(client: SyncPrefectClient, deployment: UUID) -> Any:
    """Begin a run as a worker does; returns its state."""
    run = client.create_flow_run_from_deployment(deployment)
    return client.set_flow_run_state(run.id, Pending()).state


def test_server_that_is_killed_with_a_run_knows_who_holds_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_SERVER_SERVICES_REPOSSESSOR_LOOP_SECONDS", "1")
    with served(tmp_path) as client:
        flow = client.create_flow_from_name("nightly")
        deployment = client.create_deployment(
            flow,
            "one-at-a-time",
            concurrency_limit=1,
            concurrency_options={"collision_strategy": "CANCEL_NEW"},
        )
        first = begin(client, deployment)
        assert first.is_pending()
        lease = first.state_details.deployment_concurrency_lease_id
        assert begin(client, deployment).is_cancelled()
    with served(tmp_path) as client:
        # a run that went on meanwhile keeps its turn
        client.renew_concurrency_lease(lease, lease_duration=300)
        assert begin(client, deployment).is_cancelled()
        # and that of one that died with the server is free, once its time is over
        let_time_pass(home_of(tmp_path) / "concurrency_leases", lease)
        deadline = time.monotonic() + 20
        while (state := begin(client, deployment)).is_cancelled():
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert state.type == StateType.PENDING


def let_time_pass(folder: Path, lease: UUID) -> None:
    """Make a lease as old as one that nobody has renewed."""
    past = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    for name, key in ((str(lease), "expiration"), ("expirations", str(lease))):
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: past}))
