"""A service over a tiny model, with keys of two tenants, for the tests of the API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import tiny_gguf

from anchorkv.config import AnchorConfig
from anchorkv.engines.llama import LlamaEngine
from anchorkv.serve.app import make_app
from anchorkv.serve.audit.store import AuditStore
from anchorkv.serve.audit.trail import AuditTrail
from anchorkv.serve.auth import KeyGate, LoopbackGate
from anchorkv.serve.documents import Documents
from anchorkv.serve.keys import KeyFile, Role, make_key
from anchorkv.serve.limits import Limiter
from anchorkv.serve.policies import Policies
from anchorkv.serve.scheduler import Scheduler
from anchorkv.serve.seams import DirectLadder
from anchorkv.serve.service import ModelCard, Service
from anchorkv.serve.settings_groups import PolicyBounds, RequestLimits

CELLS = 8192
POLICY = AnchorConfig(scorer="frequency", reduction=4, min_segment=8, max_segment=16, sinks=2, recent_window=1)
STORY = (
    "The mill at the river was built in 1821. Its wheel has twelve blades. The miller was called Anton Berg. "
    "He sold it to Clara Voss for ninety thalers. She had it painted blue. In winter the wheel stood still. "
)


def engine(folder: Path) -> Iterator[LlamaEngine]:
    loaded = LlamaEngine.load(tiny_gguf.write(folder / "tiny.gguf"), threads=1)
    loaded.fix(CELLS, 64)
    yield loaded
    loaded.close()


def keys(folder: Path, *wanted: tuple[str, Role]) -> dict[tuple[str, Role], str]:
    """Keys in folder/keys.json, by tenant and role."""
    texts = {}
    with KeyFile(folder / "keys.json").changing(create=True) as found:
        for tenant, role in wanted:
            key, texts[tenant, role] = make_key(tenant, role)
            found[key.id] = key
    return texts


def service(folder: Path, model: Any, *, with_keys: bool = False, **changes: Any) -> Service:
    """Not started; its trail keeps text."""
    scheduler = Scheduler(model, CELLS, max_sessions=16, documents=Documents(model, folder / "documents"))
    found: dict[str, Any] = {
        "scheduler": scheduler, "card": ModelCard("tiny", model.info), "bounds": RequestLimits(),
        "policies": Policies.of(POLICY, "own", PolicyBounds(policies=("paper-ep",))),
        "trail": AuditTrail(AuditStore(folder / "audit.db", keep_text=True)),
        "gate": KeyGate(folder / "keys.json") if with_keys else LoopbackGate(), "limits": Limiter(cells=CELLS),
        "ladder": DirectLadder(), "drain_seconds": 5.0,
    }
    return Service(**{**found, **changes})


@asynccontextmanager
async def client(served: Service, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Over the app itself, started and closed."""
    app = make_app(served)
    stack = AsyncExitStack()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        stack, app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60, **options) as found,
    ):
        stack.callback(served.trail.close)
        yield found


def said(text: str, **more: Any) -> dict[str, Any]:
    """The body of a chat that never ends before its tokens do."""
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "seed": 7, "ignore_eos": True, **more}


def events(text: str) -> list[dict[str, Any]]:
    """The JSON of server-sent events, `[DONE]` left out."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def run(work: Any) -> None:
    """A coroutine, in a test that is none."""
    asyncio.run(work)
