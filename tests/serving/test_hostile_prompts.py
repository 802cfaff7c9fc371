"""Files and listings made to do harm: refused in words, before what they claim is allocated."""

import gzip
import json
import os
import pickle
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptv2_core.artifact import load_manifest
from ptv2_core.errors import ArtifactError, BackboneError, PTv2Error
from ptv2_serving.checks import MAX_ENTRIES
from ptv2_serving.store import golden_check
from ptv2_serving.tracking import StoreError, StoreUnreachableError
from tests.serving.store_parts import FILES, Kept, accept, open_store, tree
from tests.tiny import tiny_artifact, tiny_backbone

MOST_BYTES = 4 * 2**20
"""What refusing may take; the prompt itself has 5 KB."""


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, backbone):
    return tiny_artifact(tmp_path_factory.mktemp("artifact") / "prompt", backbone)


@pytest.fixture
def kept(tmp_path, artifact):
    return Kept(tmp_path, artifact)


def refused(kept, tmp_path, message, error=ArtifactError, *, most_bytes=MOST_BYTES, **version):
    """Fetch, and check that nothing came of it but a message."""
    store = open_store(tmp_path)
    stated = kept.version(**version)
    before = tree(tmp_path / "store")
    tracemalloc.start()
    try:
        with pytest.raises(error, match=message) as caught:
            store.fetch(stated, accept)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert type(caught.value) is error
    assert len(str(caught.value)) < 3000
    assert peak < most_bytes
    assert tree(tmp_path / "store") == before
    assert not list((tmp_path / "store" / "incoming").iterdir())


def test_hostile_prompt_that_is_not_is_taken(kept, tmp_path):
    assert open_store(tmp_path).fetch(kept.version(), accept).downloaded


@pytest.mark.parametrize("name", FILES)
def test_hostile_flipped_byte_every_kilobyte(kept, tmp_path, name):
    file = kept.folder / name
    stated, data = kept.version(), file.read_bytes()
    store = open_store(tmp_path)
    for place in [*range(0, len(data), 1024), len(data) - 1]:
        harmed = bytearray(data)
        harmed[place] ^= 0x10
        file.write_bytes(harmed)
        with pytest.raises(ArtifactError):
            store.fetch(stated, accept)
        if name == "prompt.safetensors":
            # and without a registry: the manifest vouches for the weights
            with pytest.raises(ArtifactError):
                load_manifest(kept.folder)
    assert tree(tmp_path / "store") == {}


# The manifest, rewritten with digests that fit


def set_path(path, value):
    def change(manifest):
        *parents, last = path.split(".")
        for name in parents:
            manifest = manifest[name]
        manifest[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema_version", True, "expected schema_version 1, got True"),
        ("schema_version", 1.0, "expected schema_version 1, got 1.0"),
        ("sha256", "../../etc/passwd", "expected 64 hexadecimal digits"),
        ("sha256", "A" * 64, "expected 64 hexadecimal digits"),
        ("method", [], "method must be a str"),
        ("task.name", "other", "expected a prompt for 'tiny', got one for 'other'"),
        ("task.name", "../../tiny", "task.name"),
        ("task.name", "tiny\n", "task.name must be a line of text"),
        ("task.name", "ti\0ny", "task.name must be a line of text"),
        ("task.kind", {}, "task.kind must be a line of text"),
        ("task.metric", [[]], "task.metric must be a line of text"),
        ("task.labels", ["a", "a", "b"], "task.labels: expected two or more distinct"),
        ("task.labels", ["a", "b", "c", "d"], "expected tensors"),
        ("task.labels", ["a", "b", 3], "task.labels must be texts"),
        ("task.labels", [str(n) for n in range(65_537)], "task.labels: expected at most 65,536"),
        ("backbone.name", ["/etc"], "backbone.name must be a line of text"),
        ("backbone.num_layers", -1, "backbone.num_layers must be a whole number above 0"),
        ("backbone.num_layers", True, "backbone.num_layers must be a whole number"),
        ("backbone.num_layers", 10**17, "at most 1,024, got 1000"),
        ("backbone.head_size", 8.0, "backbone.head_size must be a whole number"),
        ("backbone.hidden_size", 10**12, "at most 65,536"),
        ("encoding.max_length", 2**40, "encoding.max_length must be a whole number"),
        ("encoding.stride", -5, "encoding.stride must be a whole number"),
        ("prompt.length", 10**9, r"prompt.length: expected a whole number"),
        ("prompt.length", -4, "prompt.length"),
        ("prompt.length", True, "prompt.length"),
        ("prompt.length", 5, "expected tensors"),
        ("prompt.layers", 10**17, "prompt.layers: expected at most 1,024 layers"),
        ("prompt.layers", [0, 10**9], "prompt.layers: expected"),
        ("prompt.layers", [0, 0], "prompt.layers: expected"),
        ("prompt.dropout", 10**17, "prompt.dropout: expected"),
        ("decoding", {"null_threshold": "1"}, "decoding.null_threshold must be a number"),
        ("decoding", {"null_threshold": True}, "decoding.null_threshold must be a number"),
        ("golden", [{"input": [], "logits": [1.0]}], "golden input 1 must have a mapping"),
        ("golden", [{"input": {}, "logits": [[1.0], [1.0, 2.0]]}], "or a table of them"),
        ("golden", [{"input": {}, "logits": [True, False]}], "or a table of them"),
        ("golden", [{"input": {}, "logits": [[[1.0]]]}], "or a table of them"),
        ("golden", [{"input": {}, "logits": []}] * 65, "golden: expected at most 64, got 65"),
    ],
)  # fmt: skip
def test_hostile_manifest(kept, tmp_path, path, value, message):
    kept.edit(set_path(path, value))
    most = 64 * 2**20 if path == "task.labels" else MOST_BYTES
    refused(kept, tmp_path, message, most_bytes=most)


def test_hostile_manifest_whose_shapes_would_fill_the_memory(kept, tmp_path):
    def grow(manifest):
        manifest["prompt"]["length"] = 4096
        measures = {"num_layers": 1024, "num_heads": 1024, "head_size": 4096}
        manifest["backbone"].update(measures)

    kept.edit(grow)
    refused(kept, tmp_path, "expected weights of at most 1,073,741,824 bytes, got shapes of")


def in_place_of(name, data):
    def harm(kept):
        (kept.folder / name).write_bytes(data)
        if name == "prompt.safetensors":
            kept.edit(lambda manifest: None)

    return harm


def with_text(old, new):
    def harm(kept):
        data = kept.manifest.read_bytes()
        assert old in data
        kept.manifest.write_bytes(data.replace(old, new, 1))

    return harm


def zip_bomb():
    import io

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("prompt.json", b"0" * 10**7)
    return stream.getvalue()


JSON_CASES = {
    "deep lists": (in_place_of("prompt.json", b"[" * 100_000), "not valid JSON .*32 levels"),
    "deep closed": (in_place_of("prompt.json", b"[" * 40 + b"]" * 40), "at most 32 levels"),
    "deep mappings": (in_place_of("prompt.json", b'{"a":' * 90_000), "at most 32 levels"),
    "deep golden": (
        with_text(b'"golden": [', b'"golden": [' + b"[" * 50 + b"]" * 50 + b","),
        "at most 32 levels",
    ),
    "many parts": (in_place_of("prompt.json", b"[" + b"[]," * 400_000 + b"0]"), "at most 524,288"),
    "latin-1": (in_place_of("prompt.json", '{"a": "\u00e9"}'.encode("latin-1")), "not valid JSON"),
    "utf-16": (in_place_of("prompt.json", "{}".encode("utf-16")), "not valid JSON"),
    "byte order mark": (in_place_of("prompt.json", b"\xef\xbb\xbf{}"), "not valid JSON"),
    "nothing": (in_place_of("prompt.json", b""), "expected 1 to 16,777,216 bytes, got 0"),
    "NUL": (in_place_of("prompt.json", b"{}\0"), "not valid JSON"),
    "NaN": (with_text(b'"metrics": {', b'"metrics": {"x": NaN, '), "NaN is no number of JSON"),
    "Infinity": (with_text(b'"metrics": {', b'"metrics": {"x": -Infinity, '), "no number of JSON"),
    "overflow": (with_text(b'"metrics": {', b'"metrics": {"x": 1e999, '), "too large a number"),
    "digits": (
        with_text(b'"metrics": {', b'"metrics": {"x": ' + b"9" * 100_000 + b", "),
        "too large a number",
    ),
    "key twice": (with_text(b'"task": {', b'"task": {"name": "x", '), "'name' is there twice"),
    "section twice": (with_text(b'"method":', b'"method": "probe", "method":'), "there twice"),
    "pickle": (in_place_of("prompt.json", pickle.dumps({"a": 1})), "not valid JSON"),
    "zip": (in_place_of("prompt.json", zip_bomb()), "not valid JSON"),
    "gzip": (in_place_of("prompt.json", gzip.compress(b"0" * 10**7)), "not valid JSON"),
    "a list": (in_place_of("prompt.json", b"[]"), "expected schema_version 1, got 'list'"),
    "a number": (in_place_of("prompt.json", b"1"), "expected schema_version 1, got 'int'"),
}  # fmt: skip


@pytest.mark.parametrize("case", JSON_CASES)
def test_hostile_json(kept, tmp_path, case):
    harm, message = JSON_CASES[case]
    harm(kept)
    refused(kept, tmp_path, message, most_bytes=16 * 2**20, prompt_sha256="ab" * 32)


def test_hostile_json_of_gigabytes_is_not_read(kept, tmp_path):
    version = kept.version()
    with kept.manifest.open("r+b") as stream:
        stream.truncate(2**34)
    with pytest.raises(ArtifactError, match="prompt.json: expected 1 to 16,777,216 bytes, got 17"):
        open_store(tmp_path).fetch(version, accept)


# The weights


def claim(length):
    """Put a length in front of the header, and little behind it."""
    return in_place_of("prompt.safetensors", length.to_bytes(8, "little") + b"{}" * 50)


def prompt_entry(**changes):
    return lambda kept: kept.header(lambda header: header["prompt"].update(changes))


def overlap(kept):
    kept.header(lambda header: header["head.weight"].update(data_offsets=[0, 384]))


def swap_sizes(kept):
    """Shapes of equal size but another order."""
    prompt_entry(shape=[2, 3, 4, 4, 8])(kept)


WEIGHTS_CASES = {
    "header of 100 MB": (claim(100 * 2**20), "its header claims 104,857,600 bytes"),
    "header of 2^63": (claim(2**63), "its header claims 9,223,372,036,854,775,808 bytes"),
    "header of 2^64 - 1": (claim(2**64 - 1), "its header claims 18,446"),
    "header of 0": (claim(0), "its header claims 0 bytes"),
    "header beyond the file": (claim(10_000), "its header claims 10,000 bytes"),
    "deep header": (
        in_place_of("prompt.safetensors", (2000).to_bytes(8, "little") + b"[" * 2000),
        "at most 32 levels",
    ),
    "overlap": (overlap, r"expected 'head.weight' at bytes .12, 396., got .0, 384."),
    "gap": (prompt_entry(data_offsets=[400, 3472]), "at bytes"),
    "negative offset": (prompt_entry(data_offsets=[-4, 3068]), "malformed"),
    "boolean offset": (prompt_entry(data_offsets=[False, 3072]), "malformed"),
    "beyond the end": (prompt_entry(data_offsets=[396, 2**40]), "at bytes"),
    "negative shape": (prompt_entry(shape=[-3, 2, 4, 4, -8]), "malformed"),
    "huge shape": (prompt_entry(shape=[10**17] * 8), "at bytes"),
    "too many digits": (prompt_entry(shape=[10**30]), "too large a number"),
    "many dimensions": (prompt_entry(shape=[1] * 9), "malformed"),
    "boolean shape": (prompt_entry(shape=[True, 2, 4, 4, 8]), "malformed"),
    "text as shape": (prompt_entry(shape="3"), "malformed"),
    "another shape": (swap_sizes, r"expected tensors .*\[3, 2, 4, 4, 8\].*got"),
    "half precision": (prompt_entry(dtype="F16"), "expected F32 tensors, got F16, F32"),
    "unknown type": (prompt_entry(dtype=[1]), "malformed"),
    "more keys": (prompt_entry(more=1), "malformed"),
    "metadata": (
        lambda kept: kept.header(lambda header: header.update(__metadata__={"a": {}})),
        "__metadata__ must be a mapping of texts",
    ),
    "pickle": (
        in_place_of("prompt.safetensors", pickle.dumps({"a": 1})),
        "not a safetensors file",
    ),
    "zip": (in_place_of("prompt.safetensors", zip_bomb()), "not a safetensors file"),
    "short": (in_place_of("prompt.safetensors", b"\1\2\3"), "not a safetensors file"),
    "more bytes": (
        lambda kept: in_place_of("prompt.safetensors", kept.weights.read_bytes() + b"\0")(kept),
        r"expected 3,\d\d\d bytes, as its header says, got 3,",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS_CASES)
def test_hostile_weights(kept, tmp_path, case):
    harm, message = WEIGHTS_CASES[case]
    harm(kept)
    refused(kept, tmp_path, message)


def test_hostile_weights_of_gigabytes_are_not_read(kept, tmp_path):
    version = kept.version()
    with kept.weights.open("r+b") as stream:
        stream.truncate(2**34)
    with pytest.raises(ArtifactError, match="expected at most 1,05.* bytes for .*, got 17,179,869"):
        open_store(tmp_path).fetch(version, accept)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["prompt", "head.weight", "head.bias"])
def test_hostile_numbers(kept, tmp_path, name, value):
    tensors = load_file(kept.weights)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, kept.weights)
    kept.edit(lambda manifest: None)
    refused(kept, tmp_path, f"expected finite numbers, got NaN or infinity in '{name}'")


def test_hostile_pickle_is_not_run(kept, tmp_path):
    class Harm:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "was-run"),))

    torch.save({"prompt": Harm()}, kept.weights)
    kept.edit(lambda manifest: None)
    refused(kept, tmp_path, "not a safetensors file")
    assert not (tmp_path / "was-run").exists()


# Names and kinds of files


@pytest.mark.parametrize(
    "name", ["..%2f..%2fetc", "prompt.json.", "PROMPT.JSON", ".prompt.json", "model.pkl", "\u202e"]
)
def test_hostile_file_beside_the_two(kept, tmp_path, name):
    (kept.folder / name).write_text("x")
    refused(kept, tmp_path, "expected prompt.safetensors and prompt.json, found")


def test_hostile_number_of_files(kept, tmp_path):
    for place in range(MAX_ENTRIES + 1):
        (kept.folder / f"more-{place}").write_text("x")
    refused(kept, tmp_path, "found ")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["symbolic", "hard", "folder", "pipe", "dangling"])
def test_hostile_kind_of_file(kept, tmp_path, name, kind):
    version = kept.version()
    file, other = kept.folder / name, tmp_path / "secret"
    file.rename(other)
    if kind == "symbolic":
        file.symlink_to(other)
    elif kind == "dangling":
        file.symlink_to(tmp_path / "nothing")
    elif kind == "hard":
        os.link(other, file)
    elif kind == "folder":
        file.mkdir()
    else:
        os.mkfifo(file)
    with pytest.raises(ArtifactError, match=f"expected a plain file {name}, found a link, a f"):
        open_store(tmp_path).fetch(version, accept)
    assert tree(tmp_path / "store") == {}


def test_hostile_link_in_place_of_the_folder(kept, tmp_path):
    version = kept.version()
    kept.folder.rename(tmp_path / "other")
    kept.folder.symlink_to(tmp_path / "other")
    with pytest.raises(ArtifactError, match="expected a folder with a prompt"):
        open_store(tmp_path).fetch(version, accept)


@pytest.mark.parametrize(
    "source",
    ["file:///tmp/../etc", "file:///tmp/%2e%2e/etc", "relative/path", "../up", "file://host/tmp",
     "file:///tmp/%00x", "file:relative"],
)  # fmt: skip
def test_hostile_source(kept, tmp_path, source):
    refused(kept, tmp_path, "expected an absolute path", source=source)


@pytest.mark.parametrize("source", ["", "/a\0b", "/a\nb", "x" * 5000])
def test_hostile_source_that_is_no_address(kept, source):
    with pytest.raises(ArtifactError, match="source: expected an address"):
        kept.version(source=source)


@pytest.mark.parametrize("task", ["../up", "/etc", "ti\0ny", "tiny\n", "Tiny", "", 3, None])
def test_hostile_task_name(kept, task):
    with pytest.raises(ArtifactError, match="task: expected a task's name"):
        kept.version(task=task)


def test_hostile_prompt_for_another_backbone(kept, tmp_path):
    other = tiny_backbone(tmp_path / "other", seed=1)
    verify = golden_check(backbone_name=str(other), device="cpu")
    with pytest.raises(BackboneError, match="expected sha256:.*, got sha256:"):
        open_store(tmp_path).fetch(kept.version(), verify)
    assert tree(tmp_path / "store") == {}


@pytest.mark.parametrize("given", [{}, {"text": 3}, {"tokens": ["a"]}])
def test_hostile_golden_input(kept, tmp_path, given):
    kept.edit(lambda manifest: manifest["golden"][0].update(input=given))
    with pytest.raises(ArtifactError, match="the golden inputs of 'tiny' are none of its task"):
        open_store(tmp_path).fetch(kept.version(), golden_check(device="cpu"))


LIMITED = """
import resource, sys
from pathlib import Path
from ptv2_core.artifact import load_manifest
from ptv2_core.errors import ArtifactError
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**26, taken + 2**26))
for folder in sys.argv[1:]:
    try:
        load_manifest(Path(folder))
    except ArtifactError as error:
        print(str(error).replace(chr(10), " "))
    else:
        print("taken:", folder, file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_files_are_refused_within_64_megabytes(tmp_path, artifact):
    cases = [*WEIGHTS_CASES.values(), *JSON_CASES.values()]
    folders = []
    for place, (harm, _) in enumerate(cases):
        kept = Kept(tmp_path / str(place), artifact)
        harm(kept)
        folders.append(str(kept.folder))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *folders], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == len(cases)


# A server that lies


class Server:
    """Speaks as MLflow's server of files does, and lies as it is told."""

    def __init__(self, folder):
        self.files = [
            {"path": name, "is_dir": False, "file_size": (folder / name).stat().st_size}
            for name in FILES
        ]
        self.contents = {name: (folder / name).read_bytes() for name in FILES}
        self.headers = {}
        self.status = 200
        self.listing = None
        self.seen = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.seen.append((self.path, self.headers.get("Accept-Encoding")))
                parts = urlsplit(self.path)
                name = parts.path.rpartition("/")[2]
                if "path" in parse_qs(parts.query):
                    told = server.listing
                    body = json.dumps({"files": server.files}).encode() if told is None else told
                else:
                    body = server.contents.get(name, b"")
                self.send_response(server.status)
                for key, value in server.headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def server(kept):
    server = Server(kept.folder)
    yield server
    server.http.shutdown()
    server.http.server_close()


def fetch_from(server, kept, tmp_path, source="mlflow-artifacts:/1/models/m-1/artifacts"):
    store = open_store(tmp_path, tracking_uri=server.uri)
    return store.fetch(kept.version(source=source), accept)


def test_hostile_server_that_is_not_is_asked_for_three_things(kept, tmp_path, server):
    stored = fetch_from(server, kept, tmp_path)
    assert tree(stored.path) == tree(kept.folder)
    base = "/api/2.0/mlflow-artifacts/artifacts"
    folder = "1/models/m-1/artifacts/artifacts/prompt"
    assert [path for path, _ in server.seen] == [
        f"{base}?path={folder.replace('/', '%2F')}",
        f"{base}/{folder}/prompt.json",
        f"{base}/{folder}/prompt.safetensors",
    ]
    assert {encoding for _, encoding in server.seen} == {"identity"}


@pytest.mark.parametrize(
    "name",
    ["../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "prompt.json\0",
     "a/prompt.json", "prompt.json/../x", "C:\\prompt.json", "", None, 3,
     ["prompt.json"], "prompt.json "],
)  # fmt: skip
def test_hostile_listing_of_names(kept, tmp_path, server, name):
    server.files.append({"path": name, "is_dir": False, "file_size": 10})
    with pytest.raises(ArtifactError, match="expected prompt.safetensors and prompt.json, found"):
        fetch_from(server, kept, tmp_path)
    assert tree(tmp_path / "store") == {}
    assert not (tmp_path / "etc").exists()


@pytest.mark.parametrize("size", [-1, 0, 10**30, "12", 1.5, True and 2**60])
def test_hostile_listing_of_sizes(kept, tmp_path, server, size):
    server.files[0]["file_size"] = size
    with pytest.raises(ArtifactError, match=r"expected 1 to .* bytes, got|too large a number"):
        fetch_from(server, kept, tmp_path)


@pytest.mark.parametrize(
    ("listing", "error"),
    [
        (b"[" * 50_000, ArtifactError),
        (b"\xff", ArtifactError),
        (b"x" * 100_000, ArtifactError),
        (b"[]", ArtifactError),
        (b'{"files": 3}', ArtifactError),
        (b'{"files": [3, null]}', ArtifactError),
        (b'{"files": []}', ArtifactError),
    ],
)
def test_hostile_listing_itself(kept, tmp_path, server, listing, error):
    server.listing = listing
    with pytest.raises(error):
        fetch_from(server, kept, tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_hostile_server_that_sends_more_than_it_announced(kept, tmp_path, server, name):
    server.contents[name] += b"\0" * 10_000_000
    with pytest.raises(ArtifactError, match="expected at most .* bytes, got more"):
        fetch_from(server, kept, tmp_path)
    assert not list((tmp_path / "store" / "incoming").iterdir())


def test_hostile_server_that_compresses(kept, tmp_path, server):
    server.headers["Content-Encoding"] = "gzip"
    server.contents = {name: gzip.compress(b"0" * 10**8) for name in FILES}
    with pytest.raises(ArtifactError, match="expected plain bytes, got compressed ones"):
        fetch_from(server, kept, tmp_path)


def test_hostile_server_that_redirects(kept, tmp_path, server):
    server.status, server.headers["Location"] = 302, "http://127.0.0.1:1/elsewhere"
    with pytest.raises(StoreError, match="got HTTP 302"):
        fetch_from(server, kept, tmp_path)


def test_hostile_server_that_fails(kept, tmp_path, server):
    server.status = 501
    with pytest.raises(StoreUnreachableError, match="got HTTP 501"):
        fetch_from(server, kept, tmp_path)


@pytest.mark.parametrize(
    "source",
    ["mlflow-artifacts://other:5000/1", "http://other/api/2.0/mlflow-artifacts/artifacts/1",
     "https://user:secret@other/x"],
)  # fmt: skip
def test_hostile_source_on_another_server_gets_no_credentials(kept, tmp_path, server, source):
    with pytest.raises(StoreError, match="not sent to another server") as caught:
        fetch_from(server, kept, tmp_path, source)
    assert "secret" not in str(caught.value)


def test_hostile_source_with_a_way_up_on_the_server(kept, tmp_path, server):
    with pytest.raises(PTv2Error, match="expected files of MLflow's server"):
        fetch_from(server, kept, tmp_path, "mlflow-artifacts:/1/%2e%2e/2")
    assert server.seen == []
