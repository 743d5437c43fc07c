"""uvicorn with a graceful end: on SIGTERM nothing new is taken, what runs ends, then the process does, with code 0."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from anchorkv.errors import ConfigError
from anchorkv.serve.service import Service


class Server(uvicorn.Server):
    """A first SIGTERM or Ctrl-C drains; a second one ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service, started: Callable[[int], None]) -> None:
        """started: called with the port once requests are taken."""
        super().__init__(config)
        self._service, self._started = service, started
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if not self.should_exit and sockets:
            self._started(int(sockets[0].getsockname()[1]))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not uvicorn's own: it closes the door at once, where /health/ready should say first that it is closing; and
        # it raises the signal again at the end, where the process should end with code 0.
        if self._draining is not None or self._loop is None:
            self.should_exit = True
            self.force_exit = self.force_exit or sig == signal.SIGINT
            return
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        await self._service.drain()
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Raises ConfigError when the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"There is no address {host!r} ({error.strerror}); choose another host.") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"Port {port} of {host} cannot be listened on ({error.strerror}); choose another with --port."
        ) from None
    return sock


def run(app: FastAPI, service: Service, sock: socket.socket, log_level: str, started: Callable[[int], None]) -> None:
    """Serve until told to stop. Returns when all is closed."""
    config = uvicorn.Config(
        app, log_level=log_level, log_config=None, access_log=False, server_header=False, date_header=False,
        timeout_keep_alive=15, timeout_graceful_shutdown=5, h11_max_incomplete_event_size=64 * 1024, ws="none",
        lifespan="on", proxy_headers=False,
    )
    Server(config, service, started).run(sockets=[sock])
