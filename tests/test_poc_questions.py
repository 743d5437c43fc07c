"""Questions that the user brings, and those that are made from a document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anchorkv import samples
from anchorkv.errors import DataError
from anchorkv.evaluate.metrics import contains
from anchorkv.poc.cloze import cloze
from anchorkv.poc.documents import Source, collect
from anchorkv.poc.questions import BadRow, own_questions
from anchorkv.poc.report.words import LANGS, Words

PUMP = (
    "The pump of deck 4 was bought in Hamburg on 3 May 2019. It cost $1,250 and weighs 38 kilograms with its frame.\n\n"
    "The crew inspects its seals and filters every 450 hours of running. Once opened, the oil lasts for 12 months. "
    "Report a leak to Anna Keller within 24 hours of finding it."
)
RULES = "出張者は、帰着後14日以内に、会社に対し報告書を提出する。東京23区内の宿泊費は、1泊あたり9,000円とする。"


def source(text: str, name: str = "manuals/pump.txt") -> Source:
    area, _, file = name.partition("/")
    return Source(id=name, area=area, title=Path(file).stem, path=name, text=text, sha256="")


SOURCES = [source(PUMP), source(RULES, "rules/travel.txt"), source("A pump costs money.", "other/pump.txt")]


def written(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


# --- the user's own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "text"), [
    ("q.jsonl", '{"question": "When?", "answers": ["3 May 2019", "May 2019"], "document": "manuals/pump.txt"}\n\n'),
    ("q.json", '[\n {"question": "When?", "answers": ["3 May 2019", "May 2019"], "document": "manuals/pump.txt"}\n]'),
    ("q.json", '{"question": "When?", "answers": ["3 May 2019", "May 2019"], "document": "manuals/pump.txt"}'),
    ("q.yaml", "- question: When?\n  answers: [3 May 2019, May 2019]\n  document: manuals/pump.txt\n"),
    ("q.csv", "Question,Answer,Answer 2,Document\nWhen?,3 May 2019,May 2019,manuals/pump.txt\n"),
    ("q.csv", "question;answer;answer2;document\nWhen?;3 May 2019;May 2019;MANUALS/pump.txt\n"),
])
def test_every_kind_of_file_gives_the_same_question(tmp_path: Path, name: str, text: str) -> None:
    (found,) = own_questions(written(tmp_path, name, text), SOURCES)
    assert (found.document, found.text, found.answers) == ("manuals/pump.txt", "When?", ("3 May 2019", "May 2019"))
    assert found.passage == "The pump of deck 4 was bought in Hamburg on 3 May 2019."
    assert found.own


def test_a_document_is_known_by_its_answer_where_only_one_has_it(tmp_path: Path) -> None:
    rows = [{"question": "How much?", "answer": "9,000円"}, {"question": "Where?", "answer": "hamburg"}]
    path = written(tmp_path, "q.jsonl", "\n".join(map(json.dumps, rows)))
    first, second = own_questions(path, SOURCES)
    assert (first.document, first.passage) == ("rules/travel.txt", "東京23区内の宿泊費は、1泊あたり9,000円とする。")
    assert second.document == "manuals/pump.txt"


def test_of_several_places_the_one_that_the_question_is_about(tmp_path: Path) -> None:
    text = "The fine for the deck is 20 euro. " + "Nothing happened. " * 30 + "The tax on every pump is 20 euro."
    row = {"question": "What tax is on a pump?", "answer": "20 euro", "document": "a/b.txt"}
    path = written(tmp_path, "q.jsonl", json.dumps(row))
    (found,) = own_questions(path, [source(text, "a/b.txt")])
    assert found.passage == "The tax on every pump is 20 euro."


BAD = "\n".join((
    '{"question": "When?", "answer": "3 May 2019", "document": "travel"}',
    '{"question": "When?", "answer": "3 May 2019", "document": "nothing.txt"}',
    '{"question": "Where?", "answer": "Hamburg"}',
    '{"question": "What?", "answer": "pump"}',
    '{"question": "What?", "answer": "money", "document": "pump"}',
    '{"question": "", "answer": "money"}',
    '{"question": "What?", "answer": []}',
    "no JSON", "[1]",
))


def test_bad_rows_are_told_with_their_lines_in_one_sentence(tmp_path: Path) -> None:
    path = written(tmp_path, "q.jsonl", BAD)
    with pytest.raises(DataError) as raised:
        own_questions(path, SOURCES)
    said = str(raised.value)
    first = "line 1: its answer does not stand in rules/travel.txt; line 2: there is no document 'nothing.txt'"
    assert said.startswith(f"{path} has 8 bad questions ({first}; line 4: ")
    assert "line 4: it names no document, and its answer stands in 2 of them" in said
    assert "and 3 more); mend them, or go on without (--skip-bad-rows)." in said


def test_bad_rows_are_passed_over_and_counted(tmp_path: Path) -> None:
    bad: list[BadRow] = []
    (found,) = own_questions(written(tmp_path, "q.jsonl", BAD), SOURCES, bad=bad)
    assert found.text == "Where?"
    assert [row.line for row in bad] == [1, 2, 4, 5, 6, 7, 8, 9]
    assert [row.reason for row in bad[3:]] == [
        "there are 2 documents 'pump', so name it with its folder", "it has no question", "it has no answer",
        "it is no JSON", "it is no row of question, answer and document",
    ]
    for lang in LANGS:
        assert all(Words(lang)(f"said.{row.key}", **row.values) for row in bad)
    assert Words("ja")("said.not_there", **bad[0].values) == "正解がrules/travel.txtに含まれていません"


@pytest.mark.parametrize(("name", "text", "words"), [
    ("q.txt", "question", "is no file of questions"),
    ("q.jsonl", "", "has no usable question"),
    ("q.csv", "when;what\n1;2\n", "has no columns question and answer"),
    ("q.yaml", "- a: [", "is not YAML"),
    ("q.yaml", "a: b", "is no list of questions"),
    ("q.json", '[\n{"question": "a"},\n{"quest', "no JSON from line 3 on"),
])
def test_a_file_that_is_none_of_questions(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        own_questions(written(tmp_path, name, text), SOURCES, bad=[])


def test_a_missing_and_a_binary_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file of questions"):
        own_questions(tmp_path / "q.csv", SOURCES)
    (tmp_path / "b.csv").write_bytes(bytes(range(256)) * 9)
    with pytest.raises(DataError, match="cannot be read"):
        own_questions(tmp_path / "b.csv", SOURCES)


def test_japanese_spreadsheets_are_read_in_their_own_encoding(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    path.write_bytes("question,answer,document\n報告書はいつまでに提出しますか。,14日以内,travel\n".encode("cp932"))
    (found,) = own_questions(path, SOURCES)
    assert found.passage == "出張者は、帰着後14日以内に、会社に対し報告書を提出する。"


def test_lines_of_yaml_and_csv(tmp_path: Path) -> None:
    bad: list[BadRow] = []
    for name, text in {
        "q.yaml": "# mine\n- {question: a, answer: Hamburg}\n- question: b\n",
        "q.csv": 'question,answer\n"a\nb",Hamburg\nc,nothing\n',
    }.items():
        own_questions(written(tmp_path, name, text), SOURCES, bad=bad)
    assert [row.line for row in bad] == [3, 4]


def test_the_samples_questions_have_their_passages() -> None:
    sources, _ = collect(samples.folder())
    found = own_questions(samples.questions(), sources)
    assert len(found) == len(samples.questions().read_text(encoding="utf-8").splitlines())
    texts = {one.id: one.text for one in sources}
    for question in found:
        assert question.passage in texts[question.document]
        assert contains(question.passage, question.answers), question


# --- cloze ---------------------------------------------------------------------------------------------------------


def test_facts_are_asked_for_with_the_words_that_lead_to_them() -> None:
    found = {question.answers[0]: question for question in cloze(source(PUMP), 6)}
    assert {"3 May 2019", "450 hours", "12 months", "24 hours"} <= found.keys()
    hours = found["450 hours"]
    assert hours.lead == "The crew inspects its seals and filters every"
    assert hours.text == f'Complete the sentence as it stands in the text: "{hours.lead} …"'
    assert hours.answers == ("450 hours", "450hours", "450")
    assert not hours.own


def test_japanese_facts() -> None:
    text = f"{RULES}この規程は、就業規則の定めにより令和3年4月1日から施行する。担当は、本社のサポートセンターとする。"
    found = {question.answers[0]: question for question in cloze(source(text), 6)}
    assert {"9,000円", "令和3年4月1日"} <= found.keys()
    assert found["令和3年4月1日"].text == "本文の文を引用してください。この規程は、就業規則の定めにより"
    assert found["9,000円"].lead in text


def test_a_fact_that_stands_twice_is_no_question() -> None:
    text = "The pump weighs with its frame about 38 kilograms. The motor weighs without its frame about 38 kilograms."
    assert not cloze(source(text), 4)


def test_facts_are_spread_over_the_document() -> None:
    ships = (chr(97 + n % 26) * (4 + n // 26) for n in range(60))
    text = " ".join(f"The crew of the ship {ship} counted {100 + n} whales." for n, ship in enumerate(ships))
    found = [text.index(question.passage) / len(text) for question in cloze(source(text), 6)]
    assert [int(6 * at) for at in found] == list(range(6))


def test_tables_links_and_labels_are_no_facts() -> None:
    text = "| item | the price of the item is 42 |\n\n1. The first\n\nSee for more of the same https://example.org/page/17\n"
    assert cloze(source(text), 4) == []


def test_the_samples_have_enough_questions_of_their_own_making() -> None:
    for one in collect(samples.folder())[0]:
        found = cloze(one, 6)
        assert len(found) >= 5, one.id
        for question in found:
            assert one.text.count(question.passage) == 1
            assert question.lead in " ".join(question.passage.split())
            assert contains(question.passage, question.answers)
            assert not contains(question.lead, question.answers)


def test_a_seed_gives_the_same_questions_and_another_others() -> None:
    one = collect(samples.folder())[0][3]
    assert cloze(one, 6, 1) == cloze(one, 6, 1)
    assert any(cloze(one, 6, seed) != cloze(one, 6, 1) for seed in range(2, 8))


WORDS = st.sampled_from([
    "The", "pump", "costs", "$40", "in", "12", "days.", "Anna", "Keller", "B-12", "\n", "第3条", "9,000円", "である。",
    "3.5", "%",
])


@given(st.lists(WORDS, max_size=60).map(" ".join), st.integers(0, 8))
def test_every_question_can_be_answered_from_its_passage(text: str, count: int) -> None:
    found = cloze(source(text), count)
    assert len(found) <= count
    for question in found:
        assert question.passage in text
        assert question.answers[0] in question.passage
        assert question.text
