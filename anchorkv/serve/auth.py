"""Who is let in, and as whom: by API key, or everybody as one tenant where the server listens on loopback alone."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from anchorkv.errors import ConfigError
from anchorkv.serve.audit.record import EVERY_TENANT
from anchorkv.serve.keys import Key, KeyFile, Role, split_key
from anchorkv.serve.limits import Clock, TokenBucket
from anchorkv.serve.refusals import Refused

log = logging.getLogger("anchorkv.serve")
LOCAL = "local"
"""The tenant of everybody where there are no keys."""
FAILURES_PER_MINUTE = 20
"""Wrong keys that one address may try; each costs the server as much work as a right one, once."""
_REMEMBERED = 4096
_INCLUDES: dict[Role, frozenset[Role]] = {
    "user": frozenset({"user"}), "auditor": frozenset({"auditor"}),
    "operator": frozenset({"user", "operator", "auditor"}),
}


@dataclass(frozen=True)
class Principal:
    """Who asks. A user asks for its tenant; an auditor reads its tenant's records; an operator may do both, and sees
    figures and settings."""

    tenant: str
    """EVERY_TENANT sees all tenants' records and figures, and can ask for none."""
    key_id: str = ""
    """Never the key; "" where no keys are used."""
    role: Role = "operator"

    @property
    def key(self) -> str:
        """`key_id`, as records name it."""
        return self.key_id

    @property
    def roles(self) -> frozenset[Role]:
        """What `role` includes."""
        found = _INCLUDES[self.role]
        return found - {"user"} if self.tenant == EVERY_TENANT else found


def bearer(header: str | None) -> str | None:
    """The key in an Authorization header, None where there is none."""
    scheme, _, key = (header or "").strip().partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


class LoopbackGate:
    """Without keys: everybody on this machine is the operator of one tenant, and nobody else is let in."""

    keys = False
    trouble = ""

    def caller(self, key: str | None, client: str = "") -> Principal:
        """client: the caller's address. Raises Refused (401) for one of another machine, which a proxy passed on."""
        address = _address(client)
        if address is not None and not address.is_loopback:
            raise Refused(
                401, "This server has no API keys and answers its own machine alone; its operator can add keys.",
                code="missing_key",
            )
        return Principal(LOCAL)


class KeyGate:
    """By API key. Thread-safe; the file is read again when it changes.

    A file that cannot be read while the server runs leaves the keys as they were: `trouble` says so, and the log does.
    """

    keys = True

    def __init__(
        self, file: str | Path | KeyFile, *, clock: Clock = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Raises ConfigError when the file cannot be read."""
        self._file = file if isinstance(file, KeyFile) else KeyFile(file)
        self._clock, self._now = clock, now
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._pepper = secrets.token_bytes(32)
        self._verified: OrderedDict[bytes, tuple[str, str]] = OrderedDict()
        """Digest of a key under this process's own secret -> its id and hash: scrypt is paid once, not every time."""
        self._failures: OrderedDict[str, TokenBucket] = OrderedDict()
        self.trouble = ""
        """Why the file was not read again, one sentence; "" when it was."""
        self._stamp = self._stat()
        self._keys: Mapping[str, Key] = self._file.read()

    def caller(self, key: str | None, client: str = "") -> Principal:
        """key: as its owner holds it. client: the caller's address, to slow down who guesses.

        The first time with a key takes tens of milliseconds, which is for a worker thread: see `knows`.
        Raises Refused: 401, or 429 with `retry_after` after many wrong keys.
        """
        if not key:
            raise Refused(
                401, "This server needs an API key; send it as 'Authorization: Bearer ak_…'.", code="missing_key"
            )
        found = self._known(key) or self._verify(key, client)
        state = found.state(self._now())
        if state != "valid":
            said = "has expired" if state == "expired" else "was revoked"
            raise Refused(401, f"This API key {said}; ask the operator for another.", code=f"{state}_key")
        return Principal(found.tenant, found.id, found.role)

    def knows(self, key: str | None) -> bool:
        """Whether `caller` will answer at once."""
        return not key or split_key(key) is None or self._known(key) is not None

    def _known(self, key: str) -> Key | None:
        """By the digest of an earlier time, if its record is still the same."""
        keys, digest = self._current(), self._digest(key)
        with self._lock:
            number, stored = self._verified.get(digest, ("", ""))
            found = keys.get(number)
            if found is None or found.hash != stored:
                self._verified.pop(digest, None)
                return None
            self._verified.move_to_end(digest)
            return found

    def _verify(self, key: str, client: str) -> Key:
        parts = split_key(key)
        if parts is None:
            raise _wrong()
        with self._turn:  # one at a time, so that guessing takes one core at most; others may have done it meanwhile
            return self._known(key) or self._compare(key, *parts, self._bucket(client))

    def _compare(self, key: str, number: str, secret: str, failures: TokenBucket) -> Key:
        if (wait := failures.wait()) > 0:
            raise Refused(
                429, "Too many wrong API keys came from this address; try again later.", code="too_many_failures",
                retry_after=wait,
            )
        found = self._current().get(number)
        # An unknown id is told faster than a wrong secret: ids are no secret.
        if found is None or not found.matches(secret):
            failures.take()
            log.warning("A wrong API key was refused (%s).", f"id {number}" if found is not None else "unknown id")
            raise _wrong()
        with self._lock:
            self._verified[self._digest(key)] = found.id, found.hash
            while len(self._verified) > _REMEMBERED:
                self._verified.popitem(last=False)
        return found

    def _digest(self, key: str) -> bytes:
        return hmac.digest(self._pepper, key.encode("utf-8", "surrogatepass"), hashlib.sha256)

    def _bucket(self, client: str) -> TokenBucket:
        origin = _origin(client)
        bucket = self._failures.setdefault(origin, TokenBucket(FAILURES_PER_MINUTE, self._clock))
        self._failures.move_to_end(origin)
        while len(self._failures) > _REMEMBERED:
            self._failures.popitem(last=False)
        return bucket

    def _current(self) -> Mapping[str, Key]:
        with self._lock:
            stamp = self._stat()
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._keys = self._file.read()
                except ConfigError as error:
                    self.trouble = f"{error} The keys of before stay in force."
                    log.error("%s", self.trouble)
                else:
                    self.trouble = ""
                    log.info("The key file was read again: %d keys.", len(self._keys))
            return self._keys

    def _stat(self) -> tuple[int, ...] | None:
        try:
            found = os.stat(self._file.path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode


def _wrong() -> Refused:
    return Refused(401, "This API key is not valid; check it, or ask the operator for another.", code="invalid_key")


def gate_of(keys: Path | None) -> KeyGate | LoopbackGate:
    """keys: the key file, None for loopback without any. Raises ConfigError when it cannot be read."""
    return LoopbackGate() if keys is None else KeyGate(keys)


def is_loopback(host: str) -> bool:
    """Whether a server that listens on `host` is reached from its own machine alone."""
    address = _address(host.strip("[]"))
    return address.is_loopback if address is not None else host.lower() == "localhost"


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def _origin(client: str) -> str:
    """An IPv6 caller has a whole /64 of addresses."""
    address = _address(client)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address or client)
