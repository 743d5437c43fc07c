"""`anchorkv poc` on a fake engine: runs, resumes, budgets, bad input, and its sub-commands."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from command import Command
from fake_engine import FakeEngine
from rich.console import Console

import anchorkv.evaluate.statistics
import anchorkv.models
import anchorkv.poc.run
from anchorkv.evaluate.run import RECORDS, Models, Record
from anchorkv.poc import measure
from anchorkv.poc.live import View, final
from anchorkv.poc.plan import Plan
from anchorkv.poc.results import PocReport
from anchorkv.poc.rollout import Rollout
from anchorkv.poc.run import Run

SECRET = "The valve of Lisbon opens at 4711 bar."
call = Command("poc")
refused = call.refused


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeEngine:
    """Every command loads this engine, has its records at once, and writes into a folder of its own."""
    fake = FakeEngine()
    monkeypatch.setattr("anchorkv.poc.run.measure.measured", at_once)
    monkeypatch.setattr(anchorkv.shipped, "FOLDER", tmp_path / "nothing shipped")
    monkeypatch.setattr(anchorkv.models, "_engine", lambda *_: fake)
    monkeypatch.setattr(anchorkv.evaluate.statistics.bootstrap, "__defaults__", (0, 10))  # draws: errors are not tested
    monkeypatch.chdir(tmp_path)
    return fake


def at_once(models: Any, job: Any, plan: Any) -> Record:
    """A record as measure.py has it, invented: what is measured has tests of its own."""
    head = {"task": job.task, "way": job.way.name, "item": job.item.id, "area": job.item.source.area, "seconds": 0.5}
    tokens, full = len(job.item.source.text.encode()), job.way.name == "full"
    turns = [0.02, 0.021, 0.019]
    if job.task == "speed":
        answering = dict.fromkeys(("full", *plan.recall_modes), turns)
        return {**head, "length": tokens, "full_settings": {}, "samples": {
            "prefill": {"full": turns, "way": turns, "at": [0.0] * 3}, "decode": answering, "first_token": answering,
        }}
    blocks = [[64 * (2.0 if full else 2.1) + n, 64] for n in range(3)]
    if job.task == "ground":
        return {**head, "blocks": blocks, "tokens": tokens}
    kept = tokens if full else tokens // round(job.way.policy.reduction / 2)
    answer = {"answer": "4711 bar", "correct": True, "answer_loss": 1.0, "recalled_cells": 0, "recalled": SECRET,
              "kept_cells": kept, "peak_cells": kept + 9, "first_token_seconds": 0.1, "recalled_again": False}
    questions = [
        {"question": one.text, "accepted": list(one.answers), "passage": one.passage, "kept": "",
         "answers": dict.fromkeys(["off"] if full else plan.recall_modes, answer)}
        for one in job.item.questions
    ]
    return {**head, "tokens": tokens, "blocks": blocks, "curve": [[tokens, kept]], "read_seconds": 0.2,
            "kept_cells": kept, "peak_cells": kept + 9, "full_cells": tokens, "cell_bytes": 64, "questions": questions,
            "truncated": False, "unasked": 0, **({} if full else {"view": [[SECRET, "dropped"]]})}


@pytest.fixture(autouse=True)
def draw(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Pages are a line, which takes no second, but where a test undoes it by calling this."""
    plain = anchorkv.poc.files.write

    def line(report: PocReport, out: Path) -> Path:
        out.write_text(report.title, encoding="utf-8")
        return out

    monkeypatch.setattr("anchorkv.poc.files.write", line)
    return lambda: monkeypatch.setattr("anchorkv.poc.files.write", plain)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Two areas of two documents each, and questions on one of them."""
    folder = tmp_path / "texts"
    for area in ("logs", "manuals"):
        (folder / area).mkdir(parents=True)
        for number in (1, 2):
            lines = [f"The pump of deck {number}{n} in the {area} ran for {n + 30} hours." for n in range(8)]
            (folder / area / f"{number}.txt").write_text(" ".join([*lines, SECRET, f"End {number} {area}."]))
    return folder


def jobs_measured(monkeypatch: pytest.MonkeyPatch, then: Callable[[int], None] = lambda _: None) -> list[str]:
    """What is measured from now on; `then` is called with its number before each."""
    found: list[str] = []
    plain = measure.measured  # as it is patched already

    def measured(models: Any, job: Any, plan: Any) -> Record:
        then(len(found))
        found.append(" ".join(job.key))
        return plain(models, job, plan)

    monkeypatch.setattr("anchorkv.poc.run.measure.measured", measured)
    return found


# --- a run ---------------------------------------------------------------------------------------------------------


def test_a_folder_becomes_a_report(texts: Path, draw: Callable[[], None]) -> None:
    draw()
    result = call(texts, "--title", "Our texts")
    assert result.stdout.rstrip().splitlines()[-1] == "The report is in poc/texts/report.html"
    assert "logs" in result.stdout
    assert "manuals" in result.stdout
    out = Path("poc/texts")
    report = PocReport.from_json((out / "report.json").read_text(encoding="utf-8"))
    assert [area.name for area in report.areas] == ["logs", "manuals"]
    assert sorted(document.id for document in report.documents) == [
        "logs/1.txt", "logs/2.txt", "manuals/1.txt", "manuals/2.txt",
    ]
    assert report.title == "Our texts"
    assert not report.own_questions
    assert report.overall.questions == sum(area.questions for area in report.areas) > 8
    assert (out / "report.html").stat().st_size > 10_000
    assert Rollout.load(out / "rollout.yaml").policy
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "documents").glob("*.json"))]
    assert {file["document"]["id"] for file in files} == {document.id for document in report.documents}
    assert all({record["item"] for record in file["records"]} == {file["document"]["id"]} for file in files)
    assert not list(out.rglob("*.partial"))


def test_json_is_the_report_and_nothing_else(texts: Path) -> None:
    result = call(texts, "--json", "--out", "here")
    assert result.stdout == Path("here/report.json").read_text(encoding="utf-8")
    assert result.stderr.splitlines()[-1] == "The report is in here/report.html"


def test_every_area_has_its_first_document_before_any_has_its_second(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = jobs_measured(monkeypatch)
    call(texts)
    documents = [job for job in found if job.startswith("document")]
    assert [job.rpartition(" ")[2] for job in documents[:4]] == ["logs/1.txt"] * 2 + ["manuals/1.txt"] * 2


def test_without_a_folder_the_samples_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    found = jobs_measured(monkeypatch, stop_at(0))
    call("--max-tokens", 64, code=130)
    assert Path("poc/samples", "settings.json").is_file()
    assert found == []


def test_a_plan_is_run_with_what_the_command_line_changes(texts: Path) -> None:
    call("init", "--yes")
    plan = Path("poc.yaml").read_text(encoding="utf-8").replace("folder: null", "folder: texts")
    Path("poc.yaml").write_text(plan.replace("seed: 0", "seed: 5"), encoding="utf-8")
    call("poc.yaml", "--lang", "ja", "--out", "here", "-p", "default:reduction=6")
    report = PocReport.from_json(Path("here/report.json").read_text(encoding="utf-8"))
    assert (report.seed, report.lang, list(report.policies)) == (5, "ja", ["default:reduction=6"])


def test_redacted_reports_have_no_text(texts: Path, draw: Callable[[], None]) -> None:
    draw()
    result = call(texts, "--redact", "--out", "here")
    for path in [*Path("here/documents").iterdir(), Path("here/report.json"), Path("here/report.html")]:
        assert "Lisbon" not in path.read_text(encoding="utf-8"), path
    assert "pass on the report alone" in result.stderr
    assert "Lisbon" in Path("here", RECORDS).read_text(encoding="utf-8")


# --- going on ------------------------------------------------------------------------------------------------------


def stop_at(number: int) -> Callable[[int], None]:
    def then(at: int) -> None:
        if at == number:
            raise KeyboardInterrupt

    return then


def test_an_interrupted_run_goes_on_and_measures_nothing_twice(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        first = jobs_measured(patch, stop_at(5))
        result = call(texts, code=130)
    assert "What was measured is in poc/texts; the same command goes on from there." in result.stderr
    second = jobs_measured(monkeypatch)
    result = call(texts)
    assert "5 of 14 measurements are there already, in poc/texts." in result.stderr
    assert len(first) == 5
    assert len({*first, *second}) == len(first) + len(second) == 14
    again = jobs_measured(monkeypatch)
    call(texts)
    assert again == []


def test_half_a_record_of_a_killed_run_is_measured_again(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(texts)
    path = Path("poc/texts", RECORDS)
    path.write_bytes(path.read_bytes()[:-20])
    found = jobs_measured(monkeypatch)
    call(texts)
    assert len(found) == 1


def test_changed_documents_have_a_folder_of_their_own_and_fresh_measures_anew(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(texts)
    before = Path("poc/texts/report.json").read_text(encoding="utf-8")
    (texts / "logs" / "1.txt").write_text(f"{SECRET} Nothing else happened on that day, as far as anyone could tell.")
    assert call(texts).stdout.rstrip().endswith("poc/texts-2/report.html")
    assert Path("poc/texts/report.json").read_text(encoding="utf-8") == before
    found = jobs_measured(monkeypatch)
    assert call(texts, "--fresh").stdout.rstrip().endswith("poc/texts-2/report.html")
    assert len(found) == 14
    assert "holds a run of other settings" in refused(texts, "--out", "poc/texts")
    call(texts, "--out", "poc/texts", "--fresh")


def test_a_report_in_the_folder_of_documents_is_no_document(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(texts)
    call(".", "--out", "result")
    call(".")
    call(".", "--fresh", "--out", "result")
    report = PocReport.from_json(Path("result/report.json").read_text(encoding="utf-8"))
    assert len(report.documents) == 4


# --- budgets -------------------------------------------------------------------------------------------------------


def test_a_budget_that_is_over_at_once_has_one_document_and_says_what_was_left_out(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = jobs_measured(monkeypatch)
    result = call(texts, "--budget-minutes", "0.0001")
    assert [job.split()[0] for job in found] == ["document", "document"]
    report = PocReport.from_json(Path("poc/texts/report.json").read_text(encoding="utf-8"))
    assert [document.id for document in report.documents] == ["logs/1.txt"]
    left_out = [remark.text for remark in report.left_out]
    assert left_out[0] == (
        "The 0.0001 minutes were up: 3 of 4 documents were not measured (manuals/1.txt, logs/2.txt, manuals/2.txt)."
    )
    assert "speed was not measured in logs, manuals" in left_out[1]
    assert "for 1 document." in left_out[2]
    assert all(sentence in result.stderr.replace("\n", " ") for sentence in left_out)
    call(texts)
    report = PocReport.from_json(Path("poc/texts/report.json").read_text(encoding="utf-8"))
    assert (len(report.documents), report.left_out) == (4, ())


def test_what_does_not_fit_into_the_time_left_is_not_begun(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = measure.measured
    monkeypatch.setattr("anchorkv.poc.run.measure.measured", lambda *given: {**plain(*given), "seconds": 1000.0})
    found = jobs_measured(monkeypatch)
    call(texts, "--budget-minutes", "10")
    assert not [job for job in found if "2.txt" in job and job.startswith("document")]


# --- bad input -----------------------------------------------------------------------------------------------------


def test_mistakes_are_one_sentence(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "does not exist" in refused("nowhere")
    assert "has no document" in refused("empty")
    assert "There is no plan" in refused("nowhere.yaml")
    assert "There is no policy 'nothing'" in refused(texts, "-p", "nothing")
    assert "There is no file of questions" in refused(texts, "-q", "nowhere.csv")
    assert "is no size" in refused(texts, "--max-size", "large")
    assert "should be greater than 0" in refused(texts, "--budget-minutes", "0")
    assert not Path("poc").exists()


def test_questions_that_cannot_be_asked_stop_the_run_unless_they_are_passed_over(texts: Path) -> None:
    rows = [{"question": "At what pressure?", "answer": "4711 bar", "document": "manuals/1.txt"},
            {"question": "Who?", "answer": "Nobody at all", "document": "manuals/1.txt"}]
    (texts / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = refused(texts)
    assert "has 1 bad question (line 2: its answer does not stand in manuals/1.txt); mend them" in said
    call(texts, "--skip-bad-rows")
    report = PocReport.from_json(Path("poc/texts/report.json").read_text(encoding="utf-8"))
    assert [(one.path, one.reason) for one in report.skipped] == [
        ("questions.jsonl:2", "its answer does not stand in manuals/1.txt"),
    ]
    assert report.own_questions
    asked = {document.id: document for document in report.documents}
    assert asked["manuals/1.txt"].ways[0].answering.correct.n == 1
    assert asked["logs/1.txt"].ways[0].answering.correct.n > 1


def test_long_documents_are_cut_and_that_is_said(texts: Path) -> None:
    (texts / "questions.jsonl").write_text(
        json.dumps({"question": "At what pressure?", "answer": "4711 bar", "document": "manuals/1.txt"})
    )
    call(texts, "--max-tokens", "200")
    report = PocReport.from_json(Path("poc/texts/report.json").read_text(encoding="utf-8"))
    assert [remark.text for remark in report.left_out] == [
        "1 question was not asked: the answer stands in a part of the document that was not read.",
        "Only the first 200 tokens were read of logs/1.txt, logs/2.txt, manuals/1.txt and 1 more.",
    ]
    assert report.left_out[1].values["tokens"] == "200"
    assert all(document.tokens <= 200 for document in report.documents)


def test_a_full_disk_is_one_sentence_and_loses_nothing(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Path.write_text
    full = [True]

    def write(self: Path, *given: Any, **more: Any) -> int:
        if full[0] and self.name.startswith("report.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(self, *given, **more)

    monkeypatch.setattr(Path, "write_text", write)
    result = call(texts, code=2)
    assert "report.json cannot be written (No space left on device); what was measured is kept" in result.stderr
    full[0] = False
    found = jobs_measured(monkeypatch)
    call(texts)
    assert found == []


def test_a_record_that_cannot_be_written_stops_the_run_and_the_others_stay(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Path.open

    def opened(self: Path, mode: str = "r", *given: Any, **more: Any) -> Any:
        if self.name == RECORDS and mode == "a" and self.is_file() and self.read_text().count("\n") == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(self, mode, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        assert "records.jsonl cannot be written (No space left" in call(texts, code=2).stderr
    found = jobs_measured(monkeypatch)
    call(texts)
    assert len(found) == 14 - 3


def test_documents_are_data(texts: Path, draw: Callable[[], None]) -> None:
    draw()
    script = "<script>alert('x')</script>"
    text = f"{SECRET} {script} The pump of deck nine ran for 77 hours and then {script}."
    (texts / "logs" / "1.txt").write_text(text)
    call(texts)
    assert script not in Path("poc/texts/report.html").read_text(encoding="utf-8")


# --- the live view -------------------------------------------------------------------------------------------------


def test_the_view_shows_areas_as_they_are_measured(texts: Path) -> None:
    console = Console(width=140, force_terminal=False)
    shown: list[str] = []
    models = Models()
    with models, View(console, quiet=True) as view:
        running = Run(Plan(folder=texts), models)

        def progress(run: Run) -> None:
            view(run)
            with console.capture() as capture:
                console.print(view.table(run))
            shown.append(capture.get())

        running.measure(progress)
        report = running.report()
    assert "0/2" in shown[0]
    line = next(line for line in shown[3].splitlines() if "logs" in line)
    assert "1/2" in line
    assert "×" in line
    with console.capture() as capture:
        console.print(final(report))
    assert "all" in capture.get()
    assert f"{report.overall.ways[0].answering.correct.value:.0%}→" in capture.get()


def test_on_a_terminal_the_table_fills_in_and_goes_away(texts: Path) -> None:
    console = Console(width=100, force_terminal=True, file=io.StringIO(), legacy_windows=False)
    models = Models()
    with models, View(console) as view:
        Run(Plan(folder=texts), models).measure(view)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert "logs/1.txt: reading and asking, full" in written
    assert "14/14" in written
    assert "manuals" in written


def test_without_a_terminal_every_job_is_a_line(texts: Path) -> None:
    lines = [line for line in call(texts).stderr.splitlines() if line.startswith("[")]
    assert lines[0] == "[1/14] logs/1.txt: reading and asking, full"
    assert len(lines) == 14
    assert not [line for line in call(texts, "--json", "--fresh").stderr.splitlines() if line.startswith("[")]


# --- sub-commands --------------------------------------------------------------------------------------------------


def test_a_plan_is_written_with_defaults_where_nobody_can_be_asked() -> None:
    result = call("init")
    assert "Nobody can be asked here" in result.stderr
    assert result.stdout == "The plan is in poc.yaml; run it with: anchorkv poc poc.yaml\n"
    assert "is there already" in refused("init")
    call("init", "--force", "--yes")
    assert "is a YAML file" in refused("init", "plan.txt")


def test_two_runs_side_by_side(texts: Path) -> None:
    call(texts, "--out", "a")
    call(texts, "--out", "b", "-p", "default:reduction=6")
    result = call("compare", "a", "b/report.json")
    for words in ("all areas", "logs", "cells, full per kept", "perplexity ratio", "verdict", "default:reduction=6"):
        assert words in result.stdout
    found = json.loads(call("compare", "a", "b", "--json").stdout)
    assert [area["name"] for area in found["areas"]] == ["", "logs", "manuals"]
    row = next(row for row in found["areas"][0]["rows"] if row["figure"] == "cells, full per kept")
    assert row["difference"] == pytest.approx(row["b"]["value"] - row["a"]["value"])
    assert found["notes"] == []


def test_an_older_report_whose_remarks_are_sentences_is_compared(texts: Path) -> None:
    call(texts, "--max-tokens", "200", "--out", "a")
    report = json.loads(Path("a/report.json").read_text(encoding="utf-8"))
    report["left_out"] = [remark["text"] for remark in report["left_out"]]
    report["skipped"] = [{"path": "x.txt", "reason": "is empty"}]
    Path("older.json").write_text(json.dumps(report), encoding="utf-8")
    assert "The verdicts follow" not in call("compare", "older.json", "a").stderr
    read = PocReport.from_json(Path("older.json").read_text(encoding="utf-8"))
    assert [remark.text for remark in read.left_out] == report["left_out"]
    assert read.skipped[0].key == ""


def test_runs_that_cannot_be_compared_are_told(texts: Path) -> None:
    call(texts, "--out", "a")
    (texts / "logs" / "1.txt").unlink()
    (texts / "logs" / "2.txt").unlink()
    call(texts, "--out", "b")
    result = call("compare", "a", "b")
    assert "The runs read other documents: 2 are in both, 2 in one alone." in result.stderr
    assert "There is no report at nowhere" in refused("compare", "a", "nowhere")
    Path("b/report.json").write_text('{"schema_version": 0}')
    assert "is no report.json of this version" in refused("compare", "a", "b")


def test_help_tells_of_the_sub_commands() -> None:
    said = call("--help").stdout
    assert "--budget-minutes" in said
    assert "poc init" in said
    assert "poc compare" in said


def test_run_gives_the_report_without_a_command_line(texts: Path) -> None:
    report = anchorkv.poc.run.run(Plan(folder=texts, out=Path("here")))
    assert report.to_json() == Path("here/report.json").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_real_model_from_folder_to_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: Path) -> None:
    """Nothing is faked but the model, which is tiny and random."""
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    model = tiny_gguf.write(tmp_path / "tiny.gguf")
    call(texts, "--model", model, "--threads", 1)
    report = PocReport.from_json(Path("poc/texts/report.json").read_text(encoding="utf-8"))
    assert report.left_out == ()
    assert report.model.name == "tiny"
    for area in report.areas:
        assert area.ways[1].speed.decode.value > 0
        assert area.ways[1].reduction.value >= 1
        assert area.ways[1].perplexity_ratio.value > 0
