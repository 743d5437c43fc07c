"""API keys in a file: hashed, each of one tenant and one role. The file is written whole or not at all.

A key is "ak_<id>_<secret>". Its id is no secret and names it in logs and records. The secret has 256 random bits; the
file holds its scrypt hash (RFC 7914) under a salt of its own, and nobody can read it back.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from filelock import FileLock, Timeout
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from anchorkv.errors import ConfigError, SavedStateError
from anchorkv.serve.audit.record import EVERY_TENANT

Role = Literal["user", "operator", "auditor"]
State = Literal["valid", "expired", "revoked"]
ROLES: tuple[Role, ...] = get_args(Role)
FORMAT = "anchorkv-keys/1"
FILE = "keys.json"
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_KEY = re.compile(r"ak_([0-9a-f]{12})_([A-Za-z0-9_-]{16,128})")
_N, _R, _P = 2**14, 8, 1
_Hex = Annotated[str, Field(pattern=r"^([0-9a-f]{2}){16,64}$")]


class Key(BaseModel):
    """What the file holds of one key. n, r, p: scrypt's cost, so that it can be raised for new keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    tenant: str
    role: Role = "user"
    note: str = Field(default="", max_length=200, description="whose it is")
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None
    salt: _Hex = Field(repr=False)
    hash: _Hex = Field(repr=False)
    n: int = Field(ge=2**10, le=2**17)
    r: int = Field(ge=1, le=16)
    p: int = Field(ge=1, le=4)

    @model_validator(mode="after")
    def _consistent(self) -> Key:
        if self.n & (self.n - 1):
            raise ValueError("n must be a power of two")
        _check_note(self.note)
        check_tenant(self.tenant, self.role)
        return self

    def matches(self, secret: str) -> bool:
        """Takes tens of milliseconds, on purpose."""
        return hmac.compare_digest(bytes.fromhex(self.hash), _scrypt(secret, self.salt, self.n, self.r, self.p))

    def state(self, now: datetime) -> State:
        if self.revoked is not None and self.revoked <= now:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "valid"

    def changed(self, **changes: Any) -> Key:
        return self.model_copy(update=changes)

    def as_dict(self, now: datetime) -> dict[str, Any]:
        """JSON-able, without the hash."""
        return {**self.model_dump(mode="json", exclude={"salt", "hash", "n", "r", "p"}), "state": self.state(now)}


def make_key(
    tenant: str, role: Role = "user", *, note: str = "", lifetime: timedelta | None = None, now: datetime | None = None
) -> tuple[Key, str]:
    """A new key as the file holds it, and as its owner does: this text exists nowhere else.

    Raises ConfigError for a tenant that cannot be so called, and a lifetime that is none.
    """
    check_tenant(tenant, role)
    _check_note(note)
    created = (now or datetime.now(UTC)).replace(microsecond=0)
    try:
        if lifetime is not None and lifetime <= timedelta():
            raise ConfigError("A key must expire after it was made; give a time to come.")
        expires = None if lifetime is None else created + lifetime
    except OverflowError:
        raise ConfigError("The key would expire after the year 9999; leave its expiry out.") from None
    number, secret, salt = secrets.token_hex(6), secrets.token_urlsafe(32), secrets.token_hex(16)
    key = Key(
        id=number, tenant=tenant, role=role, note=note, created=created, expires=expires, salt=salt,
        hash=_scrypt(secret, salt, _N, _R, _P).hex(), n=_N, r=_R, p=_P,
    )
    return key, f"ak_{number}_{secret}"


def split_key(text: str) -> tuple[str, str] | None:
    """Id and secret of a key as its owner holds it, None for what cannot be one."""
    found = _KEY.fullmatch(text)
    return (found[1], found[2]) if found else None


def check_tenant(name: str, role: Role = "user") -> None:
    """Raises ConfigError for a name that no tenant may have, or a user of every tenant."""
    if name == EVERY_TENANT:
        if role == "user":
            raise ConfigError(f"A user's key belongs to one tenant; '{EVERY_TENANT}' is for operators and auditors.")
    elif not _TENANT.fullmatch(name):
        raise ConfigError(
            f"No tenant can be called {name!r}; use up to 64 letters, digits and . _ @ - (and begin with a letter or "
            "digit)."
        )


def _check_note(text: str) -> None:
    if len(text) > 200 or not text.isprintable():
        raise ConfigError("A key's note has at most 200 characters, all of them printable.")


def _scrypt(secret: str, salt: str, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(
        secret.encode(), salt=bytes.fromhex(salt), n=n, r=r, p=p, maxmem=129 * n * r * p + 2**20, dklen=32
    )


class KeyFile:
    """The file itself: its owner alone may read and write it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    def read(self) -> dict[str, Key]:
        """Keys by id, oldest first. Raises ConfigError, one sentence, for a file that is missing, damaged or open to
        others' changes."""
        try:
            with self.path.open(encoding="utf-8") as file:
                mode = os.fstat(file.fileno()).st_mode
                content = json.load(file)
        except FileNotFoundError:
            raise ConfigError(
                f"There is no key file at {self.path}; `anchorkv keys add TENANT --file {self.path}` makes it."
            ) from None
        except OSError as error:
            raise ConfigError(f"The key file {self.path} cannot be read ({error.strerror}).") from None
        except (ValueError, RecursionError):
            raise ConfigError(f"The key file {self.path} is damaged; restore it from a copy.") from None
        if os.name == "posix" and mode & 0o022:
            raise ConfigError(
                f"Others than its owner can change the key file {self.path}; run: chmod 600 {self.path}"
            )
        return self._parsed(content)

    def _parsed(self, content: Any) -> dict[str, Key]:
        if not isinstance(content, dict) or not isinstance(content.get("keys"), list):
            raise ConfigError(f"{self.path} is no key file; `anchorkv keys add` makes one.")
        if content.get("format") != FORMAT:
            raise ConfigError(f"{self.path} is a key file of another version ({content.get('format')!r}).")
        found: dict[str, Key] = {}
        for number, item in enumerate(content["keys"], 1):
            try:
                key = Key.model_validate(item)
            except (ValidationError, ConfigError):  # neither names what the file holds: it may be a secret
                raise ConfigError(f"Key {number} in {self.path} is damaged; restore the file from a copy.") from None
            if key.id in found:
                raise ConfigError(f"The key {key.id} is twice in {self.path}; take one of them out.")
            found[key.id] = key
        return found

    @contextmanager
    def changing(self, *, create: bool = False) -> Iterator[dict[str, Key]]:
        """The keys, to be changed; they are written at the end of the block, and others wait until then.

        create: begin a file where there is none. Raises ConfigError as `read`, SavedStateError when it cannot be
        written; the file is then as it was.
        """
        try:
            if create:
                self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = FileLock(self.path.with_name(self.path.name + ".lock"), timeout=10, mode=0o600)
            lock.acquire()
        except Timeout:
            raise SavedStateError(f"Another process is changing {self.path}; try again.") from None
        except OSError as error:
            raise self._not_written(error) from None
        try:
            keys = {} if create and not self.path.exists() else self.read()
            before = dict(keys)
            yield keys
            if keys != before:
                self._write(keys)
        finally:
            lock.release()

    def _write(self, keys: Mapping[str, Key]) -> None:
        content = {"format": FORMAT, "keys": [key.model_dump(mode="json") for key in keys.values()]}
        target = self.path.resolve()  # a link stays one
        partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
        try:
            handle = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(json.dumps(content, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            _same_owner(target, partial)
            os.replace(partial, target)
            _sync(target.parent)
        except OSError as error:
            raise self._not_written(error) from None
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _not_written(self, error: OSError) -> SavedStateError:
        return SavedStateError(f"The key file {self.path} cannot be written ({error.strerror}); choose another --file.")


def find(keys: Mapping[str, Key], wanted: str) -> Key:
    """By its id, or by the first characters of it that name only one. Raises ConfigError."""
    found: Iterable[Key] = [key for number, key in keys.items() if wanted and number.startswith(wanted)]
    match list(found):
        case [key]:
            return key
        case []:
            raise ConfigError(f"There is no key {wanted[:64]!r}; `anchorkv keys list` shows those there are.")
        case several:
            raise ConfigError(f"{len(several)} keys begin with {wanted!r}; give more of the id.")


def _same_owner(old: Path, new: Path) -> None:
    """So that the server can still read what root has changed."""
    with suppress(OSError, AttributeError):
        was = old.stat()
        if was.st_uid != os.geteuid() or was.st_gid != os.getegid():
            os.chown(new, was.st_uid, was.st_gid)


def _sync(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
