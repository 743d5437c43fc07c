"""Kinds of numbers: in which unit each is said, and with how many decimals."""

from __future__ import annotations

from collections.abc import Callable

Amount = tuple[str, str]
"""The unit's name (the words' `unit.NAME`) and the amount in it."""
_ROUNDINGS = (-2, -1, 0, 1, 2, 3)


def _decimals(unit: str, digits: int) -> Callable[[float, int], Amount]:
    return lambda value, finer: (unit, f"{value:,.{max(0, digits + finer)}f}")


def _figures(unit: str) -> Callable[[float, int], Amount]:
    """Three figures: 1.08, 11.2, 312."""
    return lambda value, finer: (unit, _three(value, finer))


def _three(value: float, finer: int) -> str:
    return f"{value:,.{max(0, (abs(value) < 10) + (abs(value) < 100) + finer)}f}"


def _bytes(value: float, finer: int) -> Amount:
    power = 1 + (abs(value) >= 2**20) + (abs(value) >= 2**30)
    return ("kib", "mib", "gib")[power - 1], _three(value / 1024**power, finer)


def _seconds(value: float, finer: int) -> Amount:
    small = abs(value) < 1
    return ("milliseconds", f"{value * 1000:,.{max(0, finer)}f}") if small else ("seconds", _three(value, finer))


def _minutes(value: float, finer: int) -> Amount:
    return "minutes", f"{value / 60:,.{max(0, 1 + finer)}f}"


def _share(value: float, finer: int) -> Amount:
    return "percent", f"{value * 100:,.{max(0, finer)}f}"


def _points(value: float, finer: int) -> Amount:
    return "plain", _share(value, finer)[1]


def _money(value: float, finer: int) -> Amount:
    return "money", f"{value:,.{0 if value == round(value) else 2}f}"


KINDS: dict[str, Callable[[float, int], Amount]] = {
    "count": _decimals("plain", 0),
    "decimal": _decimals("plain", 2),
    "plain": _figures("plain"),
    "ratio": _figures("times"),
    "fewer": _figures("fewer"),
    "plain_minutes": _figures("minutes"),
    "share": _share,
    "points": _points,  # the error of a share, in its per cent
    "seconds": _seconds,
    "minutes": _minutes,  # seconds, said in minutes
    "bytes": _bytes,
    "money": _money,
}
"""Kind -> how a value of it is said. The second argument is how many decimals more than usual."""


def exact(value: float, kind: str) -> int:
    """The fewest decimals, beside the usual, that say a round number such as a threshold as it was set."""
    def said(finer: int) -> float:
        return float(KINDS[kind](value, finer)[1].replace(",", ""))

    return next(finer for finer in _ROUNDINGS if said(finer) == said(_ROUNDINGS[-1]))
