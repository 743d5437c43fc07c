"""`anchorkv keys`: a key is shown once, and what the server then thinks of it."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from command import Command

from anchorkv.serve import keys as keys_module
from anchorkv.serve.auth import KeyGate, Principal
from anchorkv.serve.keys import KeyFile
from anchorkv.serve.refusals import Refused

call = Command("keys", COLUMNS="160")
refused = call.refused


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The key file, by the variable that the server reads too."""
    monkeypatch.setattr(keys_module, "_N", 2**10)
    monkeypatch.setenv("ANCHORKV_KEYS", str(tmp_path / "new" / "keys.json"))
    return tmp_path / "new" / "keys.json"


def add(*arguments: object) -> tuple[str, str]:
    """The key, and its id."""
    text = call("add", *arguments).stdout.strip()
    return text, text.split("_")[1]


def listed(*arguments: object) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(call("list", "--json", *arguments).stdout)["keys"]
    return found


def test_a_new_key_opens_the_gate_and_is_shown_once(place: Path) -> None:
    result = call("add", "bank", "--role", "auditor", "--note", "Ms Sato")
    text = result.stdout.strip()
    number = text.split("_")[1]
    assert result.stdout == f"{text}\n"  # nothing but the key, for scripts
    assert text not in result.stderr
    assert number in result.stderr
    assert KeyGate(place).caller(text) == Principal("bank", number, "auditor")
    secret = text.split("_", 2)[2]
    assert secret not in place.read_text()
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    shown = call("list").stdout
    assert "Ms Sato" in shown
    assert number in shown
    for output in (shown, call("list", "--json").stdout):
        assert secret not in output
        assert KeyFile(place).read()[number].hash not in output


def test_json(place: Path) -> None:
    found = json.loads(call("add", "bank", "--expires", "90d", "--json").stdout)
    assert KeyGate(place).caller(found["key"]).key_id == found["id"]
    assert (found["tenant"], found["role"], found["state"], found["file"]) == ("bank", "user", "valid", str(place))
    assert datetime.fromisoformat(found["expires"]) - datetime.fromisoformat(found["created"]) == timedelta(days=90)
    assert [key["id"] for key in listed()] == [found["id"]]
    assert not {"key", "hash", "salt"} & listed()[0].keys()


def test_list(place: Path) -> None:
    first, second = add("bank")[1], add("inn")[1]
    assert [key["id"] for key in listed()] == [first, second]
    assert [key["id"] for key in listed("--tenant", "inn")] == [second]
    assert "no keys" in call("list", "--tenant", "none").stdout


def test_revoke(place: Path) -> None:
    (text, number), (other, _) = add("bank"), add("bank")
    gate = KeyGate(place)
    gate.caller(text)
    assert f"{number} of bank is revoked" in call("revoke", number).stdout
    with pytest.raises(Refused, match="was revoked"):
        gate.caller(text)
    gate.caller(other)
    with KeyFile(place).changing() as stored:
        stored[number] = stored[number].changed(revoked=datetime(2026, 1, 1, tzinfo=UTC))
    before = listed()[0]["revoked"]
    assert f"{number} of bank is already revoked" in call("revoke", number[:8]).stdout
    assert [key["state"] for key in listed()] == ["revoked", "valid"]
    assert listed()[0]["revoked"] == before


def test_revoke_takes_all_or_none(place: Path) -> None:
    number = add("bank")[1]
    assert "There is no key 'ffff'" in refused("revoke", number, "ffff")
    assert listed()[0]["state"] == "valid"
    assert json.loads(call("revoke", number, number, "--json").stdout)["keys"][0]["state"] == "revoked"


def test_rotate_at_once(place: Path) -> None:
    text, number = add("bank", "--role", "operator", "--note", "ops", "--expires", "30d")
    gate = KeyGate(place)
    fresh = call("rotate", number).stdout.strip()
    with pytest.raises(Refused, match="was revoked"):
        gate.caller(text)
    assert gate.caller(fresh) == Principal("bank", fresh.split("_")[1], "operator")
    old, new = listed()
    assert new["note"] == "ops"
    assert datetime.fromisoformat(new["expires"]) - datetime.fromisoformat(new["created"]) == timedelta(days=30)
    assert "is revoked" in refused("rotate", old["id"])


def test_rotate_with_grace(place: Path) -> None:
    text, number = add("bank")
    fresh = call("rotate", number, "--grace", "1h", "--expires", "7d").stdout.strip()
    later = KeyGate(place, now=lambda: datetime.now(UTC) + timedelta(minutes=59))
    assert later.caller(text).tenant == later.caller(fresh).tenant == "bank"
    with pytest.raises(Refused, match="has expired"):
        KeyGate(place, now=lambda: datetime.now(UTC) + timedelta(hours=1)).caller(text)
    assert len(listed()) == 2


def test_grace_does_not_lengthen_a_life(place: Path) -> None:
    number = add("bank", "--expires", "1h")[1]
    before = listed()[0]["expires"]
    call("rotate", number, "--grace", "30d")
    assert listed()[0]["expires"] == before


@pytest.mark.parametrize(("arguments", "said"), [
    (("add", "a b"), "No tenant can be called 'a b'"), (("add", "*"), "belongs to one tenant"),
    (("add", "bank", "--expires", "soon"), "90d"), (("add", "bank", "--expires", "2001-01-01"), "expired already"),
    (("add", "bank", "--expires", "0d"), "0d"), (("add", "bank", "--note", "x" * 201), "200 characters"),
    (("add", "bank", "--expires", "999999d"), "90d"), (("list",), "There is no key file at"),
    (("revoke", "abc"), "There is no key file at"), (("rotate", "abc", "--grace", "x"), "--grace takes"),
    (("add", "bank", "--file", "/proc/none/keys.json"), "cannot be written"),
])
def test_mistakes_are_one_sentence(arguments: tuple[str, ...], said: str, place: Path) -> None:
    assert said in refused(*arguments)
    assert not place.exists()


def test_an_expiry_by_date(place: Path) -> None:
    add("bank", "--expires", "2999-01-31")
    assert datetime.fromisoformat(listed()[0]["expires"]).date().isoformat() in ("2999-01-30", "2999-01-31")


def test_a_damaged_file_is_not_written_over(place: Path) -> None:
    add("bank")
    place.write_text("{")
    assert "is damaged" in refused("add", "bank")
    assert place.read_text() == "{"


def test_the_default_place_is_the_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anchorkv.serve.settings import ServeSettings

    monkeypatch.delenv("ANCHORKV_KEYS")
    monkeypatch.setenv("ANCHORKV_DATA", str(tmp_path / "data"))
    add("bank")
    assert ServeSettings.load().keys_file == tmp_path / "data" / "keys.json"
    monkeypatch.delenv("ANCHORKV_DATA")
    monkeypatch.setattr("platformdirs.user_data_path", lambda name: tmp_path / name)
    add("bank")
    assert ServeSettings.load().keys_file == tmp_path / "anchorkv" / "keys.json"
