"""How many live conversations of a given length fit a given KV budget, and the tokens/s that they share (design.md).

A text is read once; what the session then is (`Session.state`) is restored as often as the budget allows. A restored
session holds cells of its own, as another conversation would; a fork would share them. What the cells say differs from
conversation to conversation, their number and the speed do not depend on it. The next conversation is opened only if
the accounting says that it fits: the cells held by those that are live, and the peak while one more is read (one reads
at a time); and all of them must still fit when they have been written on. Then all are written on together, in turns
with those of the full cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

from anchorkv.config import PRESETS, AnchorConfig
from anchorkv.decode import step_together
from anchorkv.engines.base import Engine
from anchorkv.errors import CapacityError, ConfigError
from anchorkv.evaluate.run import Item, Models, Record, Row, failures, good
from anchorkv.evaluate.statistics import Estimate, verdict
from anchorkv.evaluate.tasks.speed import document_tokens, read_texts
from anchorkv.evaluate.timing import Act, fastest, in_turns, own_engine, rate, ratio_of_medians
from anchorkv.evaluate.ways import FULL, Way
from anchorkv.session import Session

FULL_CONVERSATIONS = 4
"""The default budget is what so many need with the full cache: real numbers on a small machine."""
MOST = 250
"""Sequences of one llama.cpp context, less a few that the engine keeps for itself."""


@dataclass(frozen=True)
class Sessions:
    """Conversations in a budget of KV bytes. Raises ConfigError for options that fit nothing."""

    name: ClassVar[str] = "sessions"
    policies: ClassVar[tuple[str, ...]] = (FULL, "default", "sepllm")
    columns: ClassVar[tuple[tuple[str, str, object], ...]] = (
        ("tokens each", "length", ""), ("policy", "policy", ""),
        ("KV budget", "budget_bytes", lambda value: f"{value / 2**20:.0f} MiB"), ("sessions", "sessions", ""),
        ("to full", "sessions_ratio", "{:.1f}×"), ("tok/s in all", "tokens_s", ".1f"),
        ("to full", "tokens_s_ratio", "{:.2f}×"), ("tok/s each", "session_tokens_s", ".1f"),
        ("cells each", "cells", ""),
    )

    data: Path | None = None
    """As `Speed.data`."""
    length: int = 2048
    """Tokens of each conversation before it is written on."""
    budget: int | None = None
    """KV bytes; None: what FULL_CONVERSATIONS need with the full cache."""
    most: int = 64
    """Conversations opened at most."""
    seed: int = 0
    """Of random words, where there are no data."""
    skip_bad_rows: bool = False
    burst: int = 8
    """Tokens that each conversation is written on by in one turn."""
    rounds: int = 8
    """Turns that count."""

    def __post_init__(self) -> None:
        if not 1 <= self.most <= MOST:
            raise ConfigError(f"most is between 1 and {MOST} conversations (got {self.most}).")
        if self.length < 1 or self.burst < 1 or self.rounds < 2 or (self.budget is not None and self.budget < 1):
            raise ConfigError("Sessions need tokens to hold, a budget above 0, one token a burst and two rounds.")

    @property
    def steps(self) -> int:
        """Tokens that each conversation is written on by, the turn that warms up included."""
        return self.burst * (self.rounds + 1)

    # --- what is read ------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """What its one item and its measurement follow from."""
        text = sha256("".join(read_texts(self.data, self.skip_bad_rows)[:1]).encode("utf-8", "surrogatepass"))
        return {
            "text": text.hexdigest()[:16], "budget": self.budget, "most": self.most, "seed": self.seed,
            "burst": self.burst, "rounds": self.rounds,
        }

    def items(self) -> list[Item]:
        """Raises DataError or DocumentError when the data are missing or bad."""
        read_texts(self.data, self.skip_bad_rows)
        return [Item(str(self.length))]

    def ways(self, ways: Sequence[Way]) -> list[Way]:
        return list(ways)

    # --- measuring ---------------------------------------------------------------------------------------------

    def measure(self, models: Models, way: Way, item: Item) -> Record:
        """`way_side`, `full_side`: what `Held` says of each. paired: False where both did not fit into memory at once
        and were measured one after the other. Raises CapacityError when not even one conversation fits the budget."""
        loaded = models.of(way).engine
        cell = loaded.info.cell_bytes
        budget = self.budget or FULL_CONVERSATIONS * (self.length + self.steps) * cell
        texts = read_texts(self.data, self.skip_bad_rows)
        tokens = document_tokens(loaded, texts, 0, self.length + self.steps, self.seed)
        # llama.cpp's kernels: which is faster with a full cache depends on the machine, and the faster one counts.
        kernels: list[dict[str, Any]] = [{}]
        if loaded.name == "llama":
            kernels = [{"flash_attention": False}, {"flash_attention": True}]
        full = [(PRESETS[FULL], options) for options in kernels]
        mine = full if way.policy == PRESETS[FULL] else [(way.policy, {})]
        plans = [*mine, *full]
        try:
            sides, paired = self._measured(models, way, tokens, budget, plans), True
        except CapacityError:
            sides, paired = [self._measured(models, way, tokens, budget, [plan])[0] for plan in plans], False
        ours, theirs = _faster(sides[: len(mine)]), _faster(sides[len(mine) :])
        if not ours.sessions:
            raise CapacityError(
                f"One conversation of {self.length:,} tokens takes {ours.needed:,} bytes with '{way.name}', more than "
                f"the budget of {budget:,}; raise budget or lower length."
            )
        return {
            "length": self.length, "engine": loaded.name, "weights": loaded.info.weights, "budget_bytes": budget,
            "cell_bytes": cell, "burst": self.burst, "paired": paired, "way_side": asdict(ours),
            "full_side": asdict(theirs),
        }

    def _measured(
        self, models: Models, way: Way, tokens: Sequence[int], budget: int,
        plans: Sequence[tuple[AnchorConfig, dict[str, Any]]],
    ) -> list[Held]:
        """For each (policy, options of the engine), all of them live at once."""
        cells = budget // models.of(way).engine.info.cell_bytes
        with ExitStack() as stack:
            live = []
            for policy, options in plans:
                own = own_engine(models, way, cells=cells, sessions=self.most + 1, **options)
                live.append(Conversations(stack.enter_context(own), policy, tokens, self.length))
                stack.callback(live[-1].close)
                live[-1].fill(budget, self.most)
            spent = in_turns([side.write(self.burst) for side in live], self.rounds, warm_up=1)
            return [side.held(seconds) for side, seconds in zip(live, spent, strict=True)]

    # --- results -----------------------------------------------------------------------------------------------

    def rows(self, records: Sequence[Record], ways: Sequence[Way]) -> list[Row]:
        """`tokens_s`: of all conversations together. `x_ratio`: to the full cache that took turns with them; `full_x`:
        what that one gave. capped: `most` conversations were opened, and more would have fitted. `verdict`: of the
        tokens/s."""
        found: list[Row] = []
        for way in ways:
            for record in good(records, way).values():
                row = {"policy": way.name, **_figures(record)}
                if way.policy != PRESETS[FULL] and "tokens_s_ratio" in row:
                    gain = Estimate(row["tokens_s_ratio"] - 1, row["tokens_s_ratio_stderr"], 0)
                    row["verdict"] = verdict(gain)
                found.append(row)
            found += [{"policy": way.name, "length": self.length, "error": said} for said in failures(records, way)]
        return found


def _figures(record: Record) -> Row:
    ours, theirs = Held(**record["way_side"]), Held(**record["full_side"])
    row: Row = {
        "length": record["length"], "engine": record["engine"], "budget_bytes": record["budget_bytes"],
        "sessions": ours.sessions, "full_sessions": theirs.sessions, "cells": ours.cells, "full_cells": theirs.cells,
        "peak_cells": ours.peak_cells, "held_bytes": ours.held_bytes, "capped": ours.capped, "paired": record["paired"],
    }
    for name, side in (("", ours), ("full_", theirs)):
        if side.sessions:
            pace = rate(side.seconds)
            for figure, amount in (("tokens_s", side.sessions), ("session_tokens_s", 1)):
                scale = amount * record["burst"]
                row |= {f"{name}{figure}": scale * pace.value, f"{name}{figure}_stderr": scale * pace.stderr}
    if theirs.sessions:
        more, ratio = ours.sessions / theirs.sessions, ratio_of_medians(theirs.seconds, ours.seconds)
        row |= {
            "sessions_ratio": more, "tokens_s_ratio": more * ratio.value, "tokens_s_ratio_stderr": more * ratio.stderr,
        }
    return row


@dataclass(frozen=True)
class Held:
    """The conversations of one side. Cells are those of one of them; `seconds`: of each turn."""

    sessions: int
    capped: bool
    """Whether more would have fitted than may be opened."""
    needed: int
    """Most bytes that one conversation takes, read and written on."""
    cells: int
    peak_cells: int
    held_bytes: int
    """Of all of them, after the last turn."""
    seconds: list[float]


def _faster(sides: Sequence[Held]) -> Held:
    return sides[fastest([side.seconds for side in sides])]


class Conversations:
    """Conversations of `length` tokens, live at once in one engine."""

    def __init__(self, engine: Engine, policy: AnchorConfig, tokens: Sequence[int], length: int) -> None:
        """tokens: the first `length` are read, each conversation is written on with some of them."""
        self.engine, self.policy, self.tokens, self.length = engine, policy, list(tokens), length
        self.sessions: list[Session] = []
        self.capped = False
        self.needed = self.peak_cells = self._step = 0

    def fill(self, budget: int, most: int) -> None:
        """Open as many as fit `budget` bytes, `most` at most."""
        first = Session(self.engine, self.policy)
        self.sessions.append(first)
        first.read(self.tokens[: self.length])
        read, writing = first.accounting(), self._most_written(first)
        self.needed, self.peak_cells = max(read.peak_bytes, writing), read.peak_cells
        if self.needed > budget:
            self.close()
            return
        arrays, fields = first.state()
        held = read.kept_bytes
        while held + read.peak_bytes <= budget and (len(self.sessions) + 1) * writing <= budget:
            if len(self.sessions) == most:
                self.capped = True
                break
            self.sessions.append(Session.restore(self.engine, self.policy, arrays, fields))
            held += self.sessions[-1].accounting().kept_bytes

    def _most_written(self, session: Session) -> int:
        """Most bytes that it holds while it is written on, tried on a fork."""
        with session.fork() as fork:
            held = fork.accounting().kept_bytes
            for token in self.tokens[self.length :]:
                fork.read([token])
                held = max(held, fork.accounting().kept_bytes)
        return held

    def write(self, burst: int) -> Act:
        """What one turn does: every conversation is written on by `burst` tokens, all of them in one batch a step."""

        def act(_: int) -> None:
            # Each goes on elsewhere in the text, so that their segments do not all end in the same step.
            apart = len(self.tokens) // max(1, len(self.sessions))
            for _ in range(burst):
                at = self.length + self._step
                next_ = [self.tokens[(at + apart * n) % len(self.tokens)] for n in range(len(self.sessions))]
                step_together(self.sessions, next_)
                self._step += 1

        return act

    def held(self, seconds: list[float]) -> Held:
        """seconds: of each turn."""
        each = [session.accounting().kept_bytes for session in self.sessions]
        cells = round(sum(each) / max(1, len(each)) / self.engine.info.cell_bytes)
        return Held(len(each), self.capped, self.needed, cells, self.peak_cells, sum(each), seconds)

    def close(self) -> None:
        for session in self.sessions:
            session.close()
        self.sessions.clear()
