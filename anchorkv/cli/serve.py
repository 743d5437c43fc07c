"""`anchorkv serve`: OpenAI's API over many sessions that share one KV cache, with documents and an audit trail."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from anchorkv.cli.screen import count, merging_bar, note, size, stderr, stdout
from anchorkv.errors import AnchorKVError
from anchorkv.models import EngineName

if TYPE_CHECKING:
    from anchorkv.serve.service import Service
    from anchorkv.serve.settings import ServeSettings

_MODEL, _ROOM, _GATE, _AUDIT = "Model and policy", "Memory and sessions", "Who is let in", "Audit and time"


def serve(
    *,
    config: Annotated[Path | None, Option(
        "--config", "-c", metavar="FILE.yaml", help="Settings; what is given here goes before them.")] = None,
    model: Annotated[str | None, Option(
        "--model", "-m", metavar="ID|DIR|GGUF", rich_help_panel=_MODEL,
        help="Hub id, local folder or GGUF file; without it the built-in SmolLM2-135M-Instruct.")] = None,
    engine: Annotated[EngineName | None, Option(
        "--engine", rich_help_panel=_MODEL, help="auto takes llama for GGUF files.")] = None,
    threads: Annotated[int | None, Option(
        "--threads", min=1, rich_help_panel=_MODEL, help="Processor threads.")] = None,
    adapter: Annotated[bool | None, Option(
        "--adapter/--no-adapter", rich_help_panel=_MODEL,
        help="Whether the built-in model uses its built-in adapter.")] = None,
    policy: Annotated[str | None, Option(
        "--policy", "-p", metavar="NAME|FILE[:field=value,…]", rich_help_panel=_MODEL,
        help="A preset or policy (.json), also changed (default:reduction=24), or a PoC's rollout.yaml.")] = None,
    host: Annotated[str | None, Option(
        "--host", rich_help_panel=_GATE, help="Address to listen on; any but loopback needs API keys.")] = None,
    port: Annotated[int | None, Option(
        "--port", min=0, max=65535, rich_help_panel=_GATE, help="0: any free one.")] = None,
    keys: Annotated[Path | None, Option(
        "--keys", metavar="FILE", rich_help_panel=_GATE, help="API keys, as `anchorkv keys` makes them.")] = None,
    allowed_hosts: Annotated[list[str] | None, Option(
        "--allowed-host", metavar="NAME", rich_help_panel=_GATE,
        help="A name that requests may call the server by; repeatable.")] = None,
    cells: Annotated[int | None, Option("--cells", min=256, rich_help_panel=_ROOM, help="KV cells there are.")] = None,
    kv_bytes: Annotated[str | None, Option(
        "--kv-bytes", metavar="SIZE", rich_help_panel=_ROOM, help="Memory for KV cells instead, such as 2GiB.")] = None,
    max_sessions: Annotated[int | None, Option(
        "--max-sessions", min=1, rich_help_panel=_ROOM, help="Requests that run at once.")] = None,
    max_waiting: Annotated[int | None, Option(
        "--max-waiting", min=0, rich_help_panel=_ROOM, help="Requests that wait; more are told to come back.")] = None,
    data: Annotated[Path | None, Option(
        "--data", metavar="DIR", rich_help_panel=_ROOM, help="Folder of documents, records and keys.")] = None,
    audit_database: Annotated[str | None, Option(
        "--audit-database", metavar="FILE|URL", rich_help_panel=_AUDIT, help="SQLite file or postgresql://…")] = None,
    audit_text: Annotated[bool | None, Option(
        "--audit-text/--no-audit-text", rich_help_panel=_AUDIT,
        help="Whether prompts and answers are recorded; else their hashes alone.")] = None,
    drain_seconds: Annotated[float | None, Option(
        "--drain-seconds", min=0, rich_help_panel=_AUDIT, help="Time that requests have to end at SIGTERM.")] = None,
    log_level: Annotated[str | None, Option(
        "--log-level", rich_help_panel=_AUDIT, help="debug, info, warning or error.")] = None,
    print_config: Annotated[bool, Option(
        "--print-config", help="Print all settings as YAML, with what they mean, and end.")] = False,
) -> None:
    """Serve OpenAI's API (chat, completions, models), documents and an audit trail.

    Without API keys it answers this machine alone.
    """
    given: dict[str, Any] = {
        "model": model, "engine": engine, "threads": threads, "adapter": adapter, "policy": policy, "host": host,
        "port": port, "keys": keys, "allowed_hosts": allowed_hosts or None, "cells": cells, "kv_bytes": kv_bytes,
        "max_sessions": max_sessions, "max_waiting": max_waiting, "data": data, "audit.database": audit_database,
        "audit.text": audit_text, "drain_seconds": drain_seconds, "log_level": log_level,
    }
    try:
        from anchorkv.serve.app import make_app
        from anchorkv.serve.logs import setup
        from anchorkv.serve.opening import opened
        from anchorkv.serve.running import listen, run
        from anchorkv.serve.settings import ServeSettings
    except ImportError as error:
        raise AnchorKVError(
            f"The server needs {error.name}, which is not installed: pip install 'anchorkv[serve]'."
        ) from None
    settings = ServeSettings.load(config, given)
    if print_config:
        stdout().out(settings.to_yaml(), end="", highlight=False)
        return
    setup(settings.log_level)
    sock = listen(settings.host, settings.port)  # before the model is loaded: a taken port should be told at once
    with sock, merging_bar() as progress, opened(settings, progress) as service:
        app = make_app(service, settings.hosts)
        if service.metrics is not None:
            logging.getLogger().addHandler(service.metrics.logs)
        run(app, service, sock, settings.log_level, lambda port: _say(settings, service, port))
        note("Stopped; nothing that was acknowledged is lost.")


def _say(settings: ServeSettings, service: Service, port: int) -> None:
    card, cells = service.card, service.scheduler.load().cells
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    policies = ", ".join(service.policies.names()[1:]) or "none"
    console = stderr()
    for line in (
        f"Listening on http://{host}:{port}/v1",
        f"Model {card.name} ({card.info.weights or service.scheduler.engine.name}"
        + (f", adapter {card.adapter})" if card.adapter else ")"),
        f"Policy {service.policies.default.name}; a request may name: {policies}",
        f"{count(cells)} KV cells ({size(cells * card.info.cell_bytes)}), "
        f"{service.scheduler.max_sessions} requests at once",
        f"API keys are on ({settings.keys_file})" if service.gate.keys else
        "API keys are off: this machine alone is answered; `anchorkv keys add TENANT` makes one",
        f"Audit records go to {_shown(service)}" + (", with text" if settings.audit.text else ", hashes without text"),
    ):
        console.print(line, markup=False, soft_wrap=True)


def _shown(service: Service) -> str:
    """The database without its password."""
    return service.trail.store.database.url.render_as_string(hide_password=True)
