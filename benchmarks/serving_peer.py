"""The peer of benchmarks/serving.py: llama.cpp with its full cache, as its own server drives it.

Every slot is a stream of its own; each round decodes the next token of all slots that write and as much of the waiting
prompts as the batch takes; a slot keeps what it holds, and a longer conversation goes on from there. No HTTP is
between: lines of JSON come in and go out, so that the peer is measured at its best.

    {"id": 1, "slot": 0, "messages": [...], "write": 64}    ->    {"id": 1, "token": 5, "cached": 0, "read": 4012}
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
import numpy as np

import anchorkv

BATCHES = (128, 512)


@dataclass
class Slot:
    """One conversation: what its stream holds, what is still to be read, how much is still to be written."""

    number: int
    held: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    write: int = 0
    request: dict[str, Any] = field(default_factory=dict)
    cached: int = 0
    count: int = 0


class Peer:
    """One context of llama.cpp: `slots` streams of `cells` cells each."""

    def __init__(self, engine: Any, slots: int, cells: int, threads: int, flash: bool, batch: int) -> None:
        self.tokenizer, self.size, self.batch = engine.tokenizer, engine.info.vocabulary, batch
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = slots * cells, batch, batch
        params.n_seq_max, params.kv_unified = slots, False
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type, params.no_perf = int(flash), True
        self.context = llama_cpp.llama_init_from_model(engine._model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp could not allocate {slots} x {cells} cells.")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.rows = llama_cpp.llama_batch_init(batch, 0, 1)
        self.slots = [Slot(number) for number in range(slots)]
        self.cells = llama_cpp.llama_n_ctx(self.context)

    def take(self, request: dict[str, Any]) -> None:
        """A request for its slot, which goes on where the conversation is still the same."""
        slot = self.slots[request["slot"]]
        prompt = self.tokenizer.encode(self.tokenizer.chat(request["messages"]), special=True)
        same = next((i for i, (a, b) in enumerate(zip(slot.held, prompt, strict=False)) if a != b), None)
        same = min(len(slot.held), len(prompt) - 1) if same is None else same
        llama_cpp.llama_memory_seq_rm(self.memory, slot.number, same, -1)
        slot.held, slot.pending, slot.cached, slot.count = prompt[:same], prompt[same:], same, len(prompt)
        slot.write, slot.request = request["write"], request

    def round(self) -> list[tuple[Slot, int]]:
        """One decode: who wrote which token."""
        rows: list[tuple[Slot, int, bool]] = []
        for slot in sorted(self.slots, key=lambda slot: len(slot.pending)):  # those that write come first
            room = self.batch - len(rows)
            part, slot.pending = slot.pending[:room], slot.pending[room:]
            rows += [(slot, token, not slot.pending and i == len(part) - 1) for i, token in enumerate(part)]
        for at, (slot, token, wanted) in enumerate(rows):
            self.rows.token[at], self.rows.pos[at], self.rows.logits[at] = token, len(slot.held), wanted
            self.rows.n_seq_id[at], self.rows.seq_id[at][0] = 1, slot.number
            slot.held.append(token)
        self.rows.n_tokens = len(rows)
        if llama_cpp.llama_decode(self.context, self.rows):
            raise SystemExit("llama.cpp could not decode a batch.")
        wrote = []
        for at, (slot, _, wanted) in enumerate(rows):
            if wanted:
                logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, at), (self.size,))
                token = int(logits.argmax())
                slot.write -= 1
                slot.pending = [token] if slot.write else []
                wrote.append((slot, token))
        return wrote

    @property
    def busy(self) -> bool:
        return any(slot.pending for slot in self.slots)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.rows)
        llama_cpp.llama_free(self.context)


def decode_speed(peer: Peer, depth: int, steps: int = 6) -> float:
    """Tokens/s of all slots together, each holding `depth` tokens."""
    first = peer.slots[0]
    first.pending, first.write = (peer.tokenizer.encode("The mill stood by the river. ") * depth)[:depth], 1
    while peer.busy:
        peer.round()
    for slot in peer.slots:
        if slot is not first:
            llama_cpp.llama_memory_seq_cp(peer.memory, first.number, slot.number, -1, -1)
        slot.held, slot.pending, slot.write = list(first.held), [5], steps + 1
    peer.round()
    begun = time.perf_counter()
    for _ in range(steps):
        peer.round()
    return steps * len(peer.slots) / (time.perf_counter() - begun)


def serve(peer: Peer) -> None:
    """Until the input ends."""
    waiting = b""
    while True:
        while select.select([sys.stdin], [], [], 0 if peer.busy else None)[0]:
            data = os.read(sys.stdin.fileno(), 1 << 20)
            if not data:
                return
            *lines, waiting = (waiting + data).split(b"\n")
            for line in lines:
                peer.take(json.loads(line))
        for slot, token in peer.round():
            said = {"id": slot.request["id"], "token": token, "cached": slot.cached, "read": slot.count}
            said["text"] = peer.tokenizer.piece(token).decode(errors="replace")
            print(json.dumps(said), flush=True)


def main() -> None:
    """Arguments: model path or "", slots, cells a slot, threads, tokens of a conversation."""
    model, slots, cells, threads, depth = sys.argv[1], *map(int, sys.argv[2:6])
    engine: Any = anchorkv.load(model or None, threads=threads).engine
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    speeds = {}
    for flash in (False, True):
        for batch in BATCHES:
            peer = Peer(engine, slots, cells, threads, flash, batch)
            speeds[flash, batch] = decode_speed(peer, depth)
            peer.close()
    flash, batch = max(speeds, key=lambda key: speeds[key])
    peer = Peer(engine, slots, cells, threads, flash, batch)
    settings = f"{'flash attention' if flash else 'no flash attention'}, batch {batch}, f16 cells, one stream a slot"
    print(json.dumps({"ready": settings, "cells": peer.cells}), flush=True)
    serve(peer)


if __name__ == "__main__":
    main()
