"""The chain of records, its head, and the triggers that let records be appended, and nothing else.

A record's content may be set to NULL where a record of retention, itself part of the chain, covers it.
"""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_COLUMNS = (
    "sequence", "id", "time", "tenant", "kind", "model", "policy", "fallback", "through", "content_hash", "previous",
    "hash",
)
_SECOND_HEAD = "audit_head has one row"
_APPEND_ONLY = "audit records are append-only"
_NOT_NEXT = "an audit record must follow the newest one"
_WRONG_HEAD = "audit_head must name the newest record"

# Conditions in the common tongue of SQLite and PostgreSQL: when a change is refused.
_NOT_RETENTION = (
    "NEW.content IS NOT NULL OR OLD.kind = 'retention' OR "
    + " OR ".join(f"NEW.{name} IS DISTINCT FROM OLD.{name}" for name in _COLUMNS)
    + " OR NOT EXISTS (SELECT 1 FROM audit_records r WHERE r.kind = 'retention' AND r.through >= OLD.sequence"
    " AND r.sequence > OLD.sequence AND (r.tenant = '*' OR r.tenant = OLD.tenant))"
)
_NOT_AFTER_NEWEST = (
    "NEW.sequence <> coalesce((SELECT max(sequence) FROM audit_records), 0) + 1 OR NEW.previous <> coalesce("
    "(SELECT hash FROM audit_records ORDER BY sequence DESC LIMIT 1), (SELECT origin FROM audit_head))"
)
_NOT_NEWEST = (
    "NEW.id <> 1 OR NEW.origin <> OLD.origin OR NOT EXISTS (SELECT 1 FROM audit_records r WHERE r.hash = NEW.hash"
    " AND r.sequence = NEW.sequence AND r.sequence = (SELECT max(sequence) FROM audit_records))"
)
_TRIGGERS = (
    ("audit_records", "INSERT", _NOT_AFTER_NEWEST, _NOT_NEXT),
    ("audit_records", "UPDATE", _NOT_RETENTION, _APPEND_ONLY),
    ("audit_records", "DELETE", "TRUE", _APPEND_ONLY),
    ("audit_head", "INSERT", "TRUE", _SECOND_HEAD),
    ("audit_head", "UPDATE", _NOT_NEWEST, _WRONG_HEAD),
    ("audit_head", "DELETE", "TRUE", _SECOND_HEAD),
)


def upgrade() -> None:
    op.create_table(
        "audit_records",
        sa.Column("sequence", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("time", sa.BigInteger, nullable=False, index=True),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("tenant", "kind", "model", "policy")),
        sa.Column("fallback", sa.Integer, nullable=False),
        sa.Column("through", sa.BigInteger),
        sa.Column("content", sa.Text),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("content_hash", "previous", "hash")),
    )
    op.create_index("ix_audit_records_tenant_sequence", "audit_records", ["tenant", "sequence"])
    given = sa.text("through IS NOT NULL")
    op.create_index(
        "ix_audit_records_through", "audit_records", ["through"], sqlite_where=given, postgresql_where=given
    )
    head = op.create_table(
        "audit_head",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("origin", "hash")),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.CheckConstraint("id = 1", name="ck_audit_head_one_row"),
    )
    origin = secrets.token_hex(32)
    op.bulk_insert(head, [{"id": 1, "origin": origin, "sequence": 0, "hash": origin}])
    create = _sqlite if op.get_bind().dialect.name == "sqlite" else _postgresql
    for table, event, refused, message in _TRIGGERS:
        create(table, event, refused, message)


def _sqlite(table: str, event: str, refused: str, message: str) -> None:
    condition = refused.replace("IS DISTINCT FROM", "IS NOT")  # older SQLite knows its own spelling alone
    op.execute(
        f"CREATE TRIGGER {table}_{event.lower()} BEFORE {event} ON {table} WHEN {condition} "
        f"BEGIN SELECT RAISE(ABORT, '{message}'); END"
    )


def _postgresql(table: str, event: str, refused: str, message: str) -> None:
    name = f"{table}_{event.lower()}"
    row = "OLD" if event == "DELETE" else "NEW"
    op.execute(
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF {refused} THEN "
        f"RAISE EXCEPTION '{message}' USING ERRCODE = 'restrict_violation'; END IF; RETURN {row}; END $$"
    )
    op.execute(f"CREATE TRIGGER {name} BEFORE {event} ON {table} FOR EACH ROW EXECUTE FUNCTION {name}()")
    if event == "DELETE":
        op.execute(
            f"CREATE FUNCTION {table}_truncate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"RAISE EXCEPTION '{message}' USING ERRCODE = 'restrict_violation'; END $$"
        )
        op.execute(
            f"CREATE TRIGGER {table}_truncate BEFORE TRUNCATE ON {table} FOR EACH STATEMENT "
            f"EXECUTE FUNCTION {table}_truncate()"
        )
