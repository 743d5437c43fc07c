"""The pages as a reader uses them: headless Chromium, a real server, a tiny model."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import serving
import uvicorn
from serving import STORY

from anchorkv.engines.llama import LlamaEngine
from anchorkv.engines.torch import TorchEngine
from anchorkv.engines.torch_tokenizer import TorchTokenizer
from anchorkv.serve.app import make_app
from anchorkv.serve.pages.routes import PAGES
from anchorkv.serve.pages.words import LANGS, words
from anchorkv.serve.safeguard import Safeguard
from anchorkv.serve.service import Service
from anchorkv.serve.settings_groups import CanarySettings, FallbackSettings, WatchSettings
from tests.tiny import tiny_model, tiny_tokenizer

HOSTILE = "<img src=x onerror=hacked=1>"
SENDS, STREAMED = "#send", "article.assistant details.why"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    yield from serving.engine(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium; without it the tests fail in CI and are skipped elsewhere."""
    found = shutil.which("chromium")
    try:
        from playwright import sync_api

        if found is None:
            raise ImportError("there is no chromium")
    except ImportError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@contextmanager
def served(service: Service) -> Iterator[str]:
    """The address of a real server in a thread of its own."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="error", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.02)
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            service.trail.close()


@pytest.fixture(scope="module")
def site(model: LlamaEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose watch checks every answer."""
    service = serving.service(tmp_path_factory.mktemp("site"), model)
    guarded = Safeguard.of(
        service.scheduler, service.policies, WatchSettings(share=1.0, most_share=1.0), FallbackSettings(),
        CanarySettings(),
    )
    service.safeguard, service.ladder = guarded, guarded.ladder
    service.observers.append(guarded.watch)
    with served(service) as url:
        yield url


@contextmanager
def opened(browser: Any, url: str, width: int = 1280, allowed: str = "", **options: Any) -> Iterator[Any]:
    """A page; at its end, whatever it complained of, asked for elsewhere or ran is told. allowed: in a complaint."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    page, complaints = context.new_page(), []
    page.set_default_timeout(20_000)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(url) else complaints.append(request.url))
    try:
        yield page
        assert page.evaluate("window.hacked") is None
        assert [it for it in complaints if not (allowed and allowed in it)] == []
    finally:
        context.close()


def fits(page: Any, width: int) -> None:
    """Nothing is wider than the screen, but for tables that scroll by themselves."""
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    outside = page.evaluate("""(width) => [...document.querySelectorAll("body *")].filter((one) => {
      const box = one.getBoundingClientRect();
      return box.width && box.right > width + 1 && !one.closest(".scroll, .hidden, .skip, pre");
    }).map((one) => one.outerHTML.slice(0, 80))""", width)
    assert outside == []


def at_most(page: Any, tokens: int) -> None:
    """Set the length of answers, as soon as the page knows what may be set."""
    page.wait_for_selector("#most[max]", state="attached")
    page.evaluate(f"document.getElementById('most').value = {tokens}")


def asked(page: Any, question: str, most: int = 16) -> None:
    """Write a question and wait for the whole answer."""
    at_most(page, most)
    before = page.locator(STREAMED).count()
    page.fill("#text", question)
    page.press("#text", "Enter")
    page.locator(STREAMED).nth(before).wait_for()


def reasons_of(page: Any) -> Any:
    """Open the reasons of the first answer; they are filled when they are opened, a moment after the click."""
    page.locator("details.why summary").first.click()
    body = page.locator(".why-body").first
    body.locator("h3").first.wait_for()
    return body


def asks_with(page: Any, **more: Any) -> None:
    """What the page asks goes to the server with further fields."""
    def changed(route: Any) -> None:
        route.continue_(post_data=json.dumps({**json.loads(route.request.post_data), **more}))

    page.route("**/v1/chat/completions", changed)


@pytest.mark.slow
def test_a_chat_its_reasons_its_record_and_the_dashboard(browser: Any, site: str) -> None:
    with opened(browser, site) as page:
        page.goto(f"{site}/ui/?lang=en")
        page.wait_for_selector(".gauge")
        question = f"{STORY * 3} {HOSTILE}"
        asked(page, question)
        assert page.text_content("article.user .said") == question.strip()
        assert page.text_content("article.assistant .said")
        assert "fewer" in page.text_content(".foot")
        asked(page, "And the wheel?")
        reasons = reasons_of(page)
        assert "None was needed." in reasons.text_content()
        assert reasons.locator(".segment").count() > 5
        reasons.locator(".filter", has_text="anchors").click()
        shown = set(reasons.locator(".segments .segment").evaluate_all("all => all.map((one) => one.className)"))
        assert shown == {"segment anchors"}
        thinned = reasons.locator(".segments .segment").evaluate_all("""all => all.map((one) => ({
          said: one.querySelector(".said").textContent,
          marked: [...one.querySelectorAll("mark")].map((it) => it.textContent),
          anchors: [...one.querySelectorAll(".chip code")].map((it) => it.textContent.trim()),
          positions: [...one.querySelectorAll(".chip .at")].map((it) => Number(it.textContent.replace(/\\D/g, ""))),
        }))""")
        assert len(thinned) > 1
        for segment in thinned:
            assert len(segment["anchors"]) == len(segment["positions"]) > 0
            assert all(text in segment["said"] for text in segment["marked"])
        positions = [at for segment in thinned for at in segment["positions"]]
        assert positions == sorted(set(positions))
        assert words("en")["unseen.none"] in reasons.text_content()
        for width in (400, 768, 1600):
            fits(page, width)
        record = reasons.locator("a").get_attribute("href")
        page.goto(site + record)
        page.wait_for_selector("#record h2")
        assert page.text_content("#record h2") == record.partition("#")[2]
        assert HOSTILE in page.text_content("#record")
        fits(page, 400)
        page.click("text=← All records")
        page.wait_for_selector("#records td")
        assert page.locator("#records tbody tr").count() >= 2
        page.select_option("#fallback", "true")
        page.click("#filters button")
        page.wait_for_selector("text=No record fits these filters.")
        page.click("#verify")
        page.wait_for_selector("#verified .badge.met")
        page.goto(f"{site}/ui/dashboard")
        page.wait_for_selector("text=checks of the policy")  # the watch has checked both answers by then
        page.wait_for_selector("#kpis .card .badge")
        cards = page.locator("#kpis .card")
        assert cards.count() == 6
        assert re.search(r"[1-9]\d*(\.\d)?%", cards.first.locator(".number").text_content())
        assert page.locator("#quality tbody tr").count() >= 1
        fits(page, 400)


@pytest.mark.slow
@pytest.mark.parametrize(("lang", "scheme"), [("en", "dark"), ("ja", "light")])
def test_every_page_in_every_language_and_colour(browser: Any, site: str, lang: str, scheme: str) -> None:
    with opened(browser, site, color_scheme=scheme, locale="ja-JP" if lang == "ja" else "en-GB") as page:
        for name, path in PAGES.items():
            page.goto(site + path)
            assert page.title().startswith(words(lang)[f"page.{name}"])
            page.wait_for_load_state("networkidle")
            assert page.locator(".problem:visible").count() == 0
            for width in (400, 1280, 1600):
                fits(page, width)
            unnamed = page.evaluate("""() => [...document.querySelectorAll("button, input, select, textarea, a")]
            .filter(
              (one) => one.checkVisibility() && !(one.textContent.trim() || one.ariaLabel || one.labels?.length)
            ).map((one) => one.outerHTML)""")
            assert unnamed == []


@pytest.mark.slow
def test_documents_are_read_shown_asked_and_deleted(browser: Any, site: str, tmp_path: Path) -> None:
    file = tmp_path / "mill.txt"
    file.write_text(STORY * 4 + HOSTILE, "utf-8")
    with opened(browser, site) as page:
        page.goto(f"{site}/ui/documents?lang=ja")
        page.set_input_files("#file", str(file))
        page.fill("#title", HOSTILE)
        page.click("#upload button[type=submit]")
        page.wait_for_selector("#list tbody tr")
        assert page.text_content("#list td b") == HOSTILE
        page.click("#list .row-actions button >> nth=0")
        page.wait_for_selector("#view .segment")
        assert HOSTILE in page.text_content("#view h2")
        assert page.locator("#view .map rect").count() > 10
        fits(page, 400)
        page.click("#list .row-actions a")
        page.wait_for_selector("#document option:checked[value^=doc-]", state="attached")
        asked(page, "Who?")
        assert "doc-" in reasons_of(page).locator(".facts").text_content()
        page.goto(f"{site}/ui/documents")
        page.click("#list .row-actions .danger")
        page.click("#sure .danger")
        page.wait_for_selector("text=文書はまだありません。")


@pytest.mark.slow
@pytest.mark.parametrize("lang", LANGS)
def test_where_the_attention_went(browser: Any, tmp_path: Path, lang: str) -> None:
    engine = TorchEngine(tiny_model(), TorchTokenizer(tiny_tokenizer()))
    said = words(lang)
    with served(serving.service(tmp_path, engine)) as url, opened(browser, url) as page:
        page.goto(f"{url}/ui/?lang={lang}")
        asked(page, STORY * 2)
        assert said["unseen.unasked"] in reasons_of(page).text_content()
        page.click("#new")
        page.evaluate("document.getElementById('attention').checked = true")
        asked(page, STORY * 2)
        reasons = reasons_of(page)
        kinds = reasons.locator("ul.shares li")
        assert said["att.anchors"] in kinds.all_text_contents()[1]
        shares = [float(text.strip("%")) for text in kinds.locator(".n").all_text_contents()]
        assert sum(shares) == pytest.approx(100, abs=0.5)
        ranked = [float(text.strip("%")) for text in reasons.locator("ol.shares .n").all_text_contents()]
        assert ranked == sorted(ranked, reverse=True)
        assert f"{ranked[0]:g}%" in reasons.locator(".attention svg.map").get_attribute("aria-label")
        fits(page, 400)
        record = reasons.locator("a").get_attribute("href")
        page.goto(url + record)
        page.wait_for_selector("#record .attention")
        assert [float(it.strip("%")) for it in page.locator("#record ul.shares .n").all_text_contents()] == shares


@pytest.mark.slow
def test_a_hostile_answer_stays_text(browser: Any, site: str) -> None:
    """The real server is made to write markup, by a schema that allows nothing else."""
    schema = {"type": "json_schema", "json_schema": {"schema": {"enum": [HOSTILE]}}}
    with opened(browser, site) as page:
        asks_with(page, response_format=schema)
        page.goto(f"{site}/ui/?lang=en")
        asked(page, "Hello", 64)
        assert page.text_content("article.assistant .said").strip() == json.dumps(HOSTILE)
        reasons_of(page)
        assert page.locator("article img, .why-body img").count() == 0


@pytest.mark.slow
def test_an_answer_can_be_stopped_and_an_error_is_told(browser: Any, site: str) -> None:
    with opened(browser, site, allowed="400 (Bad Request)") as page:
        asks_with(page, ignore_eos=True)
        page.goto(f"{site}/ui/?lang=ja")
        at_most(page, 4096)
        page.fill("#text", "A long one")
        page.click(SENDS)
        page.wait_for_selector("article.assistant .said:not(:empty)")
        page.click("#stop")
        page.wait_for_selector("text=停止しました。")
        at_most(page, 99999)
        page.fill("#text", "Too long")
        page.click(SENDS)
        page.wait_for_selector("details.options[open] #most:invalid")
        assert page.locator("article.user").count() == 1
        at_most(page, 16)
        asks_with(page, max_tokens=99999)
        page.click(SENDS)
        page.wait_for_selector("article .problem")
        assert "max_tokens may be 4096 at most" in page.text_content("article .problem")


@pytest.mark.slow
def test_a_key_is_asked_for_and_kept_in_the_tab_alone(browser: Any, model: LlamaEngine, tmp_path: Path) -> None:
    keys = serving.keys(tmp_path, ("north", "operator"), ("north", "user"))
    service = serving.service(tmp_path, model, with_keys=True)
    with served(service) as url, opened(browser, url, allowed="status of 40") as page:
        page.goto(f"{url}/ui/?lang=en")
        page.fill("#key-text", "ak_wrong")
        page.click("#ask-key button[type=submit]")
        page.wait_for_selector("#ask-key .problem:visible")
        page.fill("#key-text", keys["north", "user"])
        page.click("#ask-key button[type=submit]")
        page.wait_for_selector(".gauge")
        asked(page, "Hello")
        stores = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
        assert stores == [0, 1, ""]
        page.goto(f"{url}/ui/dashboard")
        page.wait_for_selector("#problem .problem")
        assert "needs the role operator" in page.text_content("#problem")
        page.click("#key")
        page.fill("#key-text", keys["north", "operator"])
        page.press("#key-text", "Enter")
        page.wait_for_selector("#kpis .card")
        page.click("#key")
        page.wait_for_selector("#ask-key[open]")
        page.keyboard.press("Escape")
        page.wait_for_selector("#problem .problem")
        assert page.evaluate("sessionStorage.length") == 0


