"""A proof of concept's report with invented, plausible figures: five areas, two policies x three modes of recall.

Every text that may come from a user is hostile: if the page took one of them for HTML, the tests would see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from anchorkv.config import RecallMode, preset
from anchorkv.poc.capacity import CapacityInputs
from anchorkv.poc.results import (
    AnchorToken,
    Answering,
    AreaResult,
    Capacity,
    Cells,
    DocumentResult,
    Features,
    Figure,
    Lang,
    ModelFacts,
    PocReport,
    Skipped,
    Speed,
    Suitability,
    Thresholds,
    WayResult,
    WorstCase,
)
from anchorkv.poc.rules import rules
from anchorkv.poc.shapes import capacity, find
from anchorkv.poc.verdict import verdict

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror=\"window.hacked = 2\">{{ 7 * 7 }} & 'quoted' </main>"
CELL = 46_080
"""Bytes of a token's keys and values: SmolLM2-135M with f16 (30 layers, 3 heads of 64, two of them, two bytes)."""
MODES: tuple[RecallMode, ...] = ("off", "auto", "on")
LIMITS = Thresholds()


def figure(value: float | None, stderr: float | None = None, n: int = 12) -> Figure:
    return Figure(value=value, stderr=stderr, n=n)


def way(
    policy: str, recall: RecallMode, tokens: int, reduction: float, correct: float, *, full: float,
    ratio: float | None = 1.0, decode: float = 1.0, questions: int = 12,
) -> WayResult:
    """reduction, decode: against the full cache; correct, full: share of right answers, its own and the full cache's;
    ratio: of the perplexities."""
    kept = tokens / reduction
    recalled = {"off": 0.0, "auto": 61.0, "on": 212.0}[recall] if policy != "full" else 0.0
    return WayResult(
        policy=policy, recall=recall,
        cells=Cells(
            end_cells=figure(kept, kept / 40), peak_cells=figure(kept * 1.12, kept / 40),
            end_bytes=figure(kept * CELL, kept * CELL / 40), peak_bytes=figure(kept * 1.12 * CELL, kept * CELL / 40),
        ),
        reduction=figure(reduction, reduction / 31), speed=Speed(
            prefill=figure(171.3 * (1 + (decode - 1) / 3), 4.1, 5), decode=figure(31.7 * decode, 0.9, 5),
            first_token=figure(0.412 / decode, 0.021, 5), prefill_ratio=figure(1 + (decode - 1) / 3, 0.034, 5),
            decode_ratio=figure(decode, 0.052 * decode, 5), first_token_ratio=figure(decode * 0.94, 0.071, 5),
        ),
        perplexity=figure(19.42 * (ratio or 1), 0.61), perplexity_ratio=figure(ratio, 0.013 if ratio else None),
        context_recovered=figure(1.0 if policy == "full" else 0.82, 0.03), answering=Answering(
            correct=figure(correct, math.sqrt(correct * (1 - correct) / questions), questions),
            share_of_full=figure(correct / full, 0.061, questions),
            agreement=figure(1.0 if policy == "full" else 0.45 + correct / 2, 0.083, questions),
            answer_loss=figure(1.21 + 2.6 * (1 - correct / full), 0.19, questions),
            recalled_cells=figure(recalled, 3.2),
        ),
    )


def ways(
    tokens: int, reduction: float, rights: Sequence[float], full: float, ratio: float | None, decode: float
) -> tuple[WayResult, ...]:
    """rights: share of right answers with the policy "default" by mode of recall; "half" keeps twice the cells."""
    found = [way("full", "off", tokens, 1.0, full, full=full)]
    for policy, less, gain in (("default", 1.0, 0.0), ("half & half <b>", 2.0, 0.05)):
        for mode, right in zip(MODES, rights, strict=True):
            found.append(way(
                policy, mode, tokens, reduction / less * {"off": 1.0, "auto": 0.93, "on": 0.8}[mode],
                min(right + gain, full), full=full, ratio=1 + (ratio - 1) / less if ratio else None,
                decode=1 + (decode - 1) / less,
            ))
    return tuple(found)


def area(
    name: str, rights: Sequence[float], *, tokens: int = 3_412,
    reduction: float = 11.3, full: float = 0.75, ratio: float | None = 1.08, decode: float = 1.62, language: str = "en",
    tables: float = 0.02, documents: int = 2, questions: int = 12, level: Any = "good", outside: bool = False,
) -> AreaResult:
    found = ways(tokens, reduction, rights, full, ratio, decode)
    return AreaResult(
        name=name, documents=documents, questions=questions, tokens=tokens * documents, ways=found,
        verdict=verdict(found, LIMITS, questions), features=Features(
            tokens=tokens * documents, segment_tokens=27.4, numbers=0.061, names=0.083, code=0.004, tables=tables,
            redundancy=0.58, repeated_names=0.41, rare_words=0.112,
            returning_terms=0.127, returning_phrases=0.031, japanese=0.94 if language == "ja" else 0.0,
            language=language,
        ), suitability=Suitability(
            expected_ratio=(ratio or 1.1) * 1.03, error=0.08, level=level,
            drivers=("repeated_names", "numbers", "segment_tokens"), effects=(0.94, 1.12, 1.03), outside=outside,
        ),
    )


def document(of: AreaResult, number: int, tokens: int, language: str) -> DocumentResult:
    texts = {
        "en": "The| supplier| pays| a| contract|ual| penalty| of| 0.5| %|.|\n",
        "ja": "受注|者|は|、|納期|に|遅れ|た|場合|、|違約金|を|支払|う|。|\n",
    }[language].split("|") * 12 + [HOSTILE]
    kinds = ["whole"] * 4 + ["anchor" if at % 11 in (2, 8) else "recalled" if 60 < at < 74 else "dropped"
                             for at in range(4, len(texts) - 20)] + ["whole"] * 20
    steps = [*range(256, tokens, 256), tokens]
    return DocumentResult(
        id=f"{of.name}/{number}.txt", area=of.name, title=f"{of.name} {number} {HOSTILE}", tokens=tokens,
        sha256=f"{number:064x}", ways=of.ways,
        memory_curve=tuple((at, at, min(at, round(64 + at / 12))) for at in steps),
        view=tuple(AnchorToken(text=text, kind=kind) for text, kind in zip(texts, kinds, strict=True))  # type: ignore[arg-type]
        if number == 1 else (),
    )


def worst(area: str, language: str) -> WorstCase:
    question, expected, passage, kept = {
        "en": (
            "What is the daily penalty for late delivery?", "0.5 %",
            "The supplier pays a contractual penalty of 0.5 % of the order's value for every day of delay.",
            "… supplier … penalty … delay.",
        ),
        "ja": (
            "納期に遅れた場合の違約金は、1日あたり何パーセントですか。", "0.5パーセント",
            "受注者は、納期に遅れた場合、遅延1日につき契約金額の0.5パーセントに相当する違約金を支払うものとする。",
            "…納期に遅れ…違約金…。",
        ),
    }[language]
    return WorstCase(
        area=area, document=f"{area}/1.txt", question=question, expected=expected, full_answer=f"0.5 % {HOSTILE}",
        answers={"off": "5 %", "auto": "0.5 %", "on": "0.5 % of the value"},
        correct={"full": True, "off": False, "auto": True, "on": True}, lost=passage, kept=kept, recalled=passage,
    )


def report(lang: Lang = "en", **changes: Any) -> PocReport:
    """changes: fields of the report that a test wants otherwise."""
    areas = (
        area("contracts", (0.75, 0.75, 0.74)),
        area("support logs & tickets", (0.5, 0.74, 0.73), decode=1.44, ratio=1.17),
        area("manuals", (0.25, 0.41, 0.49), ratio=1.62, tables=0.31, level="poor", decode=1.31),
        area("議事録・稟議書", (0.42, 0.66, 0.66), full=0.67, language="ja", level="fair",
             ratio=1.21, outside=True, tokens=2_871),
        area(f"meetings {HOSTILE}", (0.5, 0.5, 0.5), full=0.5, documents=1, questions=3,
             tokens=611, reduction=6.4, decode=1.07, ratio=None, level="fair"),
    )
    overall = area("", (0.5, 0.715, 0.71), questions=51, documents=9, ratio=1.19, decode=1.47)
    fields: dict[str, Any] = {
        "anchorkv_version": "0.1.0", "created": "2025-11-25T17:40:00+09:00", "title": f"Our texts {HOSTILE}",
        "lang": lang,
        "redacted": False, "seconds": 221.4, "model": ModelFacts(
            name="SmolLM2-135M-Instruct", weights="Q8_0", engine="llama.cpp", adapter="SmolLM2-135M-Instruct",
            architecture="llama", layers=30, window=8192, cell_bytes=CELL, fingerprint="3f9c" * 16,
        ), "environment": {
            "versions": {"anchorkv": "0.1.0", "python": "3.11.9", "llama-cpp-python": "0.3.36"},
            "hardware": {"processor": "Example CPU @ 2.40GHz", "cores": 2, "usable_cores": 2, "memory": 8_250_000_000,
                         "system": "Linux-6.1-x86_64"},
            "date": "2025-11-25",
        }, "policies": {"default": preset("default"), "half & half <b>": preset("default").replace(reduction=6.0)},
        "recall_modes": MODES, "budget_minutes": 4.0, "seed": 7, "threads": 2, "thresholds": LIMITS, "overall": overall,
        "areas": areas, "documents": tuple(
            document(one, number, one.tokens // one.documents + 97 * number, one.features.language)
            for one in areas for number in range(1, one.documents + 1)
        ), "worst": (worst(areas[0].name, "en"), worst(areas[3].name, "ja"), worst(areas[4].name, "en")),
        "capacity": machines(), "skipped": (Skipped(path=f"contracts/{HOSTILE}.bin", reason="it is not text"),
                       Skipped(path="manuals/huge.pdf", reason="it is larger than 20 MB")),
        "left_out": ("1 of 2 documents of manuals was not measured with recall on.",), "own_questions": False,
    }
    fields["rules"] = rules(overall, areas, fields["documents"], LIMITS)
    return PocReport(**{**fields, **changes})


def machines() -> Capacity:
    """What the capacity module makes of an invented machine."""
    inputs = CapacityInputs(machine="a server", memory="24GB", users=500, price=1450.0, currency="EUR")
    return capacity(inputs, find("SmolLM2-135M"), 11.3)
