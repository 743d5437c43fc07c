"""A world to watch: a simulated model whose answers are as good as a test wants, and an engine that needs facts."""

from __future__ import annotations

import random
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from fake_engine import END, VOCABULARY, FakeEngine, FakeMemory

from anchorkv.config import AnchorConfig, preset
from anchorkv.engines.base import Memory
from anchorkv.serve.auth import Principal
from anchorkv.serve.breaker import Breakers
from anchorkv.serve.fallback import FallbackLadder
from anchorkv.serve.findings import Findings, limits_of
from anchorkv.serve.policies import Chosen
from anchorkv.serve.requests import Ask, Outcome, SegmentFacts
from anchorkv.serve.seams import Answered, Plan, Question
from anchorkv.serve.settings_groups import FallbackSettings, WatchSettings
from anchorkv.serve.watch import Watch
from anchorkv.serve.watchstore import WatchStore

KIND = "contracts"
POLICY = Chosen("anchors", AnchorConfig(reduction=12, recall="auto", scorer="frequency"))
FULL_POLICY = preset("full")
MODEL = "model-1"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class World:
    """Runs asks. A healthy policy says what the full cache says in nine of ten answers, a bad one in one of ten.

    bad: names of what is broken: "anchors" (every policy but those that recall and the full cache), "recall" (every
    policy but the full cache).
    """

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.bad: set[str] = set()
        self.bad_logprob = -0.45
        """How sure the model is of an answer that is not the full cache's."""
        self.asked: list[Ask] = []

    def healthy(self, policy: AnchorConfig) -> bool:
        if policy == FULL_POLICY:
            return True
        return not ("recall" in self.bad or ("anchors" in self.bad and policy.recall != "on"))

    async def run(self, ask: Ask) -> Outcome:
        self.asked.append(ask)
        return self.answer(ask)

    def answer(self, ask: Ask) -> Outcome:
        truth = tuple(1000 + (zlib.crc32(str(ask.text).encode()) + i) % 97 for i in range(8))
        if ask.given is not None:
            close = ask.given == truth
            score = -0.3 if close else self._of_other(ask.given)
            return self._outcome(ask, ask.given, score + self.random.gauss(0, 0.02), truth)
        if ask.policy == FULL_POLICY:
            return self._outcome(ask, truth, -0.3 + self.random.gauss(0, 0.02), truth)
        if self.random.random() < (0.9 if self.healthy(ask.policy) else 0.1):
            return self._outcome(ask, truth, -0.32 + self.random.gauss(0, 0.02), truth)
        tokens = tuple(t + (1 if self.healthy(ask.policy) else 500) for t in truth)
        return self._outcome(ask, tokens, self.bad_logprob + self.random.gauss(0, 0.05), truth)

    def _of_other(self, given: tuple[int, ...]) -> float:
        """What the full cache thinks of another answer: a slip is likely enough, nonsense is not."""
        return -3.0 if given[0] >= 1400 else -0.7

    def _outcome(self, ask: Ask, tokens: tuple[int, ...], score: float, truth: tuple[int, ...]) -> Outcome:
        full = ask.policy == FULL_POLICY
        segment = SegmentFacts(0, 0, 40, 40, 40 if full else 4, 0 if full else 36, 0, 0, (), text="a dropped passage")
        return Outcome(
            ask.id, ask.tenant, "stop", " ".join(f"word{token}" for token in tokens), ask.policy, prompt_tokens=200,
            completion_tokens=len(tokens), tokens=tokens, answer_logprob=score, lowest_logprob=2 * score,
            kept_cells=200 if full else 20, full_cells=200, segments=(segment,),
        )


def ask_of(number: int, tenant: str = "a", policy: AnchorConfig = POLICY.config) -> Ask:
    return Ask(tenant=tenant, policy=policy, text=f"question {number}", max_tokens=8)


def answered_by(world: World, ask: Ask, plan: Plan | None = None, kind: str = KIND) -> Answered:
    plan = plan or Plan(Chosen(POLICY.name, ask.policy))
    ask = replace(ask, policy=plan.policy.config)
    question = Question(Principal(ask.tenant), ask, POLICY, area=kind)
    return Answered(question, plan, ask, world.answer(ask))


def findings_of(
    clock: Clock, store: WatchStore | None = None, settings: WatchSettings | None = None, **breaker: Any
) -> Findings:
    settings = settings or WatchSettings()
    breakers = Breakers(**{"pause": 60.0, "clock": clock, **breaker})
    return Findings(MODEL, settings, limits_of(settings), breakers, store, clock)


def watch_of(
    world: World, clock: Clock, *, seed: int = 0, settings: WatchSettings | None = None,
    fallback: FallbackSettings | None = None, store: WatchStore | None = None,
) -> tuple[Watch, Findings, FallbackLadder]:
    settings = settings or WatchSettings()
    findings = findings_of(clock, store, settings)
    watch = Watch(settings, findings, world.run, clock=clock, seed=seed)
    return watch, findings, FallbackLadder(fallback or FallbackSettings(), findings.breakers, MODEL)


async def serve(
    watch: Watch, ladder: FallbackLadder, world: World, clock: Clock, number: int, *, tenant: str = "a",
    kind: str = KIND, seconds: float = 1.0,
) -> Answered:
    """One request as the service carries it out; every check that it leads to is made before the next."""
    clock.now += seconds
    ask = ask_of(number, tenant)
    question = Question(Principal(tenant), ask, POLICY, area=kind)
    plan = ladder.before(question)
    outcome, earlier = world.answer(replace(ask, policy=plan.policy.config)), []
    while (again := ladder.after(question, plan, outcome)) is not None:
        earlier.append(outcome)
        plan = again
        outcome = world.answer(replace(ask, policy=plan.policy.config))
    found = Answered(question, plan, replace(ask, policy=plan.policy.config), outcome, tuple(earlier))
    watch.answered(found)
    await watch.idle()
    return found


# --- an engine that needs facts ------------------------------------------------------------------------------------


class FactMemory(FakeMemory):
    """Tells its engine whether what a token sees has gaps."""

    engine: FactEngine

    def decode(self, tokens: Any, start: int, **options: Any) -> Any:
        visible = options.get("visible")
        seen = sum(position < start for position in self.cells) if visible is None else len(visible)
        self.engine.gaps = seen < start
        return super().decode(tokens, start, **options)

    def fork(self) -> Memory:
        return FactMemory(self.engine, self.cells)


class FactEngine(FakeEngine):
    """What it writes depends on the digits that it sees. broken: it misreads them where other cells have been freed,
    as a model does whose adapter was never taught to read anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = False
        self.gaps = False
        generator = np.random.default_rng(3)
        self.table = np.zeros((VOCABULARY, VOCABULARY))
        self.table[ord("0") : ord("9") + 1] = generator.normal(size=(10, VOCABULARY))
        self.follow = 2 * generator.normal(size=(VOCABULARY, VOCABULARY))
        self.bias[END] = -50

    def logits(self, total: npt.NDArray[np.float64], token: int) -> npt.NDArray[np.float32]:
        if self.broken and self.gaps:
            total = -3 * total + 1
        return (self.bias + 6 * np.sin(total) + self.follow[token]).astype(np.float32)

    def open(self) -> Memory:
        return FactMemory(self)


FACTS = tuple(f"{7919 * (number + 1) % 10000:04d}" for number in range(9))
KEEPS_FACTS = AnchorConfig(
    reduction=5, recall="off", scorer="frequency", min_segment=16, max_segment=64, recent_window=0, pinned=FACTS,
)
DROPS_FACTS = KEEPS_FACTS.replace(pinned=(), anchors=())


def text_of(number: int) -> str:
    """A text with one fact, early enough to be dropped by whoever does not keep it."""
    story = "The mill stood by the river and had two wheels of wood. Nobody knew who had built it or when it was done. "
    return f"The code of this door is {FACTS[number % len(FACTS)]}. {3 * story}What is the code of the door?"
