"""The version of the audit tables: brought up to this program's when the store is opened, by one process at a time."""

from __future__ import annotations

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from anchorkv.serve.audit.errors import AuditError

VERSION_TABLE = "audit_version"
_LOCK = 0x616E63686F72  # any number that nobody else takes


def upgrade(connection: Connection) -> None:
    """Create or upgrade the tables, in the transaction of `connection`.

    Raises AuditError when the database is of a newer version than this program.
    """
    if connection.dialect.name == "postgresql":  # SQLite's write transaction is lock enough
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    config = _config(connection)
    found, newest = _versions(connection, config)
    if found != newest:
        command.upgrade(config, "head")


def check(connection: Connection) -> None:
    """Raises AuditError unless the tables are there and of this program's version."""
    found, newest = _versions(connection, _config(connection))
    if found is None:
        raise AuditError("This database holds no audit trail; name the one that the server writes to.")
    if found != newest:
        raise AuditError("The audit trail was written by an older anchorkv; start the server once to upgrade it.")


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", "anchorkv.serve.audit:migrations")
    config.attributes.update(connection=connection, version_table=VERSION_TABLE)
    return config


def _versions(connection: Connection, config: Config) -> tuple[str | None, str | None]:
    """Found in the database, and this program's newest."""
    script = ScriptDirectory.from_config(config)
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    found = context.get_current_revision()
    if found is not None and found not in {item.revision for item in script.walk_revisions()}:
        raise AuditError(
            f"The audit trail is of version {found}, which a newer anchorkv wrote; upgrade anchorkv to use it."
        )
    return found, script.get_current_head()
