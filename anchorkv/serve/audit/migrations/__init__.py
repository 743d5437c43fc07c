"""Versions of the audit tables, for alembic. `upgrade.py` runs them when the store is opened."""
