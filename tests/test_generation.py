"""`generate(custom_generate=anchored(...))`: the library's sampling and stopping over our cells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from anchorkv.config import AnchorConfig
from anchorkv.engines.torch import TorchEngine
from anchorkv.engines.torch_tokenizer import TorchTokenizer
from anchorkv.errors import ConfigError
from anchorkv.generation import anchored
from anchorkv.session import Session, next_logits
from tests.tiny import TEXT, tiny_model, tiny_tokenizer

torch.set_num_threads(1)
MODEL, TOKENIZER = tiny_model(), tiny_tokenizer()
SMALL = AnchorConfig(reduction=6, min_segment=4, max_segment=12, recent_window=1)


def batch() -> dict[str, torch.Tensor]:
    """Two prompts of different length, padded on the left."""
    rows = [TOKENIZER(text)["input_ids"] for text in (TEXT, TEXT[40:130])]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 3},
        {"do_sample": False, "eos_token_id": 150},
    ],
)
def test_with_nothing_dropped_it_is_the_librarys_own(options: dict[str, Any]) -> None:
    def run(**extra: Any) -> Any:
        torch.manual_seed(3)
        return MODEL.generate(**batch(), max_new_tokens=30, return_dict_in_generate=True, output_logits=True,
                              output_scores=True, **options, **extra)

    wanted, got = run(), run(custom_generate=anchored("full", TOKENIZER))
    assert torch.equal(got.sequences, wanted.sequences)
    assert torch.allclose(got.logits[5][0], wanted.logits[5][0], atol=1e-4)
    assert len(got.scores) == len(wanted.scores)


def test_rows_are_sessions_of_their_own() -> None:
    method = anchored(SMALL, TOKENIZER)
    ids = MODEL.generate(**batch(), custom_generate=method, max_new_tokens=40, do_sample=False, eos_token_id=None)
    engine = TorchEngine(MODEL, TorchTokenizer(TOKENIZER))
    for row, mask, written in zip(*batch().values(), ids[:, -40:], strict=True):
        session = Session(engine, SMALL)
        session.read(row[mask.bool()].tolist())
        for token in written.tolist():
            logits = next_logits(session)
            assert logits[token] >= logits.max() - 1e-4
            session.read([token])
    assert method.accounting[0].reduction > 2
    assert len(method.accounting) == 2


class _Streamer:
    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.got.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streaming() -> None:
    streamer = _Streamer()
    row = batch()["input_ids"][:1]
    ids = MODEL.generate(
        row, custom_generate=anchored(SMALL, TOKENIZER, streamer=streamer), max_new_tokens=5, do_sample=False,
        eos_token_id=None,
    )
    assert streamer.got == [row[0].tolist(), *([token] for token in ids[0, -5:].tolist())]
    assert streamer.ended


class _Only(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, :7] += 1e4
        return scores


class _Length(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 200)


def test_the_callers_processors_and_criteria() -> None:
    ids = MODEL.generate(
        **batch(), custom_generate=anchored(SMALL, TOKENIZER), max_length=1000, do_sample=False, eos_token_id=None,
        logits_processor=LogitsProcessorList([_Only()]), stopping_criteria=StoppingCriteriaList([_Length()]),
    )
    start = batch()["input_ids"].shape[1]
    assert ids.shape[1] == 200
    assert bool((ids[:, start:] < 7).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beam"), ({"output_attentions": True, "return_dict_in_generate": True}, "attentions"),
    ],
)
def test_what_is_not_supported_says_so(options: dict[str, Any], message: str) -> None:
    MODEL.set_attn_implementation("eager")  # the library refuses output_attentions with sdpa by itself
    try:
        with pytest.raises(ConfigError, match=message):
            MODEL.generate(**batch(), custom_generate=anchored(SMALL, TOKENIZER), max_new_tokens=3, **options)
    finally:
        MODEL.set_attn_implementation("sdpa")


def test_an_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="no preset"):
        anchored("nothing", TOKENIZER)
