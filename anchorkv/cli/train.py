"""`anchorkv train`: teach a model to speak through its anchors, or fit the scorer that chooses them."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from anchorkv.cli.options import JsonOption, ModelOptions, PolicyOptions, takes_options
from anchorkv.cli.screen import note, print_json, stderr, stdout, work_bar
from anchorkv.errors import ConfigError, ModelError
from anchorkv.export import POLICY_FILE
from anchorkv.models import builtin


@takes_options
def train(
    *,
    data: Annotated[str, Option(
        "--data", "-d", metavar="FILE|FOLDER|RECIPE|NAME", show_default=False,
        help="Text to learn from: jsonl, txt, md, parquet (compressed or not), a YAML recipe, a hub dataset.")],
    out: Annotated[Path, Option(
        "--out", "-o", metavar="DIR", show_default=False,
        help="Folder for the adapter, its checkpoints, curves and model card; or for the scorer.")],
    only_scorer: Annotated[bool, Option("--only-scorer", help="Fit the scorer alone: minutes.")] = False,
    tokens: Annotated[int, Option(min=1, help="Tokens of text to train on.")] = 1_000_000,
    length: Annotated[int, Option(min=128, help="Tokens of a block.")] = 2048,
    rows: Annotated[int, Option(min=1, help="Blocks a process reads at once.")] = 1,
    accumulation: Annotated[int, Option(min=1, help="Times it reads before each step.")] = 1,
    start: Annotated[Path | None, Option(metavar="ADAPTER", help="Folder of an adapter to go on from.")] = None,
    rank: Annotated[int, Option(min=0, help="Of the LoRA matrices; 0 trains all weights.")] = 32,
    rate: Annotated[float, Option(help="Learning rate.")] = 5e-4,
    distil: Annotated[float, Option(min=0, help="Weight of the divergence from the full cache.")] = 1.0,
    next_token: Annotated[float, Option(min=0, help="Weight of the plain next-token loss (the paper's).")] = 0.0,
    hidden: Annotated[float, Option(min=0, help="Weight of the hidden states' distance from the full cache's.")] = 1.0,
    vocabulary: Annotated[float, Option(
        min=0.001, max=1, help="Share of the vocabulary that the loss is computed over; 1 is exact.")] = 0.125,
    full_documents: Annotated[float, Option(
        min=0, max=1, help="Share of the documents read with nothing dropped: it guards the full cache.")] = 0.1,
    validation: Annotated[str | None, Option(
        metavar="FILE|…", help="Text to measure progress on, at the start and at every checkpoint.")] = None,
    save_steps: Annotated[int, Option(min=1, help="Steps between checkpoints.")] = 50,
    seed: Annotated[int, Option(min=0, help="Of the data's order and the drawn policies.")] = 0,
    as_json: JsonOption = False,
    model: ModelOptions,
    policy: PolicyOptions,
) -> None:
    """Train a LoRA adapter (or all weights) so that anchors hold what their text said. Goes on where it stopped."""
    config, out = policy.config(), out.expanduser()
    for library in ("torch", "transformers", *(() if only_scorer else ("peft", "matplotlib"))):
        if importlib.util.find_spec(library) is None:
            raise ModelError(f"Training needs {library}, which is not installed: pip install 'anchorkv[train]'.")
    if validation:
        from anchorkv.train.trainer import fsdp_asked

        if fsdp_asked():
            raise ConfigError(
                "--validation runs on one process, which has a share of the model under FSDP; leave it out."
            )
    if model.engine == "llama":
        raise ConfigError("Training runs on the torch engine; leave out --engine llama.")
    source, first = model.model or str(builtin()), os.environ.get("RANK", "0") == "0"
    if only_scorer:
        report = _fit_scorer(source, data, out, tokens, length, seed, config, as_json)
    else:
        from anchorkv.train.trainer import Settings

        settings = Settings(
            model=source, data=data, policy=config, tokens=tokens, length=length, rows=rows,
            accumulation=accumulation, rank=rank, alpha=2 * rank, rate=rate, distil=distil, next_token=next_token,
            hidden=hidden, vocabulary=vocabulary, full_documents=full_documents,
            start=str(start.expanduser()) if start else None, seed=seed,
        )
        report = _train(settings, out, validation, save_steps, as_json or not first)
    if not first:  # of several processes one speaks
        return
    if as_json:
        print_json(report)
    else:
        for name, value in report.items():
            stdout().print(f"{name.replace('_', ' ')}: [bold]{value}[/]")


def _train(settings: Any, out: Path, validation: str | None, save_steps: int, quiet: bool) -> dict[str, Any]:
    from anchorkv.train.progress import Progress
    from anchorkv.train.trainer import train as run

    if done := _reached(settings, out):
        if not quiet:
            note(f"{out} has been trained on {done:,} tokens already, so there is nothing to do.")
        return {"adapter": str(out), "tokens": done}
    with work_bar("Loading", "tokens", quiet) as bar:
        progress = Progress(settings, out, validation, bar, None if quiet else stderr(), bar.say)
        run(settings, out, callbacks=(progress,), save_steps=save_steps)
        progress.report()
    return {"adapter": str(out), "tokens": progress.tokens, **progress.last}


def _reached(settings: Any, out: Path) -> int:
    """Tokens that a finished run of these settings was to train in `out`, where they are no fewer than asked for now;
    else 0."""
    from transformers.trainer_utils import get_last_checkpoint

    from anchorkv.train.trainer import SETTINGS

    last = get_last_checkpoint(str(out)) if out.is_dir() else None
    if last is None or not (out / POLICY_FILE).is_file():  # the policy is what a run writes last
        return 0
    try:
        found, state = (json.loads((Path(last) / name).read_text("utf-8")) for name in (SETTINGS, "trainer_state.json"))
        done, wanted = int(found["tokens"]), {**json.loads(settings.to_json()), "tokens": found["tokens"]}
        finished = found == wanted and state["global_step"] >= state["max_steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return done if finished and done >= settings.tokens else 0


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
