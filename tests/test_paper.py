"""The paper's checkpoints, as tiny random models of the same layout: the right preset, anchors and logits."""

from __future__ import annotations

import json
import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from policies import chunks

import anchorkv
from anchorkv.config import AnchorConfig, preset
from anchorkv.document import Document
from anchorkv.errors import ModelError
from anchorkv.paper import paper_preset
from anchorkv.sampling import Sampling
from anchorkv.session import Session
from anchorkv.visibility import dense_mask

torch = pytest.importorskip("torch")

from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402 (all need torch)
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from anchorkv.decode import decode  # noqa: E402
from anchorkv.engines import torch_load  # noqa: E402

TOLERANCE = 1e-4
TEXT = (
    "The pump on deck two was replaced on Monday. It ran for nine hours! Pi is 3.14 on the dial . Why did the gauge "
    "read zero? The seal, e.g. a ring, had worn through. Nobody asked"
)


def llama_tokenizer() -> Any:
    """Llama's kind: BPE over "▁" with byte fallback; marks and digits stand alone, but for the piece "▁."."""
    control = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    backend.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=len(control) + 90, special_tokens=control, initial_alphabet=[*string.ascii_letters, *".!?,▁"],
        show_progress=False,
    ))
    trained = json.loads(backend.to_str())["model"]
    vocabulary = {**trained["vocab"], "▁.": len(trained["vocab"])}
    merges = [tuple(merge) for merge in trained["merges"]]
    return LlamaTokenizer(vocab=vocabulary, merges=[*merges, ("▁", ".")])


def tiny_llama(vocabulary: int) -> Any:
    """Random and large enough weights for attention to matter; no grouped heads, as in Llama 2 7B."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
        ))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def save_checkpoint(folder: Path, *, ac: bool, special: bool = False, multiple: int | None = None) -> Path:
    """A checkpoint as the paper's: [PAD], then <AC> as an ordinary added token, and embeddings resized for both."""
    tokenizer = llama_tokenizer()
    model = tiny_llama(len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if ac:
        tokenizer.add_tokens(["<AC>"], special_tokens=special)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple, mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _cpu_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch_load, "best_dtype", lambda device: torch.float32)


def pieces(document: Document) -> list[str]:
    """The words of every segment, added tokens left out."""
    ledger, tokenizer = document.ledger, document.session.engine.tokenizer
    added = ledger.column("added")
    spans = [[i for i in ledger.span(number) if not added[i]] for number in range(ledger.segments)]
    texts = [b"".join(tokenizer.piece(int(ledger.tokens[i])) for i in span).decode() for span in spans]
    return [" ".join(text.split()) for text in texts]


def assert_only_anchors_are_held(document: Document) -> None:
    """One cell for each segment that has ended, and the current one whole."""
    session, ledger = document.session, document.ledger
    current = ledger.column("segment") == session.current
    assert session.memory.positions().tolist() == np.flatnonzero(ledger.column("anchor") | current).tolist()
    assert int(ledger.column("anchor").sum()) == session.current
    assert not (ledger.column("anchor") & current).any()


def masked_forward(session: Session) -> Any:
    """Logits [n, vocabulary] of transformers' own forward under the rule as a dense 4-D mask."""
    mask = torch.from_numpy(dense_mask(session.ledger.layout()))[None, None]
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    ids = torch.from_numpy(session.ledger.tokens.copy())[None]
    model: Any = session.engine
    with torch.inference_mode():
        positions = torch.arange(ids.shape[1])[None]
        return model.model(ids, attention_mask=additive, position_ids=positions).logits[0].numpy()


# --- which preset --------------------------------------------------------------------------------------------------


def engine_of(architecture: str = "llama", *, ac: bool = False) -> Any:
    tokenizer = SimpleNamespace(encode=lambda text, special: [7] if ac else [1, 2, 3], anchor_id=lambda: 7)
    return SimpleNamespace(info=SimpleNamespace(architecture=architecture), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("source", "ac", "name"),
    [
        ("pangjh3/AnLLM-AC-7B-PT", True, "paper-ac"),
        ("pangjh3/AnLLM-AC-13B-PT", True, "paper-ac"),
        ("pangjh3/AnLLM-EP-7B-PT", False, "anllm-ep"),
        ("pangjh3/AnLLM-EP-13B-PT", False, "anllm-ep"),
        ("pangjh3/AnLLM-EP-7B-translation", False, "anllm-ep"),
        ("/models/AnLLM-EP-7B-PT/", False, "anllm-ep"),
        ("/hub/models--pangjh3--AnLLM-EP-7B-PT/snapshots/0b6b89b", False, "anllm-ep"),
        ("anllm-ep-7b-pt.Q4_K_M.gguf", False, "anllm-ep"),
        ("AnLLM-EP-7B-PT", True, "anllm-ep"),
        ("my-tuned-llama", True, "paper-ac"),
        ("AnLLM-AC-7B-PT-Q8_0.gguf", True, "paper-ac"),
        ("tuned.gguf", True, None),
        ("meta-llama/Llama-2-7b-hf", False, None),
        ("AnLLM-EP-7Billion", False, None),
        ("AnLLM-EP-7B-PT/other", False, None),
    ],
)
def test_which_preset(source: str, ac: bool, name: str | None) -> None:
    assert paper_preset(Path(source), engine_of(ac=ac)) == name
    assert paper_preset(Path(source), engine_of("qwen2", ac=ac)) is None


def test_an_ac_model_without_its_token_is_refused() -> None:
    with pytest.raises(ModelError, match="has no <AC> token"):
        paper_preset(Path("pangjh3/AnLLM-AC-7B-PT"), engine_of())


def test_the_presets_are_the_papers() -> None:
    for policy in (preset("anllm-ep"), preset("paper-ac")):
        assert (policy.sinks, policy.recent_window, policy.ac_tokens, policy.recall) == (0, 0, 1, "off")
        assert policy.isolated
        assert policy.cell_budget is None
        assert not policy.pin_prompt


# --- loading and reading -------------------------------------------------------------------------------------------


def test_ep_anchors_on_the_period_alone(tmp_path: Path) -> None:
    with anchorkv.load(save_checkpoint(tmp_path / "AnLLM-EP-7B-PT", ac=False)) as model:
        assert model.policy == preset("anllm-ep")
        with model.read_text(TEXT) as document:
            assert pieces(document) == [
                "user: The pump on deck two was replaced on Monday.", "It ran for nine hours! Pi is 3.",
                "14 on the dial . Why did the gauge read zero? The seal, e.", "g.", "a ring, had worn through.",
                "Nobody asked",
            ]
            tokens = document.ledger.tokens
            assert {model.engine.tokenizer.piece(int(i)) for i in tokens[document.ledger.column("anchor")]} == {b"."}
            assert len(tokens) == document.accounting().full_cells  # nothing is added
            assert_only_anchors_are_held(document)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("multiple", [None, 64])
def test_ac_ends_every_sentence_with_its_own_token(tmp_path: Path, special: bool, multiple: int | None) -> None:
    folder = save_checkpoint(tmp_path / "AnLLM-AC-7B-PT", ac=True, special=special, multiple=multiple)
    with anchorkv.load(folder) as model:
        tokenizer: Any = model.engine.tokenizer
        ac = tokenizer.hf.convert_tokens_to_ids("<AC>")
        assert model.policy == preset("paper-ac")
        assert ac == len(tokenizer.hf) - 1 == tokenizer.anchor_id()
        assert model.engine.info.vocabulary >= ac + 1
        assert model.engine.info.vocabulary % (multiple or 1) == 0
        with model.read_text(TEXT) as document:
            assert pieces(document) == [
                "user: The pump on deck two was replaced on Monday.", "It ran for nine hours!",
                "Pi is 3.14 on the dial .", "Why did the gauge read zero?", "The seal, e.g. a ring, had worn through.",
                "Nobody asked",
            ]
            ledger = document.ledger
            assert np.array_equal(ledger.column("anchor"), ledger.column("added"))
            assert set(ledger.tokens[ledger.column("anchor")].tolist()) == {ac}
            assert_only_anchors_are_held(document)


@pytest.mark.parametrize("how", ["whole", "chunks", "token"])
@pytest.mark.parametrize("kind", ["AC", "EP"])
def test_incremental_equals_one_masked_forward(tmp_path: Path, kind: str, how: str) -> None:
    with anchorkv.load(save_checkpoint(tmp_path / f"AnLLM-{kind}-7B-PT", ac=kind == "AC")) as model:
        tokens = model.engine.tokenizer.start_ids() + model.engine.tokenizer.encode(TEXT)
        seen: dict[int, Any] = {}
        with Session(model.engine, model.policy) as session:
            for part in chunks(len(tokens), how):
                session.read(tokens[part])
                seen[len(session.ledger) - 1] = session.logits
            rows = masked_forward(session)
        for position, logits in seen.items():
            np.testing.assert_allclose(logits, rows[position], atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["AC", "EP"])
def test_generation_goes_on_by_the_rule(tmp_path: Path, kind: str) -> None:
    with anchorkv.load(save_checkpoint(tmp_path / f"AnLLM-{kind}-7B-PT", ac=kind == "AC")) as model:
        document = model.read_text(TEXT)
        answer = document.ask("Who asked?", max_tokens=8, sampling=Sampling(temperature=1, seed=1))
        assert 0 < answer.tokens <= 8
        assert answer.recalled == []
        with document.session.fork() as session:
            written = list(decode(session, 60, Sampling(temperature=2, seed=2)))
            assert written
            session.read(model.engine.tokenizer.encode("\n\nIt ran for nine hours."))
            assert session.current > document.session.current
            np.testing.assert_allclose(session.logits, masked_forward(session)[-1], atol=TOLERANCE)


def test_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_checkpoint(tmp_path / "revision", ac=False)
    monkeypatch.setattr(torch_load, "_source", lambda spec: (str(folder), {"local_files_only": True}, spec))
    with anchorkv.load("pangjh3/AnLLM-EP-13B-PT") as model:
        assert (model.policy, model.engine.info.name) == (preset("anllm-ep"), "pangjh3/AnLLM-EP-13B-PT")


def test_an_explicit_policy_wins(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "AnLLM-AC-7B-PT", ac=False)
    own = AnchorConfig(reduction=5)
    with anchorkv.load(folder, policy="default") as named, anchorkv.load(folder, policy=own) as configured:
        assert (named.policy, configured.policy) == (preset("default"), own)
    with pytest.raises(ModelError, match="added_tokens"):
        anchorkv.load(folder)


def test_another_architecture_of_that_name_takes_the_default(tmp_path: Path) -> None:
    tokenizer = llama_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "AnLLM-EP-7B-PT")
    tokenizer.save_pretrained(tmp_path / "AnLLM-EP-7B-PT")
    with anchorkv.load(tmp_path / "AnLLM-EP-7B-PT") as model:
        assert model.policy == preset("default")


# --- the published files -------------------------------------------------------------------------------------------


def save_as_published(folder: Path, *, ac: bool) -> Path:
    """The files of the real repositories: a SentencePiece model, the added tokens beside it, one pytorch_model.bin."""
    spm = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    size = 318
    added = {"[PAD]": size, "<AC>": size + 1} if ac else {"[PAD]": size}
    model = tiny_llama(size + len(added))
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 3), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=size,
        byte_fallback=True, character_coverage=1.0, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "model_max_length": 4096, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({**names, "pad_token": "[PAD]"}))
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


@pytest.mark.parametrize("kind", ["AC", "EP"])
def test_the_files_as_they_are_published(tmp_path: Path, kind: str) -> None:
    with anchorkv.load(save_as_published(tmp_path / f"AnLLM-{kind}-7B-PT", ac=kind == "AC")) as model:
        assert model.policy == preset("paper-ac" if kind == "AC" else "anllm-ep")
        assert model.engine.tokenizer.start_ids() == [1]
        if kind == "AC":
            assert model.engine.tokenizer.anchor_id() == 319
        with model.read_text(TEXT) as document:
            assert pieces(document)[0].endswith("on Monday.")
            assert_only_anchors_are_held(document)
            session = document.session
            np.testing.assert_allclose(session.logits, masked_forward(session)[-1], atol=TOLERANCE)
