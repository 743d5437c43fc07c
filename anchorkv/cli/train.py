"""`anchorkv train`: teach a model to speak through its anchors, or fit the scorer that chooses them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from anchorkv.cli.options import JsonOption, ModelOptions, PolicyOptions, takes_options
from anchorkv.cli.screen import note, print_json, stdout, work_bar
from anchorkv.errors import ConfigError, ModelError
from anchorkv.models import builtin


@takes_options
def train(
    out: Annotated[Path, Argument(metavar="OUT", help="Folder for the adapter and its checkpoints, or the scorer.")],
    *,
    data: Annotated[str, Option(
        "--data", "-d", metavar="FILE|FOLDER|RECIPE|NAME",
        help="Text to learn from: jsonl, txt, md, parquet (compressed or not), a YAML recipe, a hub dataset.")],
    only_scorer: Annotated[bool, Option("--only-scorer", help="Fit the scorer alone: minutes.")] = False,
    tokens: Annotated[int, Option(min=1, help="Tokens of text to train on.")] = 1_000_000,
    length: Annotated[int, Option(min=128, help="Tokens of a block.")] = 1024,
    rows: Annotated[int, Option(min=1, help="Blocks a process reads at once.")] = 1,
    accumulation: Annotated[int, Option(min=1, help="Times it reads before each step.")] = 4,
    rank: Annotated[int, Option(min=0, help="Of the LoRA matrices; 0 trains all weights.")] = 32,
    rate: Annotated[float, Option(help="Learning rate.")] = 5e-4,
    distil: Annotated[float, Option(min=0, help="Weight of the divergence from the full cache.")] = 1.0,
    next_token: Annotated[float, Option(min=0, help="Weight of the plain next-token loss (the paper's).")] = 0.0,
    validation: Annotated[str | None, Option(metavar="FILE|…", help="Text to measure progress on.")] = None,
    save_steps: Annotated[int, Option(min=1, help="Steps between checkpoints.")] = 50,
    seed: Annotated[int, Option(min=0, help="Of the data's order and the drawn policies.")] = 0,
    as_json: JsonOption = False,
    model: ModelOptions,
    policy: PolicyOptions,
) -> None:
    """Train a LoRA adapter (or all weights) so that anchors hold what their text said. Goes on where it stopped."""
    config = policy.config()
    for library in ("torch", "transformers", *(() if only_scorer else ("peft",))):
        if importlib.util.find_spec(library) is None:
            raise ModelError(f"Training needs {library}, which is not installed: pip install 'anchorkv[train]'.")
    if model.engine == "llama":
        raise ConfigError("Training runs on the torch engine; leave out --engine llama.")
    source = model.model or str(builtin())
    if only_scorer:
        report = _fit_scorer(source, data, out, tokens, length, seed, config, as_json)
    else:
        from anchorkv.train.trainer import Settings

        settings = Settings(
            model=source, data=data, policy=config, tokens=tokens, length=length, rows=rows,
            accumulation=accumulation, rank=rank, alpha=2 * rank, rate=rate, distil=distil, next_token=next_token,
            seed=seed,
        )
        report = _train(settings, out, validation, save_steps, as_json)
    if as_json:
        print_json(report)
    else:
        for name, value in report.items():
            stdout().print(f"{name.replace('_', ' ')}: [bold]{value}[/]")


def _train(settings: Any, out: Path, validation: str | None, save_steps: int, quiet: bool) -> dict[str, Any]:
    from anchorkv.train.progress import Progress
    from anchorkv.train.trainer import train as run

    with work_bar("Training", "tokens", quiet) as bar:
        progress = Progress(settings, out, validation, bar, None if quiet else stdout())
        run(settings, out, callbacks=(progress,), save_steps=save_steps)
    return {"adapter": str(out), **progress.last}


def _fit_scorer(
    source: str, data: str, out: Path, tokens: int, length: int, seed: int, config: Any, quiet: bool
) -> dict[str, Any]:
    from anchorkv.engines.torch import TorchEngine
    from anchorkv.train.data import Blocks, check
    from anchorkv.train.scorer import collect, fit
    from anchorkv.train.sources import Recipe

    recipe, engine = Recipe.load(data), TorchEngine.load(source)
    check(recipe, engine.tokenizer, engine.info.vocabulary)
    blocks = Blocks(recipe, engine.tokenizer, length, seed, min_tokens=min(length, 512))
    texts = (document for block in blocks for document in block.documents if len(document) >= 512)
    with work_bar("Reading", "tokens", quiet) as bar:
        samples = collect(engine, config, texts, tokens, lambda done: bar(done, max(done, tokens)))
    with work_bar("Fitting", "epochs", quiet) as bar:
        found = fit(samples, seed=seed, progress=lambda done: bar(done, max(done, 30)))
    out.mkdir(parents=True, exist_ok=True)
    found.scorer.save(out / "scorer.safetensors")
    if not quiet:
        note(f"Wrote {out / 'scorer.safetensors'}; use it with --scorer.")
    return {
        "scorer": str(out / "scorer.safetensors"), "tokens": sum(len(s.target) for s in samples),
        "correlation": round(found.correlation, 4), "captured": round(found.captured, 4),
    }
