"""Documents and conversations: read once, ask often; pinned spans; Ctrl-C leaves a usable state."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import tiny_gguf

from anchorkv.chat import Conversation
from anchorkv.config import AnchorConfig
from anchorkv.document import Document, TextWriter, pinned_tokens
from anchorkv.engines.llama import LlamaEngine
from anchorkv.errors import CapacityError, ConfigError, DocumentError
from anchorkv.ledger import State
from anchorkv.prompt import Prompt
from anchorkv.sampling import Sampling
from anchorkv.session import Session

TEXT = "The mill stood by the river. It had two wheels; one was broken. Anna Weber bought it in 1911 for 9 crowns. " * 4
POLICY = AnchorConfig(reduction=4, max_segment=24, recall="on", recall_cells=64)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    path = tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    engine = LlamaEngine.load(path, threads=1, cells=256, sessions=6)
    yield engine
    engine.close()


def test_asking_never_changes_what_is_kept(engine: LlamaEngine) -> None:
    with Document.read(engine, POLICY, TEXT) as document:
        before = document.session.memory.positions().tolist(), len(document.ledger), document.accounting()
        first = document.ask("Who bought the mill?", max_tokens=12)
        again = document.ask("Who bought the mill?", max_tokens=12)
        assert first.text == again.text
        assert first.recalled
        assert first.recalled_cells <= 64
        assert (document.session.memory.positions().tolist(), len(document.ledger), document.accounting()) == before


def test_streaming_gives_the_same_text(engine: LlamaEngine) -> None:
    with Document.read(engine, POLICY, TEXT) as document:
        stream = document.stream("Who?", max_tokens=12, sampling=Sampling(temperature=1, seed=3))
        text = "".join(stream)
        assert stream.answer is not None
        assert stream.answer.text == text.strip()
        assert stream.answer.text == document.ask("Who?", max_tokens=12, sampling=Sampling(temperature=1, seed=3)).text


def test_pinned_spans_are_never_dropped(engine: LlamaEngine) -> None:
    with Document.read(engine, POLICY.replace(pinned=("Anna Weber",)), TEXT) as document:
        pinned = document.ledger.column("state") == State.PINNED
        text = engine.tokenizer.decode(document.ledger.tokens[pinned].tolist())
        assert text.count("Anna Weber") == 4
    with pytest.raises(ConfigError, match="does not occur"):
        Document.read(engine, POLICY.replace(pinned=("Bertha",)), TEXT)


def test_pinned_tokens_cover_partial_overlaps(engine: LlamaEngine) -> None:
    text = "ab 日本 cd 日本"
    tokens = engine.tokenizer.encode(text)
    marks = pinned_tokens(text, ["日本"], tokens, engine.tokenizer)
    assert sum(marks) == 2 * len("日本".encode())


@pytest.mark.parametrize("text", ["", "  \n\t "])
def test_empty_documents_are_refused(engine: LlamaEngine, text: str) -> None:
    with pytest.raises(DocumentError, match="no text"):
        Document.read(engine, POLICY, text, title="empty.txt")


def test_bad_questions_are_refused(engine: LlamaEngine) -> None:
    with Document.read(engine, POLICY, TEXT) as document:
        with pytest.raises(ConfigError, match="empty"):
            document.ask("  ")
        with pytest.raises(ConfigError, match="max_tokens"):
            document.ask("Who?", max_tokens=0)


def test_ctrl_c_while_reading_leaves_a_session_that_goes_on(engine: LlamaEngine) -> None:
    tokens = engine.tokenizer.encode(TEXT)

    def interrupt(done: int) -> None:
        if done > 100:
            os.kill(os.getpid(), signal.SIGINT)

    with Session(engine, POLICY) as session, Session(engine, POLICY) as undisturbed:
        with pytest.raises(KeyboardInterrupt):
            session.read(tokens, progress=interrupt)
        read = len(session.ledger)
        assert 100 < read < len(tokens)
        session.read(tokens[read:])
        undisturbed.read(tokens)
        assert session.ledger.column("state").tolist() == undisturbed.ledger.column("state").tolist()
        np.testing.assert_allclose(session.logits, undisturbed.logits, atol=1e-3)


def test_too_many_sessions_are_refused_and_closing_frees_them(engine: LlamaEngine) -> None:
    sessions = [Session(engine, POLICY) for _ in range(6)]
    with pytest.raises(CapacityError, match="in use"):
        Session(engine, POLICY)
    for session in sessions:
        session.close()
    Session(engine, POLICY).close()


def test_a_conversations_old_turns_are_compressed(engine: LlamaEngine, tmp_path: object) -> None:
    conversation = Conversation(engine, POLICY)
    for message in ("The mill stood by the river, and it had two wheels.", "One of them was broken.", "Who bought it?"):
        "".join(conversation.say(message, max_tokens=30))
    ledger = conversation.session.ledger
    assert len(conversation.turns) == 3
    assert (ledger.column("state") == State.DROPPED).any()
    text = b"".join(engine.tokenizer.piece(int(t)) for t in ledger.tokens).decode(errors="replace")
    assert text.index("two wheels") < text.index("was broken") < text.index("Who bought")
    path = f"{tmp_path}/talk"
    conversation.save(path)
    again = Conversation.open(engine, path)
    assert [turn.user for turn in again.turns] == [turn.user for turn in conversation.turns]
    first = "".join(conversation.say("Why?", max_tokens=8))
    assert first == "".join(again.say("Why?", max_tokens=8))
    conversation.close()
    again.close()


def test_the_prompt_is_the_models_own_template(engine: LlamaEngine) -> None:
    prompt = Prompt.of(engine.tokenizer, system="Be brief.")
    assert prompt.opening == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert prompt.asking == "<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.next_turn == ("<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")


def test_characters_are_held_back_until_they_are_whole(engine: LlamaEngine) -> None:
    writer = TextWriter(engine.tokenizer)
    pieces = [writer.write(token) for token in engine.tokenizer.encode("日本")]
    assert pieces == ["", "", "日", "", "", "本"]
