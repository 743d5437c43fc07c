"""What is said of a session: anchors and where they stand in the text, and where the attention of an answer went."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serving
import torch
from fake_engine import FakeEngine
from policies import POLICIES

from anchorkv.config import AnchorConfig, preset
from anchorkv.engines.torch import TorchEngine
from anchorkv.engines.torch_attention import watched
from anchorkv.engines.torch_tokenizer import TorchTokenizer
from anchorkv.errors import CapacityError
from anchorkv.serve.facts import attention_facts, segment_facts
from anchorkv.serve.requests import Ask, Outcome
from anchorkv.serve.scheduler import Scheduler
from anchorkv.session import Session
from tests.tiny import tiny_model, tiny_tokenizer

torch.set_num_threads(1)
POLICY = AnchorConfig(scorer="frequency", reduction=4, min_segment=8, max_segment=16, sinks=2, recent_window=0)
STORY = (
    "The mill at the river was built in 1821. Its wheel has twelve blades. The miller was called Anton Berg. "
    "He sold it to Clara Voss for ninety thalers. She had it painted blue. In winter the wheel stood still. "
)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> TorchEngine:
    return TorchEngine(tiny_model(request.param), TorchTokenizer(tiny_tokenizer()))


def kinds(found: Any) -> float:
    return float(found.sinks + found.pinned + found.anchors + found.recalled + found.recent + found.answer)


# --- anchors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    STORY, "水車小屋は1821年に建てられた。羽根は十二枚。粉屋の名はアントン。青く塗った。" * 2, "a\u0301 🎡" * 40,
])
def test_every_anchor_stands_in_the_text_where_it_is_said_to(text: str) -> None:
    engine = FakeEngine()  # one token a byte: most characters of the second text are several
    with Session(engine, POLICY) as session:
        session.read(engine.tokenizer.encode(text))
        found = segment_facts(session)
        held = set(session.memory.positions().tolist())
        tokens = session.ledger.tokens
    thinned = [segment for segment in found if segment.dropped]
    assert len(thinned) > 3
    for segment in thinned:
        assert len(segment.anchors) == len(segment.anchor_positions) == len(segment.anchor_spans) == segment.kept
        assert set(segment.anchor_positions) == held & set(range(segment.start, segment.stop))
        whole = bytes(tokens[segment.start : segment.stop].tolist())
        for position, (first, last) in zip(segment.anchor_positions, segment.anchor_spans, strict=True):
            at = position - segment.start
            assert last == first + 1  # a byte is in one character
            assert len(whole[:at].decode(errors="replace")) - 1 <= first <= at
            said = segment.text[first:last]
            if said != "\ufffd":
                assert whole[at] in said.encode()


# --- attention -------------------------------------------------------------------------------------------------------


@contextmanager
def seen(session: Session, loaded: TorchEngine) -> Iterator[dict[int, float]]:
    """What each position gets, summed over queries, while the session itself decodes."""
    got: dict[int, float] = {}
    decode = session.memory.decode

    def watching(tokens: Any, start: int, **options: Any) -> Any:
        keys = [*session.memory.positions().tolist(), *range(start, start + len(tokens))]
        with watched(loaded.model, len(tokens)) as shares:
            out = decode(tokens, start, **options)
        assert shares.total is not None
        for key, share in zip(keys, (shares.total / shares.layers * len(tokens)).tolist(), strict=True):
            got[key] = got.get(key, 0.0) + share
        return out

    session.memory.decode = watching  # type: ignore[method-assign]
    yield got
    del session.memory.decode


@pytest.mark.parametrize("policy", [
    POLICY.replace(aging=0), preset("paper-ep"), preset("paper-ac"), preset("full"),
], ids=["sel", "ep", "ac", "full"])
def test_attention_said_afterwards_is_the_attention_there_was(model: TorchEngine, policy: AnchorConfig) -> None:
    """With no recent window a second pass is exact, whatever was freed while the answer was written."""
    encode = model.tokenizer.encode
    prompt, answer = encode(STORY), encode(STORY[40:150])
    with Session(model, policy.replace(recent_window=0, recall="off")) as session:
        session.read(prompt[:-1])
        with seen(session, model) as got:
            for token in [prompt[-1], *answer[:-1]]:
                session.read([token])
        session.read(answer[-1:])
        before = session.memory.state()
        found = attention_facts(session, len(prompt))
        assert found is not None
        assert all(np.array_equal(value, session.memory.state()[name]) for name, value in before.items())
        segments = session.ledger.column("segment")
        queries = sum(got.values())
        wanted = np.bincount(segments[list(got)], weights=list(got.values()), minlength=session.ledger.segments)
        real = np.flatnonzero(~session.ledger.column("added"))
        own = sum(share for at, share in got.items() if at >= real[len(prompt)])
    assert queries == pytest.approx(round(queries), abs=1e-3)
    assert np.abs(np.array(found.segments) - wanted / queries).max() < 1e-4
    assert found.answer == pytest.approx(own / queries, abs=1e-4)
    assert kinds(found) == pytest.approx(1, abs=1e-4)
    assert len(found.segments) == len(segment_facts(session))
    assert (found.anchors == 0) == (policy == preset("full"))


@pytest.mark.parametrize("name", POLICIES)
def test_shares_sum_to_one_under_every_policy(model: TorchEngine, name: str) -> None:
    engine = model
    with Session(engine, POLICIES[name]) as session:
        prompt = engine.tokenizer.encode(STORY * 2)
        session.read(prompt, pinned=[20 <= at < 26 for at in range(len(prompt))])
        session.read(engine.tokenizer.encode(STORY[:90]))
        found = attention_facts(session, len(prompt))
        assert found is not None
        assert kinds(found) == pytest.approx(1, abs=1e-4)
        assert sum(found.segments) == pytest.approx(1, abs=1e-4)
        assert found.pinned > 0


def test_a_recalled_segment_gets_its_share(model: TorchEngine) -> None:
    with Session(model, POLICY) as session:
        prompt = model.tokenizer.encode(STORY * 2)
        session.read(prompt[:-4])
        assert session.recall(2, "a test")
        session.read(prompt[-4:])
        session.read(model.tokenizer.encode("The wheel stood."))
        found = attention_facts(session, len(prompt))
    assert found is not None
    assert 0 < found.recalled <= found.segments[2] + 1e-6


# --- through the engine room -----------------------------------------------------------------------------------------


def answered(engine: Any, **options: Any) -> Outcome:
    scheduler = Scheduler(engine, 4096)
    scheduler.start()
    try:
        asked = Ask(tenant="a", text=STORY, policy=POLICY, max_tokens=40, ignore_end=True, **options)
        return scheduler.submit(asked).result(60)
    finally:
        scheduler.stop(False)


def test_attention_is_told_where_it_is_asked_for_alone_and_changes_no_answer(model: TorchEngine) -> None:
    without, found = answered(model), answered(model, attention=True)
    assert without.attention is None
    assert (found.tokens, found.kept_cells, found.peak_cells) == (
        without.tokens, without.kept_cells, without.peak_cells,
    )
    assert found.attention is not None
    assert kinds(found.attention) == pytest.approx(1, abs=1e-4)
    assert len(found.attention.segments) == len(found.segments)
    assert answered(FakeEngine(), attention=True).attention is None


def test_attention_is_asked_for_over_http_by_a_field_of_its_own(model: TorchEngine, tmp_path: Path) -> None:
    async def work() -> None:
        async with serving.client(serving.service(tmp_path, model)) as http:
            async def figures(**wishes: Any) -> Any:
                body = serving.said(serving.STORY, anchorkv=wishes)
                return (await http.post("/v1/chat/completions", json=body)).json()["anchorkv"]

            assert "attention" not in await figures(explain=True)
            found = await figures(explain=True, attention=True)
            assert len(found["attention"]["segments"]) == len(found["segments"])
            assert sum(found["attention"]["segments"]) == pytest.approx(1, abs=1e-4)
            record = (await http.get(f"/v1/audit/{found['id']}")).json()
            assert record["figures"]["attention"] == found["attention"]

    asyncio.run(work())


def test_an_answer_stands_though_its_attention_cannot_be_told(
    model: TorchEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise CapacityError("There is no memory left.")

    monkeypatch.setattr(model, "attention", full)
    found = answered(model, attention=True)
    assert (found.finish, found.attention) == ("length", None)
    assert "There is no memory left." in caplog.text
