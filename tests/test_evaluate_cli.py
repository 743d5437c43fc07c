"""`anchorkv eval` on a fake engine and on a tiny GGUF file: what it prints, refuses, keeps, and goes on with."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from command import Command
from fake_engine import FakeEngine

import anchorkv.cli.evaluate
import anchorkv.models
from anchorkv.cli.evaluate import _Progress
from anchorkv.cli.screen import Bar
from anchorkv.errors import CapacityError
from anchorkv.evaluate.run import Store
from anchorkv.evaluate.tasks.perplexity import Perplexity

OPTIONS = "perplexity:length=300,first=40,texts=books"
PROSE = "The engineer of the bridge is Ada Miller. She built 12 bridges in 1902.\n\nThe river is called Sten. " * 8
call = Command("eval")
refused = call.refused


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeEngine:
    """Every command of this process loads this engine, and writes into a folder of its own."""
    fake = FakeEngine()
    monkeypatch.setattr(anchorkv.shipped, "FOLDER", tmp_path / "nothing shipped")
    monkeypatch.setattr(anchorkv.models, "_engine", lambda *_: fake)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with four books, each of which is one document."""
    folder = tmp_path / "data"
    (folder / "lm").mkdir(parents=True)
    lines = (json.dumps({"text": f"Book {number}. {PROSE}"}) + "\n" for number in range(4))
    (folder / "lm" / "books.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def draw(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Nothing is drawn, which takes a second, but where a test undoes it; this is what draws."""
    plain = anchorkv.cli.evaluate._pictures
    monkeypatch.setattr("anchorkv.cli.evaluate._pictures", lambda *_: [])
    return plain


def measured(monkeypatch: pytest.MonkeyPatch, then: Callable[[int], None] = lambda _: None) -> list[str]:
    """What is measured from now on; `then` is called with its number before each."""
    found: list[str] = []
    plain = Perplexity.measure

    def measure(self: Perplexity, models: Any, way: Any, item: Any) -> Any:
        then(len(found))
        found.append(f"{way.name} {item.id}")
        return plain(self, models, way, item)

    monkeypatch.setattr(Perplexity, "measure", measure)
    return found


# --- results -------------------------------------------------------------------------------------------------------


def test_a_table_results_and_pictures(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: Any
) -> None:
    monkeypatch.setattr("anchorkv.cli.evaluate._pictures", draw)
    result = call(OPTIONS, "--data", data, "--limit", 2, "--out", tmp_path / "out")
    for word in ("perplexity", "books", "full", "window", "default", "base", "recovered", "±"):
        assert word in result.stdout
    assert "Results are in" in result.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [row["policy"] for row in found["rows"]] == ["full", "base", "window", "default", "default:reduction=24"]
    assert {row["documents"] for row in found["rows"]} == {2}
    assert found["rows"][0]["ratio"] == found["rows"][0]["context_recovered"] == 1
    assert found["tasks"]["perplexity"]["limit"] == 2
    assert found["models"][0]["fingerprint"] == "fake-1"
    assert found["failures"] == found["notes"] == []
    assert found["bad_rows"] == {"perplexity": {"count": 0, "rows": []}}
    assert set(found["versions"]) >= {"anchorkv", "python", "numpy", "llama-cpp-python"}
    assert any(name.startswith("no-memory ") for name in found["policies"])  # everything that was measured
    if importlib.util.find_spec("matplotlib"):
        kinds = [f"perplexity-{what}.{kind}" for what in ("length", "memory") for kind in ("png", "svg")]
        assert found["pictures"] == kinds
        assert all((tmp_path / "out" / name).stat().st_size > 5000 for name in kinds)


def test_json_is_one_object_and_nothing_else(data: Path, tmp_path: Path) -> None:
    result = call(OPTIONS, "-d", data, "--limit", 1, "-p", "default", "--out", tmp_path / "out", "--seed", 3, "--json")
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [row["policy"] for row in found["rows"]] == ["full", "default"]
    assert found["tasks"]["perplexity"]["seed"] == 3


def test_it_works_without_matplotlib(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: Any
) -> None:
    monkeypatch.setattr("anchorkv.cli.evaluate._pictures", draw)
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else plain(name))
    result = call(OPTIONS, "-d", data, "--limit", 1, "-p", "default", "--out", tmp_path / "out")
    assert result.stderr.count("matplotlib, which is not installed: pip install 'anchorkv[eval]'") == 1
    assert not list((tmp_path / "out").glob("*.png"))
    assert json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["pictures"] == []


def test_a_plan_and_what_the_command_line_changes_in_it(data: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(
        "policies: [window]\ndata: data\nlimit: 2\nout: out\n"
        "tasks: {perplexity: {length: 300, first: 40, texts: [books]}}\n", encoding="utf-8",
    )
    found = json.loads(call("plan.yaml", "--json").stdout)
    assert {(row["policy"], row["documents"]) for row in found["rows"]} == {("full", 2), ("window", 2)}
    assert (tmp_path / "out" / "results.json").is_file()
    found = json.loads(call("plan.yaml", "--limit", 1, "-p", "no-memory", "--out", "other", "--json").stdout)
    assert {(row["policy"], row["documents"]) for row in found["rows"]} == {("full", 1), ("no-memory", 1)}


def test_long_documents_are_noted_once_and_marked(data: Path, engine: FakeEngine) -> None:
    engine.info = type(engine.info)(**{**vars(engine.info), "window": 100})
    result = call(OPTIONS, "-d", data, "--limit", 2, "-p", "default")
    assert result.stderr.count("never trained") == 1
    assert "default †" in result.stdout


def test_bad_rows_are_passed_over_and_counted(data: Path) -> None:
    with (data / "lm" / "books.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"title": "no text"}\n')
    arguments = (OPTIONS, "-d", data, "--limit", 1, "-p", "default")
    assert "books.jsonl:5: the row has no field 'text'" in refused(*arguments)
    result = call(*arguments, "--skip-bad-rows", "--json")
    assert json.loads(result.stdout)["bad_rows"]["perplexity"]["count"] == 1
    assert "1 bad rows were passed over, the first books.jsonl:5" in result.stderr


@pytest.mark.parametrize("everything", [False, True])
def test_what_fails_is_said(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, everything: bool) -> None:
    plain = Perplexity.measure

    def measure(self: Perplexity, models: Any, way: Any, item: Any) -> Any:
        if everything or way.name == "full":
            raise CapacityError("No cell is left.")
        return plain(self, models, way, item)

    monkeypatch.setattr(Perplexity, "measure", measure)
    result = call(OPTIONS, "-d", data, "--limit", 1, "-p", "default", "--out", "out", code=2 if everything else 0)
    assert "perplexity: 1 measurements of full failed, the first so: No cell is left." in result.stderr
    assert ("Nothing could be measured: No cell is left." in result.stderr) == everything
    found = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [row["policy"] for row in found["rows"]] == ([] if everything else ["default"])
    assert all(row["ratio"] is None for row in found["rows"])
    assert len(found["failures"]) == (4 if everything else 1)


# --- what is refused -----------------------------------------------------------------------------------------------


def test_mistakes_are_one_sentence(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anchorkv.evaluate.run.load", lambda *_, **__: pytest.fail("no model is needed for this"))
    assert "no task 'perplexty'; choose among perplexity, qa" in refused("perplexty", "-d", data)
    assert "no policy 'defalt'; choose one of full" in refused(OPTIONS, "-d", data, "-p", "defalt")
    assert "'reductio=24' is no field=value" in refused(OPTIONS, "-d", data, "-p", "default:reductio=24")
    assert "greater than 1" in refused(OPTIONS, "-d", data, "-p", "default:reduction=1")
    assert "no option 'lenth'; its options are data" in refused("perplexity:lenth=3", "-d", data)
    assert "'length' cannot be 'long'" in refused("perplexity:length=long", "-d", data)
    assert "--data" in refused("perplexity")
    assert "no lm/books.jsonl" in refused(OPTIONS, "-d", tmp_path)
    assert "no plan at none.yaml" in refused("none.yaml")
    assert "built-in model without its adapter" in refused(OPTIONS, "-d", data, "-p", "base", "-m", "some.gguf")
    call(OPTIONS, "-d", data, "--limit", 0, code=2)
    call("perplexity", "--no-such-option", code=2)
    call(code=2)


def test_other_settings_need_another_folder(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (OPTIONS, "-d", data, "--limit", 1, "--out", tmp_path / "out")
    call(*arguments, "-p", "default")
    assert "--fresh" in refused(*arguments, "-p", "window")
    seen = measured(monkeypatch)
    call(*arguments, "-p", "window", "--fresh")
    assert [what for what in seen if what.startswith("window")] == ["window books/0"]
    (tmp_path / "file").write_text("")
    for more in ((), ("--fresh",)):
        assert "choose another --out" in refused(OPTIONS, "-d", data, "--out", tmp_path / "file", *more)


# --- resuming ------------------------------------------------------------------------------------------------------


def test_the_same_command_goes_on(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    seen = measured(monkeypatch, interrupt)
    arguments = (OPTIONS, "-d", data, "-p", "default", "--json")
    result = call(*arguments, "--limit", 1, code=130)
    assert "the same command goes on from there" in result.stderr
    seen.append("interrupted")
    call(*arguments, "--limit", 1)
    first = [what for what in seen if what != "interrupted"]
    assert len(first) == len(set(first)) == 4  # full, default, base, and what anchors start from
    call(*arguments, "--limit", 2)  # a larger limit goes on from the smaller one
    assert len(seen) == 1 + 8
    call(*arguments, "--limit", 2)
    assert len(seen) == 1 + 8
    call(*arguments, "--limit", 2, "--fresh")
    assert len(seen) == 1 + 16


def test_a_killed_run_goes_on(data: Path, tmp_path: Path) -> None:
    model = tiny_gguf.write(tmp_path / "tiny.gguf")
    command = [
        sys.executable, "-m", "anchorkv", "eval", OPTIONS, "--data", str(data), "--limit", "3", "--out", "out",
        "--model", str(model), "--threads", "1", "-p", "default", "-p", "sepllm", "--json",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(anchorkv.__file__).parents[1])}
    records = tmp_path / "out" / "records.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment) as run:
        until = time.monotonic() + 300
        while time.monotonic() < until and run.poll() is None and not _lines(records):
            time.sleep(0.002)
        os.kill(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, run.stderr.read().decode() if run.stderr else ""
    before = records.read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    assert kept
    with records.open("ab") as file:
        file.write(b'{"task": "perplexity", "way": "fu')  # as a kill in the middle of a line leaves it
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    after = records.read_bytes()
    assert after.startswith(kept)
    keys = [(record["way"], record["item"]) for record in map(json.loads, after.splitlines())]
    # Those asked for, the base model's full cache, and two grounds: sepllm's segments are not those of default.
    assert len(keys) == len(set(keys)) == 3 * (3 + 1 + 2)
    assert len(keys) > len(kept.splitlines())
    found = json.loads(done.stdout)
    assert {row["documents"] for row in found["rows"]} == {3}
    assert found["models"][0]["name"]


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# --- progress ------------------------------------------------------------------------------------------------------


def test_figures_are_said_while_it_runs(data: Path, tmp_path: Path) -> None:
    said: list[tuple[str, str]] = []
    steps: list[tuple[int, int]] = []

    class Silent(Bar):
        def __call__(self, done: int, total: int) -> None:
            steps.append((done, total))

        def say(self, title: str, figures: str) -> None:
            said.append((title, figures))

    task = Perplexity(data=data, texts=("books",))
    store = Store(tmp_path / "out", {})
    progress = _Progress(Silent(), 10, 20, task, [], store)
    progress(0, 5, "perplexity: full, books/0")
    assert (steps, said) == ([(10, 20)], [("perplexity: full, books/0", "")])
    call(OPTIONS, "-d", data, "--limit", 1, "-p", "default", "--out", tmp_path / "run")
    records = list(map(json.loads, (tmp_path / "run" / "records.jsonl").read_text("utf-8").splitlines()))
    from anchorkv.evaluate.ways import ways

    assert task.figures(records[:1], ways(["default"])).startswith("books: full ")
    assert "×" in task.figures(records[:2], ways(["default"]))
