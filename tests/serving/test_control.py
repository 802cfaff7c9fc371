import fcntl
import json
import os
import shutil
import socket
import threading
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from typer.testing import CliRunner

from pipelines.cli import app
from ptv2_core.errors import ArtifactError, ConfigError
from ptv2_core.files import sha256_file
from ptv2_serving import audit, control, signing
from ptv2_serving.audit import AuditLine, champions, was_rolled_back
from ptv2_serving.control import Change, Registry
from ptv2_serving.tracking import ConflictError, StoreError, StoreUnreachableError
from tests.registry_parts import Workspace


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Return a workspace with three versions; the first is the champion."""
    workspace = Workspace(tmp_path_factory.mktemp("registry"))
    for seed, score in enumerate((0.9, 0.8, 0.7)):
        workspace.register(test=score, seed=seed)
    return workspace


class Copy:
    """A copy of the registry alone; files stay where they are."""

    def __init__(self, template, root):
        shutil.copy(template.root / "mlflow.db", root / "mlflow.db")
        self.root, self.uri, self.template = root, template.uri, template
        self.registry = Registry(self.uri, root, who="anna@here")

    def client(self):
        return Workspace.client(self)

    def aliases(self):
        found = self.client().get_registered_model("intents").aliases
        return {alias: int(version) for alias, version in found.items()}

    def tags(self):
        return dict(self.client().get_registered_model("intents").tags)


@pytest.fixture
def copy(template, tmp_path):
    return Copy(template, tmp_path)


@pytest.fixture
def registry(copy):
    return copy.registry


def brief(lines):
    return [(line.action, line.before, line.after) for line in lines]


def test_control_registration_writes_the_first_line(registry):
    (line,) = registry.history("intents")
    assert (line.action, line.before, line.after) == ("register", None, 1)
    assert line.reason.startswith("the first champion")


def test_control_routing_names_versions_digests_and_sources(copy, registry):
    routing = registry.routings()["intents"]
    assert (routing.champion, routing.canary, routing.shadow) == (1, None, None)
    assert routing.canary_share == 0.0
    version = routing.versions[1]
    files = copy.template.stored(1) / "artifacts" / "prompt"
    assert version.prompt_sha256 == sha256_file(files / "prompt.safetensors")
    assert version.manifest_sha256 == sha256_file(files / "prompt.json")
    assert version.source == copy.template.stored(1).as_uri()
    assert registry.routings(["intents"]) == {"intents": routing}
    assert registry.problems == {}


@pytest.mark.parametrize("count", [1, 20])
def test_control_routing_of_an_unknown_task_is_a_problem_and_no_error(registry, count):
    names = ["intents", *(f"slots{n}" for n in range(count))]
    assert set(registry.routings(names)) == {"intents"}
    assert set(registry.problems) == set(names[1:])
    assert "no prompt for" in registry.problems["slots0"]


def test_control_promote_moves_the_champion_and_writes_who_and_why(copy, registry):
    change = registry.promote("intents:2", reason="better on\nnight traffic")
    assert change == Change(task="intents", action="promote", before=1, after=2)
    assert copy.aliases() == {"champion": 2, "challenger": 3}
    assert registry.routings()["intents"].champion == 2
    line = registry.history("intents")[-1]
    assert (line.who, line.action, line.before, line.after) == ("anna@here", "promote", 1, 2)
    assert line.reason == "better on night traffic"
    assert abs(time.time() - audit.datetime.fromisoformat(line.when).timestamp()) < 60
    assert registry.promote("intents:2").before == 2
    assert len(registry.history("intents")) == 2


def test_control_promote_takes_an_alias(copy, registry):
    registry.promote("intents@challenger")
    assert copy.aliases()["champion"] == 3


@pytest.mark.parametrize(
    ("reference", "expect", "error", "message"),
    [
        ("intents:2", 3, ConflictError, "expected version 3 to be the champion, got 1"),
        ("intents:9", None, StoreError, "no version 9; there is: 1, 2, 3"),
        ("slots:1", None, StoreError, "no prompt for the task 'slots'"),
        ("intents", None, ConfigError, "expected what is to become the champion"),
        ("intents@champion", None, ConfigError, "expected what is to become the champion"),
        ("../intents:1", None, ConfigError, "expected TASK, TASK@ALIAS or TASK:VERSION"),
    ],
)
def test_control_promote_refuses(copy, registry, reference, expect, error, message):
    before = (copy.aliases(), copy.tags())
    with pytest.raises(error, match=message):
        registry.promote(reference, expect)
    assert (copy.aliases(), copy.tags()) == before


def test_control_promote_notices_another_writer(copy, registry, monkeypatch):
    """Somebody on another machine writes between our write and our second look."""
    look, client, seen = control.find_model, copy.client(), []

    def find_model(*args):
        seen.append(1)
        if len(seen) == 2:
            client.set_registered_model_alias("intents", "champion", "3")
        return look(*args)

    monkeypatch.setattr(control, "find_model", find_model)
    with pytest.raises(ConflictError, match="the champion was set to 2, and is 3 now"):
        registry.promote("intents:2")


def test_control_two_writers_of_one_machine_do_not_both_win(copy):
    results = []

    def write(version):
        try:
            results.append(Registry(copy.uri, copy.root).promote(f"intents:{version}", 1).after)
        except ConflictError:
            results.append(None)

    threads = [threading.Thread(target=write, args=(version,)) for version in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = copy.aliases()["champion"]
    assert sorted(results, key=str) == sorted([winner, None], key=str)


def test_control_lock_that_is_held_is_given_up_on(copy, registry, monkeypatch):
    monkeypatch.setattr(control, "LOCK_WAIT_S", 0.1)
    descriptor = os.open(copy.root, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(StoreError, match="locked by another process for 0.1 seconds"):
        registry.promote("intents:2")
    os.close(descriptor)
    assert copy.aliases()["champion"] == 1


def test_control_rollback_goes_further_back_each_time(copy, registry):
    registry.promote("intents:2")
    registry.promote("intents:3")
    assert registry.rollback("intents", reason="errors").after == 2
    assert registry.rollback("intents").after == 1
    with pytest.raises(StoreError, match="no champion before version 1 .* --to VERSION"):
        registry.rollback("intents")
    assert registry.rollback("intents", to=3).after == 3
    assert registry.rollback("intents").after == 1
    assert copy.aliases()["champion"] == 1


def test_control_rollback_knows_a_champion_that_was_set_by_hand(copy, registry):
    copy.client().set_registered_model_alias("intents", "champion", "3")
    assert registry.rollback("intents").after == 1


def test_control_rollback_passes_over_a_deleted_version(copy, registry):
    registry.promote("intents:2")
    registry.promote("intents:3")
    copy.client().delete_model_version("intents", "2")
    assert registry.rollback("intents", expect=3).after == 1


def test_control_rolled_back_version_is_not_promoted_by_registering_it_again(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.register(test=0.8)
    workspace.register(test=0.9, seed=1)
    registry = Registry(workspace.uri, workspace.root)
    assert registry.rollback("intents").after == 1
    again = workspace.register(test=0.9, seed=1)
    assert not again.gate.promoted
    assert "version 2 was rolled back; `ptv2 promote intents:2`" in again.gate.reason
    assert registry.routings()["intents"].champion == 1


def line(action, before, after):
    return AuditLine(when="", who="", action=action, before=before, after=after, reason="")


@pytest.mark.parametrize(
    ("lines", "current", "expected"),
    [
        ([], None, []),
        ([], 4, [4]),
        ([("promote", 1, 2), ("promote", 2, 3)], 3, [1, 2, 3]),
        ([("promote", 1, 2), ("rollback", 2, 1)], 1, [1]),
        ([("promote", 1, 2), ("rollback", 2, 1), ("promote", 1, 3)], 3, [1, 3]),
        ([("promote", 1, 2), ("canary", None, 5), ("shadow", None, 6)], 2, [1, 2]),
        ([("register", None, 1), ("rollback", 1, 7)], 7, [1, 7]),
    ],
)
def test_control_champions_follow_from_the_lines(lines, current, expected):
    assert champions([line(*given) for given in lines], current) == expected


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([("promote", 1, 2)], False),
        ([("promote", 1, 2), ("rollback", 2, 1)], True),
        ([("promote", 1, 2), ("rollback", 2, 1), ("promote", 1, 2)], False),
        ([("promote", 1, 2), ("rollback", 2, 1), ("promote", 1, 3)], True),
    ],
)
def test_control_rolled_back_is_what_was_not_promoted_again(lines, expected):
    assert was_rolled_back([line(*given) for given in lines], 2) is expected


def test_control_lines_that_are_none_are_left_out():
    line = {"when": "w", "who": "a\x1b[2J", "action": "promote", "from": None, "to": 2}
    good = json.dumps(line | {"reason": ""})
    tags = {
        "ptv2.audit.1": good,
        "ptv2.audit.2": "not json",
        "ptv2.audit.3": "[" * 1000,
        "ptv2.audit.4": '{"when": 3}',
        "ptv2.audit.5": good.replace("2,", "true,"),
        "ptv2.audit.6": " " * 6000,
        "other": good,
    }
    (only,) = audit.read(tags)
    assert (only.who, only.after) == ("a [2J", 2)


def test_control_canary_has_a_version_and_a_share(copy, registry):
    change = registry.set_canary("intents", 2, 10)
    assert change == Change(task="intents", action="canary", before=None, after=2)
    routing = registry.routings()["intents"]
    assert (routing.champion, routing.canary, routing.canary_share) == (1, 2, 10.0)
    assert set(routing.versions) == {1, 2}
    assert registry.set_canary("intents", 3, 2.5, reason="try").before == 2
    assert registry.routings()["intents"].canary_share == 2.5
    assert registry.history("intents")[-1].reason == "2.5 %: try"
    assert registry.stop_canary("intents", "errors", expect=2) is None
    assert registry.stop_canary("intents", "errors", expect=3).before == 3
    assert registry.stop_canary("intents") is None
    assert copy.aliases() == {"champion": 1, "challenger": 3}
    assert "ptv2.canary_share" not in copy.tags()
    assert brief(registry.history("intents"))[1:] == [
        ("canary", None, 2), ("canary", 2, 3), ("stop-canary", 3, None),
    ]  # fmt: skip


@pytest.mark.parametrize("share", [0, -1, 100.5, float("nan"), True, "10"])
def test_control_canary_needs_a_percentage(copy, registry, share):
    with pytest.raises(ConfigError, match="expected a percentage above 0, at most 100"):
        registry.set_canary("intents", 2, share)
    assert len(registry.history("intents")) == 1


def test_control_champion_is_no_canary_and_no_shadow(registry):
    with pytest.raises(ConfigError, match="another champion than the canary, got version 1"):
        registry.set_canary("intents", 1, 10)
    with pytest.raises(ConfigError, match="another champion than the shadow, got version 1"):
        registry.set_shadow("intents", 1)


@pytest.mark.parametrize("share", [None, "ten", "nan", "-5", "1e9"])
def test_control_canary_without_a_sound_share_answers_nothing(copy, registry, share):
    client = copy.client()
    client.set_registered_model_alias("intents", "canary", "2")
    if share is not None:
        client.set_registered_model_tag("intents", "ptv2.canary_share", share)
    routing = registry.routings()["intents"]
    assert (routing.champion, routing.canary, routing.canary_share) == (1, None, 0.0)
    assert "'ptv2.canary_share' is no percentage" in registry.problems["intents"]


def test_control_promoted_canary_has_ended(copy, registry):
    registry.set_canary("intents", 2, 10)
    assert registry.promote("intents@canary").ended == 2
    assert copy.aliases() == {"champion": 2, "challenger": 3}
    routing = registry.routings()["intents"]
    assert (routing.champion, routing.canary) == (2, None)


def test_control_canary_goes_on_when_another_version_is_promoted(copy, registry):
    registry.set_canary("intents", 2, 10)
    assert registry.promote("intents:3").ended is None
    assert copy.aliases()["canary"] == 2


def test_control_shadow_is_set_and_ended(copy, registry):
    assert registry.set_shadow("intents", 3).after == 3
    assert registry.routings()["intents"].shadow == 3
    assert registry.set_shadow("intents", None).before == 3
    assert registry.set_shadow("intents", None) is None
    assert registry.routings()["intents"].shadow is None
    assert brief(registry.history("intents"))[1:] == [
        ("shadow", None, 3), ("stop-shadow", 3, None),
    ]  # fmt: skip


@pytest.mark.parametrize("tag", ["prompt_sha256", "manifest_sha256"])
def test_control_version_without_its_digests_is_a_problem(copy, registry, tag):
    registry.set_canary("intents", 2, 10)
    copy.client().delete_model_version_tag("intents", "2", tag)
    routing = registry.routings()["intents"]
    assert (routing.champion, routing.canary) == (1, None)
    assert f"canary: intents:2 has no tag '{tag}'" in registry.problems["intents"]
    with pytest.raises(ArtifactError, match="has no tag"):
        registry.promote("intents:2")


def test_control_known_versions_are_asked_for_once(registry, monkeypatch):
    registry.routings()
    client = registry._client
    monkeypatch.setattr(client, "get_model_version", lambda *args: pytest.fail("asked again"))
    assert registry.routings()["intents"].champion == 1


def test_control_model_of_somebody_else_is_left_out(copy, registry):
    copy.client().create_registered_model("Somebody's Model")
    copy.client().create_registered_model("empty")
    assert set(registry.routings()) == {"intents"}
    assert registry.problems == {"empty": "empty: no version has the alias 'champion'; promote one"}


def test_control_registry_that_is_away_is_told_within_seconds(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(StoreUnreachableError, match="does not answer"):
            Registry(uri, tmp_path).routings()
        assert time.monotonic() - started < 5


def test_control_database_that_is_not_there_is_told(tmp_path):
    with pytest.raises(StoreError, match="there is no database"):
        Registry("sqlite:///mlflow.db", tmp_path).routings()


# The command line


def ptv2(copy, *words):
    uri = f"sqlite:///{copy.root}/mlflow.db"
    done = CliRunner().invoke(app, [*words, "--tracking-uri", uri], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output.splitlines()


def test_control_commands_say_what_they_did(copy):
    assert ptv2(copy, "canary", "intents:2", "--share", "10") == [
        "intents: the canary is version 2 now (was none)",
        "  it answers 10 % of the requests",
    ]
    assert ptv2(copy, "promote", "intents@canary", "--expect", "1", "--reason", "ok") == [
        "intents: the champion is version 2 now (was version 1)",
        "  the canary, version 2, has ended",
    ]
    assert ptv2(copy, "shadow", "intents") == ["intents: the shadow is version 3 now (was none)"]
    assert ptv2(copy, "shadow", "intents", "--stop") == [
        "intents: the shadow is none now (was version 3)"
    ]
    assert ptv2(copy, "canary", "intents", "--stop") == ["intents has no canary"]
    assert ptv2(copy, "rollback", "intents") == [
        "intents: the champion is version 1 now (was version 2)"
    ]
    lines = ptv2(copy, "history", "intents")
    assert [text.split("  ")[2] for text in lines] == [
        "rollback", "stop-shadow", "shadow", "promote", "canary", "register",
    ]  # fmt: skip
    assert lines[3].endswith("promote  version 1 -> version 2  ok")


def test_control_signed_version_is_pulled_with_the_key_and_others_are_not(copy, tmp_path):
    key = Ed25519PrivateKey.generate()
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    (said,) = ptv2(copy, "sign", "intents:1", "--key", str(private))
    version = copy.registry.resolve("intents:1")
    assert said == f"signed intents:1: prompt.json with sha256 {version.manifest_sha256}"
    signing.check(version, key.public_key())
    pulled = ["--to", str(tmp_path / "pulled"), "--verify-key", str(public)]
    assert "pulled intents version 1" in ptv2(copy, "pull", "intents:1", *pulled)[0]
    with pytest.raises(ArtifactError, match="got one without a signature"):
        ptv2(copy, "pull", "intents:2", *pulled)
