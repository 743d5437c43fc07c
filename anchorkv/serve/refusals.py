"""Why a request is not served: a status that HTTP can show as it is, and one sentence."""

from __future__ import annotations

from anchorkv.errors import AnchorKVError, CapacityError, ConfigError, DocumentError
from anchorkv.serve.requests import Busy, NotFound, TooLarge


class Refused(AnchorKVError):
    """`status` as in HTTP; `param`: the field at fault; `code`: a word for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after


def bad(message: str, param: str | None = None, code: str = "invalid_value") -> Refused:
    """A field is wrong (400)."""
    return Refused(400, message, param=param, code=code)


def forbidden(message: str, param: str | None = None) -> Refused:
    """The operator does not allow it (403)."""
    return Refused(403, message, param=param, code="not_allowed")


def stopping() -> Refused:
    return Refused(503, "The server is stopping; ask again when it is back.", code="draining", retry_after=10.0)


def timed_out(seconds: float) -> Refused:
    return Refused(504, f"The request took more than {seconds:g} seconds; ask for less.", code="timeout")


def refusal(error: AnchorKVError) -> Refused:
    """What any error of the engine room and the gate means to the caller."""
    if isinstance(error, Refused):
        return error
    message = str(error)
    if isinstance(error, Busy):
        return Refused(429, message, code="busy", retry_after=error.retry_after)
    if isinstance(error, TooLarge):
        return Refused(400, message, code="context_length_exceeded")
    if isinstance(error, NotFound):
        return Refused(404, message, code="not_found")
    if isinstance(error, DocumentError):
        return Refused(400, message, code="invalid_document")
    if isinstance(error, ConfigError):
        return Refused(400, message, code="invalid_value")
    if isinstance(error, CapacityError):
        return Refused(503, message, code="no_room", retry_after=5.0)
    return Refused(500, message, code="server_error")
