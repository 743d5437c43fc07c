"""Callers that wait for the engine thread: woken together, each for what is its own."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from anchorkv.config import preset
from anchorkv.serve.handle import Handle, Waking
from anchorkv.serve.requests import Ask, Message, Piece

ASK = Ask(tenant="a", messages=(Message("user", "Who?"),), policy=preset("default"), max_tokens=4)


def test_callers_are_woken_by_one_call_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        waking, loop, calls = Waking(), asyncio.get_running_loop(), list[Any]()
        soon = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: (calls.append(args), soon(*args))[1])
        handles = [Handle(ASK, waking) for _ in range(3)]
        waiting = [asyncio.ensure_future(anext(handle)) for handle in handles]
        await asyncio.sleep(0)
        for token, handle in enumerate(handles):
            handle.put(Piece("x", token))
        await asyncio.sleep(0)
        assert not calls
        assert not any(one.done() for one in waiting)
        waking.now()
        assert [piece.token for piece in await asyncio.gather(*waiting)] == [0, 1, 2]
        assert len(calls) == 1
        waking.now()
        assert len(calls) == 1

    asyncio.run(work())


def test_a_caller_whose_loop_is_closed_keeps_nobody_else_waiting() -> None:
    waking = Waking()
    gone, here = Handle(ASK, waking), Handle(ASK, waking)

    async def leave() -> None:
        asyncio.ensure_future(anext(gone)).add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.sleep(0)

    asyncio.run(leave())

    async def work() -> None:
        waiting = asyncio.ensure_future(anext(here))
        await asyncio.sleep(0)
        for handle in (gone, here):
            handle.put(Piece("x", 7))
        threading.Thread(target=waking.now).start()
        assert (await asyncio.wait_for(waiting, 60)).token == 7

    asyncio.run(work())
