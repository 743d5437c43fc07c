"""The command line on a fake engine: what it prints, what it refuses, and what Ctrl-C leaves behind."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from typer.testing import CliRunner

import anchorkv.models
from anchorkv.chat import Conversation
from anchorkv.cli import app
from anchorkv.document import Stream
from anchorkv.models import builtin
from anchorkv.session import Session

TEXT = "The engineer of the bridge is Ada Miller. She built 12 bridges in 1902.\n\nThe river is called Sten. " * 12
runner = CliRunner()


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeEngine:
    """Every command loads this engine, which no adapter was trained for."""
    fake = FakeEngine()
    monkeypatch.setattr(anchorkv.shipped, "FOLDER", tmp_path / "nothing shipped")
    monkeypatch.setattr(anchorkv.models, "_engine", lambda *_: fake)
    return fake


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "bridge.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def call(*arguments: object, stdin: str | bytes | None = None, code: int = 0) -> Any:
    result = runner.invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == code, result.output
    return result


def refused(*arguments: object, stdin: str | bytes | None = None) -> str:
    """The one sentence on standard error of a command that exits with code 2."""
    result = call(*arguments, stdin=stdin, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    return str(result.stderr)


# --- run -----------------------------------------------------------------------------------------------------------


def test_run_answers_and_shows_figures(document: Path) -> None:
    out = call("run", document, "--ask", "Who is the engineer?", "--max-tokens", 20, "--show-recalled").stdout
    assert "Q  Who is the engineer?" in out
    assert re.search(r"recalled \d+: .*engineer", out)
    assert re.search(r"Cells now +\d+ +[\d,]+ +[\d.]+×", out)
    for figure in ("Cells at the peak", "Prefill", "Decode", "Time to first token", "Segments recalled"):
        assert figure in out


def test_run_compares_side_by_side(document: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions.txt"
    questions.write_text("# questions\nWho is the engineer?\n\nWhich river?\n", encoding="utf-8")
    out = call("run", document, "--questions", questions, "--compare", "--max-tokens", 12).stdout
    assert out.count("─ Anchors ─") == out.count("─ Full cache ─") == 2
    assert "gain" in out


def test_run_json_is_one_object(document: Path) -> None:
    result = call("run", document, "--ask", "Who?", "--compare", "--json", "--max-tokens", 8)
    report = json.loads(result.stdout)
    assert report["answers"][0]["question"] == "Who?"
    assert report["accounting"]["kept_cells"] < report["full"]["accounting"]["kept_cells"]
    assert report["full"]["accounting"]["kept_cells"] == report["accounting"]["full_cells"]
    assert report["policy"]["anchors"] == ["SEL"]
    assert report["model"]["engine"] == "fake"


def test_run_several_files_and_standard_input(document: Path) -> None:
    report = json.loads(call("run", document, "-", "--ask", "Who?", "--json", stdin="Bob built a boat.\n" * 9).stdout)
    assert report["title"] == "bridge.txt and 1 more"
    assert report["reading"]["tokens"] > len(TEXT) + 9 * 17


def test_saved_document_answers_the_same(document: Path, tmp_path: Path) -> None:
    saved = tmp_path / "bridge.anchors"
    policy = tmp_path / "policy.json"
    fresh = json.loads(call(
        "run", document, "--ask", "Who?", "--save", saved, "--json", "--recall", "off", "--policy-out", policy
    ).stdout)
    again = json.loads(call("run", "--open", saved, "--ask", "Who?", "--json").stdout)
    assert again["answers"][0]["text"] == fresh["answers"][0]["text"]
    assert again["policy"] == fresh["policy"] == json.loads(policy.read_text())
    third = json.loads(call("run", document, "--ask", "Who?", "--policy", policy, "--json").stdout)
    assert third["answers"][0]["text"] == fresh["answers"][0]["text"]


def test_saving_needs_no_question(document: Path, tmp_path: Path) -> None:
    call("run", document, "--save", tmp_path / "x.anchors")
    assert (tmp_path / "x.anchors").is_file()


def test_long_text_is_noted_once(document: Path, engine: FakeEngine) -> None:
    engine.info = type(engine.info)(**{**vars(engine.info), "window": 100})
    result = call("run", document, "--ask", "Who?", "--compare", "--max-tokens", 4)
    assert result.stderr.count("never trained") == 1


def test_ctrl_c_while_answering_keeps_what_was_answered(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Stream.__iter__
    asked = []

    def interrupted(self: Stream) -> Iterator[str]:
        asked.append(self)
        pieces = plain(self)
        if len(asked) == 2:
            next(pieces, None)
            raise KeyboardInterrupt
        yield from pieces

    monkeypatch.setattr(Stream, "__iter__", interrupted)
    result = call("run", document, "--ask", "One?", "--ask", "Two?", "--ask", "Three?", "--json", code=130)
    report = json.loads(result.stdout)
    assert report["interrupted"] is True
    assert [answer["question"] for answer in report["answers"]][:1] == ["One?"]
    assert "Three?" not in result.stdout


def test_ctrl_c_while_reading(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "read", interrupted)
    result = call("run", document, "--ask", "Who?", code=130)
    assert "Interrupted" in result.stderr
    assert "Traceback" not in result.output


# --- policies ------------------------------------------------------------------------------------------------------


def test_policy_options(document: Path, tmp_path: Path) -> None:
    out = tmp_path / "policy.json"
    call(
        "run", document, "--ask", "Who?", "--max-tokens", 2, "--policy-out", out, "--anchors", "ep,sel", "--scorer",
        "surprise", "--reduction", 8, "--sinks", 2, "--recent-window", 3, "--anchors-see-anchors", "--pin",
        "Ada Miller", "--pin", "Sten", "--min-segment", 4, "--max-segment", 32, "--segments", "separator", "--recall",
        "on", "--recall-cells", 64, "--cell-budget", "none",
    )
    policy = json.loads(out.read_text())
    assert policy == {
        **policy, "anchors": ["EP", "SEL"], "scorer": "surprise", "reduction": 8, "sinks": 2, "recent_window": 3,
        "anchors_see_anchors": True, "pinned": ["Ada Miller", "Sten"], "min_segment": 4, "max_segment": 32,
        "segments": "separator", "recall": "on", "recall_cells": 64, "cell_budget": None,
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--anchors", "AC", "--ac-tokens", "0"], "ac_tokens"),
        (["--ac-tokens", "2"], "needs AC"),
        (["--policy", "paper-ep", "--reduction", "9"], "needs SEL"),
        (["--reduction", "-3"], "reduction"),
        (["--anchors", "XX"], "anchors"),
        (["--anchors", ","], "--anchors is empty"),
        (["--min-segment", "80"], "smaller than"),
        (["--sinks", "-1"], "sinks"),
        (["--cell-budget", "20"], "no room"),
        (["--cell-budget", "many"], "number of cells"),
        (["--recall", "on", "--recall-cells", "0"], "recall_cells is 0"),
        (["--recall", "sometimes"], "recall"),
        (["--scorer", "nobody"], "no scorer"),
        (["--policy", "nothing"], "no policy"),
        (["--policy", "none.json"], "cannot be read"),
        (["--policy", "default:reductio=24"], "no field=value"),
        (["--pin", "never said"], "does not occur"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--ask", " "], "empty"),
        (["--questions", "/none.txt"], "no file"),
        (["--open", "x.anchors"], "not both"),
    ],
)
def test_options_that_cannot_be(document: Path, options: list[str], words: str) -> None:
    assert words in refused("run", document, "--ask", "Who?", *options)


def test_policy_file_that_is_no_policy(document: Path, tmp_path: Path) -> None:
    for text in ("{", "[]", '{"unknown": 1}'):
        path = tmp_path / "policy.json"
        path.write_text(text)
        assert "policy" in refused("inspect", document, "--policy", path)


# --- refusals of run -----------------------------------------------------------------------------------------------


def test_documents_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no document" in refused("run", "--ask", "Who?")
    assert "There is no file" in refused("run", tmp_path / "none.txt", "--ask", "Who?")
    (tmp_path / "empty.txt").write_bytes(b"")
    assert "empty" in refused("run", tmp_path / "empty.txt", "--ask", "Who?")
    (tmp_path / "b.bin").write_bytes(bytes(range(256)) * 8)
    assert "binary" in refused("run", tmp_path / "b.bin", "--ask", "Who?")
    assert "standard input is empty" in refused("run", "-", "--ask", "Who?", stdin="")
    assert "once" in refused("run", "-", "-", "--ask", "Who?", stdin="text")


def test_no_question_without_a_terminal(document: Path) -> None:
    assert "no question" in refused("run", document)


def test_one_endless_line(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("word " * 400)
    report = json.loads(call("run", path, "--ask", "Who?", "--json", "--max-tokens", 4).stdout)
    assert report["accounting"]["reduction"] > 4


def test_saved_documents_that_cannot_be_opened(document: Path, tmp_path: Path, engine: FakeEngine) -> None:
    saved = tmp_path / "a.anchors"
    call("run", document, "--save", saved)
    assert "keeps the policy" in refused("run", "--open", saved, "--ask", "Who?", "--sinks", "2")
    assert "--compare" in refused("run", "--open", saved, "--ask", "Who?", "--compare")
    assert "no saved document" in refused("run", "--open", tmp_path / "none", "--ask", "Who?")
    whole = saved.read_bytes()
    saved.write_bytes(whole[:-100])
    assert "truncated" in refused("run", "--open", saved, "--ask", "Who?")
    saved.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "altered" in refused("run", "--open", saved, "--ask", "Who?")
    saved.write_bytes(whole)
    engine.info = type(engine.info)(**{**vars(engine.info), "fingerprint": "other"})
    assert "open it with the model" in refused("run", "--open", saved, "--ask", "Who?")


def test_places_that_cannot_be_written(document: Path, tmp_path: Path) -> None:
    nowhere = tmp_path / "none" / "file"
    assert "cannot be written" in refused("inspect", document, "--html", nowhere)
    assert "cannot be written" in refused("run", document, "--ask", "Who?", "--policy-out", nowhere)
    assert "cannot be written" in refused("run", document, "--ask", "Who?", "--save", nowhere)


# --- chat ----------------------------------------------------------------------------------------------------------


def test_chat_from_a_pipe(tmp_path: Path) -> None:
    saved, page = tmp_path / "talk.anchors", tmp_path / "talk.html"
    lines = f"hello there\n/stats\n\n/save {saved}\n/inspect\n/inspect {page}\n/help\nand again\n/quit\nnever read\n"
    out = call("chat", "--system", "Be short.", "--max-tokens", 12, stdin=lines).stdout
    assert "cells kept" in out
    assert f"Saved to {saved}" in out.replace("\n", "")
    assert "/save [FILE]" in out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    report = json.loads(call("chat", "--resume", saved, "--json", "--max-tokens", 12, stdin="go on\n").stdout)
    assert [turn["user"] for turn in report["turns"]] == ["hello there", "go on"]


def test_chat_goes_on_after_a_mistake() -> None:
    result = call("chat", "--json", "--max-tokens", 6, stdin="/none\n/save\nhello\n", code=2)
    assert "There is no command /none" in result.stderr
    assert "Name the file" in result.stderr
    assert len(json.loads(result.stdout)["turns"]) == 1


def test_ctrl_c_stops_an_answer_and_not_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Conversation.say
    said = []

    def interrupted(self: Conversation, message: str, **options: Any) -> Iterator[str]:
        said.append(message)
        for count, piece in enumerate(plain(self, message, **options)):
            if len(said) == 1 and count == 2:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(Conversation, "say", interrupted)
    out = call("chat", "--max-tokens", 12, stdin="first\nsecond\n/stats\n").stdout
    assert out.count("(stopped)") == 1
    assert "second" in said
    assert "turn" in out


def test_resumed_chat_keeps_its_own_choices(tmp_path: Path) -> None:
    saved = tmp_path / "talk.anchors"
    call("chat", "--max-tokens", 4, stdin=f"hello\n/save {saved}\n")
    assert "keeps its own policy" in refused("chat", "--resume", saved, "--sinks", "3")
    assert "system prompt" in refused("chat", "--resume", saved, "--system", "x")


# --- inspect -------------------------------------------------------------------------------------------------------


def test_inspect(document: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert "[anchor]" in call("inspect", document).stdout
    result = call("inspect", document, "--html", page, "--ask", "Who is the engineer?", "--max-tokens", 8)
    assert "Wrote" in result.stderr
    assert "recent, whole" not in result.stdout
    assert "Who is the engineer?" in page.read_text(encoding="utf-8")
    assert "recent, whole" in call("inspect", document, "--html", page, "--terminal").stdout
    report = json.loads(call("inspect", document, "--json").stdout)
    assert sum(segment["kept"] for segment in report["segments"]) == report["accounting"]["kept_cells"]


# --- models --------------------------------------------------------------------------------------------------------


def gguf(path: Path, *, cut: int = 0, version: int = 3) -> Path:
    """A GGUF header with one small tensor."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def number(name: str, value: int) -> bytes:
        return text(f"llama.{name}") + struct.pack("<II", 4, value)

    numbers = {
        "block_count": 2, "context_length": 512, "embedding_length": 64, "attention.head_count": 4,
        "attention.head_count_kv": 2,
    }
    data = b"GGUF" + struct.pack("<IQQ", version, 1, len(numbers) + 2)
    data += text("general.architecture") + struct.pack("<I", 8) + text("llama")
    words = b"".join(text(f"w{i}") for i in range(100))
    data += text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 100) + words
    data += b"".join(number(name, value) for name, value in numbers.items())
    data += text("weight") + struct.pack("<IQIQ", 1, 64, 1, 0)
    data += b"\0" * (-len(data) % 32) + b"\0" * 128
    path.write_bytes(data[: len(data) - cut])
    return path


def test_models_describes_files_and_folders(tmp_path: Path) -> None:
    gguf(tmp_path / "small.gguf")
    folder = tmp_path / "hub"
    folder.mkdir()
    config = {
        "model_type": "qwen3", "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 16, "hidden_size": 128, "max_position_embeddings": 1000, "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"0" * 100)
    found = json.loads(call("models", "--search", tmp_path, "--json").stdout)["models"]
    by_name = {entry["name"]: entry for entry in found}
    assert by_name["small"]["cell_bytes"] == 2 * 2 * 2 * 16 * 2
    assert by_name["small"]["window"] == 512
    assert by_name["small"]["weights"] == "F16"
    assert by_name["hub"]["cell_bytes"] == 2 * 4 * 2 * 16 * 2
    assert by_name["hub"]["full_bytes"] == by_name["hub"]["cell_bytes"] * 1000
    assert not by_name["hub"]["problem"]


def test_models_lists_broken_ones_with_their_problem(tmp_path: Path) -> None:
    files = {
        "cut": gguf(tmp_path / "cut.gguf", cut=64), "head": gguf(tmp_path / "head.gguf", cut=400),
        "old": gguf(tmp_path / "old.gguf", version=1), "none": tmp_path / "none.gguf",
    }
    (tmp_path / "text.gguf").write_text("not a model")
    (tmp_path / "folder").mkdir()
    encoder = tmp_path / "t5"
    encoder.mkdir()
    (encoder / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    names = [*files.values(), tmp_path / "text.gguf", tmp_path / "folder", encoder, broken]
    found = json.loads(call("models", *names, "--json", code=2).stdout)["models"]
    problems = [entry["problem"] for entry in found]
    words = (
        "truncated", "damaged", "version 1", "no file", "not a GGUF", "no config.json", "encoder-decoder", "understood",
    )
    for problem, word in zip(problems, words, strict=True):
        assert word in problem


def test_models_knows_the_built_in_one() -> None:
    result = json.loads(call("models", builtin(), "--json").stdout)["models"][0]
    assert (result["layers"], result["window"], result["cell_bytes"]) == (30, 8192, 23040)


# --- the program ---------------------------------------------------------------------------------------------------


def test_help_version_and_usage() -> None:
    for command in ("run", "chat", "inspect", "models"):
        assert command in call("--help").stdout
        assert "--json" in call(command, "--help").stdout
    assert call("--version").stdout.startswith("anchorkv ")
    call("run", "x.txt", "--no-such-option", code=2)
    call("run", "x.txt", "--max-tokens", "0", code=2)


# --- the real model ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_built_in_model_finds_a_fact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    english = (Path(__file__).parent.parent / "examples" / "english.txt").read_text(encoding="utf-8")
    end = english[english.index("I want you to meet two more people"):]
    path = tmp_path / "end.txt"
    path.write_text(english[:3000] + "\n\n" + end, encoding="utf-8")
    report = json.loads(call(
        "run", path, "--ask", "Where is Lucius Wright a teacher?", "--max-tokens", 24, "--compare", "--json"
    ).stdout)
    assert "Jackson" in report["answers"][0]["text"]
    assert "Jackson" in report["full"]["answers"][0]["text"]
    assert report["accounting"]["kept_cells"] < 0.5 * report["full"]["accounting"]["kept_cells"]


@pytest.mark.slow
def test_the_built_in_model_chats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    report = json.loads(call("chat", "--json", "--max-tokens", 16, stdin="How many days are there in a week?\n").stdout)
    assert "7" in report["turns"][0]["assistant"]
