"""`ptv2 doctor`: what it finds, in a sound workspace and in one for each thing that goes wrong."""

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines import doctor, threads
from pipelines.doctor import Finding
from ptv2_core.files import sha256_file
from ptv2_core.model.backbones.locating import locate
from tests.stage_parts import call, change_params, make_workspace, tree

Serve = Callable[..., str]
NAMES = [
    "settings params.yaml", "machine cores", "machine memory", "machine disk", "machine threads",
    "machine device", "machine precision", "machine GEMM fp32", "machine GEMM bf16",
    "versions python", "versions ptv2", "versions torch", "versions transformers",
    "versions numpy", "versions safetensors", "versions optuna", "versions mlflow",
    "versions prefect", "versions dvc", "backbone name", "backbone folder", "backbone digest",
    "backbone tokenizer", "backbone head reads", "backbone prompt starts",
    "backbone learning rates", "data intents", "data pairs", "data slots", "dvc stages",
    "dvc repository", "servers registry", "servers prefect",
]  # fmt: skip


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a sound workspace, and the working folder, in which nothing has run."""
    root = make_workspace(tmp_path / "workspace")
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / ".dvc").mkdir()
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads.joblib, "cpu_count", lambda: 3)
    _measures(monkeypatch, {torch.float32: 1e11, torch.bfloat16: 1e11})
    monkeypatch.chdir(root)
    return root


@pytest.fixture(autouse=True)
def _torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _measures(monkeypatch: pytest.MonkeyPatch, rates: dict[torch.dtype, float]) -> None:
    """Take rates for those of this machine."""
    monkeypatch.setattr(doctor, "measure_gemm_rate", lambda dtype, device: rates[dtype])


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return a function that starts a server of one answer; returns its address."""
    servers: list[HTTPServer] = []

    def start(status: int = 200, *, path: str = "/health") -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status if self.path == path else 404)
                self.end_headers()

            def log_message(self, *words: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        servers.append(server)
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def look() -> dict[str, Finding]:
    """Examine the working folder; returns the findings by section and name."""
    findings = doctor.examine(Path())
    found = {f"{finding.section} {finding.name}": finding for finding in findings}
    assert len(found) == len(findings)
    return found


def problems(found: dict[str, Finding]) -> list[str]:
    return [name for name, finding in found.items() if finding.state == "problem"]


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def test_doctor_looks_at_everything_and_changes_nothing(root: Path) -> None:
    before = tree(root)
    found = look()
    assert tree(root) == before
    assert list(found) == NAMES
    assert problems(found) == []
    notes = [name for name, finding in found.items() if finding.state == "note"]
    assert notes == [
        "backbone digest", "data intents", "data pairs", "data slots", "servers registry",
    ]  # fmt: skip
    values = {name: finding.value for name, finding in found.items()}
    assert values["settings params.yaml"] == "sound; tasks: intents, pairs, slots"
    assert values["machine threads"] == (
        "3 for a stage alone, 1 each for 2 side by side (run.concurrency)"
    )
    assert values["machine device"] == "cpu (set by backbone.device)"
    assert values["machine precision"] == "fp32 (set by backbone.precision)"
    assert values["machine GEMM bf16"] == "100 GFLOP/s, threads: 3"
    assert values["versions python"] == ".".join(map(str, sys.version_info[:3]))
    assert values["versions torch"] == torch.__version__
    assert values["backbone folder"] == str(root / "backbone")
    digest = sha256_file(root / "backbone" / "model.safetensors")
    assert values["backbone digest"] == f"sha256:{digest}"
    assert values["backbone tokenizer"] == locate("backbone").tokenizer_digest()
    assert values["backbone head reads"] == "cls, as its files say"
    assert values["data pairs"] == "mine/pairs; not yet fetched, prepared, trained"
    assert values["dvc repository"] == str(root / ".dvc")
    assert values["servers registry"] == (
        "sqlite:///mlflow.db (register.tracking_uri): not there yet"
    )
    assert values["servers prefect"] == (
        "a temporary server for each run (PREFECT_API_URL is not set)"
    )


def test_doctor_prints_a_table_and_a_verdict(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("doctor") == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[-1] == "no problems"
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert ["machine", "", ""] in rows
    assert ["cores", "ok", f"3 of {doctor.os.cpu_count()}"] in rows
    assert ["data", "", ""] in rows
    place = rows.index(["intents", "note", "mine/intents; not yet fetched, prepared, trained"])
    assert rows[place + 1] == ["", "", "`ptv2 run --task intents`"]


def test_doctor_prints_json_of_the_same(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_params(root, {"backbone.digest": f"sha256:{'0' * 64}"})
    (root / ".dvc").rmdir()
    assert call("doctor", "--json", "--workspace", str(root)) == 2
    out, err = capsys.readouterr()
    assert err == ""
    said = json.loads(out)
    assert said["problems"] == 2
    assert [f"{finding['section']} {finding['name']}" for finding in said["findings"]] == NAMES
    assert said["findings"][NAMES.index("dvc repository")] == {
        "section": "dvc",
        "name": "repository",
        "value": "not initialised",
        "state": "problem",
        "hint": "`dvc init` in a git repository, or `dvc init --no-scm`",
    }


@pytest.mark.parametrize(("count", "said"), [(1, "1 problem;"), (2, "2 problems;")])
def test_doctor_verdict_says_how_many_and_what_to_do(count: int, said: str) -> None:
    expected = f"{said} mend what says problem, then run `ptv2 doctor` again"
    assert doctor.verdict(count) == expected


def test_doctor_refuses_a_workspace_that_is_not_there(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("doctor", "-C", "nowhere") == 2
    assert capsys.readouterr() == (
        "",
        "error: --workspace: expected a folder at nowhere, found none\n",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "found no such file"), ("backbone: [", "not valid YAML"), ("x: 1", "unknown section")],
)
def test_doctor_examines_the_machine_without_sound_settings(
    content: str | None, message: str, root: Path
) -> None:
    (root / "params.yaml").unlink()
    if content is not None:
        (root / "params.yaml").write_text(content)
    found = look()
    assert problems(found) == ["settings params.yaml"]
    assert message in found["settings params.yaml"].value
    wanted = [name for name in NAMES if name.split()[0] not in ("backbone", "data")]
    assert list(found) == wanted
    assert found["machine threads"].value == "3 for a stage alone"
    assert found["servers registry"].state == "note"


# The machine


@pytest.mark.parametrize(
    ("written", "state", "value"),
    [
        ("1", "ok", "1 for a stage alone, 1 each for 2 side by side (run.concurrency)"),
        ("2", "note", "2 for a stage alone, 2 each for 2 side by side (run.concurrency)"),
        ("64", "note", "3 for a stage alone, 3 each for 2 side by side (run.concurrency)"),
    ],
)
def test_doctor_says_when_the_user_asks_for_more_threads_than_cores(
    written: str, state: str, value: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", written)
    finding = look()["machine threads"]
    assert (finding.state, finding.value) == (state, f"{value}; set by OMP_NUM_THREADS")


def test_doctor_names_threads_that_are_no_number(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    found = look()
    assert problems(found) == ["machine threads"]
    assert "whole number of threads >= 1, got 'many'" in found["machine threads"].value


@pytest.mark.parametrize(("fp32", "bf16", "noted"), [(1e11, 1.3e11, True), (1e11, 1.1e11, False)])
def test_doctor_notes_a_precision_that_is_clearly_the_slower_one(
    fp32: float, bf16: float, noted: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _measures(monkeypatch, {torch.float32: fp32, torch.bfloat16: bf16})
    found = look()
    assert (found["machine GEMM fp32"].state == "note") is noted
    assert found["machine GEMM bf16"].state == "ok"


def test_doctor_goes_on_where_a_precision_cannot_be_measured(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(dtype: torch.dtype, device: torch.device) -> float:
        if dtype == torch.bfloat16:
            raise RuntimeError("no bf16 here\nand more")
        return 2e9

    monkeypatch.setattr(doctor, "measure_gemm_rate", measure)
    found = look()
    assert (found["machine GEMM bf16"].state, found["machine GEMM bf16"].value) == (
        "note", "no bf16 here",
    )  # fmt: skip
    assert found["machine GEMM fp32"].value == "2 GFLOP/s, threads: 3"


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has the device")
def test_doctor_names_a_device_that_is_not_there_and_measures_another(root: Path) -> None:
    change_params(root, {"backbone.device": "mps"})
    found = look()
    assert problems(found) == ["machine device"]
    assert "backbone.device: 'mps' is not on this machine" in found["machine device"].value
    assert found["machine GEMM fp32"].value.startswith("100 GFLOP/s")


@pytest.mark.parametrize(("free", "state"), [(2**30, "ok"), (2**30 - 1, "note")])
def test_doctor_notes_a_disk_that_is_nearly_full(
    free: int, state: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    finding = look()["machine disk"]
    assert (finding.state, finding.value) == (state, f"1.0 GiB free in {root}")


def test_doctor_notes_a_package_that_is_not_installed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("ptv2-no-such-package",))
    finding = look()["versions ptv2-no-such-package"]
    assert (finding.state, finding.value) == ("note", "not installed")


# The backbone


def test_doctor_compares_the_backbone_with_its_digest(root: Path) -> None:
    found = f"sha256:{sha256_file(root / 'backbone' / 'model.safetensors')}"
    change_params(root, {"backbone.digest": found})
    finding = look()["backbone digest"]
    assert (finding.state, finding.value, finding.hint) == ("ok", found, "as backbone.digest says")
    other = f"sha256:{'0' * 64}"
    change_params(root, {"backbone.digest": other})
    report = look()
    assert problems(report) == ["backbone digest"]
    assert report["backbone digest"].value == found
    assert other in report["backbone digest"].hint


def test_doctor_names_a_backbone_that_is_not_there(root: Path) -> None:
    change_params(root, {"backbone.name": "./nowhere"})
    found = look()
    assert problems(found) == ["backbone name"]
    assert "'./nowhere' is not there" in found["backbone name"].value


def test_doctor_does_not_download_a_backbone(root: Path) -> None:
    change_params(root, {"backbone.name": "org/model", "backbone.revision": "0" * 40})
    found = look()
    assert problems(found) == []
    assert found["backbone name"].state == "note"
    assert "backbone digest" not in found


@pytest.mark.parametrize(
    ("file", "message"), [("model.safetensors", "is damaged"), ("tokenizer.json", "tokenizer")]
)
def test_doctor_names_damaged_files_of_a_backbone(file: str, message: str, root: Path) -> None:
    (root / "backbone" / file).write_bytes(b"\0")
    found = look()
    assert problems(found) == ["backbone files"]
    assert message in found["backbone files"].value


def test_doctor_says_what_a_head_reads_where_a_task_decides(root: Path) -> None:
    change_params(root, {"tasks.pairs.train.head.reads": "mean"})
    value = look()["backbone head reads"].value
    assert value == "cls, as its files say; train.head.reads sets pairs: mean"


def test_doctor_says_where_prompts_start(root: Path) -> None:
    change_params(
        root,
        {
            "train.prompt.start": "backbone",
            "tasks.pairs.train.prompt.start": "normal",
            "tasks.slots.train.method": "probe",
        },
    )
    value = look()["backbone prompt starts"].value
    assert value == "at its own keys and values for training words: intents; at random: pairs"


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"learning_rate": 0.2}, "where prompts learn"),
        ({"learning_rate": 0.9}, "pairs: 0.9, expected 0.005 to 0.2 (embedding)"),
        (
            {"learning_rate": 0.1, "prompt.reparameterization": "mlp"},
            "pairs: 0.1, expected 0.0001 to 0.02 (mlp)",
        ),
        ({"learning_rate": 1e-4, "method": "finetune"}, "where prompts learn"),
    ],
)
def test_doctor_notes_a_learning_rate_at_which_prompts_do_not_learn(
    root: Path, changes: dict[str, object], value: str
) -> None:
    change_params(
        root, {"train.learning_rate": 0.1, "train.prompt.reparameterization": "embedding"}
    )
    change_params(root, {f"tasks.pairs.train.{key}": one for key, one in changes.items()})
    found = look()["backbone learning rates"]
    assert found.value == value
    assert found.state == ("ok" if value == "where prompts learn" else "note")


# The workspace


def test_doctor_says_how_far_a_task_has_come(root: Path) -> None:
    for folder in ("data/raw", "data/prepared", "prompts"):
        (root / folder / "slots").mkdir(parents=True)
    (root / "data" / "raw" / "pairs").mkdir()
    found = look()
    assert (found["data slots"].state, found["data slots"].value) == (
        "ok", "mine/slots: fetched, prepared, trained",
    )  # fmt: skip
    assert found["data pairs"].value == "mine/pairs: fetched; not yet prepared, trained"


def test_doctor_names_data_that_are_not_there(root: Path) -> None:
    change_params(root, {"tasks.intents.fetch.path": "mine/nothing"})
    found = look()
    assert problems(found) == ["data intents"]
    assert found["data intents"].value == "mine/nothing is not there"
    assert found["data intents"].hint == ("put the records there, or mend tasks.intents.fetch.path")


def test_doctor_names_a_stage_graph_that_is_not_there(root: Path) -> None:
    (root / "dvc.yaml").unlink()
    assert problems(look()) == ["dvc stages"]


def test_doctor_finds_the_repository_in_a_folder_above(root: Path) -> None:
    (root / ".dvc").rename(root.parent / ".dvc")
    assert look()["dvc repository"].value == str(root.parent / ".dvc")


# Servers


def test_doctor_finds_a_registry_file(root: Path) -> None:
    (root / "mlflow.db").touch()
    finding = look()["servers registry"]
    assert (finding.state, finding.value) == (
        "ok", "sqlite:///mlflow.db (register.tracking_uri): there",
    )  # fmt: skip
    (root / "mlflow.db").write_text("no database, but long enough to look at" * 99)
    found = look()
    assert problems(found) == ["servers registry"]
    assert "cannot be read as SQLite" in found["servers registry"].value


def test_doctor_asks_the_servers_and_shows_no_password(
    root: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow, prefect = serve(), serve(path="/api/health")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:secret@{mlflow}")
    monkeypatch.setenv("PREFECT_API_URL", f"http://ann:secret@{prefect}/api/")
    found = look()
    assert problems(found) == []
    assert found["servers registry"].value == (
        f"http://ann:***@{mlflow} (MLFLOW_TRACKING_URI): answers"
    )
    assert found["servers prefect"].value == (
        f"http://ann:***@{prefect}/api/ (PREFECT_API_URL): answers"
    )


def test_doctor_names_servers_that_are_away(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"http://ann:secret@127.0.0.1:{closed_port()}"
    change_params(root, {"register.tracking_uri": address})
    monkeypatch.setenv("PREFECT_API_URL", f"{address}/api")
    found = look()
    assert problems(found) == ["servers registry", "servers prefect"]
    for name in problems(found):
        assert "does not answer" in found[name].value
        assert "refused" in found[name].value
        assert "secret" not in str(found[name])


@pytest.mark.parametrize(
    ("status", "registry", "prefect"),
    [(401, "ok", "ok"), (404, "ok", "problem"), (503, "problem", "problem")],
)
def test_doctor_judges_servers_by_their_answer(
    status: int,
    registry: str,
    prefect: str,
    root: Path,
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address = serve(status)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{address}")
    monkeypatch.setenv("PREFECT_API_URL", f"http://{address}")
    found = look()
    assert (found["servers registry"].state, found["servers prefect"].state) == (registry, prefect)


@pytest.mark.parametrize(
    "address",
    ["nonsense", "file://localhost/etc", "http://[::1:80/api", "http://host:secret", "http://"],
)
def test_doctor_names_addresses_that_are_none(
    address: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("PREFECT_API_URL", address)
    found = look()
    assert problems(found) == ["servers registry", "servers prefect"]
    assert "expected http(s)://HOST:PORT/api" in found["servers prefect"].value


def test_doctor_names_a_server_of_another_kind(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            for _ in range(2):
                connection = listener.accept()[0]
                connection.recv(1024)
                connection.sendall(b"SSH-2.0-here\r\n")
                connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.setenv("PREFECT_API_URL", address)
        found = look()
        thread.join()
    assert problems(found) == ["servers registry", "servers prefect"]
