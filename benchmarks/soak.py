"""A long run of `anchorkv serve` at its memory limit: is memory flat at the end, and is every error explained?

    python benchmarks/soak.py                          # 20 minutes on the built-in model
    python benchmarks/soak.py --seconds 20 --out /tmp/soak.json

The server is a process of its own with few cells and a short queue, so that requests wait, beginnings and documents are
pushed out and callers are turned away all the time. Two tenants chat, stream, hang up, go on with conversations,
upload, ask and delete documents, and send what is no request. Explained is 429 or 503 with Retry-After, and 400 for
what is no request; everything else is an error. At the end the server is told to stop, must do so with code 0, and
every answer that a client got must be in an audit trail whose chain is whole. Writes "soak" in results/serving.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import httpx
import psutil
import yaml
from rich.console import Console

from anchorkv.evaluate.environment import environment
from anchorkv.serve.audit.record import EVERY_TENANT
from anchorkv.serve.audit.store import AuditStore, Filter
from anchorkv.serve.keys import KeyFile, make_key

ROOT = Path(__file__).resolve().parent.parent
SERVE = [sys.executable, "-m", "anchorkv", "serve"]
TENANTS = ("north", "south")
MARKS = {tenant: secrets.token_hex(6) for tenant in TENANTS}
"""In every document of a tenant's; no model can make one up."""
FLAT = 0.03
"""Growth of resident memory from the second quarter to the last that counts as flat."""
console = Console(stderr=True)


@dataclass
class Seen:
    """What came of it."""

    outcomes: Counter[str] = field(default_factory=Counter)
    acknowledged: set[str] = field(default_factory=set)
    """Ids of audit records of answers that a client got whole."""
    unexplained: list[str] = field(default_factory=list)
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)

    def wrong(self, what: str) -> None:
        self.outcomes["unexplained"] += 1
        if len(self.unexplained) < 20:
            self.unexplained.append(what)


class Client:
    """One of a tenant's users, who does one thing after the other."""

    def __init__(self, number: int, http: httpx.AsyncClient, tenant: str, text: str, seen: Seen) -> None:
        self.random, self.http, self.tenant, self.seen = random.Random(number), http, tenant, seen
        self.mark = MARKS[tenant]
        self.text = text
        self.turns: list[dict[str, str]] = []
        self.documents: list[str] = []

    async def live(self, until: float) -> None:
        deeds = (self.chat, self.chat, self.stream, self.hang_up, self.go_on, self.ask, self.ask, self.several,
                 self.nonsense, self.tidy)
        while time.monotonic() < until:
            deed = self.random.choice(deeds)
            try:
                await deed()
            except httpx.HTTPError as error:
                self.seen.wrong(f"{deed.__name__}: {type(error).__name__}: {error}")

    # --- what a user does --------------------------------------------------------------------------------------

    async def chat(self) -> None:
        await self.post({"messages": [user(f"{self.some(4000)}\n\nWhat is this about?")], "max_tokens": 32})

    async def several(self) -> None:
        await self.post({"messages": [user(self.some(600))], "max_tokens": 16, "n": 2, "temperature": 0.8})

    async def go_on(self) -> None:
        if len(self.turns) > 12:
            self.turns = []
        asked = [*self.turns, user(self.some(300))]
        reply = await self.post({"messages": asked, "max_tokens": 24})
        if reply is not None:
            self.turns = [*asked, {"role": "assistant", "content": reply["choices"][0]["message"]["content"]}]

    async def stream(self) -> None:
        await self.read({"messages": [user(self.some(1200))], "max_tokens": 48}, pieces=None)

    async def hang_up(self) -> None:
        await self.read({"messages": [user(self.some(1500))], "max_tokens": 200}, pieces=self.random.randrange(4))

    async def ask(self) -> None:
        if not self.documents:
            await self.upload()
            return
        number = self.random.choice(self.documents)
        await self.post({
            "messages": [user("Which secret word is named?")], "max_tokens": 24, "anchorkv": {"document": number},
        })

    async def upload(self) -> None:
        text = f"{self.some(3000)} The secret word is {self.mark}{self.random.randrange(10**9)}. {self.some(1000)}"
        response = await self.http.post("/v1/documents", json={"text": text, "title": self.tenant})
        if await self.fine(response, "upload"):
            self.documents.append(response.json()["id"])

    async def tidy(self) -> None:
        if len(self.documents) < 3:
            await self.upload()
            return
        number = self.documents.pop(0)
        await self.fine(await self.http.delete(f"/v1/documents/{number}"), "delete")

    async def nonsense(self) -> None:
        body = self.random.choice((b"{", b"[]", b'{"messages": []}', b'{"messages": 7}', b'{"max_tokens": -1}'))
        response = await self.http.post(
            "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
        if response.status_code == 400 and "error" in response.json():
            self.seen.outcomes["no request, said so"] += 1
        else:
            self.seen.wrong(f"nonsense: {response.status_code} {response.text[:200]}")

    # --- how ---------------------------------------------------------------------------------------------------

    def some(self, characters: int) -> str:
        start = self.random.randrange(max(1, len(self.text) - characters))
        return self.text[start : start + characters]

    async def post(self, body: dict[str, Any]) -> dict[str, Any] | None:
        response = await self.http.post("/v1/chat/completions", json=body)
        if not await self.fine(response, "chat"):
            return None
        reply: dict[str, Any] = response.json()
        for choice in reply["choices"]:
            self.take(choice["anchorkv"], choice["message"]["content"])
        self.seen.tokens += reply["usage"]["completion_tokens"]
        return reply

    async def read(self, body: dict[str, Any], pieces: int | None) -> None:
        """Stream an answer; hang up after so many pieces, None: read all of it."""
        begun, count, ended = time.monotonic(), 0, False
        async with self.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            if response.status_code != 200:
                await response.aread()
                await self.fine(response, "stream")
                return
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    ended = True
                    break
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    self.seen.wrong(f"stream: {chunk['error']}")
                    return
                count += 1
                if count == 1:
                    self.seen.first.append(time.monotonic() - begun)
                if "anchorkv" in chunk:
                    self.take(chunk["anchorkv"], "")
                if pieces is not None and count > pieces:
                    self.seen.outcomes["hung up"] += 1
                    return
        if ended:
            self.seen.outcomes["answered"] += 1
        else:
            self.seen.wrong("stream: it ended without [DONE]")

    def take(self, figures: dict[str, Any], text: str) -> None:
        """An answer that arrived whole."""
        self.seen.acknowledged.add(figures["id"])
        others = [mark for tenant, mark in MARKS.items() if tenant != self.tenant]
        shown = text + "".join(part["text"] for part in figures["recalled"])
        if any(other in shown for other in others):
            self.seen.wrong(f"another tenant's text in {figures['id']}: {shown[:400]}")

    async def fine(self, response: httpx.Response, what: str) -> bool:
        if response.status_code == 200:
            self.seen.outcomes["answered" if what in ("chat", "stream") else what] += 1
            return True
        if response.status_code in (429, 503) and "retry-after" in response.headers:
            self.seen.outcomes["told to come back"] += 1
            await asyncio.sleep(min(5.0, float(response.headers["retry-after"])) * (0.5 + self.random.random()))
        else:
            self.seen.wrong(f"{what}: {response.status_code} {response.text[:200]}")
        return False


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# --- the server ----------------------------------------------------------------------------------------------------


def start(folder: Path, arguments: argparse.Namespace) -> tuple[subprocess.Popen[bytes], str, dict[str, str]]:
    """The process, its address, and a key of each tenant; the log is folder/log."""
    keys = {}
    with KeyFile(folder / "keys.json").changing(create=True) as file:
        for tenant in (*TENANTS, EVERY_TENANT):
            key, keys[tenant] = make_key(tenant, "operator" if tenant == EVERY_TENANT else "user")
            file[key.id] = key
    settings = {
        "port": 0, "keys": str(folder / "keys.json"), "data": str(folder), "cells": arguments.cells,
        "max_sessions": arguments.sessions, "max_waiting": arguments.waiting, "threads": arguments.threads,
        "model": arguments.model,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    log = (folder / "log").open("wb")
    process = subprocess.Popen([*SERVE, "--config", str(folder / "config.yaml")], stderr=log, stdout=log)
    until = time.monotonic() + 600
    while time.monotonic() < until and process.poll() is None:
        found = re.search(r"Listening on (http://\S+)/v1", (folder / "log").read_text(errors="replace"))
        if found:
            return process, found[1], keys
        time.sleep(0.2)
    process.kill()
    raise SystemExit(f"The server did not start:\n{(folder / 'log').read_text(errors='replace')[-2000:]}")


async def sample(http: httpx.AsyncClient, process: psutil.Process, seen: Seen, until: float) -> None:
    """Once a second: memory, files and threads of the process, and how full it says it is."""
    begun = time.monotonic()
    while time.monotonic() < until:
        load = (await http.get("/v1/load")).json()
        seen.samples.append({
            "at": time.monotonic() - begun, "rss": process.memory_info().rss, "files": process.num_fds(),
            "threads": process.num_threads(), "cells": (load["used_cells"] + load["reserved_cells"]) / load["cells"],
            "waiting": load["waiting"], "running": load["sessions"],
        })
        await asyncio.sleep(1.0)


async def load(address: str, keys: dict[str, str], process: psutil.Process, arguments: argparse.Namespace) -> Seen:
    text = (ROOT / "examples" / "english.txt").read_text(encoding="utf-8")
    seen, until = Seen(), time.monotonic() + arguments.seconds

    def client(tenant: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=address, timeout=600, headers={"authorization": f"Bearer {keys[tenant]}"},
            limits=httpx.Limits(max_connections=arguments.clients + 2),
        )

    async with client(TENANTS[0]) as north, client(TENANTS[1]) as south, client(EVERY_TENANT) as operator:
        users = [
            Client(number, (north, south)[number % 2], TENANTS[number % 2], text, seen)
            for number in range(arguments.clients)
        ]
        await asyncio.gather(*(one.live(until) for one in users), sample(operator, process, seen, until))
    return seen


# --- what came of it -----------------------------------------------------------------------------------------------


def report(seen: Seen, code: int, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    quarter = max(1, len(seen.samples) // 4)
    second, last = seen.samples[quarter : 2 * quarter], seen.samples[-quarter:]
    before, after = (median(part["rss"] for part in parts) for parts in (second or last, last))
    with AuditStore(str(folder / "audit.db"), create=False) as store:
        store.open()
        chain = store.verify()
        recorded = {entry.id for entry in store.entries(Filter(tenant=EVERY_TENANT))}
    errors = [line for line in (folder / "log").read_text(errors="replace").splitlines() if '"level": "error"' in line]
    lost = len(seen.acknowledged - recorded)
    found = {
        "seconds": arguments.seconds, "clients": arguments.clients, "cells": arguments.cells,
        "outcomes": dict(seen.outcomes), "unexplained": seen.outcomes["unexplained"], "examples": seen.unexplained,
        "tokens_per_second": round(seen.tokens / arguments.seconds, 1),
        "first_token_median": round(median(seen.first), 3) if seen.first else None,
        "rss_mb": {
            "first": round(seen.samples[0]["rss"] / 2**20, 1), "second_quarter": round(before / 2**20, 1),
            "last_quarter": round(after / 2**20, 1), "most": round(max(s["rss"] for s in seen.samples) / 2**20, 1),
        },
        "rss_growth": round(after / before - 1, 4),
        "open_files": {
            "second_quarter": median(s["files"] for s in second or last),
            "last_quarter": median(s["files"] for s in last),
        },
        "cells_taken_mean": round(mean(s["cells"] for s in seen.samples), 3),
        "share_of_time_with_a_queue": round(mean(s["waiting"] > 0 for s in seen.samples), 3),
        "acknowledged": len(seen.acknowledged), "recorded": len(recorded), "acknowledged_and_lost": lost,
        "chain_sound": chain.sound, "errors_in_log": len(errors), "exit_code": code,
    }
    found["passed"] = bool(
        not found["unexplained"] and not lost and chain.sound and code == 0 and not errors and seen.acknowledged
        and after / before - 1 <= FLAT
    )
    return {**found, "environment": environment()}


def save(path: Path, found: dict[str, Any]) -> None:
    """Beside what other measurements have written."""
    whole = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**whole, "soak": found}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="A long run of the server at its memory limit.")
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--cells", type=int, default=2048, help="few, so that they are always all in use")
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--waiting", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", help="without it the built-in one")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "serving.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process, address, keys = start(folder, arguments)
        try:
            seen = asyncio.run(load(address, keys, psutil.Process(process.pid), arguments))
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=120)
        finally:
            if process.poll() is None:
                process.kill()
        found = report(seen, code, folder, arguments)
    save(arguments.out, found)
    console.print_json(data={name: value for name, value in found.items() if name != "environment"})
    if not found["passed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
