"""`anchorkv keys`: make, list, revoke and rotate the API keys of a server. It notices changes by itself."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import platformdirs
import typer
from rich import box
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from anchorkv.cli.options import JsonOption
from anchorkv.cli.screen import note, print_json, stdout
from anchorkv.errors import ConfigError
from anchorkv.serve.keys import FILE, Key, KeyFile, Role, find, make_key

app = typer.Typer(no_args_is_help=True, help="Make, list, revoke and rotate the API keys of `anchorkv serve`.")

_SPAN = re.compile(r"(\d{1,5})([dhm])")
_UNITS = {"d": timedelta(days=1), "h": timedelta(hours=1), "m": timedelta(minutes=1)}
_STYLES = {"valid": "green", "expired": "yellow", "revoked": "red"}

FileOption = Annotated[Path | None, Option(
    "--file", "-f", metavar="FILE", envvar="ANCHORKV_KEYS", show_default=False,
    help="The key file; without it keys.json in the server's default data folder.")]
ExpiresOption = Annotated[str | None, Option(
    "--expires", metavar="AGE|DATE", help="When it stops to work: 90d, 12h, or a date; without it never.")]
IdArgument = Annotated[str, Argument(metavar="ID", help="A key's id, or its first characters.", show_default=False)]


@app.command()
def add(
    tenant: Annotated[str, Argument(
        metavar="TENANT", show_default=False,
        help="Whose documents and records it opens; '*' for an operator or auditor who sees all tenants' records.")],
    *, role: Annotated[Role, Option("--role", help="user asks; auditor reads records; operator does both and more.")]
    = "user",
    said: Annotated[str, Option("--note", metavar="TEXT", help="Whose it is, for the list.")] = "",
    expires: ExpiresOption = None, file: FileOption = None, as_json: JsonOption = False,
) -> None:
    """Make a key and print it. It is shown this once: the file holds only its hash."""
    now = datetime.now(UTC)
    where = _file(file)
    key, secret = make_key(tenant, role, note=said, lifetime=_lifetime(expires, now), now=now)
    with where.changing(create=True) as keys:
        keys[key.id] = key
    _show(where, key, secret, now, as_json)


@app.command("list")
def list_(
    *, tenant: Annotated[str | None, Option("--tenant", metavar="NAME", help="This tenant's keys alone.")] = None,
    file: FileOption = None, as_json: JsonOption = False,
) -> None:
    """List the keys, the oldest first. Their secrets are not stored and cannot be shown."""
    now = datetime.now(UTC)
    found = [key for key in _file(file).read().values() if tenant in (None, key.tenant)]
    if as_json:
        print_json({"keys": [key.as_dict(now) for key in found]})
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for heading in ("Id", "Tenant", "Role", "State", "Made", "Expires", "Note"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "Id")
    for key in found:
        state = key.state(now)
        expires = _day(key.expires) if key.expires else "never"
        table.add_row(
            key.id, Text(key.tenant), key.role, Text(state, _STYLES[state]), _day(key.created), expires, Text(key.note)
        )
    stdout().print(table if found else "There are no keys.")


@app.command()
def revoke(
    ids: Annotated[list[str], Argument(metavar="ID…", help="Keys' ids, or their first characters.",
                                       show_default=False)],
    *, file: FileOption = None, as_json: JsonOption = False,
) -> None:
    """Take keys back, at once and for good. They stay in the list, for records name them."""
    now = datetime.now(UTC).replace(microsecond=0)
    with _file(file).changing() as keys:
        chosen = {key.id: key for key in [find(keys, wanted) for wanted in ids]}
        done = {number: key.changed(revoked=key.revoked or now) for number, key in chosen.items()}
        keys.update(done)
    if as_json:
        print_json({"keys": [key.as_dict(now) for key in done.values()]})
        return
    for number, key in chosen.items():
        was = " already" if key.revoked else ""
        stdout().print(f"{number} of {key.tenant} is{was} revoked.", markup=False)


@app.command()
def rotate(
    id: IdArgument, *,
    grace: Annotated[str | None, Option(
        "--grace", metavar="AGE", help="How long the old key goes on to work (1h, 7d); without it not at all.")] = None,
    expires: ExpiresOption = None, file: FileOption = None, as_json: JsonOption = False,
) -> None:
    """Put a new key in the place of an old one, for the same tenant and role, and print it.

    Without --expires it lives as long as the old one was made for.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    kept = _span(grace, "--grace") if grace else None
    lifetime = _lifetime(expires, now)
    where = _file(file)
    with where.changing() as keys:
        old = find(keys, id)
        if old.revoked:
            raise ConfigError(f"The key {old.id} is revoked; make a new one with `anchorkv keys add {old.tenant}`.")
        if lifetime is None and old.expires is not None:
            lifetime = old.expires - old.created
        key, secret = make_key(old.tenant, old.role, note=old.note, lifetime=lifetime, now=now)
        if kept is None:
            keys[old.id] = old.changed(revoked=now)
        else:
            end = now + kept
            keys[old.id] = old.changed(expires=end if old.expires is None else min(end, old.expires))
        keys[key.id] = key
    _show(where, key, secret, now, as_json)
    if not as_json:
        note(f"The old key {old.id} " + ("is revoked." if kept is None else f"works for another {grace}."))


def _show(file: KeyFile, key: Key, secret: str, now: datetime, as_json: bool) -> None:
    """The key alone on standard output, so that a script can take it."""
    if as_json:
        print_json({**key.as_dict(now), "key": secret, "file": str(file.path)})
        return
    typer.echo(secret)
    note(f"It is shown this once. Its id is {key.id}: {key.role} of {key.tenant}, in {file.path}.")


def _file(given: Path | None) -> KeyFile:
    """The server's own default where nothing is said."""
    folder = os.environ.get("ANCHORKV_DATA") or platformdirs.user_data_path("anchorkv")
    return KeyFile(given or Path(folder) / FILE)


def _lifetime(text: str | None, now: datetime) -> timedelta | None:
    """From an age, or a time to come (UTC where it does not say)."""
    if text is None:
        return None
    if _SPAN.fullmatch(text.strip()):
        return _span(text, "--expires")
    try:
        found = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ConfigError(f"--expires takes 90d, 12h, 30m or a date such as 2027-01-31 (got {text!r}).") from None
    lifetime = (found if found.tzinfo else found.replace(tzinfo=UTC)) - now
    if lifetime <= timedelta():
        raise ConfigError(f"The key would have expired already ({text}); give a time to come.")
    return lifetime


def _span(text: str, option: str) -> timedelta:
    found = _SPAN.fullmatch(text.strip())
    if found is None or int(found[1]) == 0:
        raise ConfigError(f"{option} takes a time such as 90d, 12h or 30m (got {text!r}).")
    return int(found[1]) * _UNITS[found[2]]


def _day(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M}"
