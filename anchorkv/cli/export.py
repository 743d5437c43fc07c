"""`anchorkv export`: a trained adapter becomes one GGUF file, checked against the adapter where PyTorch is there."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from anchorkv.cli.options import JsonOption
from anchorkv.cli.screen import note, print_json, seconds, size, stderr, stdout, work_bar
from anchorkv.errors import ModelError
from anchorkv.export import BOUNDS, Agreement, MergedError, Settings, check_target, compare, merge, settings_of
from anchorkv.models import builtin

_NEEDED = ("torch", "transformers", "peft")


def export(
    adapter: Annotated[Path, Argument(
        metavar="ADAPTER", show_default=False, help="Folder of a PEFT LoRA adapter, with its policy and scorer.")],
    *,
    model: Annotated[str, Option(
        "--model", "-m", metavar="GGUF|default", help="GGUF file of the model that the adapter was trained on.")
    ] = "default",
    gguf: Annotated[str, Option("--gguf", metavar="KIND", help=f"One of {', '.join(BOUNDS)}.")] = "Q8_0",
    out: Annotated[Path, Option("--out", "-o", metavar="FILE", show_default=False, help="The GGUF file to write.")],
    as_json: JsonOption = False,
) -> None:
    """Merge a trained adapter into a GGUF file that needs no PyTorch; policy and scorer travel in it."""
    kind, base, adapter, out = gguf.upper(), _base(model), adapter.expanduser(), out.expanduser()
    settings = settings_of(adapter)
    check_target(base, out)
    # Written beside its place and moved there when it has passed: what was at --out before stays until then.
    unchecked = out.with_name(f"{out.name}.{os.getpid()}.unchecked")
    started = time.perf_counter()
    try:
        with work_bar(f"Writing {out.name}", "bytes", quiet=as_json) as report:
            merge(base, adapter, unchecked, kind, settings, report)
        took = time.perf_counter() - started
        agreement, reason = _checked(base, adapter, unchecked, kind, quiet=as_json)
        os.replace(unchecked, out)
    except OSError as error:
        raise ModelError(f"{out.parent} cannot be written to ({error.strerror}); choose another place.") from None
    finally:
        if unchecked.is_file():
            unchecked.unlink()
    if as_json:
        print_json(_report(out, base, kind, settings, took, agreement, reason))
        return
    console = stdout()
    with_it = [name for name, value in (("policy", settings.policy), ("scorer", settings.scorer)) if value is not None]
    console.print(
        f"Wrote {out} ({kind}, {size(out.stat().st_size)}) in {seconds(took)}, with "
        f"{' and '.join(with_it) or 'no policy and no scorer'} in it.", markup=False, soft_wrap=True,
    )
    if agreement is None:
        note(f"It was not verified: {reason}")
    else:
        console.print(
            f"Verified against the unmerged adapter over {agreement.tokens} tokens: mean KL {agreement.kl:.2g} a token "
            f"(at most {BOUNDS[kind]:g}), the same likeliest token after {agreement.argmax:.1%}.", soft_wrap=True,
        )


def _base(model: str) -> Path:
    """Raises ModelError for what is no GGUF file."""
    path = builtin() if model == "default" else Path(model).expanduser()
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                return path
    what = "is not a GGUF file" if path.exists() else "is no local file"
    raise ModelError(f"{path} {what}; give --model a GGUF file of the same model that the adapter was trained on.")


def _checked(
    base: Path, adapter: Path, merged: Path, kind: str, quiet: bool
) -> tuple[Agreement | None, str]:
    """How well the merged file agrees with the adapter, or None and why that is not known.

    Raises ModelError when it does not agree, or cannot be run.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return None, f"that needs {' and '.join(missing)} (pip install {' '.join(missing)})."
    console = stderr()
    console.quiet = quiet or not console.is_terminal
    try:
        with console.status("Comparing with the unmerged adapter …"):
            agreement = compare(base, adapter, merged)
    except MergedError as error:
        raise ModelError(f"The merged model cannot be run, so it was removed ({str(error).rstrip('.')}).") from None
    except ModelError as error:
        return None, f"PyTorch cannot run the unmerged adapter ({str(error).rstrip('.')})."
    if not agreement.kl <= BOUNDS[kind]:
        raise ModelError(
            f"The merged model differs from the adapter by a mean KL of {agreement.kl:.2g} a token, more than "
            f"{BOUNDS[kind]:g} for {kind}, so it was removed; was the adapter trained on {base.name}?"
        )
    return agreement, ""


def _report(
    out: Path, base: Path, kind: str, settings: Settings, took: float, agreement: Agreement | None, reason: str
) -> dict[str, Any]:
    return {
        "file": str(out), "bytes": out.stat().st_size, "weights": kind, "base": str(base), "seconds": took,
        "adapter": settings.name, "policy": settings.policy is not None, "scorer": settings.scorer is not None,
        "verified": agreement is not None,
        "agreement": None if agreement is None else {
            "tokens": agreement.tokens, "mean_kl": agreement.kl, "bound": BOUNDS[kind], "argmax": agreement.argmax,
        },
        "not_verified_because": reason or None,
    }
