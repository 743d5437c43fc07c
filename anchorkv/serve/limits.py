"""How much each tenant may do: requests and tokens a minute, requests at once, KV cells, bytes of documents.

Rates are token buckets on a monotonic clock, so that setting the machine's clock changes nothing. A minute's allowance
may be used at once; then it comes back evenly: in any t minutes at most t + 1 of it are used.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, Self

from pydantic import BaseModel, ConfigDict, Field
from pydantic.types import ByteSize

from anchorkv.serve.refusals import Refused

Clock = Callable[[], float]
_LONGEST_WAIT = 60.0
_SLACK = 1e-9
"""Rounding: who waits as long as told must be let in."""


class TenantLimits(BaseModel):
    """What one tenant may do. None: no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: int | None = Field(default=None, ge=1, description="requests a minute")
    tokens_per_minute: int | None = Field(default=None, ge=1, description="tokens a minute, read and written")
    concurrent: int | None = Field(default=None, ge=1, description="answers that are waited for or written at once")
    document_bytes: ByteSize | None = Field(
        default=None, ge=0, description="text of all stored documents, such as 100MiB"
    )
    cells_share: float = Field(
        default=1.0, gt=0, le=1, description="share of all KV cells that its requests may hold at once"
    )

    def over(self, default: TenantLimits) -> TenantLimits:
        """These, and `default` where nothing was said."""
        return default.model_copy(update={name: getattr(self, name) for name in self.model_fields_set})


class TokenBucket:
    """`per_minute` units a minute, at most `capacity` (else a minute's) saved up. Not thread-safe."""

    def __init__(self, per_minute: float, clock: Clock = time.monotonic, capacity: float | None = None) -> None:
        self.rate = per_minute / 60
        self.capacity = per_minute if capacity is None else capacity
        self._clock, self._level, self._last = clock, self.capacity, clock()

    @property
    def level(self) -> float:
        """Units there are now; below 0 where more was taken than there was."""
        now = self._clock()
        self._level = min(self.capacity, self._level + max(0.0, now - self._last) * self.rate)
        self._last = now
        return self._level

    def wait(self, amount: float = 1) -> float:
        """Seconds until `amount` may be taken: 0 now, infinite never."""
        if amount > self.capacity:
            return math.inf
        lacking = amount - self.level
        return lacking / self.rate if lacking > _SLACK * self.capacity else 0.0

    def take(self, amount: float = 1) -> None:
        """Whether or not there is as much: ask `wait` before."""
        self._level = self.level - amount

    def give(self, amount: float) -> None:
        """Back what was taken and not used."""
        self._level = min(self.capacity, self.level + amount)


class Holder(Protocol):
    """Who is limited."""

    @property
    def tenant(self) -> str: ...


@dataclass(frozen=True)
class Usage:
    """What a tenant uses now and has left, for response headers and the dashboard. None where there is no limit."""

    running: int
    cells: int
    requests_limit: int | None = None
    requests_left: int | None = None
    requests_reset: float | None = None
    """Seconds until the whole allowance is there again."""
    tokens_limit: int | None = None
    tokens_left: int | None = None
    tokens_reset: float | None = None


class _Tenant:
    """One tenant's limits and what it uses of them."""

    def __init__(self, limits: TenantLimits, clock: Clock) -> None:
        self.limits = limits
        self.requests = TokenBucket(limits.requests_per_minute, clock) if limits.requests_per_minute else None
        self.tokens = TokenBucket(limits.tokens_per_minute, clock) if limits.tokens_per_minute else None
        self.running = self.cells = self.storing = 0
        self.seconds = 1.0
        """How long its requests take, the newest counting most."""

    def until_one_ends(self) -> float:
        return min(_LONGEST_WAIT, max(1.0, self.seconds / max(1, self.running)))


class Limiter:
    """All tenants. Thread-safe."""

    def __init__(
        self, default: TenantLimits | None = None, tenants: Mapping[str, TenantLimits] | None = None, *,
        cells: int | None = None, clock: Clock = time.monotonic,
    ) -> None:
        """default: of every tenant; tenants: what differs for some. cells: KV cells there are in all."""
        self._default, self._special = default or TenantLimits(), dict(tenants or {})
        self._all_cells, self._clock = cells, clock
        self._lock = threading.Lock()
        self._tenants: dict[str, _Tenant] = {}

    def limits(self, tenant: str) -> TenantLimits:
        special = self._special.get(tenant)
        return self._default if special is None else special.over(self._default)

    def enter(self, caller: Holder, tokens: int, *, answers: int = 1, cells: int = 0) -> Lease:
        """A context manager, held while a request waits and runs. Refused leaves everything as it was.

        tokens: most that it may read and write. answers: how many are written at once. cells: most it may hold.
        Raises Refused: 429 with `retry_after`, or 400 for what would be refused however long it waited.
        """
        with self._lock:
            tenant = self._of(caller.tenant)
            self._check_ever(tenant.limits, tokens, answers, cells)
            self._check_now(tenant, tokens, answers, cells)
            if tenant.requests:
                tenant.requests.take()
            if tenant.tokens:
                tenant.tokens.take(tokens)
            tenant.running += answers
            tenant.cells += cells
        return Lease(self, tenant, tokens, answers, cells, self._clock())

    @contextmanager
    def storing(self, caller: Holder, size: int, stored: Callable[[], int]) -> Iterator[None]:
        """Held while a document of `size` bytes is stored. stored: bytes that the tenant has now; what is being stored
        may be counted in it already or not.

        Raises Refused (403) when it would be too much.
        """
        with self._lock:
            tenant = self._of(caller.tenant)
            most = tenant.limits.document_bytes
            if most is not None and (there := stored() + tenant.storing) + size > most:
                raise Refused(
                    403, f"This document has {size:,} bytes, and {max(0, most - there):,} of {most:,} are left; delete "
                    "others first.", code="quota_exceeded",
                )
            tenant.storing += size
        try:
            yield
        finally:
            with self._lock:
                tenant.storing -= size

    def usage(self, tenant: str) -> Usage:
        with self._lock:
            found = self._of(tenant)
            return Usage(
                found.running, found.cells, found.limits.requests_per_minute, *_left(found.requests),
                found.limits.tokens_per_minute, *_left(found.tokens),
            )

    def _of(self, name: str) -> _Tenant:
        if name not in self._tenants:
            self._tenants[name] = _Tenant(self.limits(name), self._clock)
        return self._tenants[name]

    def _share(self, limits: TenantLimits) -> float:
        """Cells that a tenant may hold. Who may have all of them waits in the engine room's queue like everybody."""
        if self._all_cells is None or limits.cells_share >= 1:
            return math.inf
        return limits.cells_share * self._all_cells

    def _check_ever(self, limits: TenantLimits, tokens: int, answers: int, cells: int) -> None:
        said = ""
        if limits.tokens_per_minute is not None and tokens > limits.tokens_per_minute:
            said = f"may take {tokens:,} tokens, and you have {limits.tokens_per_minute:,} a minute"
        elif limits.concurrent is not None and answers > limits.concurrent:
            said = f"asks for {answers} answers, and you may have {limits.concurrent} at once"
        elif cells > self._share(limits):
            said = f"may need {cells:,} KV cells, and you may hold {int(self._share(limits)):,}"
        if said:
            raise Refused(400, f"This request {said}; shorten it, or lower max_tokens or n.", code="over_limit")

    def _check_now(self, tenant: _Tenant, tokens: int, answers: int, cells: int) -> None:
        limits, waits = tenant.limits, []
        if tenant.requests:
            waits.append((tenant.requests.wait(), f"Your {limits.requests_per_minute:,} requests a minute are used"))
        if tenant.tokens:
            waits.append((tenant.tokens.wait(tokens), f"Of your {limits.tokens_per_minute:,} tokens a minute too few "
                          f"are left for the {tokens:,} that this request may take"))
        if limits.concurrent is not None and tenant.running + answers > limits.concurrent:
            waits.append((tenant.until_one_ends(), f"{tenant.running} of your {limits.concurrent} answers at once are "
                          "being written"))
        if tenant.cells + cells > self._share(limits):
            waits.append((tenant.until_one_ends(), "Your requests hold the KV cells that you may hold"))
        seconds, said = max(waits, default=(0.0, ""))
        if seconds > 0:
            raise Refused(
                429, f"{said}; try again in {math.ceil(seconds)} s.", code="rate_limit_exceeded", retry_after=seconds,
            )

    def _leave(self, lease: Lease) -> None:
        tenant = lease.tenant
        with self._lock:
            tenant.running -= lease.answers
            tenant.cells -= lease.cells
            tenant.seconds += 0.2 * (max(0.0, self._clock() - lease.since) - tenant.seconds)

    def _settle(self, lease: Lease, tokens: int) -> None:
        with self._lock:
            if lease.tenant.tokens:
                lease.tenant.tokens.give(lease.tokens - tokens)


class Lease:
    """What one request was let in with; given back at the end of the `with` block, or by `close`."""

    def __init__(
        self, limiter: Limiter, tenant: _Tenant, tokens: int, answers: int, cells: int, since: float
    ) -> None:
        self._limiter, self._open = limiter, True
        self.tenant, self.tokens, self.answers, self.cells, self.since = tenant, tokens, answers, cells, since

    def settle(self, tokens: int) -> None:
        """Count `tokens` that were really read and written, not the most that could have been. Never called, all of
        them count; 0 for a request that did not run."""
        self._limiter._settle(self, tokens)
        self.tokens = tokens

    def close(self) -> None:
        if self._open:
            self._open = False
            self._limiter._leave(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _left(bucket: TokenBucket | None) -> tuple[int | None, float | None]:
    if bucket is None:
        return None, None
    level = bucket.level
    return max(0, math.floor(level + _SLACK * bucket.capacity)), (bucket.capacity - level) / bucket.rate
