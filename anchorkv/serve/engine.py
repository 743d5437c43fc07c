"""The engine as a server wants it: sized once for all its requests, so that memory stays what the operator gave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from anchorkv.engines.base import Engine
from anchorkv.errors import ConfigError

MOST_SESSIONS = 254
"""llama.cpp's 256 sequences, less the two that the engine decodes aside in."""
LEAST_CELLS = 256
MOST_CONTEXTS = 4


@contextmanager
def contexts(engine: Engine, cells: int, count: int = 1, sessions: int = MOST_SESSIONS) -> Iterator[list[Engine]]:
    """`count` contexts of the one loaded model, `cells` KV cells in all, that never grow; each has room for `sessions`
    sessions, parked ones too. The first is `engine` itself, which holds no session yet; the others are closed here.

    In one context each written token passes over the cells of all other sessions, which tells on a CPU from about
    5,000 cells on. A request lives in one context, so the largest one must fit there. Engines other than llama.cpp's
    stay as they are: they allocate as they go. Raises ConfigError for numbers that cannot be, CapacityError when a
    context cannot be allocated.
    """
    from anchorkv.engines.llama import LlamaEngine  # llama.cpp is loaded where it is used, not by the settings

    if count < 1 or cells // count < LEAST_CELLS:
        raise ConfigError(f"A server needs at least {LEAST_CELLS} KV cells in each context (got {cells} in {count}).")
    if not 1 <= sessions <= MOST_SESSIONS:
        raise ConfigError(f"The llama engine holds 1 to {MOST_SESSIONS} sessions (got {sessions}).")
    if not isinstance(engine, LlamaEngine):
        yield [engine]
        return
    engine.fix(cells // count, sessions)
    with ExitStack() as stack:
        others = []
        for _ in range(count - 1):
            others.append(engine.beside())
            stack.callback(others[-1].close)
        yield [engine, *others]


def contexts_for(engine: Engine, cells: int) -> int:
    """How many contexts suit so many cells: up to MOST_CONTEXTS, each as large as the model's window."""
    return max(1, min(MOST_CONTEXTS, cells // max(LEAST_CELLS, engine.info.window)))
