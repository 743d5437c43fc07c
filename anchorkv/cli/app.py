"""The program itself: its commands, and what a user sees when something goes wrong."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from anchorkv.cli import audit, capacity, chat, evaluate, export, inspect, keys, lm_eval, models, poc, run, serve, train
from anchorkv.cli.screen import stderr
from anchorkv.errors import AnchorKVError


class _Program(TyperGroup):
    """Mistakes are one sentence on standard error and exit code 2; Ctrl-C is exit code 130. Never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AnchorKVError as error:
            stderr().print(f"Error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            stderr().print("Interrupted; nothing that was saved is lost.", style="yellow")
            raise typer.Exit(130) from None
        except MemoryError:
            stderr().print("Error: Out of memory; choose a smaller model or a smaller cell budget.", style="red")
            raise typer.Exit(2) from None


app = typer.Typer(
    name="anchorkv", cls=_Program, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Read long documents with a small KV cache: each sentence keeps its anchors, the rest is freed.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run)
app.command("chat")(chat.chat)
app.command("inspect")(inspect.inspect)
app.command("models")(models.models)
app.command("train")(train.train)
app.command("export")(export.export)
app.command("eval")(evaluate.evaluate)
app.command("capacity")(capacity.capacity)
app.add_typer(poc.app, name="poc")
app.command("serve")(serve.serve)
app.add_typer(keys.app, name="keys")
app.add_typer(audit.app, name="audit")
app.command("lm-eval", **lm_eval.SETTINGS)(lm_eval.lm_eval)


def _version(wanted: bool) -> None:
    if wanted:
        import anchorkv

        typer.echo(f"anchorkv {anchorkv.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options of the program itself."""


def main() -> None:
    """The console script."""
    app()
