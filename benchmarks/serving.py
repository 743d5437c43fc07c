"""Sessions and speed of `anchorkv serve` beside llama.cpp's full cache in the same KV memory, under load.

    python benchmarks/serving.py                     # conversations of 4,000 tokens; writes results/serving.json
    python benchmarks/serving.py --tokens 300 --slots 2 --times 3 --answer 16 --out try.json

This process is the load; each side runs in a process of its own, one after the other, with the same KV cells and
threads. Conversations differ from each other and have many turns; each says one thing more when all of them are there.

    sessions                a conversation lives when its next turn need not read it again (9 of 10 tokens cached)
    decode                  tokens/s of all conversations together, while all of them write
    p95                     time between two tokens of an answer, while all write and new conversations come in

The peer (serving_peer.py) has as many slots as full conversations fit, and the better of flash attention on and off.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np
from rich.console import Console

import anchorkv
from anchorkv.evaluate.environment import environment

ROOT = Path(__file__).resolve().parent.parent
TURN, NEW = 100, 64
"""Tokens of a turn; cells that a conversation needs beyond its tokens and the answer, for what is said next."""
AT_ONCE = 4
"""New conversations that are read at once."""
QUESTIONS = ("What happened then?", "Tell me more of that.", "And what did the others say?", "Why was that so?")
console = Console(stderr=True)
Messages = list[dict[str, str]]


@dataclass
class Answer:
    """When each token came, and what the server said of the prompt."""

    times: list[float] = field(default_factory=list)
    text: str = ""
    read: int = 0
    cached: int = 0


class Side(Protocol):
    """A server under load."""

    settings: str

    async def say(self, number: int, messages: Messages, write: int) -> Answer:
        """Conversation `number` goes on; `write` tokens are written, whatever they are."""

    def leave(self, number: int) -> None:
        """Conversation `number` is over: what it holds may serve another."""


@dataclass
class Anchored:
    """`anchorkv serve` over HTTP, answers streamed."""

    url: str
    client: httpx.AsyncClient
    settings: str = ""
    recall: str = ""

    async def say(self, number: int, messages: Messages, write: int) -> Answer:
        answer = Answer()
        body = {
            **({"anchorkv": {"recall": self.recall}} if self.recall else {}),
            "messages": messages, "max_tokens": write, "ignore_eos": True, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with self.client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                raise SystemExit(f"The server answered {reply.status_code}: {(await reply.aread()).decode()[:400]}")
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                data = json.loads(line.removeprefix("data: "))
                if data.get("usage"):
                    answer.read = data["usage"]["prompt_tokens"]
                    answer.cached = data["usage"]["prompt_tokens_details"]["cached_tokens"]
                for choice in data.get("choices", ()):
                    # A token that is no whole character yet comes with no text, and is a token nevertheless.
                    if choice["delta"].get("content") is not None:
                        answer.text += choice["delta"]["content"]
                        answer.times.append(time.perf_counter())
        return answer

    def leave(self, number: int) -> None:
        """Nobody need say so: what is parked makes way by itself."""


class Peer:
    """serving_peer.py over pipes."""

    def __init__(self, process: asyncio.subprocess.Process, slots: int) -> None:
        self._process, self.settings = process, ""
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for slot in range(slots):
            self._free.put_nowait(slot)
        self._slots: dict[int, int] = {}
        self._answers: dict[int, tuple[Answer, int, asyncio.Event]] = {}
        self._count = 0

    async def listen(self) -> None:
        """Sort what comes by request."""
        async for line in self._lines():
            data = json.loads(line)
            answer, write, done = self._answers[data["id"]]
            answer.times.append(time.perf_counter())
            answer.text, answer.cached, answer.read = answer.text + data["text"], data["cached"], data["read"]
            if len(answer.times) == write:
                done.set()

    async def _lines(self) -> AsyncIterator[bytes]:
        if self._process.stdout is not None:
            async for line in self._process.stdout:
                yield line

    def leave(self, number: int) -> None:
        """Conversation `number` is over: its slot serves another."""
        self._free.put_nowait(self._slots.pop(number))

    async def say(self, number: int, messages: Messages, write: int) -> Answer:
        if number not in self._slots:
            self._slots[number] = await self._free.get()
        self._count += 1
        answer, done = Answer(), asyncio.Event()
        self._answers[self._count] = answer, write, done
        request = {"id": self._count, "slot": self._slots[number], "messages": messages, "write": write}
        if self._process.stdin is None:
            raise RuntimeError("the peer has no input")
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        await self._process.stdin.drain()
        await done.wait()
        return answer


def conversations(tokenizer: Any, count: int, tokens: int) -> list[Messages]:
    """`count` conversations of about `tokens` tokens, each a walk of its own through the example text."""
    words = (ROOT / "examples" / "english.txt").read_text(encoding="utf-8").split()
    density = len(words) / len(tokenizer.encode(" ".join(words)))
    out = []
    for number in range(count):
        messages, random = [{"role": "system", "content": f"You help reader {number}."}], np.random.default_rng(number)
        while (left := tokens - len(tokenizer.encode(tokenizer.chat(messages), special=True))) > 30:
            step = round(min(TURN, max(10, left / 2)) * density)
            for role in ("user", "assistant"):
                at = int(random.integers(0, len(words) - step))
                messages.append({"role": role, "content": " ".join(words[at : at + step])})
        out.append([*messages, {"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}])
    return out


def _turn(answer: str, number: int) -> Messages:
    """What was answered, and what is said to it."""
    said = QUESTIONS[(number + len(answer)) % len(QUESTIONS)]
    return [{"role": "assistant", "content": answer}, {"role": "user", "content": said}]


async def load(side: Side, talks: list[Messages], new: list[Messages], answer: int) -> dict[str, Any]:
    """The whole run against one side: everybody arrives, all go on at once, and then with others coming in."""
    gate, begun = asyncio.Semaphore(AT_ONCE), time.perf_counter()

    async def arrive(number: int, messages: Messages) -> None:
        async with gate:
            first = await side.say(number, messages, 4)
        messages += _turn(first.text, number)

    await asyncio.gather(*(arrive(number, talk) for number, talk in enumerate(talks)))
    arrived = time.perf_counter() - begun
    console.print(f"  {len(talks)} conversations were read in {arrived:.0f} s")

    async def go_on(number: int) -> Answer:
        said = await side.say(number, talks[number], answer)
        talks[number] += _turn(said.text, number)
        return said

    quiet = await asyncio.gather(*(go_on(number) for number in range(len(talks))))
    living = sum(said.cached >= 0.9 * (said.read - NEW) for said in quiet)
    begin, end = max(said.times[0] for said in quiet), min(said.times[-1] for said in quiet)
    together = sum(begin < moment <= end for said in quiet for moment in said.times)
    if end <= begin:
        raise SystemExit("The first answer ended before the last began; give a longer --answer.")
    console.print(f"  {living} of {len(talks)} went on without being read again")
    # The peer has to give up a slot for those that come in; so that both do the same, anchorkv's last one rests too.
    writers = talks[: max(1, len(talks) - 1)] if new else talks
    if new:
        side.leave(len(talks) - 1)

    async def come_and_go(number: int, talk: Messages) -> None:
        await side.say(number, talk, 2)
        side.leave(number)

    loaded, _ = await asyncio.gather(
        asyncio.gather(*(go_on(number) for number in range(len(writers)))),
        asyncio.gather(*(come_and_go(len(talks) + number, talk) for number, talk in enumerate(new))),
    )
    gaps = {name: np.concatenate([np.diff(said.times) for said in answers]) for name, answers in
            (("quiet", quiet), ("load", loaded))}
    return {
        "settings": side.settings, "conversations": len(talks), "sessions": living,
        "decode_tokens_per_second": together / (end - begin), "all_writing_seconds": end - begin,
        "p95_seconds_between_tokens": float(np.quantile(gaps["load"], 0.95)),
        "median_seconds_between_tokens": float(np.median(gaps["load"])),
        "p95_seconds_between_tokens_all_writing": float(np.quantile(gaps["quiet"], 0.95)),
        "prompt_tokens": float(np.mean([said.read for said in quiet])), "arrival_seconds": arrived,
        "tokens_written": sum(len(said.times) for said in (*quiet, *loaded)),
    }


async def anchored(
    options: argparse.Namespace, cells: int, talks: list[Messages], new: list[Messages]
) -> dict[str, Any]:
    """The figures of `anchorkv serve`."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "serve.yaml"
        contexts = "null" if options.contexts is None else options.contexts
        # What waits long is measured too.
        settings.write_text(f"requests: {{seconds: 86400, read_seconds: 86400}}\ncontexts: {contexts}\n")
        command = [
            sys.executable, "-m", "anchorkv", "serve", "--cells", str(cells), "--threads", str(options.threads),
            "--config", str(settings), "--port", str(options.port), "--data", folder, "--max-sessions", "200",
            "--log-level", "error",
            *(["--model", options.model] if options.model else []),
            *(["--policy", options.policy] if options.policy else []),
        ]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
        url = f"http://127.0.0.1:{options.port}"
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        try:
            async with httpx.AsyncClient(timeout=None, limits=limits) as client:
                await _ready(client, url, process)
                named = f"{options.policy or 'own'} policy, recall {options.recall or 'as it says'}"
                side = Anchored(url, client, named, options.recall)
                return await load(side, talks, new, options.answer)
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def _ready(client: httpx.AsyncClient, url: str, process: asyncio.subprocess.Process) -> None:
    for _ in range(1200):
        if process.returncode is not None:
            raise SystemExit(f"anchorkv serve ended with code {process.returncode}.")
        try:
            if (await client.get(f"{url}/health/ready")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.5)
    raise SystemExit("anchorkv serve was not ready within ten minutes.")


async def peer(options: argparse.Namespace, each: int, talks: list[Messages], new: list[Messages]) -> dict[str, Any]:
    """The figures of llama.cpp with its full cache."""
    command = [sys.executable, str(ROOT / "benchmarks" / "serving_peer.py"), options.model or ""]
    numbers = [str(number) for number in (options.slots, each, options.threads, options.tokens)]
    process = await asyncio.create_subprocess_exec(
        *command, *numbers, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 24,
    )
    try:
        if process.stdout is None:
            raise RuntimeError("the peer has no output")
        ready = json.loads(await process.stdout.readline() or b"{}")
        if "ready" not in ready:
            raise SystemExit("the peer did not start.")
        side = Peer(process, options.slots)
        side.settings = ready["ready"]
        listening = asyncio.create_task(side.listen())
        figures = await load(side, talks, new, options.answer)
        listening.cancel()
        return {**figures, "cells": ready["cells"]}
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="GGUF file; without it the built-in model")
    parser.add_argument("--policy", help="of the server: a preset or a .json; without it the model's own")
    parser.add_argument("--recall", choices=("off", "on", "auto"), help="without it as the policy says")
    parser.add_argument("--tokens", type=int, default=4000, help="of a conversation")
    parser.add_argument("--slots", type=int, default=4, help="full conversations that the KV memory is made for")
    parser.add_argument("--contexts", type=int, help="that anchorkv keeps its cells in; without it as the server does")
    parser.add_argument("--times", type=float, default=11, help="conversations of anchorkv for one of the peer's")
    parser.add_argument("--answer", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--arrivals", type=int, default=2, help="new conversations while all others write")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--port", type=int, default=18431)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "serving.json")
    options = parser.parse_args()
    said = {name: value for name, value in vars(options).items() if name not in ("port", "out")}
    each = -(-(options.tokens + 2 * (options.answer + NEW)) // 256) * 256
    cells = options.slots * each
    with anchorkv.load(options.model, threads=1) as model:
        tokenizer, info = model.engine.tokenizer, model.engine.info
        count = round(options.slots * options.times)
        talks = conversations(tokenizer, count + options.arrivals, options.tokens)
    console.print(f"{cells} KV cells, {cells * info.cell_bytes / 2**20:.0f} MiB")
    sides = {}
    for name, run, size, number in (("peer", peer, each, options.slots), ("anchorkv", anchored, cells, count)):
        console.print(f"[bold]{name}")
        own = [[dict(message) for message in talk] for talk in (*talks[:number], *talks[count:])]
        sides[name] = asyncio.run(run(options, size, own[:number], own[number:]))
    ours, theirs = sides["anchorkv"], sides["peer"]
    ratio = ours["p95_seconds_between_tokens"] / theirs["p95_seconds_between_tokens"]
    result = {
        "sessions_ratio": ours["sessions"] / theirs["sessions"],
        "decode_throughput_ratio": ours["decode_tokens_per_second"] / theirs["decode_tokens_per_second"],
        "p95_between_tokens_ratio": ratio, "tokens": options.tokens, "kv_cells": cells,
        "kv_bytes": cells * info.cell_bytes, "threads": options.threads, "answer": options.answer, "anchorkv": ours,
        "peer": theirs, "settings": said, "model": asdict(info) | {"scorer": Path(info.scorer).name}, **environment(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    if "soak" in known:
        result["soak"] = known["soak"]
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print({key: result[key] for key in list(result)[:3]})


if __name__ == "__main__":
    main()
