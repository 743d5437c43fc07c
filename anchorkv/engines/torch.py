"""The reference engine: any decoder-only transformers (>= 5) model with attention layers, on CPU or CUDA.

It uses the library's own extension points: a `Cache` (see torch_cache), explicit `position_ids`, and 4-D masks, one
for each type of attention layer. Positions are the tokens' original indices, whatever was dropped in between.

Models whose layers have a sliding window (Mistral, Gemma 3 …) hold the rule *and* their window: a token sees what both
allow, by true positions. An anchor older than the window is therefore invisible to the sliding layers, as it would be
with a full cache; full-attention layers see it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from anchorkv.engines.base import Bools, Floats, Ints, ModelInfo, Output, Tokenizer
from anchorkv.engines.torch_attention import watched
from anchorkv.engines.torch_cache import CellCache, CellRows
from anchorkv.engines.torch_memory import TorchMemory, floats, from_numpy, out_of_memory
from anchorkv.engines.torch_model import (
    DTYPES,
    FULL,
    cache_argument,
    check_arguments,
    fingerprint,
    layer_kinds,
    rope_types,
)
from anchorkv.errors import ModelError, SavedStateError

BATCH, GPU_BATCH = 128, 512
"""Tokens of a forward: what is read together is held together, and on a CPU more than 128 gain nothing."""


class TorchEngine:
    """A transformers model and its tokenizer, behind the protocol `anchorkv.engines.base.Engine`.

    On construction a few tokens are run two ways, to make sure that this model obeys 4-D masks and explicit
    positions. Raises ModelError when it does not, or is not a decoder-only attention model.
    """

    name = "torch"
    masks = True

    def __init__(
        self, model: Any, tokenizer: Tokenizer, *, name: str = "", batch: int | None = None
    ) -> None:
        """batch: tokens of a forward; None takes BATCH on a CPU, GPU_BATCH elsewhere."""
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.config = self.model.config.get_text_config(decoder=True)
        self.device = next(model.parameters()).device
        self.batch = batch or (BATCH if self.device.type == "cpu" else GPU_BATCH)
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.kinds = layer_kinds(self.config)
        self.sliding_window = int(getattr(self.config, "sliding_window", None) or 0)
        self._accepted = check_arguments(self.model)
        self._mask_of = self._masks()
        # Positions decide these frequencies for a whole batch: rows of different length must not share one.
        self._rows_apart = rope_types(self.config) & {"dynamic", "longrope"} != set()
        self._rows: CellRows | None = None
        self._check_rule()
        self.info = self._describe(name)
        self.threads = torch.get_num_threads()

    @classmethod
    def load(
        cls, spec: str | Path, *, device: str | None = None, dtype: str | None = None,
        adapter: str | Path | None = None, batch: int | None = None, threads: int | None = None,
    ) -> TorchEngine:
        """Load a hub id, a local folder or a GGUF file; see `anchorkv.engines.torch_load.load`.

        threads: CPU threads, for PyTorch as a whole; None leaves them as they are.
        """
        from anchorkv.engines.torch_load import load

        if threads is not None:
            torch.set_num_threads(threads)
        model, tokenizer, name = load(spec, device=device, dtype=dtype, adapter=adapter)
        return cls(model, tokenizer, name=name, batch=batch)

    # --- memories ----------------------------------------------------------------------------------------------

    def open(self) -> TorchMemory:
        """An empty memory."""
        return TorchMemory(self, CellCache(self.config.num_hidden_layers))

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> TorchMemory:
        """The memory that `TorchMemory.state` described. Raises SavedStateError when it does not fit this model."""
        try:
            positions = np.asarray(state["positions"], dtype=np.int64)
            weights = np.asarray(state["dtype"], dtype=np.uint8).tobytes().decode()
            if positions.ndim != 1 or (np.diff(positions) <= 0).any():
                raise ValueError("its positions are not ascending")
            if weights != self.info.weights:
                raise ValueError(f"its cells are {weights}, this model computes in {self.info.weights}")
            memory = self.open()
            for number, layer in enumerate(memory.cells.layers if len(positions) else []):
                pair = []
                for name, shape in zip(("keys", "values"), self._shapes[number], strict=True):
                    array = state[f"{name}.{number}"]
                    if array.shape != (shape[0], len(positions), shape[1]):
                        raise ValueError(f"{name} of layer {number + 1} have shape {array.shape}")
                    pair.append(from_numpy(array, self.dtype).to(self.device)[None])
                layer.update(*pair)
            memory.cells.commit(0, len(positions))
            memory.cells.held = positions
            if "ahead.logits" in state:
                ahead = np.asarray(state["ahead.logits"], dtype=np.float32)
                if ahead.shape != (self.info.vocabulary,):
                    raise ValueError(f"its logits have shape {ahead.shape}")
                memory.ahead = (int(state["ahead.position"]), torch.from_numpy(ahead).to(self.device))
        except KeyError as error:
            raise SavedStateError(f"The saved cells are incomplete: {error.args[0]} is missing.") from None
        except (ValueError, TypeError) as error:
            raise SavedStateError(f"The saved cells do not fit this model: {error}.") from None
        return memory

    def decode_together(self, steps: Sequence[tuple[Any, int, int]], parts: int = 1) -> list[Output]:
        """One token (memory, token, position) for each of several memories, in one padded forward; `parts` is of no
        account, as PyTorch's threads serve the whole process.

        The memories move into one shared batch and stay there, so that nothing is copied while the same ones step on
        together. Raises ValueError when a memory is named twice, CapacityError when there is no room for the batch.
        """
        memories: list[TorchMemory] = [memory for memory, _, _ in steps]
        if len({id(memory) for memory in memories}) < len(memories):
            raise ValueError("a memory can take one token a step")
        if len(steps) == 1 or self._rows_apart or not all(len(memory.cells.held) for memory in memories):
            return [memory.decode([token], position) for memory, token, position in steps]
        with out_of_memory():
            caches = [memory.cells for memory in memories]
            if self._rows is None or not self._rows.fits(caches):
                self._rows = None  # let go of the old batch before the new one is allocated
                self._rows = CellRows(caches)
            width = self._rows.prepare()
            queries = np.array([[position] for _, _, position in steps])
            keys = np.zeros((len(steps), width), dtype=np.int64)
            seen = np.zeros((len(steps), 1, width), dtype=bool)
            for r, cache in enumerate(caches):
                held = len(cache.held)
                keys[r, :held], keys[r, held] = cache.held, queries[r, 0]
                seen[r, 0, :held] = cache.held < queries[r, 0]
                seen[r, 0, held] = True
            out = self.forward([[token] for _, token, _ in steps], queries, keys, seen, self._rows, logits=1)
            numbers = floats(out[:, -1])
        for r, (memory, _, position) in enumerate(steps):
            memory.cells.commit(position, 1)
            memory.look_ahead(position + 1, out[r, -1].clone())
        return [Output(logits=row) for row in numbers]

    def attention(self, memory: Any, tokens: Sequence[int], start: int, mask: Bools, rows: int) -> Floats:
        """As `anchorkv.engines.base.ShowsAttention` says. A forward holds nothing until it is committed, and this one
        is not."""
        cells: CellCache = memory.cells
        queries = np.arange(start, start + len(tokens))
        keys = np.concatenate([cells.held, queries])
        with out_of_memory(), watched(self.model, rows) as shares:
            self.forward([list(tokens)], queries[None], keys[None], mask[None], cells, logits=0)
        if shares.total is None or shares.layers != self.config.num_hidden_layers:
            raise ModelError(f"{self._what} does not tell where its attention goes.")
        return floats(shares.total / shares.layers)

    def close(self) -> None:
        """Let go of the model and its batch."""
        self._rows = None
        self.model = None

    # --- one forward -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(
        self, tokens: Sequence[Sequence[int]], queries: Ints, keys: Ints, seen: Bools, cache: CellCache | CellRows,
        *, logits: int = 1,
    ) -> torch.Tensor:
        """Run tokens [rows, n] at positions `queries` [rows, n] over keys at positions `keys` [rows, k].

        seen: [rows, n, k], what the rule allows; sliding windows are added here.
        logits: for how many of the last tokens; 0 leaves the output matrix out.
        Returns logits [rows, logits, vocabulary].
        """
        arguments = {
            "input_ids": torch.tensor(tokens, device=self.device),
            "position_ids": torch.from_numpy(queries).to(self.device),
            "attention_mask": self._attention_mask(queries, keys, seen),
            cache_argument(self._accepted): cache,
            "use_cache": True,
        }
        if not logits:
            self.model.base_model(**arguments)
            return torch.empty(len(tokens), 0)
        if "logits_to_keep" in self._accepted:
            arguments["logits_to_keep"] = logits
        out: torch.Tensor = self.model(**arguments).logits[:, -logits:]
        return out

    def _attention_mask(self, queries: Ints, keys: Ints, seen: Bools) -> Any:
        """What the model takes as `attention_mask`: None where that means the same and is faster."""
        needed = {
            kind: seen if kind == FULL else seen & (queries[:, :, None] - keys[:, None, :] < self.sliding_window)
            for kind in set(self.kinds)
        }
        n = queries.shape[1]
        if len(needed) == 1:
            (kind, mask), = needed.items()
            # The library would count a sliding window in rows, not in positions: it is always given the mask.
            return None if kind == FULL and _is_causal(mask, n) else self._mask_of(mask)
        return {
            kind: None if self._sdpa and _is_causal(mask, n) else self._mask_of(mask) for kind, mask in needed.items()
        }

    def _masks(self) -> Callable[[Bools], torch.Tensor]:
        """How the model's attention wants a mask: booleans [rows, 1, n, k] for sdpa, added to the scores for eager."""
        softcapped = getattr(self.config, "attn_logit_softcapping", None)
        wanted = "eager" if softcapped or not getattr(self.model, "_supports_sdpa", True) else "sdpa"
        if self.config._attn_implementation != wanted:
            self.model.set_attn_implementation(wanted)
        self._sdpa = wanted == "sdpa"
        least = torch.finfo(self.dtype).min

        def booleans(mask: Bools) -> torch.Tensor:
            return torch.from_numpy(mask)[:, None].to(self.device)

        def additive(mask: Bools) -> torch.Tensor:
            allowed = booleans(mask)
            return torch.zeros(allowed.shape, dtype=self.dtype, device=self.device).masked_fill(~allowed, least)

        return booleans if self._sdpa else additive

    # --- what the model is -------------------------------------------------------------------------------------

    def _check_rule(self) -> None:
        """Forget two of five tokens and see whether the rest is as if they had never been there."""
        tokens = [1, 2, 3, 4, 5]
        mask = np.tri(4, dtype=bool)
        mask[3, 1:3] = False
        apart = np.array([[0, 3, 4]])
        kept = [tokens[i] for i in apart[0]]
        try:
            memory = self.open()
            self.info = ModelInfo("", "", 0, 0, 0, 0, 0, 0, 0, "")
            memory.decode(tokens[:4], 0, mask=mask, logits=False)
            memory.drop(np.array([1, 2]))
            got = memory.decode(tokens[4:], 4).logits
            cells = CellCache(self.config.num_hidden_layers)
            out = self.forward([kept], apart, apart, np.tri(3, dtype=bool)[None], cells)
            wanted = floats(out[0, -1])
            self._shapes = [tuple((t.shape[1], t.shape[3]) for t in layer.held()) for layer in memory.cells.layers]
        except ModelError:
            raise ModelError(f"{self._what} has layers without attention cells, so nothing can be anchored.") from None
        except Exception as error:  # whatever a model's code may raise
            raise ModelError(f"{self._what} cannot be run with our own mask and positions: {_line(error)}.") from None
        off = float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-6))
        if not off < (1e-3 if self.dtype == torch.float32 else 0.1):
            raise ModelError(f"{self._what} does not follow masks and positions of our own, so it cannot be anchored.")
        self._cell_bytes = memory.nbytes() // 3

    @property
    def _what(self) -> str:
        return f"The model ({type(self.model).__name__})"

    def _describe(self, name: str) -> ModelInfo:
        config, (heads, dim) = self.config, self._shapes[0][0]
        return ModelInfo(
            name=name or config._name_or_path or config.model_type, architecture=config.model_type,
            layers=config.num_hidden_layers, kv_heads=heads, head_dim=dim, hidden_size=config.hidden_size,
            vocabulary=self.model.get_output_embeddings().weight.shape[0],
            window=int(getattr(config, "max_position_embeddings", 0) or 0), cell_bytes=self._cell_bytes,
            fingerprint=fingerprint(self.model),
            weights=next((key for key, value in DTYPES.items() if value == self.dtype), str(self.dtype)),
        )


def _is_causal(mask: Bools, n: int) -> bool:
    """Whether [rows, n, k] is what attention does unasked: one token sees everything, a first text itself, causally."""
    if n == 1:
        return bool(mask.all())
    return mask.shape[1] == mask.shape[2] and bool((mask == np.tri(n, dtype=bool)).all())


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
