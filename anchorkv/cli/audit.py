"""`anchorkv audit`: look at the records of a server's answers, check that none was changed, export and retire them."""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from anchorkv.cli import audit_tables as tables
from anchorkv.cli.options import JsonOption, ModelOptions, takes_options
from anchorkv.cli.screen import count, interactive, note, print_json, stdout
from anchorkv.errors import AnchorKVError, ConfigError
from anchorkv.extract import extract

if TYPE_CHECKING:
    from anchorkv.serve.audit.store import AuditStore, Filter

app = typer.Typer(no_args_is_help=True, help="Look at, check, export and retire the records of a server's answers.")

_AGE = re.compile(r"(\d+)([dhm])")
_UNITS = {"d": timedelta(days=1), "h": timedelta(hours=1), "m": timedelta(minutes=1)}
_WHEN = "DATE|AGE"

DatabaseOption = Annotated[str | None, Option(
    "--database", "-d", metavar="FILE|URL", envvar="ANCHORKV_AUDIT_DATABASE",
    help="SQLite file or postgresql://… ; without it the server's default place.")]
TenantOption = Annotated[str | None, Option("--tenant", metavar="NAME", help="This tenant's records alone.")]
SinceOption = Annotated[str | None, Option(
    "--since", metavar=_WHEN, help="From this time on: 2026-01-31, 2026-01-31T12:00 (UTC), or an age: 7d, 12h, 30m.")]
UntilOption = Annotated[str | None, Option("--until", metavar=_WHEN, help="Before this time.")]
ModelOption = Annotated[str | None, Option("--model", metavar="NAME", help="Answers of this model.")]
PolicyOption = Annotated[str | None, Option("--policy", metavar="NAME", help="Answers under this policy.")]
FallbackOption = Annotated[bool | None, Option(
    "--fallback/--no-fallback", help="Answers that took fallback steps, or that took none.", show_default=False)]
IdArgument = Annotated[str, Argument(metavar="ID", help="A record's id, as `list` shows it.", show_default=False)]


@app.command()
def verify(
    *, database: DatabaseOption = None,
    head: Annotated[list[str] | None, Option(
        "--head", metavar="N:HASH", help="A head noted earlier, which must still be in the chain; repeatable.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that no record was changed, removed or put in. Exit code 1 and the places where one was."""
    with _store(database) as store:
        from anchorkv.serve.audit.chain import Head

        report = store.verify([Head.parse(text) for text in head or []])
        if as_json:
            print_json(report.as_dict())
        else:
            tables.print_report(stdout(), report, noted=bool(head))
    if not report.sound:
        raise typer.Exit(1)


@app.command()
def head(*, database: DatabaseOption = None, as_json: JsonOption = False) -> None:
    """Print the newest record's number and hash. Note it where the database's owner cannot change it.

    A chain cannot show that its end was cut off and its head changed to fit; `verify --head` with a noted head does.
    """
    with _store(database) as store:
        newest = store.head()
        if as_json:
            print_json({"head": str(newest), "sequence": newest.sequence, "hash": newest.hash})
        else:
            stdout().print(str(newest), soft_wrap=True)


@app.command("list")
def list_(
    *, database: DatabaseOption = None, tenant: TenantOption = None, since: SinceOption = None,
    until: UntilOption = None, model: ModelOption = None, policy: PolicyOption = None, fallback: FallbackOption = None,
    limit: Annotated[int, Option("--limit", "-n", min=1, help="Most records, the newest first.")] = 50,
    before: Annotated[int | None, Option("--before-record", metavar="N", help="Go on below this number.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List records, the newest first."""
    with _store(database) as store:
        wanted = _filter(tenant, since, until, model, policy, fallback)
        found = store.query(wanted, limit=limit, before=before)
        if as_json:
            print_json({"records": [entry.as_dict() for entry in found]})
            return
        tables.print_list(stdout(), found)
        if len(found) == limit:
            note(f"There may be more; go on with --before-record {found[-1].sequence}.")


@app.command()
def show(
    id: IdArgument, *, database: DatabaseOption = None, tenant: TenantOption = None, as_json: JsonOption = False,
) -> None:
    """Show one record: what was kept, dropped, pinned and recalled for an answer, and why."""
    with _store(database) as store:
        entry = store.get(id, tenant=_tenant(tenant))
        if as_json:
            print_json(entry.as_dict())
        else:
            tables.print_entry(stdout(), entry)


@app.command()
def export(
    file: Annotated[str, Argument(metavar="FILE", help="Where to; '-' is standard output.", show_default=False)],
    *, form: Annotated[str | None, Option(
        "--format", metavar="KIND", help="csv, jsonl or parquet; without it as FILE ends.")] = None,
    database: DatabaseOption = None, tenant: TenantOption = None, since: SinceOption = None, until: UntilOption = None,
    model: ModelOption = None, policy: PolicyOption = None, fallback: FallbackOption = None,
) -> None:
    """Write records to a file for other programs, the oldest first."""
    with _store(database) as store:
        from anchorkv.serve.audit.export import export as write

        written = write(store.entries(_filter(tenant, since, until, model, policy, fallback)), file, form)
        note(f"Wrote {count(written)} records to {'standard output' if file == '-' else file}.")


@app.command()
@takes_options
def replay(
    id: IdArgument, *, database: DatabaseOption = None, tenant: TenantOption = None,
    document: Annotated[str | None, Option(
        "--document", metavar="FILE", help="The document that the request was about, where it names one.")] = None,
    as_json: JsonOption = False, model: ModelOptions,
) -> None:
    """Run a recorded request again and compare the answer. Exit code 1 when something differs.

    Needs a record with text, and the same model.
    """
    with _store(database) as store:
        from anchorkv.cli.audit_replay import ServeReplayer
        from anchorkv.serve.audit.replay import check, replay

        entry = store.get(id, tenant=_tenant(tenant))
        check(entry)
        texts = [] if document is None else _texts(document)
        with model.load(None) as loaded:
            found = replay(entry, ServeReplayer(loaded, texts))
    differing = [item for item in found if not item.same]
    if as_json:
        print_json({"id": id, "same": not differing, "comparisons": [item.as_dict() for item in found]})
    else:
        tables.print_comparisons(stdout(), found)
    if differing:
        raise typer.Exit(1)


@app.command()
def retain(
    *, older_than: Annotated[str | None, Option(
        "--older-than", metavar="AGE|DATE", help="Retire what was asked before: 90d, or a date.")] = None,
    through: Annotated[int | None, Option(
        "--through", metavar="N", min=1, help="Retire all records up to this number instead.")] = None,
    tenant: TenantOption = None, database: DatabaseOption = None,
    reason: Annotated[str, Option("--reason", metavar="TEXT", help="Goes into the chain.")] = "",
    dry_run: Annotated[bool, Option("--dry-run", help="Say what would be retired, and retire nothing.")] = False,
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Take the content of old records away for good. Their hashes stay, so the chain can still be verified."""
    with _store(database) as store:
        from anchorkv.serve.audit.retention import Retire

        def retire(dry: bool) -> Any:
            return store.retain(Retire(
                tenant=_tenant(tenant), before=_when(older_than), through=through, reason=reason, by=_user(),
                dry_run=dry,
            ))

        plan = retire(True)
        if not dry_run and plan.records and not yes:
            if as_json or not interactive():
                raise ConfigError(f"This takes the content of {count(plan.records)} records away; add --yes.")
            typer.confirm(f"Take the content of {count(plan.records)} records away for good?", abort=True)
        done = plan if dry_run else retire(False)
        for text in done.notes:
            note(text)
        if as_json:
            print_json({**done.as_dict(), "dry_run": dry_run})
            return
        said = "Would retire" if dry_run else "Retired"
        stdout().print(f"{said} {count(done.records)}, up to number {done.through}.")


@contextmanager
def _store(database: str | None) -> Iterator[AuditStore]:
    """An existing trail; the command line makes none. Raises AnchorKVError where the server's libraries are missing."""
    try:
        from anchorkv.serve.audit.store import AuditStore, default_database
    except ImportError as error:
        raise AnchorKVError(
            f"The audit trail needs {error.name}, which is not installed: pip install 'anchorkv[serve]'."
        ) from None
    with AuditStore(database or default_database(), timeout=30.0, create=False, keep_text=True) as store:
        store.open()
        yield store


def _filter(
    tenant: str | None, since: str | None, until: str | None, model: str | None, policy: str | None,
    fallback: bool | None,
) -> Filter:
    from anchorkv.serve.audit.store import Filter

    return Filter(
        tenant=_tenant(tenant), since=_when(since), until=_when(until), model=model, policy=policy, fallback=fallback
    )


def _texts(path: str) -> list[str]:
    """What a server may have been given: the text taken out of the file, or the file as it stands."""
    found = [extract(path)]
    try:
        return [*found, Path(path).read_bytes().decode()]
    except (OSError, UnicodeDecodeError):
        return found


def _user() -> str:
    """Who runs the command; containers may have users without a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid()) if hasattr(os, "getuid") else ""


def _tenant(name: str | None) -> str:
    from anchorkv.serve.audit.record import EVERY_TENANT

    return EVERY_TENANT if name is None else name


def _when(text: str | None) -> datetime | None:
    """A date, a time (UTC where it does not say), or an age."""
    if text is None:
        return None
    age = _AGE.fullmatch(text.strip())
    try:
        if age:
            return datetime.now(UTC) - int(age[1]) * _UNITS[age[2]]
        found = datetime.fromisoformat(text.strip())
    except (ValueError, OverflowError):
        raise ConfigError(f"'{text}' is no time; write 2026-01-31, 2026-01-31T12:00, or an age like 7d.") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
