"""Write token by token: one session, or several in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from anchorkv.recall import RecallPlan
from anchorkv.sampling import Sampling
from anchorkv.session import Session, next_logits


def decode(
    session: Session, max_tokens: int, sampling: Sampling, *, plan: RecallPlan | None = None, question: str = ""
) -> Iterator[int]:
    """Yield token ids until the model ends its turn or `max_tokens` are written; each is read back before the next.

    plan: at each segment end of a long answer, recall again for the question and what was just written.
    """
    sampler = sampling.sampler(_never_written(session))
    ends = session.engine.tokenizer.eos_ids
    for _ in range(max_tokens):
        token = sampler.draw(next_logits(session))
        if token in ends:
            return
        segment = session.current
        session.read([token])
        yield token
        if plan is not None and session.current != segment:
            written = session.ledger.tokens[session.ledger.span(segment)].tolist()
            plan.update(f"{question} {session.engine.tokenizer.decode(written)}")


def _never_written(session: Session) -> int | None:
    """<AC> is added where a segment ends, never written, though the paper's models were trained to predict it."""
    return session.engine.tokenizer.anchor_id() if "AC" in session.config.anchors else None


def step_together(sessions: Sequence[Session], tokens: Sequence[int]) -> None:
    """Read one token in each of several sessions of one engine, in one batch where the rule allows it.

    Each session ends as if it had read its token alone.
    """
    joint = [(session, token) for session, token in zip(sessions, tokens, strict=True) if session.begin_step(token)]
    if joint:
        steps = [(session.memory, token, len(session.ledger) - 1) for session, token in joint]
        for (session, _), out in zip(joint, joint[0][0].engine.decode_together(steps), strict=True):
            session.end_step(out)


def decode_together(
    sessions: Sequence[Session], max_tokens: int, sampling: Sampling
) -> Iterator[list[tuple[int, int]]]:
    """Write in several sessions at once; yields, per step, (index of the session, token id) of those still writing."""
    samplers = [sampling.sampler(_never_written(session)) for session in sessions]
    writing = list(range(len(sessions)))
    for _ in range(max_tokens):
        drawn = [(i, samplers[i].draw(next_logits(sessions[i]))) for i in writing]
        drawn = [(i, token) for i, token in drawn if token not in sessions[i].engine.tokenizer.eos_ids]
        if not drawn:
            return
        writing = [i for i, _ in drawn]
        step_together([sessions[i] for i in writing], [token for _, token in drawn])
        yield drawn
