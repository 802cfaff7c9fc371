"""`ptv2 serve`: what it refuses before it loads anything."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.threads import available_cores
from ptv2_core.errors import BackboneError, ConfigError, PTv2Error
from ptv2_serving import opening


def refusal(*arguments: str) -> PTv2Error:
    found = CliRunner().invoke(app, ["serve", "--tracking-uri", "sqlite:///none.db", *arguments])
    assert isinstance(found.exception, PTv2Error), found.output
    return found.exception


def test_serve_refuses_other_addresses_without_tokens() -> None:
    error = refusal("--host", "0.0.0.0")
    assert isinstance(error, ConfigError)
    assert [path for path, _ in error.problems] == ["host"]


def test_serve_names_a_token_file_that_is_none(tmp_path: Path) -> None:
    assert "expected a file of tokens" in str(refusal("--token-file", str(tmp_path / "none")))


def test_serve_says_what_would_name_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = CliRunner().invoke(app, ["serve", "--workspace", str(tmp_path)])
    assert isinstance(found.exception, ConfigError)
    said = str(found.exception)
    assert "by --tracking-uri, MLFLOW_TRACKING_URI or" in said
    assert str(tmp_path / "params.yaml") in said


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("--max-body-bytes", "0", "max_body_bytes"),
        ("--max-inputs", "-1", "max_inputs"),
        ("--rate", "-1", "rate_per_s"),
        ("--timeout-s", "0", "timeout_s"),
        ("--drain-s", "nan", "drain_timeout_s"),
    ],
)
def test_serve_checks_its_limits(option: str, value: str, name: str) -> None:
    assert str(refusal(option, value)).startswith(f"{name}: expected")


class ChosenError(PTv2Error):
    """Ends the command where it would begin to load."""

    def __init__(self, config: opening.ServiceConfig) -> None:
        super().__init__("nothing is loaded here")
        self.config = config


@pytest.fixture
def stops_at_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stop(config: opening.ServiceConfig, told: Any) -> None:
        raise ChosenError(config)

    monkeypatch.setattr(opening, "open_service", stop)


def chosen(*arguments: str) -> opening.ServiceConfig:
    error = refusal("--port", "0", *arguments)
    assert isinstance(error, ChosenError)
    return error.config


@pytest.mark.usefixtures("stops_at_loading")
def test_serve_says_how_rows_become_batches_and_what_stays_warm() -> None:
    given = ("--warm", "3", "--token-budget", "4096", "--batch-rows", "128", "--engines", "2")
    config = chosen("--device", "cpu", *given)
    assert (config.warm, config.engines) == (3, 2)
    assert (config.token_budget, config.batch_rows) == (4096, 128)
    config = chosen("--device", "cpu")
    assert (config.warm, config.token_budget, config.batch_rows) == (1, 1024, 64)
    assert config.engines == max(1, available_cores() - 1)
    assert chosen("--warm", "0").warm == 0


@pytest.mark.usefixtures("stops_at_loading")
@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_serve_has_one_engine_process_a_card(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert chosen("--device", device).engines == 3
    assert chosen("--device", device, "--engines", "1").engines == 1
    assert chosen("--device", device, "--engines", "6").engines == 6
    assert chosen("--device", "cpu", "--engines", "2").engines == 2


@pytest.mark.usefixtures("stops_at_loading")
@pytest.mark.parametrize("engines", [(), ("--engines", "2")])
def test_serve_refuses_a_device_that_is_not_here_before_it_asks_the_registry(
    engines: tuple[str, ...],
) -> None:
    absent = "cuda" if not torch.cuda.is_available() else "mps"
    error = refusal("--device", absent, *engines)
    assert isinstance(error, BackboneError)
    assert f"{absent!r} is not on this machine" in str(error)
