"""How many conversations a machine holds, and what that costs: pure formulas, each in whole bytes, cells and machines.

`report/calculator.js` has the same formulas under the same names, and a test holds the two to each other; what they
mean and leave out is in docs/capacity.md. "Full" is the full cache, "anchored" a session that keeps anchors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from anchorkv.config import AnchorConfig
from anchorkv.errors import ConfigError
from anchorkv.poc.results import CapacityRow, Part

KvType = Literal["f32", "f16", "q8_0", "q4_0"]
WeightType = Literal["f32", "f16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0"]
BLOCKS: dict[str, tuple[int, int]] = {
    "f32": (4, 1), "f16": (2, 1), "q8_0": (34, 32), "q6_k": (210, 256), "q5_k": (176, 256), "q4_k": (144, 256),
    "q4_0": (18, 32),
}
"""Type -> (bytes, numbers) of a block: q8_0 and q4_0 store 32 numbers with an f16 scale. bf16 is as large as f16."""
REDUCTION = 12.0
"""Where nothing was measured: what the default policy aims at."""
_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(|b|[kmgt](?:i?b)?)\s*", re.IGNORECASE)


def nbytes(text: str | int) -> int:
    """Bytes of "24GB", "24 GiB", "512M" or a plain number. Units are powers of two, as memory is sold: 24GB is 24 GiB.

    Raises ConfigError for anything else.
    """
    found = _SIZE.fullmatch(str(text))
    if not found:
        raise ConfigError(f"{text!r} is no size; write it as 24GB, 512MB or a number of bytes.")
    return round(float(found[1]) * _UNITS[found[2].lower()[:1]])


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Raises ConfigError, one sentence, for values that are out of range."""
    try:
        yield
    except ValidationError as error:
        said = []
        for problem in error.errors():
            where, message = ".".join(map(str, problem["loc"])), problem["msg"].removeprefix("Value error, ")
            said.append(f"{where}: {message} (got {problem['input']!r})" if where else message)
        raise ConfigError(f"Invalid {what}: {'; '.join(said)}.") from None


class ModelShape(Part):
    """What a model's cache and weights take, from its configuration. `layers` are those that keep keys and values."""

    name: str
    layers: int = Field(ge=1, le=10_000)
    kv_heads: int = Field(0, ge=0, le=100_000, description="key-value heads of a layer")
    head_dim: int = Field(0, ge=0, le=100_000, description="numbers of one head's key; its value has as many")
    window: int = Field(0, ge=0, description="tokens that the model was trained for at once; 0: unknown")
    parameters: int = Field(0, ge=0, le=2**50)
    weight_bytes: int = Field(0, ge=0, le=2**52, description="where the file is known; 0: from `parameters`")
    sliding_layers: int = Field(0, ge=0, description="layers that only look back `sliding_window` tokens")
    sliding_window: int = Field(0, ge=0)
    numbers: int = Field(0, ge=0, le=2**40, description="of a token's cell, where layers differ")
    hybrid: bool = Field(False, description="it also has layers without keys and values; their state is not counted")
    source: str = Field("", description="where the shape was read")

    def __init__(self, **fields: Any) -> None:
        with _told("model shape"):
            super().__init__(**fields)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.cell_numbers:
            raise ValueError(f"{self.name} has no keys and values; give kv_heads and head_dim")
        if self.sliding_layers > self.layers or bool(self.sliding_layers) != bool(self.sliding_window):
            raise ValueError(f"{self.name}: sliding_layers needs a sliding_window and at most {self.layers} layers")
        if not (self.weight_bytes or self.parameters):
            raise ValueError(f"how large the weights of {self.name} are is not known; give their size, as in 16GB")
        return self

    @property
    def cell_numbers(self) -> int:
        """Numbers that one token's keys and values have in all layers."""
        return self.numbers or 2 * self.layers * self.kv_heads * self.head_dim

    def notes(self, context: int) -> tuple[str, ...]:
        """What the figures leave out: keys of the report's words, under `calculator.note`."""
        found = {
            "sliding": self.sliding_layers > 0, "hybrid": self.hybrid, "window": 0 < self.window < context,
        }
        return tuple(name for name, holds in found.items() if holds)


class CapacityInputs(Part):
    """Every assumption behind the rows. Sizes may be written as "24GB"."""

    machine: str = Field("", description="what the machine is called in the report")
    memory: int = Field(24 * 2**30, ge=1, le=2**52, description="bytes of one machine, all its GPUs together")
    reserve: float = Field(0.1, ge=0, lt=1, description="share of the memory kept free for buffers and the system")
    weights: WeightType = Field("f16", description="how the weights are stored, where no file says it")
    kv_type: KvType = Field("f16", description="how keys and values are stored")
    context: int = Field(8192, ge=1, le=10**8, description="tokens of one conversation with its documents")
    users: int = Field(50, ge=1, le=10**9, description="conversations that are live at the same time")
    price: float = Field(0.0, ge=0, le=1e12, description="of one machine a month; 0: not given")
    currency: str = Field("USD", pattern="^[A-Z]{3}$", description="ISO 4217")
    reduction: float | None = Field(None, ge=1, description="full cells per cell kept, without recall; None: measured")
    sinks: int = Field(4, ge=0, le=10**8)
    recent_window: int = Field(1, ge=0, le=2**31, description="newest whole segments before the current one")
    segment: int = Field(64, ge=1, le=10**6, description="most tokens of a segment, added anchors included")
    recall_cells: int = Field(256, ge=0, le=10**8, description="cells that recalled segments may hold at once")
    reading_cells: int = Field(0, ge=0, le=10**8, description="tokens read in one forward: 0 on llama.cpp, which reads "
                               "by segments; the batch on PyTorch (128 on a CPU, 512 on a GPU)")
    cell_budget: int | None = Field(None, ge=1, description="most cells kept, recall apart; None: no limit")
    models: tuple[str, ...] = Field(
        ("Llama-2-7B", "Llama-3-8B", "Llama-3-70B"), description="models beside one's own: names, folders, GGUF files"
    )

    def __init__(self, **fields: Any) -> None:
        with _told("capacity inputs"):
            super().__init__(**fields)

    @field_validator("memory", mode="before")
    @classmethod
    def _size(cls, value: Any) -> Any:
        try:
            return nbytes(value) if isinstance(value, str) else value
        except ConfigError as error:
            raise ValueError(str(error).removesuffix(".")) from None

    def of_policy(self, policy: AnchorConfig, window: int) -> CapacityInputs:
        """The same with what `policy` keeps of a model of `window` tokens; its budget only where it is a number."""
        added = policy.ac_tokens if "AC" in policy.anchors else 0
        budget = policy.cell_budget if isinstance(policy.cell_budget, int) else None
        return CapacityInputs(**{
            **self.model_dump(), "sinks": policy.sinks, "recent_window": policy.recent_window, "cell_budget": budget,
            "segment": policy.max_segment + added, "recall_cells": policy.recall_cells if policy.recall != "off" else 0,
        })


# --- cells of one session ------------------------------------------------------------------------------------------


def held_cells(inputs: CapacityInputs, reduction: float) -> int:
    """Cells that an anchored session holds between questions, at most: sinks, the recent window, the current segment,
    and one cell in `reduction` of the whole context. Never more than the context has tokens."""
    whole = inputs.sinks + (inputs.recent_window + 1) * inputs.segment
    held = min(inputs.context, whole + math.ceil(inputs.context / reduction))
    return held if inputs.cell_budget is None else min(held, inputs.cell_budget)


def peak_cells(inputs: CapacityInputs, reduction: float) -> int:
    """Cells that it holds at its peak: recalled segments while it answers, or the forward's tokens while it reads."""
    return min(inputs.context, held_cells(inputs, reduction) + max(inputs.recall_cells, inputs.reading_cells))


# --- bytes ---------------------------------------------------------------------------------------------------------


def kv_bytes(shape: ModelShape, cells: int, kv_type: str) -> int:
    """Bytes of `cells` cells, rounded up: 2 (keys, values) x layers x kv_heads x head_dim x bytes a number, each. The
    engines hold a kept cell in every layer, sliding ones too."""
    size, numbers = BLOCKS[kv_type]
    return -(-shape.cell_numbers * cells * size // numbers)


def full_bytes(shape: ModelShape, context: int, kv_type: str) -> int:
    """Bytes of a full cache of `context` tokens, rounded up. Of a sliding layer only its window counts: other software
    frees what lies before it."""
    size, numbers = BLOCKS[kv_type]
    sliding = shape.sliding_layers
    in_layers = (shape.layers - sliding) * context + sliding * min(context, shape.sliding_window)
    return -(-shape.cell_numbers * in_layers * size // (numbers * shape.layers))


def weight_bytes(shape: ModelShape, weights: str) -> int:
    """Bytes of the weights: the file's where it is known, else parameters x bytes a number, rounded up."""
    size, numbers = BLOCKS[weights]
    return shape.weight_bytes or -(-shape.parameters * size // numbers)


def cache_bytes(memory: int, reserve: float, weights: int) -> int:
    """Bytes of a machine left for caches: its memory without the reserve and the weights; 0 if they do not fit."""
    return max(0, math.floor(memory * (1 - reserve)) - weights)


# --- sessions, machines, money -------------------------------------------------------------------------------------


def sessions(cache: int, session: int) -> int:
    """Live sessions of `session` bytes each that `cache` bytes hold."""
    return cache // session


def machines(users: int, each: int) -> int:
    """Machines for `users` live sessions at `each` a machine. 0: none will do, for not one session fits."""
    return -(-users // each) if each else 0


def row(inputs: CapacityInputs, shape: ModelShape, reduction: float) -> CapacityRow:
    """One model on the machine. 0 sessions: the model or one cache does not fit, and no machines are counted."""
    cache = cache_bytes(inputs.memory, inputs.reserve, weight_bytes(shape, inputs.weights))
    full = full_bytes(shape, inputs.context, inputs.kv_type)
    anchored = kv_bytes(shape, peak_cells(inputs, reduction), inputs.kv_type)
    sessions_full, sessions_anchored = sessions(cache, full), sessions(cache, anchored)
    machines_full, machines_anchored = machines(inputs.users, sessions_full), machines(inputs.users, sessions_anchored)
    return CapacityRow(
        model=shape.name, kv_bytes_token=kv_bytes(shape, 1, inputs.kv_type), full_bytes_session=full,
        anchored_bytes_session=anchored, sessions_full=sessions_full, sessions_anchored=sessions_anchored,
        machines_full=machines_full, machines_anchored=machines_anchored, cost_full=machines_full * inputs.price,
        cost_anchored=machines_anchored * inputs.price,
    )


def saving(row: CapacityRow) -> float | None:
    """Money a month that anchors save; None where one side fits on no machine, so that nothing can be compared."""
    return row.cost_full - row.cost_anchored if row.machines_full and row.machines_anchored else None


def rows(
    inputs: CapacityInputs, shapes: Sequence[ModelShape], reduction: float | None = None
) -> tuple[CapacityRow, ...]:
    """One row a model. reduction: as measured, recall not counted, for recalled cells are added here; what `inputs`
    say of it goes first, and REDUCTION is taken where neither says anything."""
    return tuple(row(inputs, shape, chosen_reduction(inputs, reduction)) for shape in shapes)


def chosen_reduction(inputs: CapacityInputs, measured: float | None = None) -> float:
    """The reduction that `rows` takes. One below 1, of a policy that adds more than it drops, counts as 1."""
    return max(1.0, inputs.reduction or measured or REDUCTION)
