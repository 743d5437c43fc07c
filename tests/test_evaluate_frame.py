"""The frame of the evaluation: records that resume, ways, rows of data, plans, tables, pictures."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from fake_engine import FakeEngine
from rich.console import Console

import anchorkv
from anchorkv.config import AnchorConfig, preset
from anchorkv.errors import AnchorKVError, CapacityError, ConfigError, DataError, SavedStateError
from anchorkv.evaluate.environment import environment, models_of
from anchorkv.evaluate.plan import TASKS, Plan
from anchorkv.evaluate.report import Job, live, results, save, table
from anchorkv.evaluate.rows import Rows
from anchorkv.evaluate.run import Item, Models, Record, Row, Store, run, settings_of
from anchorkv.evaluate.statistics import bootstrap, difference, mean, verdict
from anchorkv.evaluate.ways import FULL, Way, newest_whole, way, ways
from anchorkv.models import Model


@dataclass(frozen=True)
class Count:
    """A task that counts how often it measures; "bad" items fail."""

    name: ClassVar[str] = "count"

    numbers: tuple[int, ...] = (1, 2)
    seed: int = 0
    measured: list[tuple[str, str]] = field(default_factory=list, init=False, compare=False)
    bad_rows: list[str] = field(default_factory=lambda: ["x.jsonl:3: the row is no JSON"], init=False, compare=False)

    def settings(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def items(self) -> Sequence[Item]:
        return [Item(str(number)) for number in self.numbers]

    def ways(self, ways: Sequence[Way]) -> list[Way]:
        return list(ways)

    def measure(self, models: Models, way: Way, item: Item) -> Record:
        self.measured.append((way.name, item.id))
        if item.id == "13":
            raise CapacityError("No cell is left.")
        return {"value": int(item.id) * (2 if way.name == FULL else 1)}

    def rows(self, records: Sequence[Record], ways: Sequence[Way]) -> list[Row]:
        found = []
        for one in ways:
            value = mean([r["value"] for r in records if r["way"] == one.name and "value" in r])
            found.append({"policy": one.name, "value": value.value, "value_stderr": value.stderr, "n": value.n})
        return found

    def figures(self, records: Sequence[Record], ways: Sequence[Way]) -> str:
        return f"{len(records)} so far"


@pytest.fixture
def models() -> Models:
    found, model = Models(), Model(FakeEngine(), preset("default"))
    found._loaded = {True: model, False: model}
    return found


ASKED = ways(["default"])


# --- records that resume -------------------------------------------------------------------------------------------


def test_nothing_is_measured_twice(models: Models, tmp_path: Path) -> None:
    first, again, more = Count(), Count(), Count(numbers=(1, 2, 3))
    rows = run([first], ASKED, models, Store(tmp_path, {}))
    assert first.measured == [("full", "1"), ("default", "1"), ("full", "2"), ("default", "2")]  # in turns
    assert run([again], ASKED, models, Store(tmp_path, {})) == rows
    assert again.measured == []
    run([more], ASKED, models, Store(tmp_path, {}))
    assert more.measured == [("full", "3"), ("default", "3")]


def test_rows_are_of_the_items_asked_for(models: Models, tmp_path: Path) -> None:
    run([Count(numbers=(1, 2, 30))], ASKED, models, Store(tmp_path, {}))
    (row, _) = run([Count()], ASKED, models, Store(tmp_path, {}))
    assert (row["value"], row["n"], row["task"]) == (3.0, 2, "count")


@pytest.mark.parametrize("left", [b'{"task": "count", "way": "full", "it', b'{"task": "count"}\n', b"\n", b"[1]\n"])
def test_half_a_line_at_the_end_is_forgotten(models: Models, tmp_path: Path, left: bytes) -> None:
    run([Count()], ASKED, models, Store(tmp_path, {}))
    path = tmp_path / "records.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + left)
    store = Store(tmp_path, {})
    assert len(store.of("count")) == 4
    assert path.read_bytes() == whole
    store.add({"task": "count", "way": "full", "item": "9"})
    assert len(Store(tmp_path, {}).of("count")) == 5


def test_a_last_line_without_its_end_counts(models: Models, tmp_path: Path) -> None:
    run([Count()], ASKED, models, Store(tmp_path, {}))
    path = tmp_path / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    Store(tmp_path, {}).add({"task": "count", "way": "full", "item": "9"})
    assert len(Store(tmp_path, {}).of("count")) == 5


def test_other_settings_are_refused_and_fresh_clears(tmp_path: Path) -> None:
    Store(tmp_path, {"seed": 0}).add({"task": "t", "way": "w", "item": "i"})
    (tmp_path / "mine.txt").write_text("stays")
    with pytest.raises(ConfigError, match="--fresh"):
        Store(tmp_path, {"seed": 1})
    Store.clear(tmp_path)
    assert Store(tmp_path, {"seed": 1}).of("t") == []
    assert (tmp_path / "mine.txt").read_text() == "stays"
    (tmp_path / "file").write_text("")
    with pytest.raises(SavedStateError, match="--out"):
        Store(tmp_path / "file", {})


def test_what_fails_is_in_the_records(models: Models, tmp_path: Path) -> None:
    task, store = Count(numbers=(13, 2)), Store(tmp_path, {})
    seen: list[tuple[int, int, str]] = []
    rows = run([task], ASKED, models, store, lambda *said: seen.append(said))
    assert [record["error"] for record in store.of("count") if "error" in record] == ["No cell is left."] * 2
    assert [row["n"] for row in rows] == [1, 1]
    assert seen[0] == (0, 4, "count: full, 13")
    assert seen[-1] == (4, 4, "")
    assert all(record["seconds"] >= 0 for record in store.of("count"))


def test_settings_tell_weights_and_policies(models: Models) -> None:
    found = settings_of([Count(seed=3)], ASKED, models)
    assert found["tasks"] == {"count": {"seed": 3}}
    assert found["ways"]["default"]["reduction"] == 12
    assert found["fingerprints"] == ["fake-1"]
    json.dumps(found)


# --- ways ----------------------------------------------------------------------------------------------------------


def test_ways_mean_what_they_say(tmp_path: Path) -> None:
    own = AnchorConfig(reduction=7)
    own.save(tmp_path / "own.json")
    assert way("default").policy == preset("default")
    assert way("default", own).policy == own == way(str(tmp_path / "own.json")).policy
    assert way("default:reduction=24,recall=off").policy == preset("default").replace(reduction=24, recall="off")
    assert way("window:reduction=24").policy == newest_whole(preset("default")).replace(reduction=24)
    assert way("default:anchors=EP+SEL").policy.anchors == ("EP", "SEL")
    assert (way("base").policy, way("base").adapter) == (preset("full"), False)
    assert (way("base/sepllm").policy, way("base/sepllm").adapter) == (preset("sepllm"), False)
    assert [one.name for one in ways(["default", "full", "default"])] == ["full", "default"]
    assert way("default").ground.name == way("default:reduction=24").ground.name
    assert way("default").ground.name != way("base/default").ground.name != way("no-memory").ground.name


@pytest.mark.parametrize(("text", "words"), [
    ("fulll", "no policy 'fulll'; choose one of full"), ("default:reductio=3", "'reductio=3' is no field=value"),
    ("default:reduction", "'reduction' is no field=value"), ("default:reduction=none", "reduction"),
    ("default:reduction=0.5", "greater than 1"), ("none.json", "cannot be read"), ("base/", "no policy ''"),
])
def test_unknown_ways_are_one_sentence(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        way(text)
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match="No policy"):
        ways([])


# --- rows of data --------------------------------------------------------------------------------------------------

FIELDS: dict[str, Any] = {"question": str, "answer": int}


@pytest.mark.parametrize(("line", "words"), [
    ("{", "the row is no JSON"), ("[1]", "no JSON object"), ('{"question": "a"}', "no field 'answer'"),
    ('{"question": "a", "answer": "b"}', "'answer' is str, not int"),
    ('{"question": "a", "answer": true}', "'answer' is bool, not int"), ('{"question": "", "answer": 1}', "is empty"),
])
def test_bad_rows_are_told_by_line_and_counted(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write('{"question": "a", "answer": 1}\n\n' + line + '\n{"question": "b", "answer": 2}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl\.gz:3: .*{words}.*--skip-bad-rows"):
        list(Rows(path, FIELDS))
    rows = Rows(path, FIELDS, skip_bad=True)
    assert [row["answer"] for row in rows] == [1, 2]
    assert [bad.split(":")[1] for bad in rows.bad] == ["3", "5"]


def test_files_without_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    for name, words in {"a.jsonl": "no usable row", "b.jsonl.gz": "damaged", "c.jsonl": "no data file"}.items():
        with pytest.raises(DataError, match=words):
            list(Rows(tmp_path / name, FIELDS))


# --- statistics ----------------------------------------------------------------------------------------------------


def test_statistics() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = mean(values)
    assert found.stderr == pytest.approx(values.std(ddof=1) / 20)
    assert bootstrap(lambda drawn: float(values[drawn].mean()), 400) == pytest.approx(found.stderr, rel=0.1)
    paired = difference(values + 0.1, values)
    assert (paired.value, paired.stderr) == (pytest.approx(0.1), pytest.approx(0, abs=1e-9))
    assert [verdict(mean(numbers)) for numbers in ([1, 1.1, 0.9], [-1, -1.1, -0.9], [1, -1, 0.5])] == [
        "better", "worse", "tie",
    ]
    assert verdict(mean([5])) == "tie"  # one measurement says nothing
    assert mean([]).n == 0
    assert math.isnan(bootstrap(lambda drawn: 0.0, 1))
    with pytest.raises(ValueError, match="paired"):
        difference([1], [1, 2])


# --- plans ---------------------------------------------------------------------------------------------------------

PLAN = """
model: null
policies: [default, "default:reduction=24", window, base]
data: ../shared/data
limit: 20
tasks:
  perplexity: {length: 2048, texts: [pg19.test], files: [a.txt], limit: 3}
"""


def plan(folder: Path, text: str) -> Plan:
    (folder / "plan.yaml").write_text(text, encoding="utf-8")
    return Plan.of([str(folder / "plan.yaml")])


def test_a_plan_makes_tasks(tmp_path: Path) -> None:
    found = plan(tmp_path, PLAN)
    (task,) = found.make()
    assert (task.length, task.texts, task.limit, task.first) == (2048, ("pg19.test",), 3, 512)
    assert task.data == tmp_path / "../shared/data"  # paths are relative to the plan
    assert task.files == (tmp_path / "a.txt",)
    assert [one.name for one in found.ways(task)] == ["full", "default", "default:reduction=24", "window", "base"]
    (changed,) = found.changed(limit=7, seed=3, data=None).make()
    assert (changed.limit, changed.seed, changed.data) == (3, 3, task.data)  # a task's own options stay its own
    assert plan(tmp_path, "tasks: [perplexity]").make() == plan(tmp_path, "tasks: {perplexity: }").make()


def test_task_names_with_options() -> None:
    (task,) = Plan.of(["perplexity:length=2048,first=0,texts=a+b"]).changed(limit=5).make()
    assert (task.length, task.first, task.texts, task.limit) == (2048, 0, ("a", "b"), 5)
    names = [one.name for one in Plan.of(["perplexity"]).ways(task)]
    assert names == ["full", "base", "window", "default", "default:reduction=24"]
    # Only the built-in model has an adapter to leave out.
    assert "base" not in [one.name for one in Plan.of(["perplexity"]).changed(model="x.gguf").ways(task)]
    with pytest.raises(ConfigError, match="'base' means the built-in model"):
        Plan.of(["perplexity"]).changed(model="x.gguf", policies=("base",)).ways(task)
    assert [one.name for one in Plan().ways(Count())] == ["full", "window", "default"]


@pytest.mark.parametrize(("text", "words"), [
    ("tasks: {perplexit: {}}", "no task 'perplexit'; choose among perplexity"),
    ("tasks: {perplexity: {lenght: 3}}", "perplexity has no option 'lenght'; its options are data, limit"),
    ("tasks: {perplexity: {length: long}}", "'length' cannot be 'long'"),
    ("tasks: {perplexity: {length: true}}", "'length' cannot be True"),
    ("tasks: {perplexity: {length: 2024-01-01}}", "'length' cannot be"),
    ("tasks: {perplexity: 3}", "options of perplexity are written as"), ("tasks: {perplexity: {name: x}}", "no option"),
    ("tasks: {perplexity: {_rows: {}}}", "no option '_rows'"), ("tasks: {perplexity: {length: 5}}", "leaves nothing"),
    ("task: {perplexity: {}}", "no tasks"), ("tasks:", "no tasks"), ("- perplexity", "is no plan"), ("", "is no plan"),
    ("tasks: {perplexity: {}}\nlimits: 3", "The plan has no option 'limits'"),
    ("tasks: {perplexity: {}}\nlimit: 0", "greater than or equal to 1"),
    ("tasks: {perplexity: {}}\nengine: gpu", "'engine' cannot be 'gpu'"),
    ("tasks: {perplexity: {}}\npolicies: default", "'policies' cannot be 'default'"),
    ("tasks: [\n  1", r"plan\.yaml:\d is not YAML"), ("tasks: \0", "is not YAML"),
])
def test_bad_plans_are_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        plan(tmp_path, text).make()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("what", "words"), [
    (["nothing"], "no task 'nothing'"), (["perplexity", "perplexity"], "named twice"),
    (["no.yaml"], "no plan at no.yaml"), (["no.yaml", "perplexity"], "evaluated alone"),
    (["perplexity:length"], "'length' is no option=value"),
    (["perplexity:length=a"], "'length' cannot be 'a'"), (["perplexity:word=a"], "no option 'word'"),
])
def test_bad_names_are_one_sentence(what: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Plan.of(what).make()


@pytest.mark.parametrize("name", list(TASKS))
def test_every_task_is_one(name: str) -> None:
    (task,) = Plan.of([name]).make()
    assert task.name == name
    for method in ("settings", "items", "ways", "measure", "rows"):
        assert callable(getattr(task, method))
    for heading, field_, form in getattr(task, "columns", ()):
        assert isinstance(heading, str)
        assert isinstance(field_, str)
        assert callable(form) or isinstance(form, str)


# --- results and tables --------------------------------------------------------------------------------------------


def shown(job: Job, width: int = 120) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(job, width))
    return console.export_text()


def test_results_hold_what_figures_depend_on(models: Models, tmp_path: Path) -> None:
    task, store = Count(numbers=(13, 2)), Store(tmp_path, {})
    rows = run([task], ASKED, models, store)
    job = Job(task, ASKED, store.of("count"), rows)
    found = results([job], {"seed": 0}, **environment(), models=models_of(models, ASKED), notes=["long"])
    path = save(found, tmp_path)
    assert json.loads(path.read_text(encoding="utf-8")) == found
    assert found["versions"]["anchorkv"] == anchorkv.__version__
    assert found["versions"]["numpy"] == np.__version__
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["processor"]
    assert found["models"][0] == {
        "name": "fake", "fingerprint": "fake-1", "weights": "none", "adapter": "", "engine": "fake",
        "architecture": "fake", "window": 8192, "cell_bytes": 64, "ways": ["full", "default"],
    }
    assert found["policies"]["default"]["policy"] == preset("default").model_dump(mode="json")
    assert found["tasks"]["count"] == {"numbers": [13, 2], "seed": 0}
    assert found["failures"][0] == {"task": "count", "way": "full", "item": "13", "error": "No cell is left."}
    assert found["bad_rows"] == {"count": {"count": 1, "rows": ["x.jsonl:3: the row is no JSON"]}}
    assert found["rows"][1]["value_stderr"] is None  # one measurement has none, and JSON knows no NaN
    assert live(task, store.of("count"), ASKED) == "4 so far"
    with pytest.raises(SavedStateError, match="--out"):
        save(found, tmp_path / "none")


def test_tables_show_errors_and_call_ties_ties() -> None:
    rows: list[Row] = [
        {"task": "count", "policy": "full", "accuracy": 0.5, "accuracy_stderr": 0.01, "difference": 0.0,
         "difference_stderr": 0.0, "n": 1200},
        {"task": "count", "policy": "default", "accuracy": 0.49, "accuracy_stderr": 0.012, "difference": -0.01,
         "difference_stderr": 0.02, "n": 1200, "beyond_window": True},
        {"task": "count", "policy": "window", "accuracy": 0.3, "accuracy_stderr": math.nan, "difference": -0.2,
         "difference_stderr": 0.02, "n": 1200},
        {"task": "count", "policy": "detail", "accuracy": 0.1, "detail": True},
    ]
    plain = shown(Job(Count(), ASKED, [], rows))
    assert "0.490 ±0.012" in plain
    assert "1,200" in plain
    assert [line.split()[-1] for line in plain.splitlines()[-5:-2]] == ["±0.010", "tie", "worse"]
    assert "default †" in plain
    narrow = shown(Job(Count(), ASKED, [], rows), width=26)
    assert max(map(len, narrow.splitlines())) <= 26
    assert narrow.count("window") == 2  # in two parts, each of which says whose figures they are
    assert "0.490" in narrow
    assert "longer than the model was trained for" in plain
    assert "detail" not in plain

    @dataclass(frozen=True)
    class Headed(Count):
        columns: ClassVar[Any] = (
            ("way", "policy", ""), ("right", "accuracy", ".1%"), ("fewer", "n", "{:.1f}×"), ("none", "missing", ""),
            ("n", "n", lambda value: f"<{value}>"),
        )

    headed = shown(Job(Headed(), ASKED, [], rows))
    assert "49.0% ±1.2%" in headed
    assert "1200.0×" in headed
    assert "<1200>" in headed
    assert "–" in headed


# --- pictures ------------------------------------------------------------------------------------------------------

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="an optional extra")


def figures(rows: list[Row]) -> dict[str, Any]:
    from anchorkv.evaluate import pictures

    whole = [{**row, "way": pictures._way(row, rows)} for row in rows]
    draw = pictures.PICTURES.get(rows[0]["task"], pictures._bars)
    return dict(draw(rows[0]["task"], whole, "tiny F32"))


@needs_matplotlib
def test_pictures_of_perplexity() -> None:
    from anchorkv.evaluate.pictures import COLOURS

    rows: list[Row] = [
        {"task": "perplexity", "policy": name, "text": text, "ratio": ratio, "ratio_stderr": 0.01, "kv_bytes": kv,
         "kv_bytes_stderr": 0.0, "curve": [{"length": n, "perplexity": 20 - n / 1024} for n in (1024, 2048, 4096)]}
        for text in ("books", "articles") for name, ratio, kv in (("full", 1.0, 2**26), ("default", 1.1, 2**22))
    ]
    length, memory = figures(rows).values()
    assert [panel.get_title() for panel in length.axes] == ["books", "articles"]
    assert length.axes[0].get_xscale() == memory.axes[0].get_xscale() == "log"
    assert [list(line.get_ydata()) for line in length.axes[1].lines] == [[19.0, 18.0, 16.0]] * 2
    assert [line.get_color() for line in length.axes[1].lines] == list(COLOURS[:2])
    (legend,) = length.legends
    assert [text.get_text() for text in legend.get_texts()] == ["full", "default"]
    assert memory.axes[0].lines[0].get_xdata()[0] == 64  # MiB
    rows[1]["ratio"] = math.nan  # of a way whose full cache failed
    assert len(figures(rows)["perplexity-memory"].axes[0].containers) == 1


@needs_matplotlib
def test_pictures_of_needles_are_heat_maps() -> None:
    rows: list[Row] = [
        {"task": "needle", "policy": "default", "recall": recall, "length": length, "depth": depth, "score": depth}
        for recall in ("off", "on") for length in (1024, 4096) for depth in (0.0, 0.5, 1.0, "all")
    ]
    (figure,) = figures(rows).values()
    assert [panel.get_title() for panel in figure.axes[:2]] == ["default, recall off", "default, recall on"]
    assert figure.axes[0].images[0].get_array().tolist() == [[0, 0], [0.5, 0.5], [1, 1]]


@needs_matplotlib
def test_pictures_of_icl_speed_and_the_rest() -> None:
    icl: list[Row] = [
        {"task": "icl", "policy": "full", "demonstrations": n, "accuracy": n / 64, "seconds": n} for n in (32, 0, 8)
    ]
    accuracy, seconds = figures(icl)["icl"].axes
    assert list(accuracy.lines[0].get_xdata()) == [0, 8, 32]
    assert list(seconds.lines[0].get_ydata()) == [0, 8, 32]
    several: list[Row] = [
        {"task": "icl", "policy": "full", "benchmark": name, "shots": n, "accuracy": 0.5, "seconds_per_question": n}
        for name in ("arc", "piqa") for n in (1, 4)
    ]
    panels = figures(several)["icl"].axes
    assert [panel.get_title() for panel in panels] == ["arc", "arc", "piqa", "piqa"]
    assert list(panels[3].lines[0].get_xdata()) == [1, 4]
    speed: list[Row] = [
        {"task": "speed", "policy": "full", "length": 1024, "prefill_ratio": 1.0, "decode_ratio": 1.0},
        {"task": "speed", "policy": "full", "length": 4096, "prefill_ratio": 1.0, "decode_ratio": None},
        {"task": "speed", "policy": "sepllm", "length": 4096, "error": "no cell is left"},
    ]
    assert len(figures(speed[:2])["speed"].axes) == 2
    rest: list[Row] = [
        {"task": "qa", "policy": name, "benchmark": benchmark, "shots": shots, "questions": 10 + shots,
         "accuracy": 0.5 + shots / 20, "accuracy_stderr": 0.05, "seconds": 3.0}
        for benchmark in ("arc", "boolq") for shots in (0, 5) for name in ("full", "default")
    ]
    (panel,) = figures(rest)["qa"].axes
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        "arc, shots 0", "arc, shots 5", "boolq, shots 0", "boolq, shots 5",
    ]
    assert len(panel.patches) == 8
    assert panel.get_xlabel() == "accuracy (± s.e.)"


def test_errors_of_the_frame_are_one_family() -> None:
    for error in (ConfigError, DataError, SavedStateError, CapacityError):
        assert issubclass(error, AnchorKVError)
