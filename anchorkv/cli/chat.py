"""`anchorkv chat`: a conversation whose own turns are compressed as they age."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer import Option

from anchorkv.chat import Conversation
from anchorkv.cli.asking import printable
from anchorkv.cli.inspect import print_view
from anchorkv.cli.options import JsonOption, ModelOptions, PolicyOptions, SamplingOptions, takes_options
from anchorkv.cli.screen import count, print_json, size, speed, stderr, stdout, write_file
from anchorkv.errors import AnchorKVError, ConfigError
from anchorkv.sampling import Sampling
from anchorkv.views.page import PageInput, render_page
from anchorkv.views.segments import segment_infos

HELP = """\
/stats              cells kept, speeds, what was recalled
/save [FILE]        save the conversation; go on later with --resume FILE
/inspect [FILE]     show what is kept and dropped, here or as a web page
/help               this list
/quit               leave (Ctrl-D does as well); Ctrl-C stops an answer"""


@takes_options
def chat(
    *,
    system: Annotated[str | None, Option(metavar="TEXT", help="The system prompt.")] = None,
    resume: Annotated[Path | None, Option(metavar="FILE", help="Go on with a saved conversation.")] = None,
    as_json: JsonOption = False,
    model: ModelOptions,
    policy: PolicyOptions,
    sampling: SamplingOptions,
) -> None:
    """Talk with a model that keeps the anchors of older turns. One message a line; /help lists the commands."""
    chosen, draw = policy.chosen(), sampling.sampling()
    if resume is not None and policy.given():
        raise ConfigError(f"A saved conversation keeps its own policy; leave out {policy.given()[0]}.")
    if resume is not None and system is not None:
        raise ConfigError("A saved conversation keeps its own system prompt; leave out --system.")
    console = Console(quiet=True) if as_json else stdout()
    with model.load(chosen) as loaded:
        talk = Conversation.open(loaded.engine, resume) if resume else loaded.chat(system)
        with closing(talk):
            room = _Room(console, talk, sampling.max_tokens, draw, resume)
            room.run(sys.stdin.isatty() and not as_json)
            if as_json:
                print_json(room.report())
    if room.failed:
        raise typer.Exit(2)


class _Room:
    """The loop: a line is a message or a command. An error ends a turn, never the conversation."""

    def __init__(
        self, console: Console, talk: Conversation, max_tokens: int, sampling: Sampling, saved: Path | None
    ) -> None:
        self.console, self.talk, self.max_tokens, self.sampling, self.saved = console, talk, max_tokens, sampling, saved
        self.failed = False
        """Whether a line of a script (no terminal) failed: the exit code must say so."""
        self.commands: dict[str, Callable[[str], None]] = {
            "/stats": self._stats, "/save": self._save, "/inspect": self._inspect,
            "/help": lambda _: self.console.print(HELP, markup=False),
        }

    def run(self, asks: bool) -> None:
        """Until the input ends or /quit. asks: a person types, so prompts are shown."""
        if asks:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (input() then edits lines and remembers them)
            info = self.talk.session.engine.info
            self.console.print(f"{info.name}. /help lists the commands, Ctrl-D leaves.", style="dim", markup=False)
        while True:
            try:
                line = self._line(asks)
            except KeyboardInterrupt:
                if not asks:
                    raise
                self.console.print("\n(Ctrl-D or /quit leaves)", style="dim")
                continue
            if line is None or line.strip() in ("/quit", "/exit"):
                return
            if line.strip():
                self._handle(line.strip(), asks)

    def _line(self, asks: bool) -> str | None:
        if not asks:
            # The bytes, not sys.stdin's text: a pipe is UTF-8 whatever the locale is.
            raw = sys.stdin.buffer.readline()
            return raw.decode("utf-8", "replace") if raw else None
        try:
            return self.console.input("[bold]You:[/] ")
        except EOFError:
            self.console.print()
            return None

    def _handle(self, line: str, asks: bool) -> None:
        name, _, argument = line.partition(" ")
        try:
            if line.startswith("/"):
                if name not in self.commands:
                    raise ConfigError(f"There is no command {name}; /help lists them.")
                self.commands[name](argument.strip())
            else:
                self._answer(line)
        except AnchorKVError as error:
            self.failed = self.failed or not asks
            stderr().print(f"Error: {error}", style="red", markup=False, soft_wrap=True)

    def _answer(self, message: str) -> None:
        started = False
        try:
            with closing(self.talk.say(message, max_tokens=self.max_tokens, sampling=self.sampling)) as pieces:  # type: ignore[type-var]
                for piece in pieces:
                    shown = printable(piece if started else piece.lstrip())
                    started = started or bool(shown)
                    self.console.print(shown, end="", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            self.console.print(" (stopped)", style="yellow", end="")
        self.console.print()

    # --- commands ----------------------------------------------------------------------------------------------

    def _stats(self, _: str) -> None:
        cells = self.talk.session.accounting()
        self.console.print(
            f"{count(cells.kept_cells)} of {count(cells.full_cells)} cells kept ({cells.reduction:.1f}× fewer), "
            f"{size(cells.kept_bytes)} of {size(cells.full_bytes)}; at the peak {count(cells.peak_cells)} cells"
        )
        states = {state: tokens for state, tokens in self.talk.session.ledger.counts().items() if tokens}
        self.console.print(", ".join(f"{state} {tokens:,}" for state, tokens in states.items()), style="dim")
        if self.talk.turns:
            last = self.talk.turns[-1]
            recalled = f", recalled segments {', '.join(map(str, last.recalled))}" if last.recalled else ""
            self.console.print(
                f"{len(self.talk.turns)} turns; the last: {last.tokens} tokens, first after "
                f"{last.first_token_seconds:.2f} s, then {speed(last.tokens_per_second)}{recalled}", style="dim",
            )

    def _save(self, argument: str) -> None:
        target = Path(argument).expanduser() if argument else self.saved
        if target is None:
            raise ConfigError("Name the file: /save FILE.")
        self.talk.save(target)
        self.saved = target
        self.console.print(f"Saved to {target}.", style="dim", markup=False)

    def _inspect(self, argument: str) -> None:
        session = self.talk.session
        segments, cells = segment_infos(session.ledger, session.engine.tokenizer), session.accounting()
        if not argument:
            print_view(self.console, "Conversation", segments, cells)
            return
        page = PageInput("Conversation", session.engine.info.name, session.config, segments, cells)
        write_file(argument, render_page(page))
        self.console.print(f"Wrote {argument}; open it in a browser.", style="dim", markup=False)

    def report(self) -> dict[str, Any]:
        """For --json."""
        info = self.talk.session.engine.info
        return {
            "model": {"name": info.name, "engine": self.talk.session.engine.name, "weights": info.weights},
            "policy": self.talk.session.config.model_dump(mode="json"),
            "turns": [asdict(turn) for turn in self.talk.turns],
            "accounting": self.talk.session.accounting().as_dict(),
        }
