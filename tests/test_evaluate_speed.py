"""Speed and sessions: what is timed takes turns, what is counted is the engine's own count, on tiny engines."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import tiny_gguf
from fake_engine import ByteTokenizer, FakeEngine

from anchorkv.config import preset
from anchorkv.engines.llama import LlamaEngine
from anchorkv.errors import CapacityError, ConfigError, DataError
from anchorkv.evaluate.run import Models, Store, run
from anchorkv.evaluate.tasks.sessions import Conversations, Sessions
from anchorkv.evaluate.tasks.speed import SETTINGS, Speed, best_settings, document_tokens, random_words, read_texts
from anchorkv.evaluate.timing import SessionSide, Whole, WholeLlama, in_turns, rate, ratio_of_medians
from anchorkv.evaluate.ways import Way, ways
from anchorkv.models import Model
from anchorkv.session import Session, next_logits

TEXT = "The pump was replaced. It ran for nine hours, and nobody asked why. " * 40
POLICY = preset("default").replace(scorer="frequency", cell_budget=None, sinks=2)


class FakeModels(Models):
    """Every way on one engine without a model."""

    def __init__(self, engine: FakeEngine | None = None) -> None:
        super().__init__("fake")
        self.fake = engine or FakeEngine()

    def of(self, way: Way) -> Model:
        return Model(self.fake, way.policy)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    path = tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    with Models(str(path), engine="llama", threads=1) as found:
        yield found


@pytest.fixture
def engine(models: Models) -> Iterator[LlamaEngine]:
    engine = LlamaEngine(Path(str(models.name)), threads=1, cells=512)
    yield engine
    engine.close()


def tokens(count: int) -> list[int]:
    return list((TEXT * (count // len(TEXT) + 1)).encode()[:count])


def measured(task: Any, wanted: list[Way], models: Models, folder: Path) -> tuple[list[Any], list[dict[str, Any]]]:
    store = Store(folder, task.settings())
    rows = run([task], wanted, models, store)
    return rows, [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


# --- turns and ratios ----------------------------------------------------------------------------------------------


def test_sides_take_turns_and_change_who_begins() -> None:
    order: list[tuple[str, int]] = []
    spent = in_turns([lambda n: order.append(("a", n)), lambda n: order.append(("b", n))], 2, warm_up=1)
    assert order == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert [len(turns) for turns in spent] == [2, 2]


def test_seconds_are_those_of_the_act() -> None:
    (slow,) = in_turns([lambda _: time.sleep(0.02)], 2)
    assert all(0.019 < seconds < 1 for seconds in slow)


def test_ratio_is_of_medians_and_paired() -> None:
    full, way = [2.0, 4.0, 6.0, 100.0], [1.0, 2.0, 3.0, 50.0]
    ratio = ratio_of_medians(full, way)
    assert ratio.value == 2.0  # 5 / 2.5: the one slow turn decides nothing
    assert ratio.stderr == pytest.approx(0, abs=1e-9)  # both sides of a turn are drawn together
    with pytest.raises(ValueError, match="cannot be paired"):
        ratio_of_medians(full, way[:2])


def test_what_grows_along_the_document_is_no_noise() -> None:
    at = list(range(12))
    full, way = [1 + 0.5 * n for n in at], [1.0] * 12
    assert ratio_of_medians(full, way).stderr > 0.3
    assert ratio_of_medians(full, way, at).stderr < 1e-9
    noisy = [seconds + 0.2 * (-1) ** n for n, seconds in enumerate(full)]
    assert ratio_of_medians(noisy, way, at).stderr > 0.03
    assert rate([0.5] * 4).value == 2.0
    assert math.isnan(rate([0.5]).stderr)


# --- sides ---------------------------------------------------------------------------------------------------------


def test_a_question_leaves_no_trace(engine: LlamaEngine) -> None:
    text, question = tokens(200), tokens(32)
    for side in (SessionSide(engine, POLICY, "way"), WholeLlama(engine, "full")):
        side.read(text)
        before = side.accounting()
        first = side.ask(question)
        after = side.accounting()
        assert (after.kept_cells, after.kept_bytes) == (before.kept_cells, before.kept_bytes)
        assert after.peak_cells > before.peak_cells
        assert side.ask(question) == first
        side.restart()
        assert side.accounting().kept_cells == side.accounting().peak_cells == 0
        side.close()


def test_both_full_sides_say_the_same(engine: LlamaEngine) -> None:
    text, question = tokens(200), tokens(32)
    session, whole = SessionSide(engine, preset("full"), "full"), WholeLlama(engine, "full")
    for side in (session, whole):
        side.read(text)
    assert session.ask(question) == whole.ask(question)
    assert session.accounting().kept_bytes == whole.accounting().kept_bytes == 200 * engine.info.cell_bytes


@pytest.mark.parametrize("count", [50, 90, 160, 500])
def test_held_cells_are_copies_at_the_positions_that_follow(engine: LlamaEngine, count: int) -> None:
    side = WholeLlama(engine, "full")
    with pytest.raises(ValueError, match="nothing to copy"):
        side.hold(count)
    side.read(tokens(80))
    side.hold(count)
    assert side.memory.positions().tolist() == list(range(count))
    assert side.accounting().kept_cells == side.at == count
    side.write(tokens(2))
    assert side.accounting().kept_cells == count + 2
    side.close()
    assert len(engine._free_sequences) == 62


def test_the_best_settings_are_found_by_trial(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    best_settings.cache_clear()
    slow = [setting for setting in SETTINGS if setting != SETTINGS[2]]

    def read(self: WholeLlama, part: list[int]) -> None:
        plain(self, part)
        time.sleep(0.03 * (self.label in [setting.label for setting in slow]))

    def write(self: WholeLlama, part: list[int]) -> None:
        time.sleep(0.03 * self.label.startswith("no flash"))

    plain = Whole.read
    monkeypatch.setattr(WholeLlama, "read", read)
    monkeypatch.setattr(WholeLlama, "write", write)
    found = best_settings(models, True, 128)
    assert found[0] == SETTINGS[2]
    assert found[1].kernel == (True, "f16")
    assert len(found) == 2
    best_settings.cache_clear()


# --- speed ---------------------------------------------------------------------------------------------------------


def test_rows_on_llama(models: Models, tmp_path: Path) -> None:
    task = Speed(lengths=(128,), rounds=2, burst=4)
    wanted = [Way("full", preset("full")), Way("mine", POLICY), Way("keen", POLICY.replace(recall="on"))]
    rows, records = measured(task, wanted, models, tmp_path / "run")
    assert [row["policy"] for row in rows] == ["full", "mine", "keen"]
    for row, record in zip(rows, records, strict=True):
        assert len(record["samples"]["prefill"]["way"]) == len(record["samples"]["prefill"]["full"]) >= 8
        assert len(record["samples"]["decode"]["way"]) == len(record["samples"]["first_token"]["full"]) == 2
        for figure, name in (("prefill", "prefill_tok_s"), ("decode", "decode_tok_s")):
            assert row[f"{figure}_ratio"] == pytest.approx(row[name] / row[f"full_{name}"])
            assert row[name] == pytest.approx(1 / record["medians"][figure]["way"])
            assert row[f"{figure}_ratio_stderr"] >= 0
        assert row["first_token_ratio"] == pytest.approx(row["full_first_token_s"] / row["first_token_s"])
        assert row["full_cells"] == 128
        assert any(setting.label in row["full_settings"] for setting in SETTINGS)
    full, mine, keen = rows
    assert (full["kept_cells"], full["reduction"], full["recalled_cells"]) == (128, 1, 0)
    assert full["peak_cells"] == 128 + 32
    assert mine["kept_cells"] < 128
    assert mine["reduction"] == pytest.approx(128 / mine["kept_cells"])
    assert mine["kv_bytes"] == mine["kept_cells"] * models.of(wanted[1]).engine.info.cell_bytes
    assert keen["recalled_cells"] > 0
    assert keen["peak_cells"] >= keen["kept_cells"] + keen["recalled_cells"]


def test_a_faster_way_is_called_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowed(side: type[Whole] | type[SessionSide], seconds: float) -> None:
        plain = side.write

        def write(self: Any, part: list[int]) -> None:
            plain(self, part)
            time.sleep(seconds)

        monkeypatch.setattr(side, "write", write)

    slowed(Whole, 0.02)
    slowed(SessionSide, 0.004)  # beside nothing at all the ratio would be all noise
    rows, _ = measured(Speed(lengths=(64,), rounds=4, burst=2), ways(["sepllm"]), FakeModels(), tmp_path / "run")
    full, mine = rows
    assert mine["decode_ratio"] > 2
    assert "decode better" in mine["verdict"]
    assert 0.3 < full["decode_ratio"] < 3  # itself against itself
    assert "verdict" not in full


def test_a_failure_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: SessionSide, part: list[int]) -> None:
        raise CapacityError("No cell is left.")

    monkeypatch.setattr(SessionSide, "read", read)
    rows, _ = measured(Speed(lengths=(64,), rounds=2), ways(["sepllm"]), FakeModels(), tmp_path / "run")
    assert "error" not in rows[0]
    assert rows[1] == {"task": "speed", "policy": "sepllm", "length": 64, "error": "No cell is left."}


def test_items_and_settings(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} {TEXT}"}) + "\n" for n in range(3)))
    task = Speed(data=path, lengths=(512, 128), documents=5)
    assert [item.id for item in task.items()] == [f"{length}/{n}" for length in (128, 512) for n in range(3)]
    assert len(replace(task, limit=1).items()) == 2
    assert replace(task, lengths=(128,), documents=1).settings() == task.settings()
    assert replace(task, seed=1).settings() != task.settings() != Speed().settings()
    assert json.loads(json.dumps(task.settings())) == task.settings()
    assert len(Speed(documents=2).items()) == 6


def test_texts_come_from_folders_files_and_words(tmp_path: Path) -> None:
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "pg19.test.jsonl").write_text(json.dumps({"text": "A book."}) + "\n")
    (tmp_path / "note.txt").write_text("A note.")
    assert read_texts(tmp_path) == ("A book.",)
    assert read_texts(tmp_path / "note.txt") == ("A note.\n",)
    with pytest.raises(DataError, match="pg19"):
        read_texts(tmp_path / "lm")
    engine = FakeEngine()
    assert bytes(document_tokens(engine, ["A book."], 0, 16, 0)) == b"A book.A book.A "
    words = document_tokens(engine, [], 0, 500, 3)
    assert words == document_tokens(engine, [], 0, 500, 3) != document_tokens(engine, [], 1, 500, 3)
    text = bytes(words).decode()
    assert len(text) == 500
    assert 500 / 25 <= text.count(".") <= 500 / 9 + 1
    assert text.replace(".", "").isalpha()


def test_a_vocabulary_without_words_is_said() -> None:
    with pytest.raises(DataError, match="--data"):
        random_words(ByteTokenizer(), ord("0"), 10, 0)


@pytest.mark.parametrize("options", [{"lengths": ()}, {"lengths": (8,)}, {"rounds": 1}, {"documents": 0}, {"limit": 0}])
def test_options_that_fit_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Speed(**options)


# --- sessions ------------------------------------------------------------------------------------------------------


def test_restored_sessions_hold_cells_of_their_own(engine: LlamaEngine) -> None:
    """What the budget rests on: a restored session takes cells of the context, a fork takes none."""
    def held() -> int:
        return int(llama_cpp.llama_state_get_size(engine._context))

    session = Session(engine, preset("full"))
    session.read(tokens(100))
    arrays, fields = session.state()
    one = held()
    fork = session.fork()
    forked = held() - one
    restored = Session.restore(engine, preset("full"), arrays, fields)
    grown = held() - one - forked
    assert forked < 100 * 64  # ids alone
    assert 100 * engine.info.cell_bytes <= grown < 101 * (engine.info.cell_bytes + 64)
    fork.close()
    restored.memory.drop(np.arange(100))
    assert session.memory.nbytes() == 100 * engine.info.cell_bytes


def test_as_many_are_opened_as_the_budget_takes(models: Models, tmp_path: Path) -> None:
    task = Sessions(length=256, burst=2, rounds=2, most=20)
    wanted = [Way("full", preset("full")), Way("mine", POLICY)]
    rows, records = measured(task, wanted, models, tmp_path / "run")
    full, mine = rows
    assert (full["sessions"], full["sessions_ratio"], full["cells"]) == (4, 1.0, 256 + 6)
    assert mine["sessions"] > 4
    assert mine["sessions_ratio"] == mine["sessions"] / 4
    assert mine["full_sessions"] == 4
    assert mine["cells"] < 256
    cell = models.of(wanted[0]).engine.info.cell_bytes
    for row, record in zip(rows, records, strict=True):
        assert row["budget_bytes"] == 4 * (256 + 6) * cell
        assert row["held_bytes"] <= row["budget_bytes"]
        side = record["way_side"]
        if not row["capped"]:  # the next one would not have fitted
            assert side["held_bytes"] + side["needed"] > row["budget_bytes"] - 64 * cell * side["sessions"]
        assert row["tokens_s"] == pytest.approx(row["session_tokens_s"] * row["sessions"])
        assert row["tokens_s_ratio"] == pytest.approx(row["tokens_s"] / row["full_tokens_s"])
        assert record["paired"]


def test_they_are_conversations_as_if_alone(engine: LlamaEngine) -> None:
    live = Conversations(engine, POLICY, tokens(150), 140)
    live.fill(3 * 160 * engine.info.cell_bytes, 3)
    assert len(live.sessions) == 3
    assert live.capped
    act = live.write(5)
    act(0)
    act(1)
    for n, session in enumerate(live.sessions):
        apart = [live.tokens[(140 + step + 50 * n) % 150] for step in range(10)]
        with Session(engine, POLICY) as alone:
            alone.read(live.tokens[:140])
            for token in apart:
                alone.read([token])
            assert alone.ledger.tokens.tolist() == session.ledger.tokens.tolist()
            assert alone.memory.positions().tolist() == session.memory.positions().tolist()
            assert np.allclose(next_logits(alone), next_logits(session), atol=0.05)
    live.close()


def test_a_budget_below_one_conversation(models: Models, tmp_path: Path) -> None:
    cell = models.of(Way("full", preset("full"))).engine.info.cell_bytes
    task = Sessions(length=400, budget=300 * cell, burst=1, rounds=2, most=4)
    wanted = [Way("full", preset("full")), Way("mine", POLICY)]
    (full, mine), _ = measured(task, wanted, models, tmp_path / "run")
    assert "raise budget" in full["error"]
    assert mine["sessions"] >= 1
    assert mine["full_sessions"] == 0
    assert mine["tokens_s"] > 0
    assert "tokens_s_ratio" not in mine


def test_sides_that_do_not_fit_at_once_are_measured_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_only_one(self: Sessions, *given: Any) -> Any:
        if len(given[-1]) > 1:
            raise CapacityError("No room for two.")
        return plain(self, *given)

    plain = Sessions._measured
    monkeypatch.setattr(Sessions, "_measured", open_only_one)
    task = Sessions(length=128, burst=1, rounds=2, most=3)
    rows, records = measured(task, ways(["sepllm"]), FakeModels(), tmp_path / "run")
    assert [record["paired"] for record in records] == [False, False]
    assert [row["sessions"] for row in rows] == [3, 3]


@pytest.mark.parametrize("options", [{"most": 0}, {"most": 251}, {"length": 0}, {"budget": 0}, {"rounds": 1}])
def test_sessions_options_that_fit_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Sessions(**options)


# --- the reference engine, and the real model ----------------------------------------------------------------------


def test_both_tasks_on_torch(tmp_path: Path) -> None:
    from tiny import save_tiny

    wanted = [Way("full", preset("full")), Way("mine", POLICY.replace(recall="off"))]
    with Models(str(save_tiny(tmp_path / "tiny")), engine="torch", threads=1) as models:
        (full, mine), _ = measured(Speed(lengths=(128,), rounds=2, burst=2), wanted, models, tmp_path / "speed")
        assert full["kv_bytes"] == full["full_kv_bytes"] == 128 * models.of(wanted[0]).engine.info.cell_bytes
        assert mine["kept_cells"] < 128
        assert mine["full_settings"].lower().count("cache") == 3
        task = Sessions(length=128, burst=1, rounds=2, most=6)
        (full, mine), _ = measured(task, wanted, models, tmp_path / "sessions")
        assert full["sessions"] == 4
        assert mine["sessions"] > 4


@pytest.mark.slow
def test_the_real_model(tmp_path: Path) -> None:
    with Models() as models:
        wanted = ways(["default"])
        rows, _ = measured(Speed(lengths=(1024,), rounds=3), wanted, models, tmp_path / "speed")
        assert rows[1]["reduction"] > 4
        assert rows[1]["kv_bytes"] < rows[1]["full_kv_bytes"] / 4
        rows, _ = measured(Sessions(length=512, rounds=2, most=12), wanted, models, tmp_path / "sessions")
        assert [row["sessions"] for row in rows] == [4, 12]
        assert rows[1]["held_bytes"] <= rows[1]["budget_bytes"]
