"""The engine as a server wants it: sized once for all its requests, so that memory stays what the operator gave."""

from __future__ import annotations

from typing import Any

from anchorkv.engines.base import Engine
from anchorkv.errors import CapacityError, ConfigError

MOST_SESSIONS = 254
"""llama.cpp's 256 sequences, less the two that the engine decodes aside in."""


def fixed(engine: Engine, cells: int, sessions: int = MOST_SESSIONS) -> Engine:
    """`engine` with a context of `cells` cells that never grows, and room for `sessions` sessions, parked ones too.

    It must hold no session yet. Other engines than llama.cpp's are given back as they are: they allocate as they go.
    Raises ConfigError for numbers that cannot be, CapacityError when the context cannot be allocated.
    """
    return split(engine, cells, 1, sessions)[0]


def split(engine: Engine, cells: int, contexts: int, sessions: int = MOST_SESSIONS) -> list[Engine]:
    """As `fixed`, with the cells in several contexts of the one loaded model, the first of them `engine` itself.

    In one context each written token passes over the cells of all other sessions, which tells on a CPU from about
    5,000 cells on. A request lives in one context, so the largest one must fit there.
    """
    if contexts < 1 or cells // max(1, contexts) < 256:
        raise ConfigError(f"A server needs at least 256 KV cells in each context (got {cells} in {contexts}).")
    if not 1 <= sessions <= MOST_SESSIONS:
        raise ConfigError(f"The llama engine holds 1 to {MOST_SESSIONS} sessions (got {sessions}).")
    if engine.name != "llama":
        return [engine]
    first: Any = engine
    others = [object.__new__(type(first)) for _ in range(contexts - 1)]
    for other in others:
        other.__dict__.update(first.__dict__)
        other._context = None
    for part in (first, *others):
        _size(part, cells // contexts, sessions)
    return [first, *others]


def contexts_for(engine: Engine, cells: int) -> int:
    """How many contexts suit so many cells: up to 4, each as large as the model's window."""
    return max(1, min(4, cells // max(256, engine.info.window)))


def close_contexts(engines: list[Engine]) -> None:
    """Close what `split` made beside the first engine; that one, and the model with it, is closed by its owner."""
    import llama_cpp

    for engine in engines[1:]:
        part: Any = engine
        llama_cpp.llama_free(part._context)
        part._context = None


def _size(part: Any, cells: int, sessions: int) -> None:
    import llama_cpp

    from anchorkv.engines.llama import _FIRST

    old, options = part._context, part._options
    # llama.cpp's flash attention passes over cells that a token does not see: those of all other sessions.
    part._options = (options[0], sessions + _FIRST, True, options[3])
    try:
        part._open_context(cells)
    except CapacityError:
        part._context, part._options = old, options
        raise
    if old is not None:
        llama_cpp.llama_free(old)
    part._free_sequences = list(range(sessions + _FIRST - 1, _FIRST - 1, -1))
    part._reserve = _nothing

    def grow(more: int) -> None:
        raise CapacityError(f"All {part.cells} KV cells of the server are in use.")

    part._grow = grow


def _nothing(more: int) -> None:
    """Cells are seen to by the scheduler."""
