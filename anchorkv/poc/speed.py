"""The speed of one document, anchored and full in turns: reading, the first token of an answer, writing.

Short by design: every part has its seconds, and takes as many turns as fit. The full side is the model's own library at
its best settings (evaluate/timing.py); recall modes take turns with it on forks of the same reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from itertools import pairwise

from anchorkv.config import PRESETS, RecallMode
from anchorkv.errors import CapacityError, DataError
from anchorkv.evaluate.asking import modes
from anchorkv.evaluate.run import Models, Record
from anchorkv.evaluate.tasks.speed import QUESTION, SETTINGS, LlamaSetting, full_sides
from anchorkv.evaluate.timing import SLICE, Act, SessionSide, Side, Whole, WholeLlama, fastest, in_turns, own_engine
from anchorkv.evaluate.ways import FULL, Way
from anchorkv.recall import RecallPlan

PREFILL, DECODE, FIRST_TOKEN = "prefill", "decode", "first_token"
SECONDS = {PREFILL: 4.0, FIRST_TOKEN: 3.0, DECODE: 2.0}
"""What each part may take, about."""
MOST_TOKENS = 2048
"""Of a document; a longer one is cut."""
LEAST_TURNS, MOST_TURNS = 3, 8
BURST = 8
"""Tokens written in one turn."""
TRIAL = 1024
"""Cells held while settings of llama.cpp are tried: the middle of what is measured."""
PART = 128
"""Tokens read in one turn of the trial."""


def measure(
    models: Models, way: Way, tokens: Sequence[int], questions: Sequence[str], recall_modes: Sequence[RecallMode]
) -> Record:
    """tokens: of the document. questions: asked in turn; without any, stretches of the document are.

    `length`: tokens held when answers are timed. `samples`: {part: {"full" and each recall mode: seconds of each
    turn}}, those of reading ("way", "at": which slice) and writing a token's. `full_settings`: what the full side ran
    with, by part.
    Raises DataError for a text too short to time.
    """
    if len(tokens) < 2 * QUESTION:
        raise DataError(f"A document of {len(tokens)} tokens is too short to time; give longer ones.")
    tokens = tokens[:MOST_TOKENS]
    tokenizer = models.of(way).engine.tokenizer
    asked = [tokenizer.encode(question) for question in questions] or _stretches(tokens)
    room = max(map(len, asked)) + BURST * MOST_TURNS
    with ExitStack() as stack:
        full = stack.enter_context(_full_sides(models, way, len(tokens), room))
        reader = SessionSide(stack.enter_context(own_engine(models, way)), way.policy, way.name)
        stack.callback(reader.close)
        samples: dict[str, dict[str, list[float]]] = {}
        settings: dict[str, str] = {}

        def keep(part: str, spent: Sequence[list[float]], ours: Sequence[str], amount: int = 1) -> None:
            best = fastest(spent[: len(full)])
            settings[part] = full[best].label
            named = dict(zip(["full", *ours], [spent[best], *spent[len(full) :]], strict=True))
            samples[part] = {name: [turn / amount for turn in turns] for name, turns in named.items()}

        at, spent = _prefill([*full, reader], tokens)
        keep(PREFILL, spent, ["way"])
        samples[PREFILL]["at"] = list(map(float, at))
        wanted = modes(way.policy, recall_modes)
        forks = [_fork(reader, mode) for mode in wanted]
        for side in forks:
            stack.callback(side.close)
        sides = [*full, *forks]
        keep(FIRST_TOKEN, _timed([partial(_ask, side, asked) for side in sides], SECONDS[FIRST_TOKEN]), wanted)
        for side in forks:
            RecallPlan(side.session).update(tokenizer.decode(asked[0]))
        keep(DECODE, _timed([partial(_write, side, tokens) for side in sides], SECONDS[DECODE]), wanted, BURST)
    return {"length": len(tokens), "samples": samples, "full_settings": settings}


def _prefill(sides: Sequence[Side], tokens: Sequence[int]) -> tuple[list[int], list[list[float]]]:
    """Which slice each turn read, and its seconds a token [side][turn]: as much of the document as the seconds allow,
    more than once where it is short. Afterwards all sides hold all of it."""
    trial = tokens[:PART]
    for side in sides:  # the first decode of all sets up what later ones find
        side.read(trial[:QUESTION])
        side.restart()
    seconds = sum(turns[0] for turns in in_turns([partial(_read, side, [trial]) for side in sides], 1))
    length = min(len(tokens), max(SLICE, int(SECONDS[PREFILL] / seconds * len(trial))))
    count = -(-length // SLICE)
    cuts = [length * n // count for n in range(count + 1)]
    parts = [tokens[start:stop] for start, stop in pairwise(cuts)]
    at: list[int] = []
    found: list[list[float]] = [[] for _ in sides]
    for _ in range(-(-LEAST_TURNS // count)):
        for side in sides:
            side.restart()
        at += range(count)
        for kept, turns in zip(found, in_turns([partial(_read, side, parts) for side in sides], count), strict=True):
            kept += [seconds / len(part) for seconds, part in zip(turns, parts, strict=True)]
    for side in sides if length < len(tokens) else ():
        if isinstance(side, WholeLlama):  # of a full cache it matters how long it is, not what it says
            side.hold(len(tokens))
        else:
            side.read(tokens[length:])
    return at, found


def _timed(acts: Sequence[Act], seconds: float) -> list[list[float]]:
    """A few turns, and as many more as fit into `seconds`, within reason."""
    found = in_turns(acts, LEAST_TURNS)
    spent = sum(map(sum, found))
    more = min(MOST_TURNS - LEAST_TURNS, int((seconds - spent) / spent * LEAST_TURNS))
    return [turns + later for turns, later in zip(found, in_turns(acts, max(0, more)), strict=True)]


def _read(side: Side, parts: Sequence[Sequence[int]], turn: int) -> None:
    side.read(parts[turn])


def _ask(side: Side, asked: Sequence[Sequence[int]], turn: int) -> None:
    side.ask(asked[turn % len(asked)])


def _write(side: Side, tokens: Sequence[int], turn: int) -> None:
    side.write([tokens[(turn * BURST + n) % len(tokens)] for n in range(BURST)])


def _stretches(tokens: Sequence[int]) -> list[list[int]]:
    """Questions made of the document's own tokens, so that recall has something to find."""
    starts = [(len(tokens) - QUESTION) * n // LEAST_TURNS for n in range(LEAST_TURNS)]
    return [list(tokens[start : start + QUESTION]) for start in starts]


def _fork(reader: SessionSide, mode: RecallMode) -> SessionSide:
    """A side of its own that goes on from what `reader` has read, with recall `mode`."""
    side = SessionSide(reader.engine, reader.policy.replace(recall=mode), mode)
    side.session.close()
    side.session = reader.session.fork()
    side.session.config = side.policy
    return side


# --- the full side at its best -------------------------------------------------------------------------------------


@contextmanager
def _full_sides(models: Models, way: Way, length: int, room: int) -> Iterator[list[Side]]:
    """As `evaluate.tasks.speed.full_sides`, after a shorter trial of llama.cpp's settings."""
    if models.of(way).engine.name != "llama":
        with full_sides(models, way, length, room) as sides:
            yield sides
        return
    with ExitStack() as stack:
        found: list[Side] = []
        for setting in best_settings(models, way.adapter):
            found.append(_whole(stack, models, way, setting, length + room + SLICE))
        yield found


@lru_cache(maxsize=4)
def best_settings(models: Models, adapter: bool) -> tuple[LlamaSetting, ...]:
    """The fastest to read and the fastest to write, one or two: kernels first, then the batch for reading. Raises
    CapacityError when none can be had."""
    way, half = Way(FULL, PRESETS[FULL], adapter), TRIAL // 2
    kernels = [setting for setting in SETTINGS if setting.batch == PART]
    with ExitStack() as stack:
        tried: dict[LlamaSetting, WholeLlama] = {}
        for setting in kernels:
            try:
                tried[setting] = _whole(stack, models, way, setting, TRIAL + 2 * SLICE)
            except CapacityError:  # not every model's heads can be held as q8_0
                if setting is kernels[-1] and not tried:
                    raise
        known = list(tried)
        reading = known[fastest(_trial(list(tried.values()), half, _again, PART))]
        writing = known[fastest(_trial(list(tried.values()), TRIAL, WholeLlama.write, BURST))]
    with ExitStack() as stack:
        batches = [setting for setting in SETTINGS if setting.kernel == reading.kernel]
        sides = [_whole(stack, models, way, setting, TRIAL + 2 * SLICE) for setting in batches]
        first = batches[fastest(_trial(sides, half, _again, SLICE))]
    return tuple(dict.fromkeys((first, first if first.kernel == writing.kernel else writing)))


def _whole(stack: ExitStack, models: Models, way: Way, setting: LlamaSetting, cells: int) -> WholeLlama:
    engine = stack.enter_context(own_engine(models, way, cells=cells, sessions=3, **setting.options))
    side = WholeLlama(engine, setting.label)
    stack.callback(side.close)
    return side


def _trial(
    sides: Sequence[WholeLlama], held: int, act: Callable[[WholeLlama, list[int]], None], count: int
) -> list[list[float]]:
    """Seconds [side][turn] of `act` on `count` tokens after `held` cells."""
    part = [token % sides[0].engine.info.vocabulary for token in range(count)]
    for side in sides:
        if not side.at:
            side.read(part[:PART])
        side.hold(held)

    def turn(side: WholeLlama, number: int) -> None:
        act(side, part)

    return in_turns([partial(turn, side) for side in sides], 2, warm_up=int(count == BURST))


def _again(side: Whole, tokens: Sequence[int]) -> None:
    keep = side.at
    side.read(tokens)
    side.forget(keep)
