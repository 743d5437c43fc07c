"""The pages over HTTP: words, headers, files, and the figures that the dashboard shows."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import serving
from serving import STORY, client, run, said

from anchorkv.engines.llama import LlamaEngine
from anchorkv.engines.torch import TorchEngine
from anchorkv.engines.torch_tokenizer import TorchTokenizer
from anchorkv.serve.audit.record import Record
from anchorkv.serve.audit.store import AuditStore
from anchorkv.serve.pages.recent import ENOUGH, Recent
from anchorkv.serve.pages.routes import PAGES, static
from anchorkv.serve.pages.words import LANGS, chosen, words
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaEngine]:
    yield from serving.engine(tmp_path_factory.mktemp("model"))


def test_every_language_has_the_same_words_with_the_same_values() -> None:
    first = words(LANGS[0])
    for lang in LANGS:
        assert list(words(lang)) == list(first) or set(words(lang)) == set(first)
        for key, text in words(lang).items():
            assert text.strip()
            assert set(re.findall(r"{(\w+)}", text)) == set(re.findall(r"{(\w+)}", first[key])), key


def test_every_word_is_used_and_every_used_word_is_there() -> None:
    package = files("anchorkv.serve.pages")
    templates = "".join(item.read_text() for item in package.joinpath("templates").iterdir())
    scripts = "".join(content.decode() for name, content in static().items() if name.endswith(".js"))
    found = words("en")
    used = set(re.findall(r'w\["([\w.]+)"\]', templates)) | {
        text for text in re.findall(r'"([a-z_]+\.[a-z0-9_]+)"', scripts) if text.partition(".")[0] in {
            key.partition(".")[0] for key in found
        }
    }
    starts = {*re.findall(r'w\["([\w.]+)" ~', templates), *re.findall(r"`([a-z]+\.)\$\{", scripts)}
    assert used <= set(found)
    unused = {key for key in found if key not in used and not key.startswith(tuple(starts))}
    assert unused == {"language"}  # which the links from one language to the other show


@pytest.mark.parametrize(("wishes", "lang"), [
    (("ja", None, "en"), "ja"), ((None, "ja", "en"), "ja"), ((None, None, "ja-JP,ja;q=0.9,en;q=0.8"), "ja"),
    ((None, None, "fr, en;q=0.3, ja;q=0.4"), "ja"), ((None, None, "ja;q=0, de"), "en"),
    (("xx", "<b>", ";;q=,=,"), "en"), ((None, None, None), "en"),
])
def test_the_language_that_is_wished_first(wishes: tuple[str | None, ...], lang: str) -> None:
    assert chosen(*wishes) == lang


# --- over HTTP -------------------------------------------------------------------------------------------------------


def test_pages_need_no_key_hold_no_data_and_run_nothing_but_their_own_files(
    model: LlamaEngine, tmp_path: Path
) -> None:
    serving.keys(tmp_path, ("north", "operator"))

    async def work() -> None:
        async with client(serving.service(tmp_path, model, with_keys=True)) as http:
            for path in PAGES.values():
                for lang in LANGS:
                    reply = await http.get(path, headers={"accept-language": lang})
                    assert reply.status_code == 200
                    assert f'<html lang="{lang}" data-keys="yes">' in reply.text
                    policy = reply.headers["content-security-policy"]
                    assert {"default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"} <= {
                        part.strip() for part in policy.split(";")
                    }
                    assert "unsafe" not in policy
                    assert re.findall(r"<script(?![^>]* src=)", reply.text) == []
                    assert re.findall(r"\son\w+=|\sstyle=|<style|https?://", reply.text) == []
                    for name in re.findall(r'(?:src|href)="(/ui/static/[^"]+)"', reply.text):
                        assert (await http.get(name)).status_code == 200
            for path in ("/v1/dashboard", "/v1/load", "/v1/documents", "/v1/audit"):
                assert (await http.get(path)).status_code == 401

    run(work())


def test_a_language_is_remembered_and_files_are_cached_by_what_they_hold(model: LlamaEngine, tmp_path: Path) -> None:
    async def work() -> None:
        async with client(serving.service(tmp_path, model)) as http:
            assert 'lang="ja"' in (await http.get("/ui/audit?lang=ja")).text
            assert '<html lang="ja"' in (await http.get("/ui/", headers={"accept-language": "en"})).text
            assert '<html lang="en"' in (await http.get("/ui/?lang=en")).text
            assert '<html lang="en"' in (await http.get("/ui/?lang=xx")).text
            assert (await http.get("/ui")).headers["location"] == "/ui/"
            first = await http.get("/ui/static/chat.js")
            assert first.headers["content-type"].startswith("text/javascript")
            again = await http.get("/ui/static/chat.js", headers={"if-none-match": first.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert (await http.get("/ui/words/ja.json")).json() == words("ja")
            for path in ("/ui/static/routes.py", "/ui/static/..%2froutes.py", "/ui/words/xx.json"):
                reply = await http.get(path)
                assert reply.status_code == 404
                assert reply.json()["error"]["message"]

    run(work())


def test_attention_is_offered_where_the_engine_tells_it(model: LlamaEngine, tmp_path: Path) -> None:
    teller = TorchEngine(tiny_model(), TorchTokenizer(tiny_tokenizer()))

    async def work(engine: Any, folder: Path) -> bool:
        async with client(serving.service(folder, engine)) as http:
            return 'id="attention"' in (await http.get("/ui/")).text

    assert not asyncio.run(work(model, tmp_path / "llama"))
    assert asyncio.run(work(teller, tmp_path / "torch"))


def test_the_dashboards_figures_are_those_of_the_answers(model: LlamaEngine, tmp_path: Path) -> None:
    keys = serving.keys(tmp_path, ("north", "operator"), ("south", "operator"), ("north", "user"))

    def key(tenant: str, role: Any) -> dict[str, str]:
        return {"authorization": f"Bearer {keys[tenant, role]}"}

    async def work() -> None:
        async with client(serving.service(tmp_path, model, with_keys=True)) as http:
            north = key("north", "operator")
            assert (await http.get("/v1/dashboard", headers=key("north", "user"))).status_code == 403
            empty = (await http.get("/v1/dashboard", headers=north)).json()
            assert empty["answers"] == {"count": 0}
            assert empty["watch"] is None
            figures = []
            for i in range(3):
                body = said(STORY * 3, seed=i, anchorkv={"policy": "full"} if i == 2 else {})
                figures.append((await http.post("/v1/chat/completions", json=body, headers=north)).json()["anchorkv"])
                found = (await http.get("/v1/dashboard", headers=north)).json()["answers"]
                assert found["count"] == i + 1
            kept, full = (sum(each["cells"][name] for each in figures) for name in ("kept", "full"))
            assert found["reduction"] == pytest.approx(full / kept)
            assert found["reduction"] > 1.5
            assert (found["speed_count"], found["full_speed_count"], found["speed_ratio"]) == (2, 1, None)
            assert found["fallback"]["value"] == 0 < found["fallback"]["high"] < 1
            other = (await http.get("/v1/dashboard", headers=key("south", "operator"))).json()
            assert other["answers"] == {"count": 0}
            assert other["thresholds"]["memory_reduction"] == 3

    run(work())


def test_speeds_are_compared_and_steps_counted_once_there_are_enough(tmp_path: Path) -> None:
    with contextlib.closing(AuditStore(tmp_path / "audit.db")) as store:
        recent = Recent(store)

        def answer(number: int, policy: str, seconds: float, steps: tuple[Any, ...] = ()) -> None:
            store.append(Record(id=f"{policy}-{number}", tenant="north", policy=policy, fallback=steps, figures={
                "full_cells": 100, "kept_cells": 20, "peak_cells": 40, "kv_bytes": 2000, "decode_seconds": seconds,
                "completion_tokens": 11, "first_token_seconds": 0.5,
            }))

        step = {"before": "own", "after": "full", "reason": "It was not sure."}
        for i in range(ENOUGH):
            assert recent.figures("north").get("speed_ratio") is None
            answer(i, "own", 1.0, ({**step, "dry_run": i > 0},))
            answer(i, "full", 2.0)
        found = recent.figures("north")
        assert found["speed_ratio"] == pytest.approx(2)
        assert found["reduction"] == pytest.approx(5)
        assert found["fallback_count"] == 1
        assert {(it["dry_run"], it["count"]) for it in found["steps"]} == {(False, 1), (True, ENOUGH - 1)}
        assert recent.figures("south") == {"count": 0}
