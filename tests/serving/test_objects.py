import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from ptv2_core.errors import ArtifactError
from ptv2_serving import objects
from ptv2_serving.objects import KEEP_S
from ptv2_serving.routing import Routing
from ptv2_serving.tracking import StoreError, StoreUnreachableError
from tests.serving.store_parts import FILES, TASK, Kept, accept, open_store, tree
from tests.tiny import tiny_artifact, tiny_backbone


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    root = tmp_path_factory.mktemp("artifact")
    return tiny_artifact(root / "prompt", tiny_backbone(root / "backbone"))


@pytest.fixture
def kept(tmp_path, artifact):
    return Kept(tmp_path, artifact)


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path)


def routing_of(version):
    return Routing(
        task=TASK,
        champion=version.version,
        canary=None,
        canary_share=0.0,
        shadow=None,
        versions={version.version: version},
    )


def make_old(path):
    os.utime(path, (time.time() - KEEP_S - 60,) * 2)


def test_objects_stores_a_version_under_the_sha256_of_its_manifest(kept, store, tmp_path):
    version = kept.version(3)
    stored = store.fetch(version, accept)
    assert stored.downloaded
    assert str(stored.prompt) == "tiny:3"
    assert stored.prompt.digest == version.prompt_sha256 == stored.manifest.sha256
    assert stored.path == tmp_path / "store" / "objects" / version.manifest_sha256
    assert tree(stored.path) == tree(kept.folder)
    assert set(tree(tmp_path / "store")) == {
        f"objects/{version.manifest_sha256}/{name}" for name in FILES
    }


def test_objects_downloads_and_verifies_what_is_there_only_once(kept, store):
    version, verified = kept.version(), []
    store.fetch(version, lambda folder, manifest: verified.append(manifest.sha256))
    for name in FILES:
        (kept.folder / name).unlink()
    again = store.fetch(version, lambda folder, manifest: verified.append(manifest.sha256))
    assert not again.downloaded
    assert verified == [version.prompt_sha256]


def test_objects_keeps_what_was_there_when_the_verification_fails(kept, store, tmp_path):
    store.fetch(kept.version(), accept)
    before = tree(tmp_path / "store")
    kept.edit(lambda manifest: manifest["metrics"].update(dev=0.1))

    def refuse(folder, manifest):
        raise ArtifactError("golden input 1: expected logits")

    with pytest.raises(ArtifactError, match="golden input 1"):
        store.fetch(kept.version(2), refuse)
    assert tree(tmp_path / "store") == before
    assert not list((tmp_path / "store" / "incoming").iterdir())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "link"])
def test_objects_notices_a_damaged_object_and_fetches_it_again(kept, store, name, harm):
    version = kept.version()
    file = store.fetch(version, accept).path / name
    data = file.read_bytes()
    file.unlink()
    if harm == "flip":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif harm == "link":
        file.symlink_to(kept.folder / name)
    again = store.fetch(version, accept)
    assert again.downloaded
    assert tree(again.path) == tree(kept.folder)
    assert not file.is_symlink()


def test_objects_says_that_the_files_are_gone(kept, store):
    version = kept.version()
    kept.folder.rename(kept.root / "elsewhere")
    with pytest.raises(StoreError, match="not there; expected a folder with a prompt"):
        store.fetch(version, accept)


def test_objects_remembers_routings_across_a_restart(kept, store, tmp_path):
    version = kept.version(4)
    store.fetch(version, accept)
    routes = {TASK: routing_of(version)}
    assert store.last_known() == {}
    store.remember(routes)
    again = open_store(tmp_path)
    assert again.last_known() == routes
    kept.folder.rename(kept.root / "gone")
    assert not again.fetch(again.last_known()[TASK].versions[4], accept).downloaded


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda r: r.update(version=2), "expected routes of version 1"),
        (lambda r: r["tasks"].update(tiny=[]), "tiny: expected a mapping of"),
        (lambda r: r["tasks"]["tiny"].update(champion=9), "expected a champion"),
        (lambda r: r["tasks"]["tiny"].update(champion=True), "expected a champion"),
        (lambda r: r["tasks"]["tiny"].update(canary_share=200), "expected a champion"),
        (
            lambda r: r["tasks"]["tiny"]["versions"][0].update(manifest_sha256="../../etc"),
            "manifest_sha256: expected 64 hexadecimal digits, got '../../etc'",
        ),
        (lambda r: r["tasks"].update({"../up": r["tasks"]["tiny"]}), "expected a champion"),
    ],
)
def test_objects_refuses_damaged_routes(kept, store, tmp_path, harm, message):
    store.remember({TASK: routing_of(kept.version())})
    file = tmp_path / "store" / "routes.json"
    values = json.loads(file.read_text())
    harm(values)
    file.write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=message):
        store.last_known()


def test_objects_collects_what_nothing_names_once_it_is_old(kept, store, tmp_path):
    versions = []
    for number in range(1, 5):
        kept.edit(lambda manifest, n=number: manifest["metrics"].update(dev=n))
        versions.append(kept.version(number))
    named, remembered, fresh, old = versions
    kept.edit(lambda manifest: manifest["metrics"].update(dev=1))
    for number, version in enumerate(versions, start=1):
        kept.edit(lambda manifest, n=number: manifest["metrics"].update(dev=n))
        path = store.fetch(version, accept).path
        if version is not fresh:
            make_old(path)
    store.remember({TASK: routing_of(remembered)})
    assert store.collect({named.manifest_sha256}) == 1
    left = {path.name for path in (tmp_path / "store" / "objects").iterdir()}
    assert left == {version.manifest_sha256 for version in (named, remembered, fresh)}
    assert old.manifest_sha256 not in left


def test_objects_opening_one_keeps_it_from_being_collected(kept, store):
    version = kept.version()
    path = store.fetch(version, accept).path
    make_old(path)
    store.fetch(version, accept)
    assert store.collect(set()) == 0
    assert tree(path) == tree(kept.folder)


def test_objects_removes_what_a_killed_process_left_and_nothing_that_is_in_use(store, tmp_path):
    incoming = tmp_path / "store" / "incoming"
    left, used = incoming / "left", incoming / "used"
    for folder in (left, used):
        folder.mkdir()
        (folder / "prompt.json").write_text("{")
    descriptor = os.open(used, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    open_store(tmp_path)
    assert [path.name for path in incoming.iterdir()] == ["used"]
    os.close(descriptor)
    open_store(tmp_path)
    assert not list(incoming.iterdir())


def test_objects_keeps_what_failed_tasks_were_remembered_by(kept, store, tmp_path):
    routes = {TASK: routing_of(kept.version(4))}
    store.fetch(kept.version(4), accept)
    store.remember(routes)
    store.remember({}, failed={TASK, "unknown"})
    assert open_store(tmp_path).last_known() == routes
    store.remember({})
    assert store.last_known() == {}
    # a damaged file has nothing to keep, and is written anew
    (tmp_path / "store" / "routes.json").write_text("{")
    store.remember(routes, failed={"unknown"})
    assert store.last_known() == routes


def test_objects_stages_what_is_not_in_the_store_before_it_is_committed(kept, store, tmp_path):
    version = kept.version()
    staged = store.stage(version)
    assert not staged.is_stored
    assert tree(staged.path) == tree(kept.folder)
    assert not list((tmp_path / "store" / "objects").iterdir())
    staged.close()
    assert tree(tmp_path / "store") == {}
    staged = store.stage(version)
    path = store.commit(staged)
    staged.close()
    assert tree(path) == tree(kept.folder)
    again = store.stage(version)
    assert (again.is_stored, again.path, store.commit(again)) == (True, path, path)
    again.close()
    assert tree(path) == tree(kept.folder)


class Dripping(BaseHTTPRequestHandler):
    """An MLflow server that lists a prompt's files, and sends them a byte now and then."""

    sizes: ClassVar[dict[str, int]] = {}

    def do_GET(self):
        listed = [{"path": name, "file_size": size} for name, size in self.sizes.items()]
        body = json.dumps({"files": listed}).encode()
        is_file = self.path.endswith(FILES)
        self.send_response(200)
        self.send_header("Content-Length", "100" if is_file else str(len(body)))
        self.end_headers()
        if not is_file:
            self.wfile.write(body)
            return
        with suppress(OSError):
            for _ in range(100):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.05)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("is_closing", [False, True])
def test_objects_gives_up_on_a_server_that_drips(kept, tmp_path, monkeypatch, is_closing):
    monkeypatch.setattr(objects, "DOWNLOAD_S", 30.0 if is_closing else 0.3)
    Dripping.sizes = {name: (kept.folder / name).stat().st_size for name in FILES}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    store = open_store(tmp_path, tracking_uri=f"http://127.0.0.1:{server.server_port}")
    version = kept.version(source="mlflow-artifacts:/1/models/m-1/artifacts")
    began = time.monotonic()
    message = "as the server is closing" if is_closing else r"not there within 0\.3 seconds"
    with pytest.raises(StoreUnreachableError, match=message):
        store.stage(version, is_over=lambda: is_closing and time.monotonic() - began > 0.3)
    assert time.monotonic() - began < 3.0
    assert tree(tmp_path / "store") == {}
    server.shutdown()
    server.server_close()


FETCH = """
import sys
from pathlib import Path
from tests.serving.store_parts import accept, open_store
from ptv2_serving.routing import ResolvedVersion
import json
root, stated = Path(sys.argv[1]), json.loads(sys.argv[2])
for _ in range(20):
    stored = open_store(root).fetch(ResolvedVersion(**stated), accept)
    assert sorted(p.name for p in stored.path.iterdir()) == ["prompt.json", "prompt.safetensors"]
"""


@pytest.mark.slow
def test_objects_two_processes_fetch_the_same_version_at_once(kept, tmp_path):
    version = kept.version()
    stated = json.dumps({name: getattr(version, name) for name in version.__dataclass_fields__})
    command = [sys.executable, "-c", FETCH, str(tmp_path), stated]
    running = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(120) for process in running] == [0, 0]
    assert set(tree(tmp_path / "store")) == {
        f"objects/{version.manifest_sha256}/{name}" for name in FILES
    }
