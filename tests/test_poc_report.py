"""The report as a page: every number is the JSON's, every text is text, every word is there in both languages."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import poc_example
import pytest
from bs4 import BeautifulSoup, Tag
from poc_example import HOSTILE

from anchorkv.errors import SavedStateError
from anchorkv.poc.report.html import SCRIPTS, render, write
from anchorkv.poc.report.numbers import KINDS, exact
from anchorkv.poc.report.place import Place, at
from anchorkv.poc.report.selection import KPI_KINDS, because, compared, slower
from anchorkv.poc.report.shown import FEATURES, Shown
from anchorkv.poc.report.words import LANGS, Words
from anchorkv.poc.results import Answering, Features, Figure, Lang, PocReport, Reason, Remark, Skipped, Speed, Verdict
from anchorkv.poc.rollout import rollout
from anchorkv.poc.rules import BECAUSE

REPORTS: dict[str, PocReport] = {lang: poc_example.report(lang) for lang in ("en", "ja")}


@pytest.fixture(scope="module", params=LANGS)
def lang(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def html(lang: str) -> str:
    return render(REPORTS[lang])


@pytest.fixture(scope="module")
def page(html: str) -> BeautifulSoup:
    return BeautifulSoup(html, "html.parser")


# --- numbers ---------------------------------------------------------------------------------------------------------

SCALES = {
    "%": 0.01, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "ms": 1e-3, "ミリ秒": 1e-3, "min": 60.0, "分": 60.0,
}


def said(text: str, kind: str) -> tuple[float, float]:
    """The value that a text says, and how far off its last digit may be. Reads it anew, without the page's own code."""
    found = re.search(r"-?[\d,]+(\.\d+)?", text)
    assert found, text
    unit = re.sub(r"[-\d.,\s]|smaller|分の1", "", text)
    scale = 1.0 if kind == "plain_minutes" else 0.01 if kind == "points" else SCALES.get(unit, 1.0)
    decimals = len(found[1] or ".") - 1
    return float(found[0].replace(",", "")) * scale, 0.5 * 10**-decimals * scale


def test_every_number_is_the_reports(page: BeautifulSoup, lang: str) -> None:
    known = json.loads(REPORTS[lang].to_json())
    planned = rollout(REPORTS[lang]).model_dump(mode="json")
    shown = page.find_all("data")
    assert len(shown) > 500
    for one in shown:
        document, _, pointer = str(one["data-path"]).rpartition("#")
        value = at(planned if document else known, pointer)
        if "data-minus" in one.attrs:
            value -= at(known, str(one["data-minus"]))
        if value is None:
            assert (one["value"], one.get_text()) == ("", "–")
            continue
        assert float(str(one["value"])) == value
        read, off = said(one.get_text(), str(one["data-kind"]))
        assert abs(read - value) <= off * 1.0001, (str(one), value)


def test_every_figure_of_every_way_is_shown(page: BeautifulSoup, lang: str) -> None:
    shown = {str(one["data-path"]) for one in page.find_all("data")}
    report = REPORTS[lang]
    for where, area in (("/overall", report.overall), *((f"/areas/{n}", a) for n, a in enumerate(report.areas))):
        for number, way in enumerate(area.ways):
            names = [
                "cells/end_bytes", "cells/end_cells", "cells/peak_bytes", "cells/peak_cells", "speed/prefill",
                "speed/prefill_ratio", "speed/decode", "speed/decode_ratio", "speed/first_token",
                "speed/first_token_ratio", "perplexity", "perplexity_ratio", "context_recovered", "answering/correct",
                "answering/share_of_full", "answering/agreement", "answering/recalled_cells",
                *(["reduction"] if way.policy != "full" else []),
            ]
            missing = {f"{where}/ways/{number}/{name}/value" for name in names} - shown
            assert not missing
        reasons = {f"{where}/verdict/reasons/{n}/value" for n, _ in enumerate(area.verdict.reasons)}
        assert reasons <= shown
    for number, row in enumerate(report.capacity.rows):
        names = set(type(row).model_fields) - {"model"}
        for side in ("full", "anchored"):
            if not getattr(row, f"machines_{side}"):
                names -= {f"machines_{side}", f"cost_{side}"}
        assert {f"/capacity/rows/{number}/{name}" for name in names} <= shown


@pytest.mark.parametrize(("value", "kind", "lang", "text"), [
    (11.34, "fewer", "en", "11.3× smaller"), (11.34, "fewer", "ja", "11.3分の1"), (1.084, "ratio", "ja", "1.08倍"),
    (0.953, "share", "en", "95%"), (12345.0, "count", "ja", "12,345"), (0.0214, "seconds", "ja", "21ミリ秒"),
    (46_080, "bytes", "en", "45.0 KiB"), (24 * 2**30, "bytes", "ja", "24.0 GiB"), (312.4, "plain", "en", "312"),
    (199.0, "minutes", "ja", "3.3分"), (None, "share", "en", "–"), (2**20, "bytes", "en", "1.00 MiB"),
])
def test_numbers_as_each_language_says_them(value: float | None, kind: str, lang: str, text: str) -> None:
    assert Words(lang).number(value, kind) == text


@pytest.mark.parametrize(("lang", "currency", "text"), [
    ("en", "EUR", "€1,450"), ("ja", "JPY", "￥1,450"), ("en", "CHF", "CHF\u00a01,450"), ("en", "USD", "$1,450"),
])
def test_money_as_each_language_says_it(lang: str, currency: str, text: str) -> None:
    assert Words(lang).number(1450.0, "money", currency=currency) == text


def test_a_threshold_is_said_as_it_was_set() -> None:
    w = Words("en")
    for value, kind, text in ((5.0, "fewer", "5× smaller"), (1.0, "ratio", "1×"), (1.25, "ratio", "1.25×"),
                              (0.95, "share", "95%"), (0.975, "share", "97.5%"), (4.0, "plain_minutes", "4 min")):
        assert w.number(value, kind, exact(value, kind)) == text


def test_a_value_that_only_just_misses_looks_different_from_its_limit() -> None:
    reason = Reason(kpi="perplexity", value=1.2504, limit=1.25, passed=False)
    value, limit = compared(Words("en"), Place(reason.model_dump(mode="json")))
    assert (value.striptags(), limit.striptags()) == ("1.2504×", "1.25×")


# --- words -----------------------------------------------------------------------------------------------------------


def test_both_languages_have_the_same_words() -> None:
    texts = [Words(lang).texts for lang in LANGS]
    assert texts[0].keys() == texts[1].keys()
    for key in texts[0]:
        english, japanese = (set(re.findall(r"{(\w+)}", text[key])) for text in texts)
        assert english == japanese, key
        assert all(text[key].strip() for text in texts), key


def test_japanese_is_japanese() -> None:
    """Nothing was left untranslated but names, units and signs."""
    plain = re.compile(r"(format|unit|currency|month|calculator\.type)\.|way\.anchored|.*\.comma|.*sha256")
    for key, text in Words("ja").texts.items():
        assert plain.match(key) or re.search(r"[ぁ-んァ-ヶ一-龠]", text), key
        assert not re.search(r"[ぁ-ん一-龠]\.$|[a-z]+[!?]$", text), key


class Recorder(Words):
    """Words that remember which of them were used."""

    def __init__(self, lang: str) -> None:
        super().__init__(lang)
        self.used: set[str] = set()
        texts, used = self.texts, self.used

        class Texts(dict[str, str]):
            def __getitem__(self, key: str) -> str:
                used.add(key)
                return super().__getitem__(key)

            def get(self, key: str, default: Any = None) -> Any:
                used.add(key)
                return super().get(key, default)

        self.texts = Texts(texts)

    def under(self, section: str) -> dict[str, str]:
        found = super().under(section)
        self.used.update(f"{section}.{key}" for key in found)
        return found


def variants() -> list[PocReport]:
    """Reports that between them show everything a report can say."""
    plain = REPORTS["en"]
    nothing = emptied(plain)
    case = plain.worst[0].model_copy(update={"kept": "", "recalled": "", "full_answer": ""})
    redacted = plain.model_copy(update={
        "redacted": True, "documents": (), "own_questions": True, "worst": (case,), "overall": plain.areas[0],
        "areas": tuple(area.model_copy(update={"suitability": area.suitability.model_copy(update={"drivers": ()})})
                       for area in plain.areas),
    })
    inputs = {**plain.capacity.inputs, "price": 0.0}
    free = plain.capacity.model_copy(update={"inputs": inputs, "rows": plain.capacity.rows[::-1]})
    conditions = itertools.product(("tokens", "watch.loss_gap", "watch.agreement", "features.tables"), "<>")
    many = zip(BECAUSE, itertools.cycle(conditions), itertools.cycle(("recall", "milder", "full")), strict=False)
    ruled = (*plain.rules, *(
        plain.rules[0].model_copy(update={"when": f"{name} {sign} 0.5", "because": why, "then": then})
        for why, (name, sign), then in many
    ))
    return [plain, nothing, redacted, plain.model_copy(update={
        "capacity": free, "rules": ruled, "overall": plain.areas[2],
    })]


def test_no_word_is_unused_and_none_is_missing() -> None:
    w = Recorder("en")
    for report in (*variants(), remarked("en")):
        render(report, w)
    plain = REPORTS["en"]
    for month in range(1, 13):
        dated = plain.model_copy(update={"created": f"2026-{month:02}-03T04:05:06"})
        assert Shown(Place(dated.model_dump(mode="json")), w).created
    for kpi, passed in itertools.product(KPI_KINDS, (True, False, None)):
        kind = {True: "adopt_with_recall", False: "do_not_use", None: "not_enough_data"}[passed]
        reason = Reason(kpi=kpi, value=0.5, limit=1.5, passed=passed)
        verdict = Verdict(kind=kind, policy="default", recall="on", reasons=(reason,))
        for ways in (plain.overall.ways, plain.overall.ways[:1]):
            area = plain.overall.model_copy(update={"verdict": verdict, "ways": ways})
            assert because(w, Place(area.model_dump(mode="json")))
    met = Reason(kpi="memory", value=6, limit=5, passed=True)
    verdict = Verdict(kind="adopt", policy="default", recall="off", reasons=(met, reason))
    area = plain.overall.model_copy(update={"verdict": verdict})
    said_ = because(w, Place(area.model_dump(mode="json"))).striptags()
    assert "6.00× smaller. Not judged: answers could not be compared" in said_
    for part in ("prefill", "first_token"):
        reason = Reason(kpi="speed", value=0.5, limit=1, passed=False, part=part)
        verdict = plain.overall.verdict.model_copy(update={"reasons": (reason,)})
        area = plain.overall.model_copy(update={"verdict": verdict})
        assert "0.50×" in slower(w, Place(area.model_dump(mode="json"))).striptags()
    for currency, kind in itertools.product(("EUR", "GBP", "JPY", "USD"), KINDS):
        w.number(1.0, kind, currency=currency)
    shown = Shown(Place(plain.model_dump(mode="json")), w)
    assert [shown.language(Place(code)) for code in ("en", "ja", "other", "xx")][2:] == ["other", "xx"]
    known = {f"rule.{because}" for because in BECAUSE} | {f"feature.{name}" for name in Features.model_fields}
    assert known <= w.texts.keys()
    unused = w.texts.keys() - w.used - known
    assert not unused


def test_a_verdict_without_a_comparison_says_so() -> None:
    verdict = Verdict(kind="not_enough_data", policy="full", recall="off", reasons=())
    area = REPORTS["en"].overall.model_copy(update={"verdict": verdict, "ways": REPORTS["en"].overall.ways[:1]})
    w = Words("en")
    assert because(w, Place(area.model_dump(mode="json"))) == w("because.nothing")


def test_the_calculator_has_the_words_that_it_says() -> None:
    script = files("anchorkv.poc.report").joinpath("calculator.js").read_text(encoding="utf-8")
    words = Words("en").under("calculator.script")
    asked = set(re.findall(r'(?:say\(|words\.)"?(\w+)', script))
    assert asked <= words.keys()
    assert {key for key in words if not key.startswith("note_")} <= asked


def test_the_example_has_every_verdict() -> None:
    kinds = [area.verdict.kind for area in REPORTS["en"].areas]
    assert set(kinds) == {"adopt", "adopt_with_recall", "do_not_use", "not_enough_data"}


# --- texts are texts -------------------------------------------------------------------------------------------------


def test_nothing_of_a_document_becomes_html(page: BeautifulSoup, html: str) -> None:
    assert not page.find_all("img")
    assert len(page.find_all("script")) == len(SCRIPTS) + 1
    assert page.h1 is not None
    assert page.h1.get_text() == f"Our texts {HOSTILE}"
    assert page.get_text().count(HOSTILE) > 10
    assert "49" not in str(page.h1)
    views = page.find_all(class_="view")
    assert [view.get_text() for view in views] == [
        "".join(token.text for token in document.view) for document in REPORTS["en"].documents if document.view
    ]
    data = page.find(id="capacity-data")
    assert isinstance(data, Tag)
    assert json.loads(str(data.string)) == json.loads(REPORTS["en"].capacity.model_dump_json())


def test_nothing_is_asked_of_any_other_place(page: BeautifulSoup, html: str) -> None:
    for element in page.find_all(True):
        for name, value in element.attrs.items():
            assert not name.startswith("on"), element
            assert name != "style", element
            if name in ("src", "href", "action", "data", "poster", "srcset"):
                assert str(value).startswith(("#", "data:,")), element
    for style in page.find_all("style"):
        assert not re.search(r"url\(|@import", str(style.string))


def test_the_policy_allows_the_pages_own_style_and_scripts_and_nothing_else(page: BeautifulSoup) -> None:
    meta = page.find("meta", attrs={"http-equiv": "Content-Security-Policy"})
    assert isinstance(meta, Tag)
    rules = dict(rule.strip().split(" ", 1) for rule in str(meta["content"]).split(";"))
    assert rules["default-src"] == "'none'"

    def hashes(elements: list[Tag]) -> set[str]:
        digests = (hashlib.sha256(str(element.string).encode()).digest() for element in elements)
        return {f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests}

    assert set(rules["script-src"].split()) == hashes(page.find_all("script", type=None))
    assert set(rules["style-src"].split()) == hashes(page.find_all("style"))


def test_a_redacted_report_says_so() -> None:
    report = REPORTS["en"].model_copy(update={"redacted": True})
    assert str(Words("en")("first.redacted")) in render(report)
    assert str(Words("en")("first.redacted")) not in render(REPORTS["en"])


# --- structure -------------------------------------------------------------------------------------------------------


def test_headings_landmarks_tables_and_pictures_have_names(page: BeautifulSoup, lang: str) -> None:
    assert page.html is not None
    assert page.html["lang"] == lang
    levels = [int(heading.name[1]) for heading in page.find_all(re.compile("^h[1-6]$"))]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert [len(page.find_all(name)) for name in ("header", "main", "nav", "footer")] == [1, 1, 1, 1]
    ids = [str(element["id"]) for element in page.find_all(id=True)]
    assert len(ids) == len(set(ids))
    for name in ("href", "aria-labelledby", "aria-describedby", "for", "clip-path"):
        for element in page.find_all(attrs={name: True}):
            for target in re.sub(r"url\(|\)|#", "", str(element[name])).split():
                assert target in ids or target == "data:,", (name, target)
    for table in page.find_all("table"):
        assert table.caption is not None
        assert table.caption.get_text(strip=True)
        assert all(cell.get("scope") for cell in table.find_all("th"))
    for svg in page.find_all("svg"):
        if svg.get("aria-hidden") != "true":
            assert svg["role"] == "img"
            assert [svg.find(tag).get_text() != "" for tag in ("title", "desc")] == [True, True]


def test_pictures_are_the_same_every_time_and_keep_their_text(lang: str, html: str, page: BeautifulSoup) -> None:
    assert render(REPORTS[lang]) == html
    plots = page.find_all("svg", class_="plot")
    assert len(plots) == 4
    texts = {text.get_text() for plot in plots for text in plot.find_all("text")}
    assert {"contracts", "議事録・稟議書"} <= texts
    assert not any("LABEL" in text for text in texts)
    for plot in plots:
        for element in plot.find_all(True):
            assert not str(element.get("fill", "none")).startswith("#"), element
            assert not str(element.get("stroke", "none")).startswith("#"), element


# --- little, and nothing ---------------------------------------------------------------------------------------------


def emptied(report: PocReport) -> PocReport:
    """A run that its budget ended at once: nothing but the full cache, and most figures unknown."""
    none = Figure()

    def of(area: Any) -> Any:
        full = area.ways[0].model_copy(update={
            "speed": Speed(**{name: none for name in Speed.model_fields if name != "length"}),
            "answering": Answering(**dict.fromkeys(Answering.model_fields, none)), "perplexity": none,
        })
        verdict = Verdict(kind="not_enough_data", policy="full", recall="off", reasons=())
        return area.model_copy(update={"ways": (full,), "verdict": verdict, "questions": 0})

    return report.model_copy(update={
        "overall": of(report.overall), "areas": tuple(map(of, report.areas[:1])), "worst": (), "rules": (),
        "documents": tuple(d.model_copy(update={"view": (), "memory_curve": ()}) for d in report.documents[:1]),
        "skipped": (), "left_out": (), "threads": None, "budget_minutes": None, "environment": {},
        "capacity": report.capacity.model_copy(update={"rows": ()}),
        "model": report.model.model_copy(update={"adapter": None}), "created": "some day",
    })


SAID = sorted(key.removeprefix("said.") for key in Words("en").texts if key.startswith("said."))
VALUES = dict.fromkeys(
    ("n", "all", "names", "minutes", "tokens", "why", "size", "most", "path", "way", "model"), "77 <i>"
)


def remarked(lang: Lang) -> PocReport:
    """A report with every remark there is, and one that only English has words for."""
    return REPORTS[lang].model_copy(update={
        "left_out": (
            *(Remark(text="in English", key=key, values=VALUES) for key in SAID), Remark(text="an <b>error</b>"),
        ),
        "skipped": tuple(Skipped(path="x.txt", reason="in English", key=key, values=VALUES) for key in SAID),
    })


@pytest.mark.parametrize("lang", LANGS)
def test_remarks_are_in_the_language_of_the_report(lang: Lang) -> None:
    text = render(remarked(lang))
    assert "in English" not in text
    assert text.count(str(Words(lang)("said.too_large", **VALUES))) == 2
    assert "an &lt;b&gt;error&lt;/b&gt;" in text
    assert "<i>" not in text


def test_a_run_that_measured_nothing_has_a_page_too() -> None:
    text = render(emptied(REPORTS["en"]))
    page = BeautifulSoup(text, "html.parser")
    assert not page.find_all("svg", class_="plot")
    assert str(Words("en")("because.nothing")) in text
    assert str(Words("en")("rollout.nothing")) in text


def test_written_whole_or_not_at_all(tmp_path: Path, html: str, lang: str) -> None:
    out = write(REPORTS[lang], tmp_path / "new" / "report.html")
    assert out.read_text(encoding="utf-8") == html
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(SavedStateError, match=r"cannot be written \(.*\); free some space or choose another --out\.$"):
        write(REPORTS[lang], tmp_path / "file" / "report.html")


def test_every_kind_of_number_has_its_unit() -> None:
    for lang, kind in itertools.product(LANGS, KINDS):
        assert Words(lang).number(1234.5, kind, currency="EUR")


def test_every_feature_is_shown() -> None:
    assert set(Features.model_fields) - set(FEATURES) == {"tokens", "language"}
