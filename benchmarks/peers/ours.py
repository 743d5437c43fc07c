"""anchorkv's own side of the comparison, and the peers that need nothing but llama.cpp.

Each method reads a case's context with at most `budget` cells left of it in the end, recalled ones counted, and then
predicts the continuation, which stays whole as it does for the other methods, or answers the question.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from cases import CONTINUATION, Case

import anchorkv
from anchorkv.adapted import adapted
from anchorkv.config import AnchorConfig, preset
from anchorkv.document import Document
from anchorkv.engines.base import Engine
from anchorkv.engines.llama import LlamaEngine
from anchorkv.evaluate.asking import gold_losses
from anchorkv.evaluate.losses import answer_losses
from anchorkv.evaluate.ways import newest_whole
from anchorkv.models import DEFAULT, builtin
from anchorkv.recall import BM25
from anchorkv.session import Session
from anchorkv.shipped import adapter_folder

Result = dict[str, Any]
WHOLE = preset("full").recent_window
"""A recent window that never ends: nothing leaves it."""


@dataclass
class Engines:
    """llama.cpp engines by (adapter on, type of the KV cells), loaded when they are first needed."""

    threads: int | None = None
    loaded: dict[tuple[bool, str], Engine] = field(default_factory=dict)

    def get(self, adapter: bool = False, kv_type: str = "f16") -> Engine:
        key = adapter, kv_type
        if key not in self.loaded and kv_type == "f16":
            self.loaded[key] = anchorkv.load(engine="llama", threads=self.threads, adapter=adapter).engine
        elif key not in self.loaded:
            plain, folder = self.get(adapter).info, adapter_folder(DEFAULT) if adapter else None
            path = builtin() if folder is None else adapted(builtin(), folder)
            engine = LlamaEngine.load(path, threads=self.threads, kv_type=kv_type)
            engine.info = replace(plain, cell_bytes=engine.info.cell_bytes)  # and with it the shipped scorer
            self.loaded[key] = engine
        return self.loaded[key]

    def close(self) -> None:
        for engine in self.loaded.values():
            engine.close()
        self.loaded.clear()


@dataclass(frozen=True)
class Method:
    """`run(engines, case, reduction)`; `note`: its settings, for the table; `fixed`: its reduction is its own."""

    run: Callable[[Engines, Case, float], Result]
    note: str
    fixed: bool = False
    tasks: tuple[str, ...] = ()
    """Those it can do; all where empty."""


def own(budget: int, tokens: int, **changes: Any) -> AnchorConfig:
    """The default policy with `budget` cells of a context of `tokens`; where it recalls, half of them are for that."""
    recalled = budget // 2 if changes.get("recall", "off") != "off" else 0
    fields = {"reduction": max(1.01, tokens / (budget - recalled)), "recall": "off", "recall_cells": recalled}
    # Within the model's window nothing else bounds the cells; the opening is no more than any other text to the peers.
    return anchorkv.preset("default").replace(**{**fields, "cell_budget": None, "pin_prompt": False, **changes})


def anchored(
    policy: Callable[[int, int], AnchorConfig], adapter: bool = True, kv_type: str = "f16", thin: bool = False
) -> Callable[[Engines, Case, float], Result]:
    """A policy of this package, on the engine that users run. It is told the cells there are and the context's tokens.

    thin: the continuation's own cells are dropped as well, as they are at work; the peers keep it whole.
    """

    def run(engines: Engines, case: Case, reduction: float) -> Result:
        engine, tokens = engines.get(adapter, kv_type), len(case.context)
        config = policy(round(tokens / (reduction or 1)), tokens)
        if case.task == CONTINUATION:
            return _continue(engine, config, case.context, case.continuation, thin)
        return _answer(engine, config, case)

    return run


def _compress(session: Session) -> None:
    """The context ends: its newest text gives up its cells too, so that exactly the budget is left."""
    window = session.config.recent_window
    if window < WHOLE:
        session.config = session.config.replace(recent_window=0)
        session.end_segment()
        session.config = session.config.replace(recent_window=window)


def truncated(engines: Engines, case: Case, reduction: float) -> Result:
    """The newest tokens alone, as many as the budget has, read afresh with a full cache."""
    budget = max(1, round(len(case.context) / reduction))
    if case.task == CONTINUATION:
        return _continue(engines.get(), preset("full"), case.context[-budget:], case.continuation)
    tokenizer = engines.get().tokenizer
    body = tokenizer.encode(case.text)
    kept = body[-max(1, budget - (len(case.context) - len(body))) :]
    return _answer(engines.get(), preset("full"), case, tokenizer.decode(kept).lstrip("\ufffd"))


def retrieved(engines: Engines, case: Case, reduction: float) -> Result:
    """BM25 retrieval into a short context, as most users do today: pieces of up to 64 tokens, the best ones for the
    question in their own order, as many as the budget has; read afresh with a full cache for every question."""
    engine = engines.get()
    tokenizer = engine.tokenizer
    body = tokenizer.encode(case.text)
    budget = max(1, round(len(case.context) / reduction) - (len(case.context) - len(body)))
    started = time.perf_counter()
    pieces = [body[at : at + 64] for at in range(0, len(body), 64)]
    scores = BM25().scores([tokenizer.decode(piece) for piece in pieces], case.question)
    chosen: list[int] = []
    for index in np.argsort(-scores, kind="stable").tolist():
        if sum(len(pieces[i]) for i in chosen) + len(pieces[index]) > budget and chosen:
            break
        chosen.append(index)
    text = " ".join(tokenizer.decode(pieces[index]).strip("\ufffd") for index in sorted(chosen))
    looked = time.perf_counter() - started
    found = _answer(engine, preset("full"), case, text)
    return {**found, "prefill_seconds": found["prefill_seconds"] + looked}


def _continue(
    engine: Engine, policy: AnchorConfig, context: Sequence[int], more: Sequence[int], thin: bool = False
) -> Result:
    with Session(engine, policy) as session:
        started = time.perf_counter()
        session.read(context)
        _compress(session)
        middle = time.perf_counter()
        accounting = session.accounting()
        if not thin:  # nothing leaves a recent window that never ends
            session.config = session.config.replace(recent_window=WHOLE)
        losses = answer_losses(session, more)
        return {
            "losses": losses.tolist(), "end_cells": session.accounting().kept_cells,
            "kept_cells": accounting.kept_cells, "kv_bytes": accounting.kept_bytes,
            "peak_bytes": accounting.peak_bytes, "prefill_seconds": middle - started,
            "decode_seconds": time.perf_counter() - middle, "decode_tokens": len(more),
        }


def _answer(engine: Engine, policy: AnchorConfig, case: Case, text: str | None = None) -> Result:
    with Document.read(engine, policy, case.text if text is None else text) as document:
        _compress(document.session)
        answer = document.ask(case.question, max_tokens=case.max_tokens)
        cells = document.accounting().kept_cells + answer.recalled_cells  # what recall brings back counts
        steps = max(1, answer.tokens - 1)
        losses, _ = gold_losses(document, case.question, case.answers[0])
        return {
            "answer": answer.text, "answer_loss": float(losses.mean()),
            "kept_cells": cells, "kv_bytes": cells * engine.info.cell_bytes,
            "peak_bytes": document.accounting().peak_bytes, "prefill_seconds": document.reading.seconds,
            "decode_seconds": steps / answer.tokens_per_second if answer.tokens_per_second else 0.0,
            "decode_tokens": steps, "first_token_seconds": answer.first_token_seconds,
        }


def _full(budget: int, tokens: int) -> AnchorConfig:
    return preset("full")


METHODS: dict[str, Method] = {
    "full (llama.cpp)": Method(anchored(_full, adapter=False), "f16 cells, nothing dropped", True),
    "full + adapter": Method(anchored(_full), "the adapter's own yardstick", True),
    "q8_0 cells": Method(anchored(_full, False, "q8_0"), "stock llama.cpp, flash attention", True),
    "q4_0 cells": Method(anchored(_full, False, "q4_0"), "stock llama.cpp, flash attention", True),
    "anchorkv": Method(anchored(own), "default, shipped adapter and scorer, recall off"),
    "anchorkv, no adapter": Method(anchored(own, adapter=False), "the base model's own weights, shipped scorer"),
    "anchorkv, thinning on": Method(
        anchored(own, thin=True), "the continuation's cells are dropped too: far fewer cells at its end",
        tasks=(CONTINUATION,),
    ),
    "anchorkv, recall auto": Method(
        anchored(partial(own, recall="auto")), "half the cells are for recall", tasks=("reading", "needle"),
    ),
    "anchorkv + q8_0 cells": Method(anchored(own, kv_type="q8_0"), "both at once"),
    "newest text whole": Method(
        anchored(lambda budget, tokens: newest_whole(own(budget, tokens)), adapter=False),
        "sinks and the newest tokens",
    ),
    "SepLLM": Method(
        anchored(lambda budget, tokens: anchorkv.preset("sepllm").replace(cell_budget=None), adapter=False),
        "preset sepllm (arXiv 2412.12094), without training; its reduction is its own", True,
    ),
    "truncation": Method(truncated, "the newest tokens, read afresh"),
    "BM25 retrieval": Method(
        retrieved, "pieces of 64 tokens, read afresh for every question", tasks=("reading", "needle"),
    ),
}
