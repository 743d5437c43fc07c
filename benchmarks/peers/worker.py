"""Runs other methods' jobs in their own environment: JSON lines in, one JSON line out for each.

    python worker.py MODEL.gguf [--threads N]

{"id", "kind": "continuation", "method", "reduction", "context": [ids], "continuation": [ids]}
    reads `context`, compressed to 1/reduction of its cells, then `continuation`: "losses", -log p of each token.
{"id", "kind": "generate", "method", "reduction", "context", "question": [ids], "gold": [ids], "max_tokens": n,
 "stop": [ids]}
    reads `question` after it, uncompressed, and answers greedily: "tokens", without the one that stopped it, and
    "answer_loss", the mean -log p of the tokens of `gold`, had they been the answer.

Every answer has the job's "id" and
    "kept_cells": cells after `context`, the mean over layers and KV heads, counted in the cache's own tensors,
    "kv_bytes": those cells as if they were stored in f16,
    "end_cells": the same when everything has been read (for "continuation"),
    "prefill_seconds": of reading and compressing, "decode_seconds" of what was read after it (for "generate" of the
    answer's own tokens, one at a time), "decode_tokens": how many those were,
or "error", one sentence. What follows a context has its original positions, as in kvpress' pipeline.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import methods
import torch
from torch import Tensor

F16 = 2
"""Bytes of a value, as llama.cpp stores it."""


class JobError(ValueError):
    """A job that asks for something that does not exist."""


@dataclass
class Context:
    """What was read and compressed."""

    cache: Any
    masked: list[Tensor | None]
    """For each layer [KV heads, cells]: True where a press that only masks has dropped a cell; None without any."""
    logits: Tensor
    """[vocabulary], of the last token."""
    position: int
    """Of the next token."""
    seconds: float

    def kept_cells(self) -> float:
        heads: int = sum(layer.keys.shape[1] for layer in self.cache.layers)
        return sum(self._cells()) / heads

    def kv_bytes(self) -> int:
        widths = (layer.keys.shape[3] + layer.values.shape[3] for layer in self.cache.layers)
        return sum(cells * width * F16 for cells, width in zip(self._cells(), widths, strict=True))

    def _cells(self) -> list[int]:
        """Of each layer, over its KV heads."""
        return [
            layer.keys.shape[1] * layer.keys.shape[2] - (0 if masked is None else int(masked.sum()))
            for layer, masked in zip(self.cache.layers, self.masked, strict=True)
        ]


def prefill(model: Any, tokenizer: Any, compress: Any, ids: Sequence[int]) -> Context:
    """compress: what a factory of `methods` made."""
    from transformers import DynamicCache

    attentions = [layer.self_attn for layer in model.model.layers]
    for attention in attentions:
        attention.masked_key_indices = None
    read, cache, started = list(ids), DynamicCache(), time.perf_counter()
    if isinstance(compress, methods.PromptCompressor):
        read = compress.shorten(model, tokenizer, read)
        compress = None
    with compress(model) if compress is not None else nullcontext():
        if compress is not None:  # what a press prepares once, such as loading a tokenizer, is not reading
            started = time.perf_counter()
        # By name: KVzip looks for these two.
        out = model.model(input_ids=torch.tensor([read]), past_key_values=cache)
    logits = model.lm_head(out.last_hidden_state[0, -1]).float()
    seconds = time.perf_counter() - started
    masked = []
    for attention, layer in zip(attentions, cache.layers, strict=True):
        masked.append(_masked(attention.masked_key_indices, layer.keys))
        # `read` below masks exactly. kvpress looks for a key that no query likes: with many queries there may be none.
        attention.masked_key_indices = None
    return Context(cache, masked, logits, len(read), seconds)


def _masked(indices: tuple[Tensor, Tensor, Tensor] | None, keys: Tensor) -> Tensor | None:
    """kvpress' (batch, head, cell) triples as [KV heads, cells]."""
    if indices is None:
        return None
    masked = torch.zeros(keys.shape[1:3], dtype=torch.bool)
    masked[indices[1], indices[2]] = True
    return masked


def read(model: Any, context: Context, ids: Sequence[int]) -> Tensor:
    """Logits [len(ids), vocabulary] of tokens that follow; they stay in the cache, whole."""
    positions = torch.arange(context.position, context.position + len(ids))[None]
    with _visible(model, context):
        out = model(input_ids=torch.tensor([list(ids)]), past_key_values=context.cache, position_ids=positions)
    context.position += len(ids)
    logits: Tensor = out.logits[0].float()
    return logits


@contextmanager
def _visible(model: Any, context: Context) -> Iterator[None]:
    """Each layer's own mask: layers may hold different numbers of cells, and heads different ones."""
    hooks = []
    for number, layer in enumerate(model.model.layers):

        def look(module: Any, args: Any, kwargs: Any, number: int = number) -> Any:
            past, new = context.cache.layers[number].keys.shape[2], kwargs["hidden_states"].shape[1]
            mask = _mask(context.masked[number], past, new, module.num_key_value_groups)
            return args, {**kwargs, "attention_mask": mask}

        hooks.append(layer.self_attn.register_forward_pre_hook(look, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _mask(masked: Tensor | None, past: int, new: int, groups: int) -> Tensor | None:
    """[1, 1 or heads, new, past + new], True where a query sees a cell; None where it sees everything."""
    if masked is None and new == 1:
        return None
    sees = torch.ones(new, past + new, dtype=torch.bool).tril(past)[None, None]
    if masked is None:
        return sees
    hidden = torch.nn.functional.pad(masked, (0, past + new - masked.shape[1]))
    return sees & ~hidden.repeat_interleave(groups, dim=0)[None, :, None]


def continuation(model: Any, context: Context, job: dict[str, Any]) -> dict[str, Any]:
    ids = job["continuation"]
    started = time.perf_counter()
    rows = [context.logits[None]]
    if len(ids) > 1:
        rows.append(read(model, context, ids[:-1]))
    seconds = time.perf_counter() - started
    losses = torch.nn.functional.cross_entropy(torch.cat(rows), torch.tensor(ids), reduction="none").tolist()
    if not all(math.isfinite(loss) for loss in losses):
        raise JobError("A loss is no finite number.")
    return {
        "losses": losses, "end_cells": context.kept_cells(), "decode_seconds": seconds, "decode_tokens": len(ids) - 1,
    }


def forget(context: Context, count: int) -> None:
    """The last `count` tokens were never read."""
    for layer in context.cache.layers if count else ():
        layer.keys, layer.values = layer.keys[:, :, :-count], layer.values[:, :, :-count]
    context.position -= count


def generate(model: Any, context: Context, job: dict[str, Any]) -> dict[str, Any]:
    logits, gold = read(model, context, job["question"])[-1] if job["question"] else context.logits, job["gold"]
    rows = torch.cat([logits[None], *([read(model, context, gold[:-1])] if len(gold) > 1 else [])])
    forget(context, len(gold) - 1)
    loss = torch.nn.functional.cross_entropy(rows, torch.tensor(gold)).item()
    stop, tokens = set(job["stop"]), [int(logits.argmax())]
    started, steps = time.perf_counter(), 0
    while tokens[-1] not in stop and len(tokens) < job["max_tokens"]:
        tokens.append(int(read(model, context, tokens[-1:])[-1].argmax()))
        steps += 1
    seconds = time.perf_counter() - started
    return {
        "tokens": tokens[:-1] if tokens[-1] in stop else tokens, "answer_loss": loss, "decode_seconds": seconds,
        "decode_tokens": steps,
    }


KINDS = {"continuation": (continuation, ("context", "continuation")), "generate": (generate, ("context", "gold"))}
"""What does a job of a kind, and which of its lists must not be empty."""
LISTS = {"continuation": ("context", "continuation"), "generate": ("context", "question", "gold", "stop")}


def check(job: Any, vocabulary: int) -> None:
    """Raises JobError for what is no job."""
    if not isinstance(job, dict):
        raise JobError("A job is a JSON object.")
    kind, name, reduction = job.get("kind"), job.get("method"), job.get("reduction")
    if not isinstance(kind, str) or kind not in KINDS:
        raise JobError(f"There is no kind of job {kind!r}; use {' or '.join(KINDS)}.")
    if not isinstance(name, str) or name not in methods.METHODS:
        raise JobError(f"There is no method {name!r}; use one of {', '.join(methods.METHODS)}.")
    if isinstance(reduction, bool) or not isinstance(reduction, int | float) or not 1 <= reduction < math.inf:
        raise JobError("A job's reduction is a number from 1 on.")
    for field in LISTS[kind]:
        ids = job.get(field)
        if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < vocabulary for token in ids):
            raise JobError(f"A job's {field} is a list of the model's token ids.")
        if not ids and field in KINDS[kind][1]:
            raise JobError(f"A job's {field} is empty.")
    if kind == "generate" and (type(job.get("max_tokens")) is not int or job["max_tokens"] < 1):
        raise JobError("A job's max_tokens is a whole number from 1 on.")


@torch.no_grad()
def answer(line: str, model: Any, tokenizer: Any) -> dict[str, Any]:
    """What a line of input gets as its line of output; whatever a method raises becomes its "error"."""
    number = None
    try:
        job = json.loads(line)
        number = job.get("id") if isinstance(job, dict) else None
        check(job, model.config.vocab_size)
        context = prefill(model, tokenizer, methods.METHODS[job["method"]](job["reduction"]), job["context"])
        sizes = {"kept_cells": context.kept_cells(), "kv_bytes": context.kv_bytes()}
        found = KINDS[job["kind"]][0](model, context, job)
        return {"id": number, **sizes, "prefill_seconds": context.seconds, **found}
    except JobError as error:
        return {"id": number, "error": str(error)}
    except Exception as error:
        said = " ".join(str(error).split())
        return {"id": number, "error": f"{type(error).__name__}: {said}" if said else type(error).__name__}


def load(path: Path, tokenizer_folder: Path) -> tuple[Any, Any]:
    """Model (fp32) and tokenizer of a GGUF file. KVzip reads a tokenizer by name; it finds it in `tokenizer_folder`."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    # AutoTokenizer would make it a CodeLlama tokenizer with tokens of its own.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(tokenizer_folder)
    model.config.name_or_path = str(tokenizer_folder)
    return model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    # Libraries print; what they say must not come between the answers.
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load(options.model.resolve(), Path(folder))
        for line in sys.stdin:
            if line.strip():
                print(json.dumps(answer(line, model, tokenizer)), file=answers, flush=True)


if __name__ == "__main__":
    main()
