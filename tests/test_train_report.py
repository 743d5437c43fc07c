"""What a training run leaves beside its adapter: a log, curves, a model card, TensorBoard; and its command line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
yaml = pytest.importorskip("yaml")

from matplotlib.image import imread  # noqa: E402
from tiny import TEXT, save_tiny  # noqa: E402 (needs torch)

from anchorkv.cli import app  # noqa: E402
from anchorkv.cli.screen import work_bar  # noqa: E402
from anchorkv.config import AnchorConfig  # noqa: E402
from anchorkv.train.card import CARD, base_name, card  # noqa: E402
from anchorkv.train.curves import PNG, SVG, figure, save_curves  # noqa: E402
from anchorkv.train.progress import BOARD, LOG, Progress, read_log  # noqa: E402
from anchorkv.train.trainer import Settings, train  # noqa: E402

POLICY = AnchorConfig(reduction=6, max_segment=24, recall="off", scorer="frequency")
TRAINED = [
    {"step": step, "tokens": 2048 * step, "loss": 2.0 / step**0.5, "rate": 1e-4, "tokens_per_second": 310.0}
    for step in range(5, 501, 5)
]
VALIDATED = [
    {
        "step": step, "tokens": 2048 * step, "perplexity_full": 30.0 - step / 1000,
        "perplexity_anchored": 37.0 - step / 200, "perplexity_no_memory": 41.5 - step / 1000,
        "ratio": 1.23 - step / 5000, "context_recovered": 0.36 + step / 5000, "reduction": 11.25,
    }
    for step in (0, 50, 100, 200, 300, 400, 500)
]
ROWS = sorted([*TRAINED, *VALIDATED], key=lambda row: row["step"])


def log(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(axes: Any) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    save_tiny(tmp_path / "model")
    for name, numbers in {"novels": range(12), "laws": range(12, 24), "held-out": range(24, 30)}.items():
        log(tmp_path / f"{name}.jsonl", [{"text": f"Chapter {n}. " + 3 * TEXT + TEXT[n:]} for n in numbers])
    (tmp_path / "recipe.yaml").write_text(
        "sources:\n  - path: novels.jsonl\n    weight: 3\n    licence: public domain\n"
        "  - path: laws.jsonl\n    licence: CC BY 4.0 | attribution\n", encoding="utf-8",
    )
    return Settings(
        model=str(tmp_path / "model"), data=str(tmp_path / "recipe.yaml"), policy=POLICY, tokens=4 * 384, length=384,
        rows=1, accumulation=1, rank=4, alpha=8, rate=0.01,
    )


# --- the log -------------------------------------------------------------------------------------------------------


def test_figures_of_one_step_become_one_row(tmp_path: Path) -> None:
    rows = read_log(log(tmp_path / LOG, [*TRAINED[:10], VALIDATED[1]]))
    assert [row["step"] for row in rows] == list(range(5, 51, 5))
    assert rows[-1] == {**TRAINED[9], **VALIDATED[1]}
    assert read_log(tmp_path / "none.jsonl") == []


def test_a_resumed_run_leaves_out_what_it_went_back_behind(tmp_path: Path) -> None:
    first = [{"step": step, "tokens": step, "loss": 1.0} for step in (5, 10, 15, 20)]
    again = [{"step": step, "tokens": step, "loss": 0.5} for step in (15, 17)]
    rows = read_log(log(tmp_path / LOG, [*first, *again]))
    assert [(row["step"], row["loss"]) for row in rows] == [(5, 1.0), (10, 1.0), (15, 0.5), (17, 0.5)]


def test_a_line_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    path = log(tmp_path / LOG, TRAINED[:3])
    path.write_text(path.read_text(encoding="utf-8") + '{"step": 20, "lo', encoding="utf-8")
    assert read_log(path) == TRAINED[:3]


# --- curves --------------------------------------------------------------------------------------------------------


def test_the_curves_show_the_log() -> None:
    loss, perplexity, recovered, ratio = figure(ROWS, "a title").axes
    assert lines(loss)[0] == ([row["tokens"] for row in TRAINED], [row["loss"] for row in TRAINED])
    at = [row["tokens"] for row in VALIDATED]
    assert dict(zip((line.get_label() for line in perplexity.lines), lines(perplexity), strict=True)) == {
        "no memory": (at, [row["perplexity_no_memory"] for row in VALIDATED]),
        "anchored": (at, [row["perplexity_anchored"] for row in VALIDATED]),
        "full": (at, [row["perplexity_full"] for row in VALIDATED]),
    }
    assert lines(recovered)[0] == (at, [row["context_recovered"] for row in VALIDATED])
    assert lines(ratio)[0] == (at, [row["ratio"] for row in VALIDATED])
    assert "11.2× fewer cells" in recovered.get_title()
    for axes in (loss, perplexity, recovered, ratio):
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert axes.get_title()


def test_a_short_run_has_a_plain_axis_and_a_long_one_a_logarithmic_one() -> None:
    assert figure(VALIDATED[:3], "").axes[1].get_xscale() == "linear"
    many = [{**VALIDATED[0], "tokens": tokens} for tokens in (0, 10, 100, 1000)]
    assert figure(many, "").axes[1].get_xscale() == "symlog"


def test_without_validation_the_loss_is_the_only_curve() -> None:
    (loss,) = figure(TRAINED[:6], "").axes
    assert lines(loss) == [([row["tokens"] for row in TRAINED[:6]], [row["loss"] for row in TRAINED[:6]])]


@pytest.mark.parametrize("rows", [[], [{"step": 5, "tokens": 5, "loss": None}], VALIDATED[:1], ROWS])
def test_any_log_becomes_two_pictures(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    save_curves(rows, tmp_path, "a title")
    picture = imread(tmp_path / PNG)
    assert min(picture.shape[:2]) > 400
    assert picture[..., :3].min() < 0.2
    assert picture[..., :3].max() == 1
    assert "<svg" in (tmp_path / SVG).read_text(encoding="utf-8")


# --- the model card ------------------------------------------------------------------------------------------------


def test_the_card_holds_figures_and_licences(settings: Settings, tmp_path: Path) -> None:
    text = card(settings, ROWS, "6 documents of 384 tokens from held-out.jsonl", 1_024_000, 1_024_000)
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["base_model"] == "model"
    assert header["library_name"] == "peft"
    assert header["license"] == "other"
    assert "anchorkv" in header["tags"]
    assert "| novels.jsonl | 75.0% | public domain |" in text
    assert r"| laws.jsonl | 25.0% | CC BY 4.0 \| attribution |" in text
    assert "| perplexity, anchored | 37.00 | 34.50 |" in text
    assert "| **context recovered** | 36.0% | 46.0% |" in text
    assert "6 documents of 384 tokens from held-out.jsonl" in text
    assert "46.0% of what older text helps is left" in text
    assert "1,024,000 tokens |" in text
    assert "rank 4, alpha 8" in text
    assert "(curves.png)" in text
    assert "anchorkv export . --model BASE.gguf" in text
    assert "anchorkv run " in text
    assert str(tmp_path) not in text
    assert "not finished" not in text


def test_the_card_says_what_is_bad_or_not_known(settings: Settings) -> None:
    worse = [VALIDATED[0], {**VALIDATED[-1], "context_recovered": 0.3, "perplexity_full": 33.0}]
    text = card(settings, worse, "1 document", 1000, 2000)
    assert "Training did not raise that share" in text
    assert "rose from 30.00 to 33.00" in text
    assert "1,000 tokens of 2,000: the run is not finished" in text
    assert "not known" in card(settings, TRAINED, "", 1000, 1000)
    unknown = [{**VALIDATED[0], "context_recovered": None, "ratio": None}]
    assert "| **context recovered** | – | – |" in card(settings, unknown, "1 document", 1000, 1000)


def test_a_model_is_named_without_its_place(tmp_path: Path) -> None:
    from anchorkv.models import builtin

    assert base_name(str(builtin())) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base_name("owner/name") == "owner/name"
    assert base_name("owner/name/file-Q8_0.gguf") == "owner/name"
    assert base_name(str(tmp_path)) == tmp_path.name


# --- the run -------------------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def pretend(progress: Progress, steps: range, total: int) -> None:
    """The callbacks of a run without a model, from one checkpoint to another."""
    args = SimpleNamespace(per_device_train_batch_size=1, gradient_accumulation_steps=1, world_size=1)
    state = SimpleNamespace(global_step=steps[0], max_steps=total, is_world_process_zero=True)
    progress.on_train_begin(args, state, None)
    for step in steps[1:]:
        state.global_step = step
        progress.on_step_end(args, state, None)
        progress.on_log(args, state, None, logs={"loss": 10.0 - step, "learning_rate": 1e-4})
    progress.on_save(args, state, None)
    progress.on_train_end(args, state, None)


def test_tensorboard_shows_a_resumed_run_once(settings: Settings, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out, said = tmp_path / "out", []
    pretend(Progress(settings, out, None, lambda *_: None, None), range(4), 4)
    pretend(Progress(settings, out, None, lambda *_: None, None, lambda *shown: said.append(shown)), range(2, 5), 4)
    assert said[0][1].startswith("loss 7.0000")  # the newest figures of the run that it goes on with
    found = scalars(out / BOARD)
    assert found["train/loss"] == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0)]
    assert {"train/rate", "train/tokens_per_second"} < set(found)


def test_without_tensorboard_the_rest_is_there(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else find(name, *a))
    shown, out = [], tmp_path / "out"
    progress = Progress(settings, out, None, lambda *_: None, None, lambda doing, figures: shown.append(figures))
    pretend(progress, range(4), 4)
    assert sorted(path.name for path in out.iterdir()) == [CARD, PNG, SVG, LOG]
    assert shown[-1].startswith("loss 7.0000 · ")
    assert shown[-1].endswith(" tokens/s")


def test_a_run_leaves_its_report(settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = [
        "train", "--model", settings.model, "--data", settings.data, "--out", out, "--tokens", 4 * 384,
        "--length", 384, "--rank", 4, "--rate", 0.01, "--hidden", 0.1, "--vocabulary", 0.5, "--save-steps", 2,
        "--validation", tmp_path / "held-out.jsonl", "--scorer", "frequency", "--reduction", 6,
        "--max-segment", 32, "--recall", "off", "--json",
    ]
    result = CliRunner().invoke(app, [str(part) for part in call])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["tokens"] == 4 * 384
    rows = read_log(out / LOG)
    validated = [row for row in rows if "ratio" in row]
    assert [row["step"] for row in validated] == [0, 2, 4]
    assert report["context_recovered"] == validated[-1]["context_recovered"]
    text = (out / CARD).read_text(encoding="utf-8")
    assert "6 documents of 384 tokens from held-out.jsonl" in text
    assert f"| {validated[0]['perplexity_full']:.2f} | {validated[-1]['perplexity_full']:.2f} |" in text
    assert "hidden states 0.1" in text
    assert "PEFT" not in text
    assert imread(out / PNG).shape[0] > 400
    if importlib.util.find_spec("tensorboard"):
        assert [step for step, _ in scalars(out / BOARD)["validation/perplexity_anchored"]] == [0, 2, 4]
    (out / LOG).write_text("", encoding="utf-8")
    again = CliRunner().invoke(app, [str(part) for part in call if part != "--json"])
    assert again.exit_code == 0, again.output
    assert "1,536 tokens already" in again.stderr
    assert (out / LOG).read_text(encoding="utf-8") == ""


def test_a_run_killed_before_its_very_end_is_finished(settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(settings, out, log_steps=1, callbacks=(Progress(settings, out, None, lambda *_: None, None),))
    for name in (CARD, "anchorkv.json", "adapter_model.safetensors"):
        (out / name).unlink()
    progress = Progress(settings, out, None, lambda *_: None, None)
    train(settings, out, callbacks=(progress,))
    progress.report()
    assert (out / "adapter_model.safetensors").is_file()
    assert progress.tokens == 4 * 384
    assert "| trained | 1,536 tokens |" in (out / CARD).read_text(encoding="utf-8")


def test_the_bar_has_a_line_of_figures() -> None:
    with work_bar("Loading", "tokens", quiet=True) as bar:
        bar(1, 2)
        bar.say("Training", "loss 1.5")
        assert (bar.tasks[0].description, bar.tasks[0].completed, bar.tasks[0].total) == ("Training", 1, 2)
        assert "loss 1.5" in [str(shown) for shown in bar.get_renderables()]


def test_other_settings_have_not_been_reached(settings: Settings, tmp_path: Path) -> None:
    from dataclasses import replace

    from anchorkv.cli.train import _reached

    assert _reached(settings, tmp_path / "out") == 0
    train(settings, tmp_path / "out")
    assert _reached(settings, tmp_path / "out") == settings.tokens
    assert _reached(replace(settings, tokens=384), tmp_path / "out") == settings.tokens
    assert _reached(replace(settings, tokens=2 * settings.tokens), tmp_path / "out") == 0
    assert _reached(replace(settings, rate=0.02), tmp_path / "out") == 0
