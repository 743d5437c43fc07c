"""The calculator on the report's page: its formulas are capacity.py's, and the form follows every change."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from capacity_cases import any_shape, assumptions, inputs, shape
from hypothesis import given, settings
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from anchorkv.poc import shapes
from anchorkv.poc.capacity import (
    CapacityInputs,
    ModelShape,
    cache_bytes,
    chosen_reduction,
    held_cells,
    row,
    saving,
    weight_bytes,
)

REPORT = Path(shapes.__file__).parent / "report"
GIB = 2**30


COMPARE = """({ code, cases }) => {
  const module = { exports: {} };
  new Function("module", code)(module);
  const c = module.exports;
  return cases.map(({ inputs, shape }) => {
    const weights = c.weightBytes(shape, inputs.weights);
    return {
      row: c.row(inputs, shape), notes: c.notes(shape, inputs.context), held: c.heldCells(inputs, inputs.reduction),
      weights, cache: c.cacheBytes(inputs.memory, inputs.reserve, weights),
    };
  });
}"""


def in_javascript(request: pytest.FixtureRequest, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What calculator.js makes of the cases: under node, or in Chromium where there is none."""
    given_ = {"code": (REPORT / "calculator.js").read_text(), "cases": cases}
    if shutil.which("node") is None:
        tab = request.getfixturevalue("browser").new_page()
        there: list[dict[str, Any]] = tab.evaluate(COMPARE, given_)
        tab.close()
        return there
    script = f"process.stdout.write(JSON.stringify(({COMPARE})(JSON.parse(require('fs').readFileSync(0)))))"
    done = subprocess.run(
        ["node", "-e", script], input=json.dumps(given_), capture_output=True, text=True, check=True, timeout=60
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def expected(assumed: CapacityInputs, own: ModelShape) -> dict[str, Any]:
    reduction, weights = chosen_reduction(assumed), weight_bytes(own, assumed.weights)
    return {
        "row": row(assumed, own, reduction).model_dump(), "notes": list(own.notes(assumed.context)),
        "held": held_cells(assumed, reduction), "weights": weights,
        "cache": cache_bytes(assumed.memory, assumed.reserve, weights),
    }


def test_the_pages_formulas_equal_these(request: pytest.FixtureRequest) -> None:
    cases: list[tuple[CapacityInputs, ModelShape]] = []

    @settings(max_examples=400, database=None)
    @given(assumptions, any_shape())
    def collect(fields: dict[str, Any], model: dict[str, Any]) -> None:
        cases.append((inputs(**fields), ModelShape(**model)))

    collect()
    cases += [(inputs(reduction=11.8, price=1234.5), known) for known in shapes.known()]
    found = in_javascript(
        request, [{"inputs": assumed.model_dump(), "shape": own.model_dump()} for assumed, own in cases]
    )
    assert len(found) == len(cases) > 300
    for theirs, case in zip(found, cases, strict=True):
        assert theirs == expected(*case)


class Words:
    """As the report's own: texts by their keys."""

    def __init__(self, lang: str) -> None:
        self.lang = lang
        self.texts: dict[str, str] = {}
        self._add("", yaml.safe_load((REPORT / "words" / f"calculator.{lang}.yaml").read_text(encoding="utf-8")))

    def _add(self, above: str, tree: dict[str, Any]) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                self._add(f"{above}{key}.", value)
            else:
                self.texts[f"{above}{key}"] = value

    def __call__(self, key: str) -> str:
        return self.texts[key]

    def under(self, section: str) -> dict[str, str]:
        above = f"{section}."
        return {key.removeprefix(above): text for key, text in self.texts.items() if key.startswith(above)}


def page(lang: str, found: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(REPORT), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )
    fragment = environment.get_template("calculator.html.j2").render(
        w=Words(lang), capacity=found.model_dump(mode="json")
    )
    styles = (REPORT / "calculator.css").read_text()
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return (
        f'<!doctype html><html lang="{lang}"><head><meta charset="utf-8"><title>t</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<style>* {{ box-sizing: border-box }} .scroll {{ overflow-x: auto }} {styles}</style></head>"
        f'<body><div class="page">{fragment}</div>'
        f"<script>{(REPORT / 'calculator.js').read_text()}</script></body></html>"
    )


def test_both_languages_have_the_same_words() -> None:
    english, japanese = Words("en").texts, Words("ja").texts
    assert english.keys() == japanese.keys()
    for key, text in english.items():
        placed = {part.split("}")[0] for part in text.split("{")[1:]}
        assert placed == {part.split("}")[0] for part in japanese[key].split("{")[1:]}, key


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        except sync_api.Error as error:
            pytest.skip(f"chromium does not start ({str(error).splitlines()[0]})")
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens the calculator; fails the test for anything on the console and any request to another place."""
    said: list[str] = []
    context = browser.new_context(viewport={"width": 1100, "height": 900})

    def open_(lang: str, found: Any) -> Any:
        path = tmp_path / f"{lang}.html"
        path.write_text(page(lang, found), encoding="utf-8")
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: request.url.startswith("file:") or said.append(request.url))
        tab.goto(path.as_uri())
        return tab

    yield open_
    context.close()
    assert said == []


def figures_of(tab: Any) -> dict[str, str]:
    cells: dict[str, str] = tab.evaluate(
        "Object.fromEntries([...document.querySelectorAll('[data-out]')].map(x => [x.dataset.out, x.textContent]))"
    )
    return cells


def test_the_page_begins_with_the_reports_figures(opened: Any) -> None:
    found = shapes.capacity(inputs(price=1200, models=("Llama-3-8B", "Llama-3-70B")), None, 11.8)
    tab, first = opened("en", found), found.rows[0]
    shown = figures_of(tab)
    assert shown["sessions-full"] == f"{first.sessions_full:,}"
    assert shown["sessions-anchored"] == f"{first.sessions_anchored:,}"
    assert shown["machines-full"] == f"{first.machines_full:,}"
    assert shown["cost-full"] == f"${first.cost_full:,.0f}"
    saved = saving(first)
    assert saved is not None
    assert f"${saved:,.0f}" in shown["verdict"]
    listed = tab.locator(".calc-models tbody tr")
    assert [each.split("\t")[0] for each in listed.all_inner_texts()] == ["Llama-3-8B", "Llama-3-70B"]
    assert "–" in listed.nth(1).inner_text()


def test_every_change_on_the_page_is_followed(opened: Any) -> None:
    found = shapes.capacity(inputs(price=900, currency="JPY", models=("Llama-3-8B",)), None, 11.8)
    tab = opened("ja", found)
    for name, text, changed in (
        ("users", "333", {"users": 333}), ("context", "32000", {"context": 32000}),
        ("memory", "80", {"memory": "80GB"}), ("reserve", "25", {"reserve": 0.25}),
        ("reduction", "6.5", {"reduction": 6.5}), ("cell_budget", "3000", {"cell_budget": 3000}),
        ("recall_cells", "0", {"recall_cells": 0}), ("price", "150000", {"price": 150000}),
    ):
        tab.fill(f"[name={name}]", text)
        found = shapes.capacity(CapacityInputs(**{**found.inputs, **changed}))
        shown, wanted = figures_of(tab), found.rows[0]
        assert shown["sessions-full"] == f"{wanted.sessions_full:,}", name
        assert shown["sessions-anchored"] == f"{wanted.sessions_anchored:,}", name
        assert shown["machines-anchored"] == f"{wanted.machines_anchored:,}", name
        assert shown["cost-full"].lstrip("¥￥") == f"{wanted.cost_full:,.0f}", name
    tab.select_option("[name=kv_type]", "q8_0")
    tab.select_option("[name=model]", "Qwen2.5-7B")
    tab.select_option("[name=weights]", "q4_k")
    assumed = CapacityInputs(**{**found.inputs, "kv_type": "q8_0", "weights": "q4_k"})
    wanted, shown = row(assumed, shape("Qwen2.5-7B"), 6.5), figures_of(tab)
    assert shown["sessions-full"] == f"{wanted.sessions_full:,}"
    assert shown["sessions-anchored"] == f"{wanted.sessions_anchored:,}"
    assert tab.input_value("[name=layers]") == "28"
    tab.fill("[name=kv_heads]", "28")
    fields = {**shape("Qwen2.5-7B").model_dump(), "kv_heads": 28}
    edited = row(assumed, ModelShape(**fields), 6.5)
    assert figures_of(tab)["sessions-full"] == f"{edited.sessions_full:,}"
    tab.fill("[name=weight_bytes]", "10")
    edited = row(assumed, ModelShape(**{**fields, "weight_bytes": 10 * GIB}), 6.5)
    assert figures_of(tab)["sessions-anchored"] == f"{edited.sessions_anchored:,}"
    tab.click("button[type=reset]")
    assert tab.input_value("[name=users]") == "50"
    assert tab.input_value("[name=kv_heads]") == "8"


def test_a_wrong_entry_is_named_and_changes_nothing(opened: Any) -> None:
    tab = opened("en", shapes.capacity(inputs(models=("Llama-3-8B",)), None, 11.8))
    before = figures_of(tab)
    for name, text, label in (("users", "0", "Users"), ("users", "", "Users"), ("reduction", "0.5", "Reduction"),
                              ("currency", "12", "Currency"), ("sliding_layers", "3", "sliding window")):
        kept = tab.input_value(f"[name={name}]")
        tab.fill(f"[name={name}]", text)
        assert label in tab.inner_text(".calc-error")
        assert tab.get_attribute(f"[name={name}]", "aria-invalid") == "true"
        assert figures_of(tab) == before
        tab.fill(f"[name={name}]", kept)
        assert not tab.is_visible(".calc-error")
        assert figures_of(tab) == before


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_the_page_says_what_does_not_fit(opened: Any, lang: str) -> None:
    tab = opened(lang, shapes.capacity(inputs(models=("Llama-3-70B",)), None, 11.8))
    shown = figures_of(tab)
    assert "131 GiB" in shown["verdict"]
    assert shown["machines-full"] == shown["cost-anchored"] == "–"


@pytest.mark.parametrize("lang", ["en", "ja"])
@pytest.mark.parametrize("width", [400, 1600])
def test_no_width_overflows_and_every_field_has_a_label(opened: Any, lang: str, width: int) -> None:
    tab = opened(lang, shapes.capacity(inputs(models=("Llama-2-7B", "Gemma-2-9B"), price=1500), None, 11.8))
    tab.set_viewport_size({"width": width, "height": 900})
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    for field in tab.locator("input, select").all():
        assert field.evaluate("x => x.labels.length") == 1
        assert field.evaluate("x => !!document.getElementById(x.getAttribute('aria-describedby')).textContent")
    handlers = "[...document.querySelectorAll('*')].flatMap(x => x.getAttributeNames()).filter(x => x.startsWith('on'))"
    assert tab.evaluate(handlers) == []


def test_a_models_name_is_text_on_the_page(opened: Any) -> None:
    hostile = "</script><script>console.log('run')</script><img src=x onerror=console.log(1)>'\""
    own = ModelShape(name=hostile, layers=2, kv_heads=2, head_dim=16, weight_bytes=10**6)
    tab = opened("en", shapes.capacity(inputs(models=()), own, 8.0))
    assert hostile in figures_of(tab)["verdict"]
    assert hostile in tab.inner_text(".calc-models tbody")
