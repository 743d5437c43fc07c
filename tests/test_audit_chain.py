"""Canonical JSON, hashes and the chain: the same text for the same value, and no tampering goes unseen."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest
from audit_records import SECRET, record
from hypothesis import given
from hypothesis import strategies as st

from anchorkv.serve.audit.chain import MOST_FAULTS, Entry, Head, verify
from anchorkv.serve.audit.errors import AuditError
from anchorkv.serve.audit.record import EVERY_TENANT, RETENTION, Record, canonical, digest, seal

ORIGIN = "0" * 64
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4), max_leaves=20,
)


def chain(count: int = 6, **fields: object) -> list[Entry]:
    entries, head = [], Head(0, ORIGIN)
    for number in range(count):
        entries.append(Entry.follow(head, seal(record(number, **fields))))
        head = Head(entries[-1].sequence, entries[-1].hash)
    return entries


def head_of(entries: list[Entry]) -> Head:
    return Head(entries[-1].sequence, entries[-1].hash)


def relink(entries: list[Entry], start: int = 0) -> list[Entry]:
    """What an attacker would do who knows how hashes are made: numbers, links and hashes anew from `start` on."""
    out = entries[:start]
    for entry in entries[start:]:
        last = out[-1] if out else None
        content_hash = digest(entry.content) if entry.content is not None else entry.content_hash
        changed = replace(
            entry, sequence=last.sequence + 1 if last else 1, previous=last.hash if last else ORIGIN,
            content_hash=content_hash,
        )
        out.append(replace(changed, hash=changed.computed_hash()))
    return out


# --- canonical JSON --------------------------------------------------------------------------------------------------


@given(VALUES)
def test_canonical_json_survives_reading_and_is_plain_ascii(value: object) -> None:
    text = canonical(value)
    assert text.isascii()
    assert canonical(json.loads(text)) == text


@given(st.dictionaries(st.text(), VALUES, max_size=6), st.randoms())
def test_the_order_of_keys_does_not_matter(value: dict[str, object], order: random.Random) -> None:
    items = list(value.items())
    order.shuffle(items)
    assert canonical(dict(items)) == canonical(value)


@given(VALUES, VALUES)
def test_different_values_have_different_texts(one: object, other: object) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (canonical(one) == canonical(other)) == same


@pytest.mark.parametrize(
    "value", [float("nan"), float("-inf"), {1: 2}, {"a": {2, 3}}, object(), b"x", [datetime.now()]]
)
def test_what_json_cannot_hold_is_refused_in_a_sentence(value: object) -> None:
    with pytest.raises(AuditError, match="audit record"):
        canonical({"figures": value})


def test_nesting_without_end_is_refused() -> None:
    value: list[object] = []
    value.append(value)
    with pytest.raises(AuditError, match="nested"):
        canonical(value)


def test_numbers_of_numpy_are_numbers() -> None:
    assert canonical([np.int64(3), np.float32(0.5), (1, 2)]) == "[3,0.5,[1,2]]"


# --- sealing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"id": ""}, {"tenant": ""}, {"tenant": EVERY_TENANT}, {"kind": RETENTION}, {"id": "a\x00b"}, {"id": "x" * 201},
        {"tenant": "a\nb"}, {"model": "\ud800"}, {"time": datetime(2026, 1, 1)},
    ],
    ids=repr,
)
def test_bad_names_and_times_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(AuditError):
        seal(record(1, **fields))


def test_without_text_no_word_is_left_and_figures_are() -> None:
    sealed = seal(record(1).without_text())
    assert "Anna" not in sealed.content
    assert "crowns" not in sealed.content
    body = json.loads(sealed.content)
    assert body["policy_config"]["pinned"] == [f"sha256:{digest(SECRET)}"]
    segment = body["segments"][0]
    assert not {"text", "anchors", "anchor_spans"} & segment.keys()
    figures = {"number": 0, "start": 0, "stop": 24, "tokens": 24, "kept": 4, "dropped": 20, "pinned": 0, "recalled": 0}
    assert {**segment, **figures, "why": ["4 sinks"]} == segment
    assert body["recalled"] == [{"number": 1, "cells": 33, "start": 24, "stop": 60}]
    assert body["figures"]["kept_cells"] == 40


def test_the_same_record_never_has_the_same_hash_so_nobody_can_guess_its_text() -> None:
    assert seal(record(1)).content_hash != seal(record(1)).content_hash


@given(st.text(st.characters(exclude_categories=()), min_size=1), VALUES)
def test_any_text_comes_back_as_it_was(answer: str, details: object) -> None:
    entry = Entry.follow(Head(0, ORIGIN), seal(Record(id="a", tenant="t", answer=answer, details={"x": details})))
    assert entry.body()["answer"] == json.loads(canonical(answer))
    assert canonical(entry.body()["details"]["x"]) == canonical(details)
    assert entry.computed_hash() == entry.hash


# --- the chain -------------------------------------------------------------------------------------------------------


def test_a_chain_that_nobody_touched_is_sound() -> None:
    entries = chain()
    report = verify(entries, ORIGIN, head_of(entries), [], [head_of(entries[:3]), Head(0, ORIGIN)])
    assert report.sound
    assert (report.records, report.retired) == (6, 0)
    assert verify([], ORIGIN, Head(0, ORIGIN), []).sound


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("name", list(chain(1)[0].columns()))
def test_a_change_of_any_column_of_any_record_is_seen_and_found(at: int, name: str) -> None:
    entries = chain()
    value = getattr(entries[at], name)
    changed = f"{value}x" if isinstance(value, str) else (value or 0) + 100
    damaged = [*entries[:at], replace(entries[at], **{name: changed}), *entries[at + 1 :]]
    report = verify(damaged, ORIGIN, head_of(entries), [])
    assert not report.sound
    assert damaged[at].sequence in {fault.sequence for fault in report.faults}


def without(entries: list[Entry], at: int) -> list[Entry]:
    return entries[:at] + entries[at + 1 :]


def swapped(entries: list[Entry]) -> list[Entry]:
    return [entries[0], entries[2], entries[1], *entries[3:]]


TAMPERING: dict[str, Callable[[list[Entry]], list[Entry]]] = {
    "the oldest deleted": lambda e: without(e, 0),
    "one in the middle deleted": lambda e: without(e, 2),
    "the newest deleted": lambda e: e[:-1],
    "all deleted": lambda e: [],
    "deleted and renumbered": lambda e: relink(without(e, 2)),
    "one put in, the rest renumbered": lambda e: relink([*e[:2], e[4], *e[2:]]),
    "one put at the end": lambda e: relink([*e, e[0]]),
    "two swapped": swapped,
    "two swapped and renumbered": lambda e: relink(swapped(e)),
    "changed, its own hash made to fit": lambda e: [*relink([*e[:3], replace(e[3], policy="x")], 3), *e[4:]],
    "changed, all hashes after it made to fit": lambda e: relink([*e[:3], replace(e[3], content="{}"), *e[4:]], 3),
    "content taken away without retention": lambda e: [*e[:3], replace(e[3], content=None), *e[4:]],
}


@pytest.mark.parametrize("name", TAMPERING)
def test_every_kind_of_tampering_is_seen(name: str) -> None:
    entries = chain()
    assert not verify(TAMPERING[name](entries), ORIGIN, head_of(entries), []).sound


def test_whoever_changes_the_head_too_is_seen_by_a_noted_head_alone() -> None:
    entries = chain()
    noted = head_of(entries)
    cut = entries[:4]
    assert verify(cut, ORIGIN, head_of(cut), []).sound, "what a chain cannot show"
    report = verify(cut, ORIGIN, head_of(cut), [], [noted])
    assert [str(fault) for fault in report.faults] == [
        "record 6: it was noted, but the chain ends before it: records were cut off"
    ]
    forged = relink([*entries[:3], replace(entries[3], content="{}"), *entries[4:]], 3)
    assert verify(forged, ORIGIN, head_of(forged), []).sound
    assert not verify(forged, ORIGIN, head_of(forged), [], [noted]).sound
    assert not verify(entries, ORIGIN, head_of(entries), [], [Head(0, "1" * 64)]).sound


def retention_after(entries: list[Entry], through: int, tenant: str) -> Entry:
    return Entry.follow(head_of(entries), seal(Record(id="r", tenant=tenant, kind=RETENTION), through=through))


@pytest.mark.parametrize(
    ("through", "tenant", "sound"),
    [(3, EVERY_TENANT, True), (3, "mill", True), (2, EVERY_TENANT, False), (3, "x", False)],
)
def test_retention_accounts_for_its_own_records_and_no_others(through: int, tenant: str, sound: bool) -> None:
    entries = chain()
    retention = retention_after(entries, through, tenant)
    retired = [replace(entry, content=None) if entry.sequence == 3 else entry for entry in entries]
    report = verify([*retired, retention], ORIGIN, Head(retention.sequence, retention.hash), [retention])
    assert report.sound == sound
    assert report.retired == 1


def test_a_retention_that_was_put_in_by_hand_breaks_the_chain() -> None:
    entries = chain()
    retention = retention_after(entries[:4], 3, EVERY_TENANT)
    retired = [replace(entry, content=None) for entry in entries[:3]]
    assert not verify([*retired, *entries[3:], retention], ORIGIN, head_of(entries), [retention]).sound


def test_a_wrecked_database_gives_a_bounded_report() -> None:
    entries = [replace(entry, content="{}") for entry in chain(2 * MOST_FAULTS)]
    report = verify(entries, ORIGIN, head_of(entries), [])
    assert report.damaged == 2 * MOST_FAULTS
    assert len(report.faults) == MOST_FAULTS


@given(st.text())
def test_heads_are_read_as_they_are_written_or_refused(text: str) -> None:
    try:
        head = Head.parse(text)
    except AuditError:
        return
    assert Head.parse(str(head)) == head


def test_a_head_survives_writing_it_down() -> None:
    head = head_of(chain())
    assert Head.parse(f" {head}\n") == head
