"""The tables, as SQLAlchemy sees them. What makes them append-only (triggers) is in `migrations`."""

from __future__ import annotations

from sqlalchemy import BigInteger, CheckConstraint, Index, Integer, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """All tables of the audit trail."""


class RecordRow(Base):
    """One link of the chain; `chain.Entry` has the same fields and says what they mean."""

    __tablename__ = "audit_records"

    sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    id: Mapped[str] = mapped_column(Text, unique=True)
    time: Mapped[int] = mapped_column(BigInteger, index=True)
    tenant: Mapped[str] = mapped_column(Text)
    kind: Mapped[str] = mapped_column(Text)
    model: Mapped[str] = mapped_column(Text)
    policy: Mapped[str] = mapped_column(Text)
    fallback: Mapped[int] = mapped_column(Integer)
    through: Mapped[int | None] = mapped_column(BigInteger)
    content: Mapped[str | None] = mapped_column(Text)
    content_hash: Mapped[str] = mapped_column(Text)
    previous: Mapped[str] = mapped_column(Text)
    hash: Mapped[str] = mapped_column(Text)

    __table_args__ = (
        Index("ix_audit_records_tenant_sequence", "tenant", "sequence"),
        Index(
            "ix_audit_records_through", "through",
            sqlite_where=through.is_not(None), postgresql_where=through.is_not(None),
        ),
    )


class HeadRow(Base):
    """One row: the newest record. It is also the lock that appends take turns by."""

    __tablename__ = "audit_head"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    origin: Mapped[str] = mapped_column(Text)
    """Random: the hash before the first record, so that no two databases have the same chain."""
    sequence: Mapped[int] = mapped_column(BigInteger)
    hash: Mapped[str] = mapped_column(Text)

    __table_args__ = (CheckConstraint("id = 1", name="ck_audit_head_one_row"),)
