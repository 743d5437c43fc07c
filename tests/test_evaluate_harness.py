"""lm-eval's model "anchorkv": tokens, shared demonstrations, scores and texts against what the engine itself says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
import typer
from fake_engine import END, FakeEngine
from typer.testing import CliRunner

from anchorkv.config import AnchorConfig, preset
from anchorkv.engines.llama import LlamaEngine
from anchorkv.errors import AnchorKVError, ConfigError
from anchorkv.evaluate.demonstrations import Context, Demonstrations, context, shared
from anchorkv.ledger import State
from anchorkv.models import Model

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model, model_registry

from anchorkv.cli import lm_eval as cli
from anchorkv.evaluate.harness import AnchorLM, policy_text
from anchorkv.evaluate.tasks.qa import TASK_FILES

ANCHORED = AnchorConfig(
    anchors=("SEL", "EP"), scorer="frequency", reduction=4, aging=0, sinks=2, recent_window=0, anchors_see_anchors=True,
    min_segment=8, max_segment=24, recall="off",
)
ISOLATED = ANCHORED.replace(anchors=("EP",), anchors_see_anchors=False, sinks=0)
SELECTED = ANCHORED.replace(anchors=("SEL",), anchors_see_anchors=False, reduction=24)
ADDED = ANCHORED.replace(anchors=("AC",), ac_tokens=2, anchors_see_anchors=False, min_segment=3)
POLICIES = {"full": preset("full"), "anchored": ANCHORED, "isolated": ISOLATED, "added": ADDED, "selected": SELECTED}
SHOWN = "Q: How old is the pump?\nA: nine\n\nQ: Who wrote it down? Nobody.\nA: the captain\n\n"
QUESTIONS = ("Q: Why zero?\nA:", "Q: Was it the wire. Or the seal?\nA:", "Q: Which deck?\nA:")
CHOICES = (" two", " the seal had worn. Through", " x")


def ask(texts: list[tuple[Any, ...]], kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(kind, {}, text, 0, metadata=("task", number, 1)) for number, text in enumerate(texts)]


REQUESTS = [(SHOWN + question, choice) for question in QUESTIONS for choice in CHOICES]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    engine = LlamaEngine(tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf"), threads=1, cells=512)
    yield engine
    engine.close()


def lm_of(engine: Any, policy: AnchorConfig, **options: Any) -> AnchorLM:
    return AnchorLM("test", model=Model(engine, policy), quiet=True, **options)


# --- demonstrations --------------------------------------------------------------------------------------------------


def bytes_of(text: str) -> list[int]:
    return list(text.encode())


def test_demonstrations_end_behind_their_delimiter() -> None:
    one = context("ab\n\ncd\n\nef?", bytes_of("ab\n\ncd\n\nef?"), bytes_of)
    assert one.demonstrations == (tuple(b"ab\n\n"), tuple(b"cd\n\n"))
    assert one.first(1) == Context(tuple(b"ab\n\n"), (4,))
    assert one.first(0) == Context(())


@pytest.mark.parametrize("text", ["", "one question", "one question\n\n", "\n\n"])
def test_what_is_asked_is_no_demonstration(text: str) -> None:
    assert context(text, bytes_of(text), bytes_of).ends == ()


def test_a_token_across_the_delimiter_belongs_to_what_follows() -> None:
    def merging(text: str) -> list[int]:
        """Two line breaks at the end are one token, as in GPT-2's kind of tokenizer; before a word they are two."""
        tokens = bytes_of(text)
        return [*tokens[:-2], 300] if text.endswith("\n\n") else tokens

    text = "ab\n\ncd\n\nef?"
    one = context(text, merging(text), merging)
    assert one.tokens == tuple(bytes_of(text))  # those of the whole text, wherever it is cut
    assert one.demonstrations == (tuple(b"ab"), tuple(b"\n\ncd"))


def test_what_contexts_share() -> None:
    texts = ["a\n\nb\n\nc\n\nx", "a\n\nb\n\nc\n\ny", "a\n\nd\n\nx", "e\n\nx"]
    assert shared([context(text, bytes_of(text), bytes_of) for text in texts]) == [3, 3, 1, 0]
    assert shared([]) == []


@pytest.mark.parametrize(
    "policy", [ANCHORED, ISOLATED, ADDED, SELECTED], ids=["anchored", "isolated", "added", "selected"]
)
def test_every_demonstration_ends_a_segment_and_is_read_once(policy: AnchorConfig) -> None:
    held = Demonstrations(FakeEngine(), policy)
    for question in QUESTIONS:
        text = SHOWN + question
        one = context(text, bytes_of(text), bytes_of)
        with held.after(one, 2) as session:
            segments, added = session.ledger.column("segment"), session.ledger.column("added")
            assert session.ledger.tokens[~added].tolist() == list(one.tokens)
            real = np.flatnonzero(~added)
            for end in one.ends:
                last, following = real[end - 1], real[end]
                assert segments[last] < segments[following]
                state = session.ledger.column("state")[session.ledger.span(segments[last])]
                assert state[-1] == (State.PINNED if policy is SELECTED else State.ANCHOR)
    assert [read.demonstrations for read in held.reads] == [2]
    read = held.reads[0].accounting
    assert read.full_cells == len(SHOWN)
    assert read.kept_cells < read.full_cells / 2
    assert held.seconds > 0
    held.close()


def test_without_anchors_nothing_of_a_demonstration_stays() -> None:
    held = Demonstrations(FakeEngine(), ANCHORED.replace(anchors=()))
    text = SHOWN + QUESTIONS[0]
    held.after(context(text, bytes_of(text), bytes_of), 2).close()
    assert held.reads[0].accounting.kept_cells == ANCHORED.sinks


def test_the_full_cache_keeps_all_and_is_not_stopped_at_demonstrations() -> None:
    engine = FakeEngine(batch=4096)
    text = SHOWN + QUESTIONS[0]
    with Demonstrations(engine, preset("full")).after(context(text, bytes_of(text), bytes_of)) as session:
        assert session.accounting().kept_cells == len(text)
        assert session.current == 0


def test_sessions_are_given_back(tiny: LlamaEngine) -> None:
    free = len(tiny._free_sequences)
    held = Demonstrations(tiny, ANCHORED, keep=1)
    contexts = [context(text, bytes_of(text), bytes_of) for text in ("ab\n\nc", "ab\n\nd", "ef\n\nc", "ef\n\nd")]
    for one in contexts:
        held.after(one, 1).close()
    assert len(held.reads) == 2
    assert len(tiny._free_sequences) == free - 1  # the newest prefix
    held.close()
    assert len(tiny._free_sequences) == free


def test_rereading_shares_nothing() -> None:
    held = Demonstrations(FakeEngine(), ANCHORED, reread=True)
    held.after(Context(tuple(b"ab\n\nc"), (4,)), 1).close()
    assert held.reads == []


# --- scoring ---------------------------------------------------------------------------------------------------------


def test_the_full_cache_scores_as_one_forward_over_the_whole_text(tiny: LlamaEngine) -> None:
    requests = REQUESTS[2:5]
    found = lm_of(tiny, preset("full")).loglikelihood(ask(requests))
    weights = tiny_gguf.weights()
    for (before, answer), (score, greedy) in zip(requests, found, strict=True):
        tokens = np.asarray(bytes_of(before + answer))
        logits = tiny_gguf.reference(weights, tokens, np.tri(len(tokens), dtype=bool))
        rows, targets = logits[len(before) - 1 : -1], tokens[len(before) :]
        top = rows.max(axis=1)
        expected = rows[np.arange(len(targets)), targets] - top - np.log(np.exp(rows - top[:, None]).sum(axis=1))
        assert score == pytest.approx(expected.sum(), rel=0.01)
        assert greedy == bool((rows.argmax(axis=1) == targets).all())


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_sharing_changes_no_score(tiny: LlamaEngine, policy: AnchorConfig) -> None:
    lm, alone = lm_of(tiny, policy), lm_of(tiny, policy, reread=True)
    together = lm.loglikelihood(ask(REQUESTS))
    one_by_one = [alone.loglikelihood(ask([request]))[0] for request in reversed(REQUESTS)][::-1]
    assert [score for score, _ in together] == pytest.approx([score for score, _ in one_by_one], abs=2e-2)
    assert len(lm.demonstrations.reads) == 1
    assert not alone.demonstrations.reads
    lm.close()


@pytest.mark.parametrize("policy", [preset("full"), ANCHORED, ADDED], ids=["full", "anchored", "added"])
def test_sharing_changes_no_score_on_pytorch(policy: AnchorConfig) -> None:
    pytest.importorskip("torch")
    from tiny import tiny_model, tiny_tokenizer

    from anchorkv.engines.torch import TorchEngine
    from anchorkv.engines.torch_tokenizer import TorchTokenizer

    engine = TorchEngine(tiny_model(), TorchTokenizer(tiny_tokenizer()), batch=32)
    together = lm_of(engine, policy).loglikelihood(ask(REQUESTS[:4]))
    one_by_one = lm_of(engine, policy, reread=True).loglikelihood(ask(REQUESTS[:4]))
    assert [score for score, _ in together] == pytest.approx([score for score, _ in one_by_one], abs=1e-3)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in one_by_one]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_scores_are_those_of_the_continuation_alone(tiny: LlamaEngine, policy: AnchorConfig) -> None:
    """Added anchors are neither predicted nor scored, however many segments end within a continuation."""
    lm = lm_of(tiny, policy)
    long = " Yes. It is so. And so it was. The end."
    (score, _), (start, _), (rest, _) = lm.loglikelihood(
        ask([("Q?", long), ("Q?", long[:-1]), ("Q?" + long[:-1], long[-1])])
    )
    assert score == pytest.approx(start + rest, abs=2e-2)
    assert lm.loglikelihood(ask([("Q?", "")])) == [(0.0, True)]


@pytest.mark.parametrize("policy", [preset("full"), ANCHORED], ids=["full", "anchored"])
def test_greedy_is_what_the_model_would_write(policy: AnchorConfig) -> None:
    lm = lm_of(FakeEngine(), policy)
    before = SHOWN + QUESTIONS[0]
    (written,) = lm.generate_until(ask([(before, {"until": [], "max_gen_toks": 12})], "generate_until"))
    assert len(written) == 12
    changed = written[:-1] + ("a" if written[-1] != "a" else "b")
    answers = [written, written[0], changed, changed[-1] + written]
    found = lm.loglikelihood(ask([(before, answer) for answer in answers]))
    assert [greedy for _, greedy in found] == [True, True, False, False]
    unasked = lm_of(FakeEngine(), policy, greedy=False).loglikelihood(ask([(before, written)]))
    assert unasked[0] == (pytest.approx(found[0][0]), False)


def test_what_was_spent_is_told_by_question() -> None:
    lm = lm_of(FakeEngine(), ANCHORED)
    lm.loglikelihood(ask(REQUESTS))
    assert [(one.task, one.question) for one in lm.spent] == [("task", number) for number in range(len(REQUESTS))]
    before, answer = REQUESTS[0]
    assert lm.spent[0].tokens == len(before + answer)
    assert lm.spent[0].full == len(before) > lm.spent[0].kept
    assert all(one.seconds > 0 for one in lm.spent)
    assert lm.longest == max(len(before + answer) for before, answer in REQUESTS)
    info = lm.get_model_info()
    assert info["demonstrations_read_once"][0]["full_cells"] == len(SHOWN)
    assert info["policy_fields"]["reduction"] == ANCHORED.reduction


def test_a_whole_text_is_scored_in_windows() -> None:
    lm = lm_of(FakeEngine(window=16), preset("full"))
    text = "The pump on deck two was replaced."
    (found,) = lm.loglikelihood_rolling(ask([(text,)], "loglikelihood_rolling"))
    windows = [([END], text[:16]), (bytes_of(text[15]), text[16:32]), (bytes_of(text[17:32]), text[32:])]
    assert found == pytest.approx(sum(lm._predicted(before, bytes_of(after)) for before, after in windows))
    assert lm.loglikelihood_rolling(ask([("",)], "loglikelihood_rolling")) == [0]


# --- writing ---------------------------------------------------------------------------------------------------------


def write(lm: AnchorLM, options: dict[str, Any], times: int = 1) -> list[str]:
    return lm.generate_until(ask([(SHOWN + QUESTIONS[0], options)] * times, "generate_until"))


def test_writing_ends_before_a_stop() -> None:
    lm = lm_of(FakeEngine(), preset("full"))
    (whole,) = write(lm, {"until": [], "max_gen_toks": 30})
    stop = whole[9:11]
    (cut,) = write(lm, {"until": [stop, ""], "max_gen_toks": 30})
    assert cut == whole[: whole.index(stop)]
    assert len(write(lm, {"until": [], "max_tokens": 5})[0]) == 5


def test_writing_follows_the_sampling_asked_for() -> None:
    def drawn() -> list[str]:
        options = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 2.0}
        return write(lm_of(FakeEngine(), ANCHORED), options, times=3)

    assert drawn() == drawn()
    assert len(set(drawn())) == 3  # repeats of one question differ
    greedy = write(lm_of(FakeEngine(), ANCHORED), {"until": [], "max_gen_toks": 20, "temperature": 0.0}, times=2)
    assert len(set(greedy)) == 1


# --- chat ------------------------------------------------------------------------------------------------------------


def test_turns_of_the_chat_template_are_demonstrations() -> None:
    lm = lm_of(FakeEngine(), ANCHORED)
    turns = [{"role": role, "content": text} for role, text in
             (("user", "How old?"), ("assistant", "nine"), ("user", "Who?"), ("assistant", "the captain"))]
    contexts = [lm.apply_chat_template([*turns, {"role": "user", "content": text}]) for text in QUESTIONS]
    assert contexts[0].startswith("<|open|>user\nHow old?<|end|>")
    lm.loglikelihood(ask([(text, answer) for text in contexts for answer in (" a", " bc")]))
    assert [read.demonstrations for read in lm.demonstrations.reads] == [2]
    assert END in lm.tok_encode(contexts[0])
    prefilled = lm.apply_chat_template([*turns[:3], {"role": "assistant", "content": "It"}], False)
    assert prefilled.endswith("<|open|>assistant\nIt")
    assert "{message}" in lm.chat_template(True)
    with pytest.raises(ConfigError, match="no name"):
        lm.chat_template("tool_use")


def test_control_tokens_in_plain_text_are_text() -> None:
    assert END not in lm_of(FakeEngine(), ANCHORED).tok_encode("a<|end|>b")


# --- lm-eval's own side ----------------------------------------------------------------------------------------------


def test_the_model_is_registered_beside_lm_evals_own() -> None:
    assert get_model("anchorkv") is AnchorLM
    assert "hf" in model_registry


@pytest.mark.parametrize("separator", [";", "|"])
def test_a_policy_with_several_changes_passes_through_model_args(separator: str, tmp_path: Path) -> None:
    from lm_eval._cli.utils import key_val_to_dict
    from lm_eval.utils import simple_parse_args_string

    path = tiny_gguf.write(tmp_path / "tiny.gguf")
    given = f"pretrained={path},policy=default:reduction=24{separator}recent_window=0,threads=1,reread=true"
    assert key_val_to_dict(given) == simple_parse_args_string(given)
    lm = AnchorLM.create_from_arg_string(given, {"batch_size": 1, "device": None})
    assert (lm.way.policy.reduction, lm.way.policy.recent_window) == (24, 0)
    assert lm.model.engine.name == "llama"
    lm.close()


def test_mistakes_are_one_sentence() -> None:
    assert policy_text("default:a=1;b=2|c=3") == "default:a=1,b=2,c=3"
    with pytest.raises(ConfigError, match="no policy 'nothing'"):
        AnchorLM(policy="nothing")
    with pytest.raises(AnchorKVError, match="no model file"):
        AnchorLM("missing.gguf")


def _program() -> typer.Typer:
    program = typer.Typer()
    program.command("other")(lambda: None)
    program.command("lm-eval", **cli.SETTINGS)(cli.lm_eval)
    return program


@pytest.mark.parametrize(("given", "added"), [
    (["run", "--model", "anchorkv", "-t", "a", "--help"], True), (["--model", "anchorkv", "--tasks", "a"], True),
    (["ls", "tasks"], True), (["--help"], False), (["run", "--include_path", "x"], False),
    (["run", "--include_path=x"], False), ([], False),
])
def test_the_wrapper_hands_everything_on(given: list[str], added: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["anchorkv"])
    result = CliRunner().invoke(_program(), ["lm-eval", *given])
    assert result.exit_code == 0, result.output
    assert seen == [[*given, *(["--include_path", str(TASK_FILES)] if added else [])]]


def test_the_wrapper_says_what_lm_eval_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["anchorkv"])
    result = CliRunner().invoke(_program(), ["lm-eval", "run", "--model", "anchorkv", "--tasks", "x", "--log_samples"])
    assert isinstance(result.exception, ConfigError)
    assert "--output_path" in str(result.exception)


def test_torch_is_not_needed() -> None:
    code = "import sys, anchorkv.evaluate.harness as h; assert h.AnchorLM; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
