"""anchorkv's own side of the comparison, and the peers that need nothing but llama.cpp.

Each method reads a case's context with `budget` cells left of it in the end, then goes on as a user would: it predicts
the continuation (cells go on being dropped), or answers the question.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from cases import CONTINUATION, Case

import anchorkv
from anchorkv.adapted import adapted
from anchorkv.config import AnchorConfig, preset
from anchorkv.document import Document
from anchorkv.engines.base import Engine
from anchorkv.engines.llama import LlamaEngine
from anchorkv.evaluate.losses import answer_losses
from anchorkv.evaluate.ways import newest_whole
from anchorkv.models import DEFAULT, builtin
from anchorkv.recall import BM25
from anchorkv.session import Session
from anchorkv.shipped import adapter_folder

Result = dict[str, Any]


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


def own(reduction: float, **changes: Any) -> AnchorConfig:
    """The default policy at this reduction. Within its window nothing else bounds the cells."""
    fields = {"reduction": reduction, "recall": "off", "cell_budget": None, **changes}
    return anchorkv.preset("default").replace(**fields)


def anchored(
    policy: Callable[[float], AnchorConfig], adapter: bool = True, kv_type: str = "f16"
) -> Callable[[Engines, Case, float], Result]:
    """A policy of this package, on the engine that users run."""

    def run(engines: Engines, case: Case, reduction: float) -> Result:
        engine = engines.get(adapter, kv_type)
        if case.task == CONTINUATION:
            return _continue(engine, policy(reduction), case.context, case.continuation)
        return _answer(engine, policy(reduction), case)

    return run


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


def _continue(engine: Engine, policy: AnchorConfig, context: Sequence[int], more: Sequence[int]) -> Result:
    with Session(engine, policy) as session:
        started = time.perf_counter()
        session.read(context)
        middle = time.perf_counter()
        accounting = session.accounting()
        losses = answer_losses(session, more)
        return {
            "losses": losses.tolist(), "kept_cells": accounting.kept_cells, "kv_bytes": accounting.kept_bytes,
            "peak_bytes": accounting.peak_bytes, "prefill_seconds": middle - started,
            "decode_seconds": time.perf_counter() - middle, "decode_tokens": len(more),
        }


def _answer(engine: Engine, policy: AnchorConfig, case: Case, text: str | None = None) -> Result:
    with Document.read(engine, policy, case.text if text is None else text) as document:
        answer = document.ask(case.question, max_tokens=case.max_tokens)
        cells = document.accounting().kept_cells + answer.recalled_cells  # what recall brings back counts
        steps = max(1, answer.tokens - 1)
        return {
            "answer": answer.text, "kept_cells": cells, "kv_bytes": cells * engine.info.cell_bytes,
            "peak_bytes": document.accounting().peak_bytes, "prefill_seconds": document.reading.seconds,
            "decode_seconds": steps / answer.tokens_per_second if answer.tokens_per_second else 0.0,
            "decode_tokens": steps, "first_token_seconds": answer.first_token_seconds,
        }


METHODS: dict[str, Method] = {
    "full (llama.cpp)": Method(anchored(lambda _: preset("full"), adapter=False), "f16 cells, nothing dropped", True),
    "full + adapter": Method(anchored(lambda _: preset("full")), "the adapter's own yardstick", True),
    "q8_0 cells": Method(anchored(lambda _: preset("full"), False, "q8_0"), "stock llama.cpp, flash attention", True),
    "q4_0 cells": Method(anchored(lambda _: preset("full"), False, "q4_0"), "stock llama.cpp, flash attention", True),
    "anchorkv": Method(anchored(own), "default, shipped adapter and scorer, recall off"),
    "anchorkv, no adapter": Method(anchored(own, adapter=False), "the base model's own weights, shipped scorer"),
    "anchorkv, recall auto": Method(
        anchored(lambda r: own(r, recall="auto")), "recalled cells counted", tasks=("reading", "needle"),
    ),
    "anchorkv + q8_0 cells": Method(anchored(own, kv_type="q8_0"), "both at once"),
    "newest text whole": Method(anchored(lambda r: newest_whole(own(r)), adapter=False), "sinks and the newest tokens"),
    "SepLLM": Method(
        anchored(lambda _: anchorkv.preset("sepllm").replace(cell_budget=None), adapter=False),
        "preset sepllm (arXiv 2412.12094), without training; its reduction is its own", True,
    ),
    "truncation": Method(truncated, "the newest tokens, read afresh"),
    "BM25 retrieval": Method(
        retrieved, "pieces of 64 tokens, read afresh for every question", tasks=("reading", "needle"),
    ),
}
