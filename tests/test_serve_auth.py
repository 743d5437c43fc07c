"""The gate: which keys open it and for whom, what a guesser meets, the key file and what may happen to it."""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchorkv.errors import ConfigError, SavedStateError
from anchorkv.serve import keys as keys_module
from anchorkv.serve.audit.record import EVERY_TENANT
from anchorkv.serve.auth import (
    FAILURES_PER_MINUTE,
    LOCAL,
    KeyGate,
    LoopbackGate,
    Principal,
    bearer,
    gate_of,
    is_loopback,
)
from anchorkv.serve.keys import ROLES, Key, KeyFile, find, make_key, split_key
from anchorkv.serve.refusals import Refused

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


class Time:
    """A wall clock and a monotonic one."""

    def __init__(self) -> None:
        self.wall, self.monotonic = NOW, 0.0

    def now(self) -> datetime:
        return self.wall

    def clock(self) -> float:
        return self.monotonic


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing that takes no time; one test looks at the real cost."""
    monkeypatch.setattr(keys_module, "_N", 2**10)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json")


@pytest.fixture
def add(file: KeyFile) -> Callable[..., tuple[Key, str]]:
    def made(tenant: str = "bank", role: Any = "user", **more: Any) -> tuple[Key, str]:
        key, text = make_key(tenant, role, now=NOW, **more)
        with file.changing(create=True) as keys:
            keys[key.id] = key
        return key, text

    return made


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the keys whose secret was hashed to be compared."""
    found: list[str] = []
    matches = Key.matches

    def counted(key: Key, secret: str) -> bool:
        found.append(key.id)
        return matches(key, secret)

    monkeypatch.setattr(Key, "matches", counted)
    return found


def gate(file: KeyFile, time: Time) -> KeyGate:
    return KeyGate(file, clock=time.clock, now=time.now)


def refused(opened: KeyGate | LoopbackGate, key: str | None, client: str = "") -> Refused:
    with pytest.raises(Refused) as error:
        opened.caller(key, client)
    assert str(error.value).endswith(".")
    return error.value


# --- who is let in -------------------------------------------------------------------------------------------------


def test_a_key_opens_for_its_tenant_and_role(file: KeyFile, add: Any, time: Time) -> None:
    made = {role: add(f"{role}s", role) for role in ROLES}
    opened = gate(file, time)
    for role, (key, text) in made.items():
        assert opened.caller(text) == Principal(f"{role}s", key.id, role)


@pytest.mark.parametrize(("tenant", "role", "roles"), [
    ("bank", "user", {"user"}), ("bank", "auditor", {"auditor"}), ("bank", "operator", {"user", "auditor", "operator"}),
    (EVERY_TENANT, "operator", {"auditor", "operator"}), (EVERY_TENANT, "auditor", {"auditor"}),
])
def test_what_a_role_includes(tenant: str, role: Any, roles: set[str]) -> None:
    found = Principal(tenant, "0123456789ab", role)
    assert found.roles == roles
    assert found.key == "0123456789ab"


def test_what_is_no_key(file: KeyFile, add: Any, time: Time, hashed: list[str]) -> None:
    _, text = add()
    opened = gate(file, time)
    for nothing in (None, ""):
        assert (refused(opened, nothing).status, refused(opened, nothing).code) == (401, "missing_key")
    for wrong in ("sk-123", "ak_", "ak_0123456789ab_", text + "\n", " " + text, text.upper(), "\udc80" * 40, "é" * 99,
                  "ak_" + "0" * 12 + "_" + "x" * 10**6):
        error = refused(opened, wrong)
        assert (error.status, error.code) == (401, "invalid_key")
    assert hashed == []


@given(st.text(max_size=60))
def test_no_text_opens_by_chance_or_breaks(text: str) -> None:
    assert split_key(text) is None or text.startswith("ak_")
    header = bearer(text)
    assert header is None or header.strip()


def test_another_secret_or_id_does_not_open(file: KeyFile, add: Any, time: Time, hashed: list[str]) -> None:
    one, text = add("bank")
    other, second = add("inn")
    secret, theirs = split_key(text), split_key(second)
    assert secret is not None
    assert theirs is not None
    opened = gate(file, time)
    for wrong in (f"ak_{one.id}_{theirs[1]}", f"ak_{other.id}_{secret[1]}", f"ak_{one.id}_{secret[1]}x", text[:-1]):
        assert refused(opened, wrong).code == "invalid_key"
    assert len(hashed) == 4
    assert refused(opened, f"ak_{'0' * 12}_{secret[1]}").code == "invalid_key"
    assert opened.caller(text).tenant == "bank"


@pytest.mark.parametrize(("header", "key"), [
    ("Bearer ak_1", "ak_1"), ("bearer  ak_1 ", "ak_1"), ("Basic ak_1", None), ("ak_1", None), ("Bearer", None),
    ("Bearer ", None), (None, None), ("", None),
])
def test_the_header(header: str | None, key: str | None) -> None:
    assert bearer(header) == key


def test_expiry_and_revocation_are_told_to_who_has_the_key_alone(file: KeyFile, add: Any, time: Time) -> None:
    key, text = add(lifetime=timedelta(hours=1))
    opened = gate(file, time)
    assert opened.caller(text).key_id == key.id
    time.wall += timedelta(hours=1)
    assert (refused(opened, text).status, refused(opened, text).code) == (401, "expired_key")
    with file.changing() as keys:
        keys[key.id] = key.changed(revoked=time.wall)
    assert refused(opened, text).code == "revoked_key"
    assert refused(opened, text[:-1]).code == "invalid_key"


# --- what it costs -------------------------------------------------------------------------------------------------


def test_scrypt_is_paid_once(file: KeyFile, add: Any, time: Time, hashed: list[str]) -> None:
    key, text = add()
    opened = gate(file, time)
    assert not opened.knows(text)
    for _ in range(50):
        opened.caller(text)
    assert hashed == [key.id]
    assert opened.knows(text)
    assert opened.knows(None)
    assert opened.knows("nonsense")


def test_the_cache_does_not_outlive_the_record(file: KeyFile, add: Any, time: Time, hashed: list[str]) -> None:
    key, text = add()
    opened = gate(file, time)
    opened.caller(text)
    another, _ = make_key("bank")
    with file.changing() as keys:  # the same id, another secret
        keys[key.id] = another.changed(id=key.id)
    assert refused(opened, text).code == "invalid_key"
    with file.changing() as keys:
        del keys[key.id]
    assert refused(opened, text).code == "invalid_key"
    assert len(hashed) == 2


def test_who_guesses_is_slowed_down_and_nobody_else(file: KeyFile, add: Any, time: Time, hashed: list[str]) -> None:
    key, text = add()
    _, late = add()
    opened = gate(file, time)
    opened.caller(text, "10.0.0.1")
    for _ in range(FAILURES_PER_MINUTE):
        assert refused(opened, f"ak_{key.id}_{'x' * 43}", "10.0.0.1").status == 401
    done = len(hashed)
    error = refused(opened, f"ak_{key.id}_{'x' * 43}", "10.0.0.1")
    assert (error.status, error.retry_after) == (429, pytest.approx(60 / FAILURES_PER_MINUTE))
    assert len(hashed) == done
    opened.caller(text, "10.0.0.1")  # known already
    opened.caller(late, "10.0.0.2")  # from elsewhere
    time.wall += timedelta(days=1)  # no matter what the machine's clock says
    assert refused(opened, "ak_" + "0" * 12 + "_" + "x" * 43, "10.0.0.1").status == 429
    time.monotonic += 60 / FAILURES_PER_MINUTE
    assert refused(opened, f"ak_{key.id}_{'x' * 43}", "10.0.0.1").status == 401


def test_one_network_of_ipv6_is_one_guesser(file: KeyFile, add: Any, time: Time) -> None:
    add()
    opened = gate(file, time)
    wrong = "ak_" + "0" * 12 + "_" + "x" * 43
    for number in range(FAILURES_PER_MINUTE):
        assert refused(opened, wrong, f"2001:db8::{number:x}").status == 401
    assert refused(opened, wrong, "2001:db8::ffff").status == 429
    assert refused(opened, wrong, "2001:db8:0:1::1").status == 401


def test_a_burst_of_right_keys_is_no_guessing(file: KeyFile, add: Any, time: Time, hashed: list[str]) -> None:
    key, text = add()
    opened = gate(file, time)
    found: list[Principal] = []
    threads = [threading.Thread(target=lambda: found.append(opened.caller(text))) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [Principal("bank", key.id, "user")] * 60
    assert hashed == [key.id]


def test_memory_is_bounded(file: KeyFile, add: Any, time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anchorkv.serve.auth._REMEMBERED", 5)
    add()
    made = [add()[1] for _ in range(8)]
    opened = gate(file, time)
    for number, text in enumerate(made):
        opened.caller(text, f"10.0.0.{number}")
    assert [opened.knows(text) for text in made] == [False] * 3 + [True] * 5
    assert len(opened._failures) == 5


def test_the_hash_is_scrypt_and_costs_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.undo()
    key, text = make_key("bank")
    secret = (split_key(text) or ("", ""))[1]
    assert (key.n, key.r, key.p, len(key.salt)) == (2**14, 8, 1, 32)
    expected = hashlib.scrypt(secret.encode(), salt=bytes.fromhex(key.salt), n=2**14, r=8, p=1, dklen=32)
    assert key.hash == expected.hex()
    assert make_key("bank")[0].salt != key.salt


# --- secrets stay secret -------------------------------------------------------------------------------------------


def test_nothing_shows_a_secret(
    file: KeyFile, add: Any, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key, text = add()
    secret = (split_key(text) or ("", ""))[1]
    opened = gate(file, time)
    opened.caller(text)
    wrong = refused(opened, text + "x")
    file.path.write_text(file.path.read_text().replace(key.salt, "zz"))
    refused(opened, "ak_0")
    assert opened.trouble
    shown = [caplog.text, str(wrong), repr(wrong), repr(key), repr(opened), opened.trouble,
             json.dumps(key.as_dict(NOW)), repr(opened.caller(text))]
    for said in shown:
        assert secret not in said
        assert key.hash not in said
    assert secret not in file.path.read_text()
    assert key.id in caplog.text


# --- without keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", "", "testclient"])
def test_without_keys_this_machine_is_the_operator(client: str) -> None:
    for key in (None, "anything"):  # clients of OpenAI's API always send one
        assert LoopbackGate().caller(key, client) == Principal(LOCAL, "", "operator")


@pytest.mark.parametrize("client", ["10.0.0.1", "2001:db8::1", "::ffff:10.0.0.1", "fe80::1%eth0"])
def test_without_keys_nobody_else_is_let_in(client: str) -> None:
    assert refused(LoopbackGate(), None, client).status == 401


@pytest.mark.parametrize(("host", "loopback"), [
    ("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("[::1]", True), ("localhost", True), ("LocalHost", True),
    ("0.0.0.0", False), ("::", False), ("192.168.0.1", False), ("example.com", False), ("localhost.example.com", False),
    ("127.0.0.1.example.com", False), ("", False),
])
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback


def test_which_gate(file: KeyFile, add: Any) -> None:
    add()
    assert isinstance(gate_of(None), LoopbackGate)
    assert gate_of(file.path).keys
    with pytest.raises(ConfigError, match="There is no key file at"):
        gate_of(file.path.with_name("none.json"))


# --- the file ------------------------------------------------------------------------------------------------------


def test_changes_are_noticed(file: KeyFile, add: Any, time: Time) -> None:
    add()
    opened = gate(file, time)
    key, text = make_key("inn", now=NOW)
    assert refused(opened, text).code == "invalid_key"
    with file.changing() as keys:
        keys[key.id] = key
    assert opened.caller(text).tenant == "inn"
    with file.changing() as keys:
        keys[key.id] = key.changed(revoked=NOW)
    assert refused(opened, text).code == "revoked_key"


@pytest.mark.parametrize("harm", ["cut", "gone", "binary", "open"])
def test_a_damaged_file_leaves_the_keys_in_force_and_is_told(
    file: KeyFile, add: Any, time: Time, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, text = add()
    opened = gate(file, time)
    whole = file.path.read_bytes()
    match harm:
        case "cut":
            file.path.write_bytes(whole[:-40])
        case "gone":
            file.path.unlink()
        case "binary":
            file.path.write_bytes(b"\xff\xfe\x00")
        case "open":
            file.path.chmod(0o666)
    assert opened.caller(text).tenant == "bank"
    assert opened.trouble.count("\n") == 0
    assert str(file.path) in opened.trouble
    assert sum(record.levelname == "ERROR" for record in caplog.records) == 1  # once, not with every request
    file.path.write_bytes(whole)
    file.path.chmod(0o600)
    os.utime(file.path, (1, 1))
    assert opened.caller(text).tenant == "bank"
    assert opened.trouble == ""
    file.path.write_bytes(b"{")
    with pytest.raises(ConfigError, match="is damaged"):  # at the start it is an error
        gate(file, time)


def test_only_the_owner_may_read_it(file: KeyFile, add: Any) -> None:
    add()
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    file.path.chmod(0o644)  # as some systems mount secrets: it may be read, not changed
    assert file.read()
    file.path.chmod(0o620)
    with pytest.raises(ConfigError, match="chmod 600"):
        file.read()


def test_a_full_disk_leaves_it_as_it_was(file: KeyFile, add: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    add()
    before = file.path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SavedStateError, match="No space left on device"):
        add()
    assert file.path.read_bytes() == before
    assert sorted(path.name for path in file.path.parent.iterdir()) == ["keys.json", "keys.json.lock"]


def test_an_error_in_the_block_changes_nothing(file: KeyFile, add: Any) -> None:
    key, _ = add()

    def fail() -> None:
        with file.changing() as keys:
            keys.clear()
            raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        fail()
    assert list(file.read()) == [key.id]


def test_changes_at_once_are_all_kept(file: KeyFile) -> None:
    def work(number: int) -> None:
        for _ in range(5):
            key, _ = make_key(f"tenant{number}")
            with KeyFile(file.path).changing(create=True) as keys:
                keys[key.id] = key

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(file.read()) == 20


def test_a_link_stays_one(file: KeyFile, add: Any, tmp_path: Path) -> None:
    add()
    link = tmp_path / "link.json"
    link.symlink_to(file.path)
    key, _ = make_key("inn")
    with KeyFile(link).changing() as keys:
        keys[key.id] = key
    assert link.is_symlink()
    assert key.id in file.read()


@pytest.mark.parametrize(("content", "said"), [
    ([], "is no key file"), ({"keys": 3}, "is no key file"), ({"keys": [], "format": "x/9"}, "another version"),
    ({"keys": [{"id": "0"}], "format": "anchorkv-keys/1"}, "Key 1 in"),
])
def test_what_is_no_key_file(file: KeyFile, content: Any, said: str) -> None:
    file.path.write_text(json.dumps(content))
    file.path.chmod(0o600)
    with pytest.raises(ConfigError, match=said) as error:
        file.read()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [
    {"n": 2**30}, {"n": 1500}, {"hash": "00"}, {"salt": "xyz"}, {"role": "root"}, {"tenant": "a b"}, {"tenant": "*"},
    {"created": "2026-01-31T12:00:00"}, {"secret": "x"}, {"note": "a\u001b[31m"}, {"id": "../../etc"},
])
def test_records_that_cannot_be(file: KeyFile, add: Any, change: dict[str, Any]) -> None:
    add()
    content = json.loads(file.path.read_text())
    content["keys"][0].update(change)
    file.path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"Key 1 in .* is damaged"):
        file.read()


def test_twice_the_same_id(file: KeyFile, add: Any) -> None:
    add()
    content = json.loads(file.path.read_text())
    file.path.write_text(json.dumps({**content, "keys": content["keys"] * 2}))
    with pytest.raises(ConfigError, match="is twice in"):
        file.read()


@pytest.mark.parametrize(("tenant", "role", "more", "said"), [
    ("", "user", {}, "No tenant can be called ''"), ("a/b", "user", {}, "No tenant"), ("*", "user", {}, "one tenant"),
    ("x" * 65, "user", {}, "up to 64"), ("-x", "user", {}, "begin with a letter"), ("a\n", "user", {}, "No tenant"),
    ("bank", "user", {"lifetime": timedelta()}, "a time to come"), ("bank", "user", {"note": "x\n"}, "printable"),
    ("bank", "user", {"lifetime": timedelta(days=999_999_999)}, "year 9999"),
])
def test_keys_that_cannot_be(tenant: str, role: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_key(tenant, role, **more)
    assert said in str(error.value)


def test_a_key_by_the_beginning_of_its_id() -> None:
    keys = {number: make_key("bank")[0].changed(id=number) for number in ("aa1111111111", "aa2222222222")}
    assert find(keys, "aa2").id == "aa2222222222"
    for wanted, said in (("aa", "2 keys begin"), ("b", "no key 'b'"), ("", "no key ''")):
        with pytest.raises(ConfigError, match=said):
            find(keys, wanted)
