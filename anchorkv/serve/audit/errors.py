"""What can go wrong with the audit trail."""

from __future__ import annotations

from anchorkv.errors import AnchorKVError


class AuditError(AnchorKVError):
    """A record, a filter or a database cannot be used as it is."""


class AuditUnavailable(AuditError):
    """Nothing was stored: the database or the disk does not take records now. Trying again later may help."""


class AuditConflict(AuditError):
    """There is another record of this id."""
