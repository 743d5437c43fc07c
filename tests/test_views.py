"""What a ledger looks like: runs that keep characters whole, exact counts, an escaped and self-contained page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import numpy as np
import pytest
from fake_engine import FakeEngine
from rich.console import Console

from anchorkv.config import AnchorConfig, preset
from anchorkv.ledger import Ledger, State
from anchorkv.models import Model
from anchorkv.views.page import PageInput, render_page
from anchorkv.views.segments import ADDED, STATES, SegmentInfo, counts_of, segment_infos, segment_text
from anchorkv.views.terminal import MARKS, terminal_view

TEXT = "The engineer is Ada <Miller> & Co. She built 12 bridges in 1902. 猫は橋の下で眠る。それは冬である。\n" * 8


def reading(policy: AnchorConfig, text: str = TEXT) -> tuple[Ledger, list[SegmentInfo], PageInput]:
    engine = FakeEngine()
    document = Model(engine, policy).read_text(text, title="a <b> & \"c\"")
    segments = segment_infos(document.ledger, engine.tokenizer)
    page = PageInput(document.title, engine.info.name, policy, segments, document.accounting(), "Q <i>?", "A </script>")
    return document.ledger, segments, page


class Pieces:
    """A tokenizer whose tokens are given pieces."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    def piece(self, token: int) -> bytes:
        return self.pieces[token]


def ledger_of(states: Sequence[State], segments: Sequence[int], added: Sequence[int] = ()) -> Ledger:
    ledger = Ledger(0)
    for token, (state, segment) in enumerate(zip(states, segments, strict=True)):
        ledger.append(token, segment, state=state, added=token in added)
    return ledger


@pytest.mark.parametrize("name", ["default", "paper-ep", "paper-ac", "sepllm", "full"])
def test_nothing_is_lost_and_counts_agree(name: str) -> None:
    ledger, segments, page = reading(preset(name))
    shown = "".join(segment.text for segment in segments)
    assert shown.replace(ADDED, "") == "user\n" + TEXT
    assert sum(segment.tokens for segment in segments) == len(ledger)
    assert sum(segment.kept for segment in segments) == int(ledger.held().sum()) == page.accounting.kept_cells
    counts = counts_of(segments)
    assert counts["dropped"] + counts["evicted"] == ledger.counts()["dropped"]
    assert counts["anchor"] == ledger.counts()["anchor"]
    for segment in segments:
        assert sum(segment.counts.values()) == segment.tokens
        assert {state for state, _ in segment.why()} == set(segment.counts)


def test_a_character_in_several_tokens_is_shown_once_as_what_is_held() -> None:
    pieces = Pieces([b"a", b"\xe7", b"\x8c", b"\xab", b"b"])
    drop, anchor = State.DROPPED, State.ANCHOR
    (segment,) = segment_infos(ledger_of([drop, drop, anchor, drop, drop], [0] * 5), pieces)  # type: ignore[arg-type]
    assert [(run.text, run.state) for run in segment.runs] == [("a", "dropped"), ("猫", "anchor"), ("b", "dropped")]
    assert segment.counts == {"dropped": 4, "anchor": 1}
    assert segment.anchors == ("猫",)


def test_a_character_across_segments_belongs_to_the_first() -> None:
    pieces = Pieces([b"a\xe7\x8c", b"", b"\xabb", b"\xe7", b"c"])
    ledger = ledger_of([State.DROPPED, State.ANCHOR, State.WHOLE, State.WHOLE, State.WHOLE], [0, 0, 1, 1, 1], added=[1])
    first, second = segment_infos(ledger, pieces)  # type: ignore[arg-type]
    assert first.text == "a猫b" + ADDED
    assert second.text == "\ufffdc"  # a character that never became whole
    assert (first.tokens, second.tokens) == (2, 3)


def test_evicted_anchors_are_told_apart() -> None:
    policy = preset("default").replace(cell_budget=160, reduction=4, recall="off")
    _, segments, _ = reading(policy, TEXT * 3)
    counts = counts_of(segments)
    assert counts["evicted"] > 0
    old = next(segment for segment in segments if segment.counts.get("evicted"))
    assert "cell budget" in dict(old.why())["evicted"]


def test_a_recalled_segment_shows_as_such() -> None:
    engine = FakeEngine()
    document = Model(engine, preset("default")).read_text(TEXT)
    number = document.ledger.dropped_segments()[1]
    assert document.session.recall(number, "asked for")
    segment = segment_infos(document.ledger, engine.tokenizer)[number]
    assert segment.counts.get("recalled")
    assert "asked for" in dict(segment.why())["recalled"]
    assert segment_text(document.ledger, engine.tokenizer, number) == segment.text


# --- terminal ------------------------------------------------------------------------------------------------------


def test_terminal_view_with_and_without_colours() -> None:
    _, segments, page = reading(preset("default"))
    for colours in (True, False):
        console = Console(width=80, color_system="truecolor" if colours else None, force_terminal=colours, record=True)
        with console.capture() as capture:
            for part in terminal_view("title", segments, page.accounting, colours):
                console.print(part)
        out = capture.get()
        assert ("\x1b[" in out) is colours
        assert ("[" in re.sub(r"\x1b\[[0-9;]*m", "", out)) is not colours
        assert f"{page.accounting.kept_cells:,} of" in out
        assert max(len(line) for line in re.sub(r"\x1b\[[0-9;]*m", "", out).splitlines()) <= 80
    assert set(MARKS) == set(STATES)


def test_terminal_view_has_no_control_characters() -> None:
    _, segments, page = reading(preset("paper-ep"), "Evil \x1b[31mred\x07 text. " * 20)
    console = Console(width=80, color_system=None, force_terminal=False)
    with console.capture() as capture:
        for part in terminal_view("t", segments, page.accounting, False):
            console.print(part)
    assert "\x1b" not in capture.get()


# --- page ----------------------------------------------------------------------------------------------------------


def test_page_is_self_contained_and_escaped() -> None:
    _, segments, page = reading(preset("default"))
    html = render_page(page)
    assert not re.search(r"""(src|href)\s*=|@import|url\(|https?://""", html)
    assert "&lt;Miller&gt; &amp; Co." in html
    assert "<Miller>" not in html
    assert "A &lt;/script&gt;" in html
    assert html.count("<script") == html.count("</script>") == 2
    assert html.count('role="option"') == len(segments)
    assert html.count('tabindex="0"') == 1
    for state, count in counts_of(segments).items():
        assert (f'data-state="{state}"' in html) is (count > 0)
    data = re.search(r'<script type="application/json" id="details">(.*?)</script>', html, re.DOTALL)
    assert data is not None
    details = json.loads(data.group(1))
    assert [detail["n"] for detail in details] == [segment.number for segment in segments]
    assert sum(detail["kept"] for detail in details) == page.accounting.kept_cells


def test_page_of_ten_thousand_tokens_stays_small() -> None:
    _, segments, page = reading(preset("default").replace(cell_budget=None), TEXT * 11)
    assert sum(segment.tokens for segment in segments) > 10_000
    html = render_page(page)
    assert len(html) < 1_500_000
    assert html.count("<span") < 10_000


def test_states_follow_the_ledger() -> None:
    ledger, segments, _ = reading(preset("sepllm"))
    sinks = int(np.sum(ledger.column("state") == State.SINK))
    assert counts_of(segments)["sink"] == sinks == 4
