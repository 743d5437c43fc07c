"""Other methods that make a KV cache smaller, from their authors' or NVIDIA/kvpress' own code (kvpress 0.5.5).

A method is a factory: a reduction R becomes what compresses a context to 1/R of its cells: a press (a context manager
around the model), a `PromptCompressor`, or None for the full cache. Each docstring: paper, settings, where those come
from. "registry" is kvpress' own evaluation registry, what its leaderboard was made with. The libraries are imported
when a method is used.

Left out, and why:
- KVzap, Fast KVzip, RestoreKV, DuoAttention, QFilter: need surrogates, gates or head patterns that were trained for
  other models and are downloaded from a hub; there are none for this one.
- PyramidKV: below 1,280 kept cells a head kvpress 0.5.5 falls back to SnapKV for it (beta 20, window 64).
- Observed attention (H2O): needs eager attention, all weights of a context at once. FINCH, CapPress: see the question
  before they compress, so the cache serves no other one. ThinK: prunes channels, not cells.
- SimLayerKV, DMS: set thresholds, not a budget. KVgrad: a backward pass a chunk. CAM: decoding only.
- ChunkKV, AdaKV + SnapKV, CUR, leverage scores alone: close relatives of what is here.
- LLMLingua-2: needs its trained classifier from a hub.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

Factory = Callable[[float], Any]
METHODS: dict[str, Factory] = {}


def method(name: str) -> Callable[[Factory], Factory]:
    def register(factory: Factory) -> Factory:
        METHODS[name] = factory
        return factory

    return register


def ratio(reduction: float) -> float:
    """kvpress' compression ratio: the share of the cells that goes."""
    return 1 - 1 / reduction


@method("full")
def full(reduction: float) -> None:
    """Everything stays, whatever `reduction` says: the yardstick."""


@method("StreamingLLM")
def streaming_llm(reduction: float) -> Any:
    """Xiao et al., arXiv 2309.17453. 4 sinks and the newest tokens. Keys keep their positions (registry): the paper's
    re-rotation is for texts beyond the model's window."""
    from kvpress import StreamingLLMPress

    return StreamingLLMPress(compression_ratio=ratio(reduction), n_sink=4)


@method("SnapKV")
def snapkv(reduction: float) -> Any:
    """Li et al., arXiv 2404.14469. Window 64, kernel 5 (registry)."""
    from kvpress import SnapKVPress

    return SnapKVPress(compression_ratio=ratio(reduction), window_size=64, kernel_size=5)


@method("TOVA")
def tova(reduction: float) -> Any:
    """Oren et al., arXiv 2401.06104. No settings; compresses once, after prefill, as every press here does."""
    from kvpress import TOVAPress

    return TOVAPress(compression_ratio=ratio(reduction))


@method("Knorm")
def knorm(reduction: float) -> Any:
    """Devoto et al., arXiv 2406.11430. No settings."""
    from kvpress import KnormPress

    return KnormPress(compression_ratio=ratio(reduction))


@method("ExpectedAttention")
def expected_attention(reduction: float) -> Any:
    """Devoto et al., arXiv 2510.00636, with AdaKV's head-wise budgets (Feng et al., arXiv 2407.11550), epsilon 0.01:
    registry, `adakv_expected_attention_e2`."""
    from kvpress import AdaKVPress, ExpectedAttentionPress

    return AdaKVPress(ExpectedAttentionPress(compression_ratio=ratio(reduction), epsilon=1e-2))


@method("CriticalAdaKV")
def critical_adakv(reduction: float) -> Any:
    """Feng et al., arXiv 2502.03805, over AdaKV and SnapKV: registry, `critical_adakv_snapkv`."""
    from kvpress import CriticalAdaKVPress, SnapKVPress

    return CriticalAdaKVPress(SnapKVPress(compression_ratio=ratio(reduction)))


@method("KeyDiff")
def keydiff(reduction: float) -> Any:
    """Park et al., arXiv 2504.15364. Block by block as in the paper, blocks of 128: registry, `block_keydiff`."""
    from kvpress import BlockPress, KeyDiffPress

    return BlockPress(KeyDiffPress(compression_ratio=ratio(reduction)), block_size=128)


@method("LagKV")
def lagkv(reduction: float) -> Any:
    """Liang et al., arXiv 2504.04704. 4 sinks, lag 128 (kvpress' defaults); contexts below 260 tokens keep their newest
    tokens."""
    from kvpress import LagKVPress

    return LagKVPress(compression_ratio=ratio(reduction), n_sink=4, lag_size=128)


@method("Compactor")
def compactor(reduction: float) -> Any:
    """Chari and Van Durme, arXiv 2507.08143. kvpress' defaults, as its docstring recommends. Its sketch is random."""
    from kvpress import CompactorPress

    return CompactorPress(compression_ratio=ratio(reduction))


@method("KVzip")
def kvzip(reduction: float) -> Any:
    """Kim et al., arXiv 2505.23416. The model repeats the context; one budget for all layers and heads (its defaults).
    kvpress takes it for granted that a context starts as the chat template does, and scores nothing of that part; for
    a context that starts otherwise everything is scored."""
    from kvpress import KVzipPress

    class AnyContext(KVzipPress):  # type: ignore[misc]
        def prepare(self, model: Any, tokenizer: Any, *rest: Any) -> Any:
            start = opening(tokenizer)
            if self._context_ids[0, : len(start)].tolist() != start:
                self.prefix_length = 0
            return super().prepare(model, tokenizer, *rest)

    return AnyContext(compression_ratio=ratio(reduction))


@method("LLMLingua")
def llmlingua(reduction: float) -> PromptCompressor:
    """Jiang et al., arXiv 2310.05736, package llmlingua 0.2.2 with the benchmark's own model as its compressor, token
    level (its defaults). Its iterations of 200 tokens are stretched to fit the text: what is left after the last whole
    one it would not compress. The opening of the chat template stays whole, as its `instruction`."""
    return PromptCompressor(reduction)


class PromptCompressor:
    """Makes the text shorter, so that its full cache is as small as others make theirs."""

    ITERATION = 200
    TRIES = 4
    """LLMLingua misses the length that it is asked for; asking again with what it missed by helps."""

    def __init__(self, reduction: float) -> None:
        self.reduction = reduction

    def shorten(self, model: Any, tokenizer: Any, context: list[int]) -> list[int]:
        """About 1 / reduction of the context's tokens, what came closest of a few tries."""
        start = opening(tokenizer)
        head = start if context[: len(start)] == start else []
        text = tokenizer.decode(context[len(head) :], clean_up_tokenization_spaces=False)
        budget = max(1, round(len(context) / self.reduction) - len(head))
        compressor = _compressor(model, tokenizer)
        length = len(tokenizer.encode(text, add_special_tokens=False))
        step = length // max(1, round(length / self.ITERATION))
        best: list[int] = []
        target = float(budget)
        for _ in range(self.TRIES):
            made = compressor.compress_prompt([text], target_token=target, iterative_size=step)
            said = made["compressed_prompt"]
            found = tokenizer.encode(said, add_special_tokens=False)
            if not best or abs(len(found) - budget) < abs(len(best) - budget):
                best = found
            if not found or abs(len(found) - budget) <= 0.01 * budget:
                break
            target *= budget / len(found)
        return head + best


def opening(tokenizer: Any) -> list[int]:
    """The tokens that the chat template puts before a user's message; none without a template."""
    if not tokenizer.chat_template:
        return []
    mark = "\u2402text\u2403"
    said = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    return list(tokenizer.encode(said.partition(mark)[0], add_special_tokens=False))


def _compressor(model: Any, tokenizer: Any) -> Any:
    """LLMLingua's compressor around a model that is loaded already."""
    import tiktoken
    from llmlingua import PromptCompressor as Compressor

    class Loaded(Compressor):  # type: ignore[misc]
        def load_model(self, *_: Any, **__: Any) -> None:
            self.model, self.tokenizer, self.device = _LegacyCaches(model), tokenizer, "cpu"
            self.context_idxs: list[Any] = []
            self.max_position_embeddings = model.config.max_position_embeddings

    # Only its report of what was saved uses GPT's tokenizer, which would be downloaded.
    with patch.object(tiktoken, "encoding_for_model", return_value=tokenizer):
        return Loaded()


class _LegacyCaches:
    """A model that takes and returns caches as LLMLingua 0.2.2 cuts them: a list of [keys, values]."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, ids: Any, *, attention_mask: Any, past_key_values: Any, use_cache: bool) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        for number, (keys, values) in enumerate(past_key_values or ()):
            cache.update(keys, values, number)
        out = self.model(ids, attention_mask=attention_mask, past_key_values=cache, use_cache=use_cache)
        out.past_key_values = [[layer.keys, layer.values] for layer in cache.layers]
        return out
