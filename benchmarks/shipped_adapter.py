"""The runs behind the figures of the adapter: what the package ships, and the paper's own anchors for comparison.

    python benchmarks/shipped_adapter.py train sel --data ../shared/data --out RUNS   # goes on from the shipped adapter
    python benchmarks/shipped_adapter.py train sel --data ../shared/data --out RUNS --fresh
    python benchmarks/shipped_adapter.py train ep --data ../shared/data --out RUNS    # the paper's: ends of sentences
    python benchmarks/shipped_adapter.py train ac --data ../shared/data --out RUNS    # the paper's: added tokens
    python benchmarks/shipped_adapter.py ship RUNS/sel                                # into the package

A stopped run goes on where it was. The last six books of pg19.train are never trained on; progress is measured on them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import yaml
from inference import ROOT
from safetensors.numpy import load_file, save_file

import anchorkv
from anchorkv.adapter import CONFIG, WEIGHTS
from anchorkv.cli.app import app
from anchorkv.config import preset
from anchorkv.export import POLICY_FILE, SCORER_FILE
from anchorkv.models import DEFAULT

HELD_OUT = 6
SHIPPED = ROOT / "anchorkv" / "shipped" / DEFAULT
MIXTURE = {  # file below lm/: weight, licence
    "pg19.fit": (4, "public domain"), "openstax_ccby.train": (1.5, "CC BY 4.0"), "enwiki_sample.train": (4, "CC BY-SA"),
    "state_union.train": (0.5, "public domain"), "qmsum_meetings.train": (1, "MIT"),
    "sourcegraph_handbook.train": (0.7, "Apache-2.0"), "eips.train": (0.5, "CC0 1.0"),
    "peps.train": (0.5, "public domain / CC0"), "rust_book.train": (0.5, "Apache-2.0 or MIT"),
}
PAPER = [
    "--length", "1024", "--tokens", "98304", "--save-steps", "24", "--rate", "5e-4", "--hidden", "0",
    "--full-documents", "0",
]
KINDS = {
    "sel": ["--policy", "default", "--length", "4096", "--tokens", "196608", "--save-steps", "24", "--rate", "3e-4"],
    "ep": ["--policy", "paper-ep", *PAPER],
    "ac": ["--policy", "paper-ac", *PAPER],
}


def recipe(data: Path, out: Path) -> Path:
    """The mixture as a YAML recipe in `out`, with the books split into those to read and those held out."""
    path = out / "recipe.yaml"
    if path.is_file():
        return path
    out.mkdir(parents=True, exist_ok=True)
    with gzip.open(data / "lm" / "pg19.train.jsonl.gz", "rt", encoding="utf-8") as file:
        books = list(file)
    for name, part in (("pg19.fit", books[:-HELD_OUT]), ("pg19.held", books[-HELD_OUT:])):
        with gzip.open(out / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(part)
    sources = [
        {
            "path": str(((out if name == "pg19.fit" else data / "lm") / f"{name}.jsonl.gz").resolve()),
            "weight": weight, "licence": licence,
        }
        for name, (weight, licence) in MIXTURE.items()
    ]
    path.write_text(yaml.safe_dump({"sources": sources}, sort_keys=False), encoding="utf-8")
    return path


def train(kind: str, data: Path, out: Path, fresh: bool, more: list[str]) -> None:
    """`anchorkv train` with the settings of `kind`."""
    mixture = recipe(data, out)
    start = ["--start", str(SHIPPED)] if kind == "sel" and not fresh else []
    app([
        "train", "--data", str(mixture), "--out", str(out / kind), "--validation", str(out / "pg19.held.jsonl.gz"),
        *KINDS[kind], *start, *more,
    ])


def ship(run: Path) -> None:
    """Copy a run's adapter into the package: halves, no path of the machine that it was trained on."""
    weights = load_file(run / WEIGHTS)
    save_file({name: w.astype(np.float16) for name, w in weights.items()}, SHIPPED / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((run / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = f"HuggingFaceTB/{DEFAULT}"
    config["target_modules"] = sorted(config["target_modules"])
    (SHIPPED / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    preset("default").save(SHIPPED / POLICY_FILE)
    for name in ("curves.png", "log.jsonl"):
        if (run / name).is_file():
            shutil.copyfile(run / name, SHIPPED / name)
    size = sum(file.stat().st_size for file in SHIPPED.iterdir())
    print(f"{SHIPPED.relative_to(ROOT)}: {size / 1e6:.1f} MB with {SCORER_FILE} (anchorkv {anchorkv.__version__})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("kind", choices=KINDS)
    training.add_argument("--data", type=Path, required=True)
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--fresh", action="store_true", help="sel: do not go on from the shipped adapter")
    shipping = commands.add_parser("ship")
    shipping.add_argument("run", type=Path)
    options, more = parser.parse_known_args()
    if options.command == "ship":
        ship(options.run)
    else:
        train(options.kind, options.data, options.out, options.fresh, more)


if __name__ == "__main__":
    main()
