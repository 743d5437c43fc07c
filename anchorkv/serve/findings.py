"""What the checks add up to: rolling estimates by tenant, policy and kind of document, drift alarms, tripped breakers.

A check counts for its tenant and kind, for the tenant, for the kind, and for all together. Breakers are tripped for a
tenant, and for a kind where more than one tenant's answers speak against it: nobody makes others' requests dearer.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from anchorkv.errors import AnchorKVError
from anchorkv.poc.results import FallbackRule, Thresholds
from anchorkv.poc.rollout import Rollout
from anchorkv.poc.rules import Watch as Limits
from anchorkv.poc.rules import condition, watch
from anchorkv.serve.breaker import Breaker, Breakers, BreakerState
from anchorkv.serve.check import Check
from anchorkv.serve.policies import Chosen
from anchorkv.serve.series import ALL, Key, Series, policy_id
from anchorkv.serve.settings_groups import WatchSettings
from anchorkv.serve.watchstore import WatchStore

log = logging.getLogger("anchorkv.serve")
MOST_SERIES = 4000
_SHOWN = 200
"""Newest checks and alarms that are kept at hand."""


@dataclass(frozen=True)
class Alarm:
    """Something changed that an operator ought to look at. tenant, kind: `ALL` for all."""

    code: str
    sentence: str
    tenant: str
    policy: str
    kind: str
    at: float
    """Seconds since 1970 (UTC), to be shown."""


def limits_of(
    settings: WatchSettings, rollout: Rollout | None = None, rules: Sequence[FallbackRule] = ()
) -> Callable[[str], Limits]:
    """The limits for a kind of document: the operator's, else those of rules on watched figures, else the plan's."""
    usual = rollout.watch if rollout is not None else watch(None, Thresholds.model_validate({}))
    given: dict[str, float] = {}
    for rule in rules:
        name, _, value = condition(rule.when)
        if name in ("watch.loss_gap", "watch.agreement") and not isinstance(value, str):
            given["loss_gap_limit" if name == "watch.loss_gap" else "agreement_floor"] = value
    for name in ("loss_gap_limit", "agreement_floor"):
        if (value := getattr(settings, name)) is not None:
            given[name] = value

    def limits(kind: str) -> Limits:
        area = rollout.areas.get(kind) if rollout is not None else None
        found = (area.watch if area is not None else usual).model_copy(update=given)
        expected = {"loss_gap": min(found.loss_gap, found.loss_gap_limit)}
        if found.agreement is not None:
            expected["agreement"] = max(found.agreement, found.agreement_floor)
        return found.model_copy(update=expected)

    return limits


class Findings:
    """Everything that the watch knows. Thread-safe."""

    def __init__(
        self, model: str, settings: WatchSettings, limits: Callable[[str], Limits], breakers: Breakers,
        store: WatchStore | None = None, clock: Callable[[], float] = time.monotonic, trips: bool = True,
    ) -> None:
        """model: fingerprint of the weights. trips: whether breakers are tripped, or alarms given alone."""
        self.model, self.limits, self.breakers, self._settings, self._clock = model, limits, breakers, settings, clock
        self._trips, self._store = trips, store or WatchStore()
        self._lock = breakers.lock
        self._series: OrderedDict[Key, Series] = OrderedDict()
        self._changed: set[Key] = set()
        self._gone: set[Key] = set()
        self._unsaved: list[tuple[str, Any]] = []
        self.alarms: deque[Alarm] = deque(maxlen=_SHOWN)
        """The newest last."""
        self.checks: deque[Check] = deque(maxlen=_SHOWN)
        self.alarm_counts: Counter[str] = Counter()
        self._load()
        breakers.on_change.append(self._breaker_changed)

    # --- what comes in -----------------------------------------------------------------------------------------

    def written(self, tenant: str, policy: Chosen, kind: str, logprob: float) -> None:
        """An answer was written, checked or not."""
        with self._lock:
            series = self._of(Key(tenant, self.model, policy_id(policy), kind))
            series.written(logprob, self._clock(), self._settings.window)

    def choose(self, tenant: str, policy: Chosen, kind: str, share: float, chance: float) -> bool:
        """As `Series.choose`."""
        with self._lock:
            return self._of(Key(tenant, self.model, policy_id(policy), kind)).choose(share, chance)

    def add(self, found: Check, policy: Chosen) -> None:
        """One check of an answer that `policy` gave."""
        limits, now, name = self.limits(found.kind), self._clock(), policy_id(policy)
        with self._lock:
            self.checks.append(found)
            self._unsaved.append(("check", found.as_dict()))
            for tenant, kind in ((found.tenant, found.kind), (found.tenant, ALL), (ALL, found.kind), (ALL, ALL)):
                key = Key(tenant, self.model, name, kind)
                series = self._of(key)
                drifted = series.add(found.loss_gap, found.agreed, limits, now, self._settings.window)
                if ALL in (tenant, kind):
                    for code in drifted:
                        self.alarm(f"drift_{code}", _drift(code, series), key)
                    self._judge(key, series, policy)

    def _judge(self, key: Key, series: Series, policy: Chosen) -> None:
        """Trip the breaker of one tenant, or of one kind of which several tenants' answers tell."""
        limits = self.limits("" if key.kind == ALL else key.kind)
        crossing = series.crossing(limits, self._clock(), self._settings.confidence)
        if crossing is not None and self._trips and (key.tenant != ALL or self._several(key, limits)):
            self.breakers.trip(key, policy, crossing)

    def _several(self, key: Key, limits: Limits) -> bool:
        """Whether `key` is of a kind, and more than one tenant's answers on it are out of bounds."""
        if key.kind in ("", ALL):
            return False
        now = self._clock()
        others = (series for other, series in self._series.items() if other[1:] == key[1:] and other.tenant != ALL)
        return sum(series.against(limits, now) for series in others) > 1

    def alarm(self, code: str, sentence: str, key: Key) -> None:
        """Say it in the log, and remember it."""
        log.warning("watch: %s (tenant %s, policy %s, kind %s): %s", code, key.tenant, key.policy, key.kind, sentence)
        found = Alarm(code, sentence, key.tenant, key.policy, key.kind, time.time())
        with self._lock:
            self.alarms.append(found)
            self.alarm_counts[code] += 1
            self._unsaved.append(("alarm", asdict(found)))

    def _breaker_changed(self, key: Key, breaker: Breaker, before: BreakerState) -> None:
        if breaker.state == "open":
            self.alarm("breaker_open", breaker.sentence, key)
        elif breaker.state == "closed":
            self.alarm("breaker_closed", f"Probes were good again; the policy '{breaker.policy.name}' is back.", key)
            self._forget(key)

    def _forget(self, closed: Key) -> None:
        """What was found before a breaker opened says nothing of the policy that its probes found good."""
        with self._lock:
            for key in list(self._series):
                if key.policy == closed.policy and (
                    (closed.tenant in (ALL, key.tenant) and closed.kind in (ALL, key.kind)) or key == closed
                ):
                    del self._series[key]
                    self._gone.add(key)

    # --- what is known -----------------------------------------------------------------------------------------

    def series(self, tenant: str, policy: Chosen, kind: str) -> Series:
        """What is known of a tenant's answers on that kind of document; a new series where nothing is."""
        with self._lock:
            return self._series.get(Key(tenant, self.model, policy_id(policy), kind)) or Series()

    def estimates(self, tenant: str | None = None) -> list[dict[str, Any]]:
        """JSON-able, of one tenant alone or of all. A bound is None while there are too few checks."""
        now, confidence = self._clock(), self._settings.confidence
        with self._lock:
            items = [(key, series) for key, series in self._series.items() if tenant in (None, key.tenant)]
            return [self._shown(key, series, now, confidence) for key, series in items if series.checks]

    def _shown(self, key: Key, series: Series, now: float, confidence: float) -> dict[str, Any]:
        limits = self.limits("" if key.kind == ALL else key.kind)
        gap, agreement = series.gap_bounds(now, confidence), series.agreement_bounds(now, confidence)
        crossing = series.crossing(limits, now, confidence)
        return {
            **key._asdict(), "checks": series.checks, "confidence": confidence,
            "loss_gap": gap.as_dict() if gap else None, "loss_gap_limit": limits.loss_gap_limit,
            "loss_gap_expected": limits.loss_gap, "agreement": agreement.as_dict() if agreement else None,
            "agreement_floor": limits.agreement_floor, "agreement_expected": limits.agreement,
            "crossing": asdict(crossing) if crossing else None,
        }

    # --- over a restart ----------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write what changed; what cannot be written now is written with the next save."""
        with self._lock:
            changed, gone, entries = self._changed, self._gone, self._unsaved
            self._changed, self._gone, self._unsaved = set(), set(), []
            values = {key.text(): self._series[key].as_dict() for key in changed if key in self._series}
        breakers = {key.text(): state for key, state in self.breakers.states()}
        try:
            self._store.save("series", values, [key.text() for key in gone if key.text() not in values], entries)
            stale = set(self._store.load("breaker")) - set(breakers)
            self._store.save("breaker", breakers, stale)
        except AnchorKVError as error:
            log.error("%s", error)
            with self._lock:
                self._changed |= changed
                self._gone |= gone
                self._unsaved = (entries + self._unsaved)[-10 * _SHOWN :]

    def close(self) -> None:
        self.save()
        self._store.close()

    def _load(self) -> None:
        for text, state in self._store.load("series").items():
            self._restored(text, state, lambda key, value: self._series.__setitem__(key, Series.of(value)))
        for text, state in self._store.load("breaker").items():
            self._restored(text, state, self.breakers.restore)
        for value in reversed(self._store.newest("alarm", _SHOWN)):
            self.alarms.append(Alarm(**value))

    def _restored(self, text: str, state: Any, put: Callable[[Key, Any], None]) -> None:
        try:
            key = Key(*map(str, json.loads(text)))
            put(key, state)
        except (AnchorKVError, KeyError, TypeError, ValueError) as error:
            log.error("an entry of the watch's file is damaged and was passed over: %s", error)

    def _of(self, key: Key) -> Series:
        self._changed.add(key)
        self._gone.discard(key)
        series = self._series.setdefault(key, Series())
        self._series.move_to_end(key)
        while len(self._series) > MOST_SERIES:
            old, _ = self._series.popitem(last=False)
            self._gone.add(old)
        return series


def _drift(code: str, series: Series) -> str:
    rolling = (series.gap if code == "loss_gap_grew" else series.agreement).rolling
    if code == "loss_gap_grew":
        return f"The loss gap is no longer what was measured: {rolling.mean:.3g} nats a token since it changed."
    return f"Agreement is no longer what was measured: {rolling.mean:.0%} since it changed."
