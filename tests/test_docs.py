"""What README.md and docs/design.md say: files that exist, command lines that parse, figures that were measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_deploy import commands, parse

ROOT = Path(__file__).resolve().parent.parent
README, DESIGN = ROOT / "README.md", ROOT / "docs" / "design.md"
PAGES = (README, ROOT / "README.ja.md", *sorted((ROOT / "docs").glob("*.md")))
_FILE = re.compile(r"`((?:[\w-]+/)*[\w.-]+\.(?:py|js|yml|yaml))`")
_LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
MADE = {"config.yaml", "recipe.yaml", "rollout.yaml", "plan.yaml"}
"""Files that a user has or a run writes."""


def results(name: str) -> Any:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def rows(text: str, columns: int) -> list[list[str]]:
    """The body of every table that has so many columns."""
    cells = [line.strip().strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in cells if len(row) == columns and "---" not in row[0]]


def test_files_that_the_design_names_exist() -> None:
    there = ["/" + path.relative_to(ROOT).as_posix() for folder in ("anchorkv", "tests", "benchmarks", "deploy")
             for path in (ROOT / folder).rglob("*")]
    named = set(_FILE.findall(DESIGN.read_text(encoding="utf-8"))) - MADE
    assert len(named) > 100
    assert [name for name in sorted(named) if not any(path.endswith(f"/{name}") for path in there)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    found = _LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in found if not (page.parent / link).exists()] == []


def test_every_command_line_of_the_readme_parses() -> None:
    found = list(commands(README))
    assert {words[0] for words in found} >= {"poc", "run", "chat", "eval", "train", "export", "serve", "audit"}
    for words in found:
        parse(words)


def test_the_readmes_speeds_are_those_of_the_results() -> None:
    measured = {
        (row["engine"], row["context"]): row for row in results("inference")["rows"] if row["policy"] == "default"
    }
    shown = [row for row in rows(README.read_text(encoding="utf-8"), 5) if row[0].startswith(("llama.cpp", "PyTorch"))]
    assert len(shown) > 3
    for engine, tokens, prefill, decode, cells in shown:
        row = measured["llama" if "llama" in engine else "torch", int(tokens.replace(",", ""))]
        assert prefill == f"{row['prefill_ratio']:.1f}×"
        assert decode == f"{row['decode_ratio']:.1f}×"
        assert cells == f"{row['kept_cells']} ({row['full_cells'] / row['kept_cells']:.1f}× fewer)"


def test_the_readmes_quality_is_that_of_the_results() -> None:
    measured = {(row["text"].split(".")[0], row["policy"]): row for row in results("adapter")["perplexity"]}
    texts = {"PG-19 books": "pg19", "WikiText": "wikitext2"}
    shown = [row for row in rows(README.read_text(encoding="utf-8"), 6) if row[0] in texts]
    assert len(shown) == 4
    for text, policy, fewer, ratio, recovered, window in shown:
        times = "24x" if "24" in policy else "12x"
        row, newest = (measured[texts[text], f"{name} {times}"] for name in ("default", "window"))
        assert fewer == f"{row['reduction']:.1f}×"
        assert ratio == f"{row['ratio']:.3f}"
        assert recovered == f"{row['context_recovered']:.0%}".replace("%", " %")
        assert window == f"{newest['context_recovered']:.0%}".replace("%", " %")
