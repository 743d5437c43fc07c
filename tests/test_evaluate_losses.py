"""The losses of several choices in one batch are those of each alone, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny_gguf

from anchorkv.config import AnchorConfig, preset
from anchorkv.engines.base import Floats
from anchorkv.engines.llama import LlamaEngine
from anchorkv.evaluate.losses import answer_losses, choice_losses
from anchorkv.session import Session, next_logits

ANCHORED = AnchorConfig(
    anchors=("SEL", "EP"), scorer="frequency", reduction=4, aging=0, sinks=2, recent_window=0, anchors_see_anchors=True,
    min_segment=8, max_segment=24, recall="off",
)
SELECTED = ANCHORED.replace(anchors=("SEL",), anchors_see_anchors=False, reduction=24)
POLICIES = {"full": preset("full"), "anchored": ANCHORED, "selected": SELECTED}
BEFORE = b"The pump on deck two was old. Nobody wrote it down. Why"
CHOICES = [b" two", b" the seal", b"x", b" a wire or so"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    path = tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    engine = LlamaEngine(path, threads=1, cells=512, batch=32, sessions=20)
    yield engine
    engine.close()


@pytest.fixture
def decodes(tiny: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each decode."""
    counts: list[int] = []
    run = tiny._run
    monkeypatch.setattr(tiny, "_run", lambda rows: (counts.append(len(rows)), run(rows))[1])
    return counts


def alone(session: Session, choices: list[list[int]]) -> list[Floats]:
    found = []
    for choice in choices:
        with session.fork() as fork:
            found.append(answer_losses(fork, choice))
    return found


def same(some: list[Floats], others: list[Floats]) -> bool:
    return [one.tolist() for one in some] == [pytest.approx(other.tolist(), abs=1e-2) for other in others]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_one_batch_gives_the_losses_of_each_alone(tiny: LlamaEngine, decodes: list[int], policy: AnchorConfig) -> None:
    choices = [list(choice) for choice in CHOICES]
    with Session(tiny, policy) as session:
        session.read(list(BEFORE))
        expected, held = alone(session, choices), session.memory.positions().tolist()
        logits, free = next_logits(session).tolist(), len(tiny._free_sequences)
        decodes.clear()
        assert same(choice_losses(session, choices), expected)
        assert decodes == [sum(len(choice) - 1 for choice in choices)]
        assert session.memory.positions().tolist() == held
        assert next_logits(session).tolist() == logits
        assert len(tiny._free_sequences) == free
        assert same(alone(session, choices), expected)


def test_more_than_a_batch_takes_goes_in_several(tiny: LlamaEngine, decodes: list[int]) -> None:
    choices = [list(b"many of them"), *[[65 + number, 66] for number in range(20)], list(range(40, 80))]
    with Session(tiny, preset("full")) as session:
        session.read(list(BEFORE))
        expected = alone(session, choices)
        decodes.clear()
        assert same(choice_losses(session, choices), expected)
        assert max(decodes) <= tiny.batch
        assert sum(decodes) < sum(map(len, choices))


def test_where_a_segment_ends_within_each_is_read_alone(tiny: LlamaEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = [list(b" It is so. And"), list(b" no")]
    monkeypatch.setattr(LlamaEngine, "score_together", lambda *_: pytest.fail("they are not one decode each"))
    with Session(tiny, ANCHORED) as session:
        session.read(list(BEFORE))
        assert not session.reads_on(choices[0])
        assert session.reads_on(choices[1])
        assert same(choice_losses(session, choices), alone(session, choices))


def test_after_a_cell_that_is_gone(tiny: LlamaEngine, decodes: list[int]) -> None:
    """llama.cpp lets no sequence go on there, so that each choice is a decode of its own."""
    choices: list[Any] = [list(choice) for choice in CHOICES]
    with Session(tiny, SELECTED) as session:
        session.read(list(BEFORE))
        session.end_segment()
        assert not session.memory.continues_at(len(session.ledger))  # type: ignore[attr-defined]
        expected = alone(session, choices)
        decodes.clear()
        assert same(choice_losses(session, choices), expected)
        assert len(decodes) == 3
