"""How alembic runs here: on the connection, and in the transaction, that `upgrade.py` hands over."""

from __future__ import annotations

from alembic import context

from anchorkv.serve.audit.models import Base

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata,
    version_table=context.config.attributes["version_table"],
)
context.run_migrations()
