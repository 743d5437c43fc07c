"""`anchorkv capacity`: how many users a machine holds with a full cache and with anchors, and what that costs."""

from __future__ import annotations

from typing import Annotated, Any

from rich import box
from rich.table import Table
from typer import Option

from anchorkv.cli.options import JsonOption
from anchorkv.cli.screen import count, print_json, size, stdout, times
from anchorkv.errors import ConfigError
from anchorkv.poc.capacity import (
    BLOCKS,
    CapacityInputs,
    ModelShape,
    cache_bytes,
    chosen_reduction,
    nbytes,
    peak_cells,
    row,
    saving,
    weight_bytes,
)
from anchorkv.poc.results import CapacityRow
from anchorkv.poc.shapes import find, known

_ANCHORS = "Anchors: what a session keeps"
NOTES = {
    "sliding": "its sliding layers are counted as other software holds them for the full cache, and whole for anchors.",
    "hybrid": "it also has layers without keys and values; what those hold is the same on both sides and not counted.",
    "window": "the context is longer than the model was trained for; answers on such a text may be poor.",
}


def capacity(
    model: Annotated[list[str] | None, Option(
        "--model", "-m", metavar="NAME|ID|DIR|GGUF", show_default=", ".join(CapacityInputs().models),
        help="Known model, hub id, folder or GGUF file; repeatable. Weights are not loaded.")] = None,
    memory: Annotated[str, Option(metavar="SIZE", help="Of one machine, all its GPUs together.")] = "24GB",
    context: Annotated[int, Option(help="Tokens of one conversation.")] = 8192,
    users: Annotated[int, Option(help="Conversations that are live at the same time.")] = 50,
    price: Annotated[float, Option(help="Of one machine a month.", show_default="no costs")] = 0.0,
    currency: Annotated[str, Option(help="Of the price.")] = "USD",
    reserve: Annotated[float, Option(help="Share of the memory kept free for buffers and the system.")] = 0.1,
    weights: Annotated[str, Option(
        metavar="TYPE|SIZE", help="How weights are stored (f16, q8_0, q4_k …), or how large they are (16GB).")] = "f16",
    kv_type: Annotated[str, Option(help="How keys and values are stored: f32, f16, q8_0 or q4_0.")] = "f16",
    reduction: Annotated[float | None, Option(
        rich_help_panel=_ANCHORS, help="Full cells per cell kept, without recall, as measured by anchorkv poc.",
        show_default="12, the default policy's aim")] = None,
    sinks: Annotated[int, Option(rich_help_panel=_ANCHORS, help="First tokens never dropped.")] = 4,
    recent_window: Annotated[int, Option(rich_help_panel=_ANCHORS, help="Newest segments held whole.")] = 1,
    segment: Annotated[int, Option(rich_help_panel=_ANCHORS, help="Most tokens of a segment.")] = 64,
    recall_cells: Annotated[int, Option(rich_help_panel=_ANCHORS, help="Cells for recalled segments.")] = 256,
    reading_cells: Annotated[int, Option(
        rich_help_panel=_ANCHORS, help="Tokens of one forward on PyTorch; 0 on llama.cpp.")] = 0,
    cell_budget: Annotated[int | None, Option(rich_help_panel=_ANCHORS, help="Most cells kept.")] = None,
    list_models: Annotated[bool, Option("--list", help="List the known models, and stop.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Sessions a machine, machines and monthly cost, full cache against anchors; formulas: docs/capacity.md."""
    if list_models:
        _print_known(as_json)
        return
    kind, weight = _weights(weights)
    inputs = CapacityInputs(
        memory=nbytes(memory), context=context, users=users, price=price, currency=currency.upper(), reserve=reserve,
        weights=kind, kv_type=kv_type, reduction=reduction, sinks=sinks, recent_window=recent_window, segment=segment,
        recall_cells=recall_cells, reading_cells=reading_cells, cell_budget=cell_budget,
    )
    shapes = [find(name, weight) for name in model or inputs.models]
    found = [(shape, row(inputs, shape, chosen_reduction(inputs))) for shape in shapes]
    if as_json:
        print_json({"inputs": inputs.model_dump(), "models": [_as_dict(inputs, *pair) for pair in found]})
        return
    for shape, figures in found:
        _print(inputs, shape, figures)
    _print_assumptions(inputs)


def _weights(text: str) -> tuple[str, int]:
    """The type and, where `text` is a size, the bytes; else 0. Raises ConfigError for what is neither."""
    if text.lower() in BLOCKS:
        return text.lower(), 0
    try:
        return CapacityInputs().weights, nbytes(text)
    except ConfigError:
        types = ', '.join(BLOCKS)
        raise ConfigError(f"--weights takes a type ({types}) or a size like 16GB, not {text!r}.") from None


def _as_dict(inputs: CapacityInputs, shape: ModelShape, figures: CapacityRow) -> dict[str, Any]:
    return {
        **figures.model_dump(), "weight_bytes": weight_bytes(shape, inputs.weights), "saving": saving(figures),
        "problem": _problem(inputs, shape, figures), "notes": [NOTES[note] for note in shape.notes(inputs.context)],
    }


def _problem(inputs: CapacityInputs, shape: ModelShape, figures: CapacityRow) -> str:
    """What does not fit, as a sentence; "" where all does."""
    weights = weight_bytes(shape, inputs.weights)
    left = cache_bytes(inputs.memory, inputs.reserve, weights)
    if not left:
        return (
            f"The weights ({size(weights)}) do not fit into the memory ({size(inputs.memory)} less "
            f"{inputs.reserve:.0%}); take a larger machine or smaller weights (--weights q4_k)."
        )
    if not figures.sessions_anchored:
        return f"Beside the weights {size(left)} are left, less than one session takes; take a larger machine."
    if not figures.sessions_full:
        return f"Beside the weights {size(left)} are left, less than one session with a full cache takes."
    return ""


def _print(inputs: CapacityInputs, shape: ModelShape, figures: CapacityRow) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", title=shape.name, title_justify="left")
    for heading in ("", "full cache", "anchors", "gain"):
        table.add_column(heading, justify="right" if heading else "left")
    full, anchored = figures.full_bytes_session, figures.anchored_bytes_session
    table.add_row("KV memory of a session", size(full), size(anchored), times(full / anchored))
    held, more = figures.sessions_full, figures.sessions_anchored
    table.add_row("Sessions a machine", count(held), count(more), times(more / held) if held else "–")
    table.add_row(f"Machines for {count(inputs.users)} users", *_or_none(figures, count, "machines"))
    if inputs.price:
        table.add_row(f"{inputs.currency} a month", *_or_none(figures, count, "cost"))
    console = stdout()
    console.print(table)
    saved = saving(figures)
    if inputs.price and saved is not None:
        console.print(f"Saves {count(saved)} {inputs.currency} a month.", style="bold" if saved > 0 else "dim")
    problem = _problem(inputs, shape, figures)
    if problem:
        console.print(problem, style="yellow", soft_wrap=True)
    for note in shape.notes(inputs.context):
        console.print(f"{shape.name}: {NOTES[note]}", style="dim", soft_wrap=True, markup=False)


def _or_none(figures: CapacityRow, show: Any, name: str) -> tuple[str, str, str]:
    """Full, anchored and their ratio; a dash where no machine will do."""
    full, anchored = (
        getattr(figures, f"{name}_{side}") if getattr(figures, f"machines_{side}") else None
        for side in ("full", "anchored")
    )
    ratio = times(full / anchored) if full and anchored else "–"
    return show(full) if full is not None else "–", show(anchored) if anchored is not None else "–", ratio


def _print_assumptions(inputs: CapacityInputs) -> None:
    reduction = chosen_reduction(inputs)
    whence = "as you say" if inputs.reduction else "the default policy's aim, not a measurement"
    cells = count(peak_cells(inputs, reduction))
    stdout().print(
        f"\n{count(inputs.context)} tokens a session; anchors hold {cells} cells of them at the peak (reduction "
        f"{reduction:g}, {whence}). Keys and values {inputs.kv_type}, weights {inputs.weights} where no size is known, "
        f"{inputs.reserve:.0%} of {size(inputs.memory)} kept free. Memory alone is counted, not speed.",
        style="dim", soft_wrap=True,
    )


def _print_known(as_json: bool) -> None:
    if as_json:
        print_json({"models": [shape.model_dump() for shape in known()]})
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for heading in ("Model", "Layers", "KV heads", "Head", "Window", "Parameters"):
        table.add_column(heading, justify="left" if heading == "Model" else "right")
    for shape in known():
        table.add_row(
            shape.name, count(shape.layers), count(shape.kv_heads), count(shape.head_dim), count(shape.window),
            count(shape.parameters),
        )
    stdout().print(table)
