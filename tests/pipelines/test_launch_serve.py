"""`ptv2 serve`: what it refuses before it loads anything."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from ptv2_core.errors import ConfigError, PTv2Error


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
