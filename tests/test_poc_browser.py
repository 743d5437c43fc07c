"""The report in a real browser: headless Chromium opens it as a reader would, on a phone, at a desk and on paper."""

from __future__ import annotations

import io
import os
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import poc_example
import pypdf
import pytest

from anchorkv.poc.report.html import write
from anchorkv.poc.report.words import LANGS, Words
from anchorkv.poc.results import Reason

try:
    from playwright import sync_api
except ImportError:
    if os.environ.get("CI"):
        raise
    pytest.skip("playwright is not installed: pip install playwright", allow_module_level=True)

THEMES = ("light", "dark")
WIDTHS = (400, 768, 1280, 1600)
Open = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium, else Playwright's own; without either the tests fail in CI and are skipped elsewhere."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except sync_api.Error as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"no Chromium to open the report with: {str(error).splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    return {lang: write(poc_example.report(lang), folder / f"{lang}.html") for lang in ("en", "ja")}


@pytest.fixture(scope="module")
def opened(browser: Any, reports: dict[str, Path]) -> Open:
    """A page with the report; at its end, whatever it complained of or asked for is told."""
    @contextmanager
    def open_(lang: str, width: int = 1280, **options: Any) -> Iterator[Any]:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        page, complaints = context.new_page(), []
        url = reports[lang].as_uri()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: None if request.url in (url, "data:,") else complaints.append(request.url))
        page.goto(url)
        yield page
        if options.get("java_script_enabled", True):
            assert page.evaluate("window.hacked") is None
        assert complaints == []
        context.close()

    return open_


@pytest.mark.parametrize("lang", LANGS)
@pytest.mark.parametrize("theme", THEMES)
def test_every_width_and_theme(opened: Open, lang: str, theme: str) -> None:
    with opened(lang, color_scheme=theme) as page:
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") == width
            out_of_sight = page.evaluate("""(width) => [...document.querySelectorAll(".page *")].filter((one) => {
                const box = one.getBoundingClientRect();
                return box.width && box.right > width + 1 && !one.closest(".scroll, .hidden, .skip");
            }).map((one) => one.outerHTML.slice(0, 80))""", width)
            assert out_of_sight == []


# What a reader sees of every text: its colour, on the nearest ground that is not transparent.
CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = colour.map((value) => linear(value / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = rgb(getComputedStyle(one).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255];
  };
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const found = {};
  const note = (element, colour, kind) => {
    const value = ratio(rgb(colour).slice(0, 3), ground(element).slice(0, 3));
    const key = `${kind} ${element.tagName}.${element.getAttribute("class")} ${colour}`;
    found[key] = Math.min(found[key] ?? 99, value);
  };
  const walker = document.createTreeWalker(document.querySelector(".page"), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    note(element, element.closest("svg") ? style.fill : style.color, "text");
  }
  for (const control of document.querySelectorAll("input, select")) {
    note(control, getComputedStyle(control).color, "text");
  }
  for (const mark of document.querySelectorAll(".legend svg *")) {
    const style = getComputedStyle(mark);
    if (!mark.classList.contains("f-good")) note(mark, style.fill === "none" ? style.stroke : style.fill, "mark");
  }
  return found;
}"""


@pytest.mark.parametrize("theme", [*THEMES, "print"])
def test_text_and_marks_stand_out(opened: Open, theme: str) -> None:
    with opened("en", color_scheme="light" if theme == "light" else "dark") as page:
        if theme == "print":
            page.emulate_media(media="print", color_scheme="dark")
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        found = page.evaluate(CONTRAST)
        assert len(found) > 30
        assert {key: ratio for key, ratio in found.items() if ratio < (4.5 if key.startswith("text") else 3)} == {}


def test_the_theme_is_the_readers(opened: Open) -> None:
    grounds = []
    for theme in THEMES:
        with opened("en", color_scheme=theme) as page:
            grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]


@pytest.mark.parametrize("lang", LANGS)
def test_texts_of_pictures_are_whole_and_apart(opened: Open, lang: str) -> None:
    with opened(lang, 400) as page:
        found = page.evaluate("""() => [...document.querySelectorAll("svg.plot")].map((plot) => {
            const box = plot.viewBox.baseVal, texts = [...plot.querySelectorAll("text")].map((text) => [
                text.textContent, text.getBoundingClientRect()]), whole = plot.getBoundingClientRect();
            const out = texts.filter(([, b]) => b.left < whole.left - 1 || b.right > whole.right + 1
                || b.top < whole.top - 1 || b.bottom > whole.bottom + 1).map(([text]) => text);
            const meet = texts.flatMap(([a, p], i) => texts.slice(i + 1).filter(([, q]) => p.left < q.right - 1
                && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1).map(([b]) => `${a}|${b}`));
            return { out, meet, size: Math.min(...texts.map(([, b]) => b.height)), texts: texts.length };
        })""")
        assert len(found) == 4
        for plot in found:
            assert plot["texts"] > 5
            assert (plot["out"], plot["meet"]) == ([], [])
            assert plot["size"] >= 11


def test_the_keyboard_reaches_every_control(opened: Open) -> None:
    with opened("en") as page:
        wanted = page.evaluate("""() => [...document.querySelectorAll(
            "a[href], button, input, select, summary, [tabindex='0']")].filter((one) => one.checkVisibility())
            .map((one, number) => { one.dataset.wanted = number; return number; })""")
        seen, unmarked = [], []
        for _ in range(len(wanted) + 5):
            page.keyboard.press("Tab")
            at, marked = page.evaluate("""() => {
                const style = getComputedStyle(document.activeElement);
                return [document.activeElement.dataset.wanted, style.outlineStyle !== "none" && style.outlineWidth];
            }""")
            if at is not None:
                seen.append(int(at))
                unmarked += [] if marked else [at]
        assert sorted(set(seen)) == wanted
        assert seen[:2] == [0, 1]
        assert unmarked == []


def test_the_skip_link_leads_to_the_content(opened: Open) -> None:
    with opened("en") as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"


@pytest.mark.parametrize("lang", LANGS)
def test_every_control_and_picture_has_a_name(opened: Open, lang: str) -> None:
    with opened(lang) as page:
        nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, select, summary, a, section, "
            + "nav, article, figure, [role=region], svg:not([aria-hidden=true])")].filter((one) => {
            const by = (one.getAttribute("aria-labelledby") || "").split(" ").map((id) => document.getElementById(id));
            const names = [one.getAttribute("aria-label"), ...by.map((other) => other && other.textContent),
                ...(one.labels ? [...one.labels].map((label) => label.textContent) : []),
                ...(["BUTTON", "SUMMARY", "A"].includes(one.tagName) ? [one.textContent] : [])];
            return !names.some((name) => name && name.trim());
        }).map((one) => one.outerHTML.slice(0, 120))""")
        assert nameless == []


@pytest.mark.parametrize("lang", LANGS)
def test_the_calculator_starts_with_the_reports_figures_and_follows(opened: Open, lang: str) -> None:
    report = poc_example.report(lang)  # type: ignore[arg-type]
    first, inputs = report.capacity.rows[0], report.capacity.inputs
    with opened(lang) as page:
        def shown(name: str) -> str:
            return str(page.locator(f'[data-out="{name}"]').text_content())

        assert [shown(f"sessions-{side}") for side in ("full", "anchored")] == [
            f"{first.sessions_full:,}", f"{first.sessions_anchored:,}"]
        assert [shown(f"machines-{side}") for side in ("full", "anchored")] == [
            f"{first.machines_full:,}", f"{first.machines_anchored:,}"]
        assert shown("cost-full") == Words(lang).number(first.cost_full, "money", currency=inputs["currency"])
        before = {name: shown(name) for name in ("machines-full", "cost-full", "memory-full")}
        page.locator("#calc-users").fill(str(inputs["users"] * 10))
        page.locator("#calc-context").fill(str(inputs["context"] * 2))
        assert all(shown(name) != text for name, text in before.items())
        page.locator("#calc-users").fill("-1")
        assert page.locator(".calc-error").is_visible()
        page.locator("#calculator button[type=reset]").click()
        assert {name: shown(name) for name in before} == before


def test_without_scripts_the_figures_are_still_there(opened: Open) -> None:
    with opened("en", java_script_enabled=False) as page:
        assert page.locator("#calculator").is_hidden()
        assert page.locator("noscript").count() == 1
        assert page.locator("#capacity table").first.is_visible()


def test_nothing_moves_for_who_asked_for_that(opened: Open) -> None:
    with opened("en", reduced_motion="reduce") as page:
        assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    with opened("en", reduced_motion="no-preference") as page:
        assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "smooth"


def squeezed(text: str) -> str:
    """Without spaces, and with the characters that PDF's fonts have twice made one."""
    return "".join(unicodedata.normalize("NFKC", text).split())


@pytest.mark.slow
@pytest.mark.parametrize("lang", LANGS)
def test_on_paper(opened: Open, lang: str) -> None:
    w = Words(lang)
    with opened(lang, color_scheme="dark") as page:
        pages = pypdf.PdfReader(io.BytesIO(page.pdf(format="A4", print_background=True))).pages
        assert page.locator("details[open]").count() == 2
    assert 8 <= len(pages) <= 30
    texts = list(map(squeezed, (one.extract_text() for one in pages)))
    assert all(len(text) > 20 for text in texts)
    whole = "".join(texts)
    for key in ("plots.heading", "areas.heading", "worst.heading", "rollout.heading", "glossary.heading"):
        assert squeezed(str(w(key))) in whole, key
    assert "aging" in whole  # what is folded on the screen is shown


@pytest.mark.slow
@pytest.mark.parametrize("lang", LANGS)
def test_the_first_page_of_an_ordinary_report_holds_what_a_manager_needs(
    browser: Any, tmp_path: Path, lang: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poc_example, "HOSTILE", "")
    report = poc_example.report(lang)  # type: ignore[arg-type]
    slower = [Reason(kpi="speed", value=0.84, limit=0.9, passed=False, part=p) for p in ("prefill", "first_token")]
    areas = [area.model_copy(update={"verdict": area.verdict.model_copy(update={
        "reasons": (*area.verdict.reasons, *slower)})}) for area in (*report.areas, report.areas[0])]
    out = write(report.model_copy(update={"areas": tuple(areas)}), tmp_path / "report.html")
    page = browser.new_page()
    page.goto(out.as_uri())
    first = pypdf.PdfReader(io.BytesIO(page.pdf(format="A4"))).pages[0].extract_text()
    page.close()
    for key in ("first.kpis", "first.areas", "saving.heading", "saving.cost"):
        assert squeezed(str(Words(lang)(key))) in squeezed(first), key
