"""Plans: what they say, how they are written and read, and the one sentence for what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from anchorkv.config import AnchorConfig, preset
from anchorkv.errors import ConfigError, SavedStateError
from anchorkv.poc.init import STEPS, ask_for_plan
from anchorkv.poc.plan import FROM_POLICY, Plan

# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "words"), [
    ({"folders": "x"}, "There is no option 'folders'; the options are title, folder,"),
    ({"thresholds": {"memory": 3}}, "There is no option 'thresholds.memory'; the options are memory_reduction,"),
    ({"thresholds": {"memory_reduction": 0.8}}, "cannot be 0.8 (input should be greater than 1; it is a factor"),
    ({"thresholds": {"quality_share": 95}}, "cannot be 95 (input should be less than or equal to 1; it is a share"),
    (
        {"thresholds": {"perplexity_ratio": 1, "memory_reduction": 5}},
        "The thresholds contradict each other: memory_reduction 5 drops cells",
    ),
    ({"thresholds": {"agreement": 1}}, "The thresholds contradict each other: agreement 1 allows no answer to differ"),
    ({"capacity": {"memory": "lots"}}, "'lots' is no size; write it as 24GB"),
    ({"recall_modes": ["sometimes"]}, "input should be 'off', 'on' or 'auto'"),
    ({"recall_modes": []}, "should have at least 1 item"),
    ({"policies": []}, "name at least one policy to set beside the full cache"),
    ({"policies": ["full"]}, "name at least one policy to set beside the full cache"),
    ({"policies": {"full": "default"}}, "'full' is the full cache"),
    ({"policies": {"mine": {"reduction": 0}}}, "Invalid anchor policy: reduction:"),
    ({"budget_minutes": 0}, "should be greater than 0"),
    ({"lang": "de"}, "should be 'en' or 'ja'"),
])
def test_what_cannot_be_is_one_sentence(given: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Plan(**given)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(".")


@pytest.mark.parametrize(("policies", "words"), [
    (["nothing"], "There is no policy 'nothing'"),
    (["base"], "'base' is the model without its adapter"),
    (["default:reduction=3"], "memory_reduction is 5, and the policies keep one cell in 3 at best"),
])
def test_policies_that_cannot_be_used(policies: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Plan(policies=policies, thresholds={"memory_reduction": 5}).resolved()


def test_a_threshold_is_compared_with_the_best_of_the_policies() -> None:
    limits = {"memory_reduction": 20}
    with pytest.raises(ConfigError, match="No policy can reach the threshold"):
        Plan(thresholds=limits).resolved()
    assert list(Plan(thresholds=limits, policies=["default", "default:reduction=24"]).resolved()) == [
        "default", "default:reduction=24",
    ]
    # What other kinds of anchors, or a budget, keep does not follow from `reduction`.
    assert Plan(thresholds=limits, policies=["paper-ep"]).resolved()
    assert Plan(thresholds=limits, policies=["default:cell_budget=300"]).resolved()


# --- what a plan means ---------------------------------------------------------------------------------------------


def test_the_default_is_the_models_own_policy() -> None:
    own = AnchorConfig(reduction=9)
    assert Plan().resolved(own) == {"default": own}
    assert Plan().resolved() == {"default": preset("default")}
    assert Plan(policies={"mild": {"reduction": 6}, "full": "full"}).resolved() == {"mild": AnchorConfig(reduction=6)}


def test_what_is_given_goes_before_what_the_plan_says() -> None:
    plan = Plan(seed=3, threads=2).changed(seed=4, lang=None)
    assert (plan.seed, plan.threads, plan.lang) == (4, 2, "en")
    with pytest.raises(ConfigError):
        plan.changed(threads=0)


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_plan_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    plan = Plan(
        title="契約書: #1", folder=tmp_path / "texts", questions=tmp_path / "q.csv", budget_minutes=2.5, lang="ja",
        policies={"default": "default", "mild": AnchorConfig(reduction=6)}, recall_modes=("off", "on"),
        thresholds={"memory_reduction": 3}, capacity={"memory": "80GB", "price": 2000, "currency": "JPY"},
        max_tokens_document=None, redact=True,
    )
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == plan
    written = yaml.safe_load((tmp_path / "plan.yaml").read_text(encoding="utf-8"))
    assert written["folder"] == "texts"
    assert written.keys() == set(Plan.model_fields)
    assert not set(FROM_POLICY) & written["capacity"].keys()


WORDS = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=40)


@settings(max_examples=20, deadline=None)
@given(st.builds(dict, title=WORDS, seed=st.integers(0, 10**9), model=st.none() | WORDS))
def test_any_words_come_back(tmp_path_factory: pytest.TempPathFactory, fields: dict[str, object]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    plan = Plan(**fields)
    plan.save(path)
    assert Plan.load(path) == plan


def test_every_option_is_explained_where_it_stands(tmp_path: Path) -> None:
    Plan().save(tmp_path / "plan.yaml")
    lines = (tmp_path / "plan.yaml").read_text(encoding="utf-8").splitlines()
    for name, field in Plan.model_fields.items():
        at = next(number for number, line in enumerate(lines) if line.startswith(f"{name}:"))
        assert lines[at - 1] == f"# {field.description}"


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "model.gguf").write_bytes(b"")
    lines = (
        "folder: ../texts", "questions: q.csv", "model: model.gguf", "policies: [default, own.json]",
        "recall_modes: [off, on]",
    )
    (tmp_path / "plans" / "p.yml").write_text("\n".join(lines), encoding="utf-8")
    AnchorConfig(reduction=7).save(tmp_path / "plans" / "own.json")
    monkeypatch.chdir(tmp_path)
    plan = Plan.load(Path("plans/p.yml"))
    assert plan.folder == Path("plans/../texts")
    assert (plan.questions, plan.model) == (Path("plans/q.csv"), "plans/model.gguf")
    assert plan.resolved()["own.json"].reduction == 7
    assert plan.recall_modes == ("off", "on")


@pytest.mark.parametrize(("text", "words"), [
    ("- a\n", "is no plan; write options such as"),
    ("", "is no plan; write options such as"),
    ("title: [", "is not YAML"),
    ("a: b: c\n", ":1 is not YAML"),
    ("seed: many\n", "'seed' cannot be 'many'"),
    ("thresholds:\n", "'thresholds' cannot be None"),
])
def test_files_that_are_no_plans(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "p.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=words) as raised:
        Plan.load(tmp_path / "p.yaml")
    assert "p.yaml" in str(raised.value)


def test_a_missing_plan_and_one_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is no plan at .*; `anchorkv poc init"):
        Plan.load(tmp_path / "p.yaml")
    (tmp_path / "file").write_text("")
    with pytest.raises(SavedStateError, match="cannot be written"):
        Plan().save(tmp_path / "file" / "p.yaml")


# --- asking --------------------------------------------------------------------------------------------------------


def test_the_defaults_of_the_questions_are_those_of_a_plan() -> None:
    assert ask_for_plan(lambda explanation, question, default: default, pytest.fail) == Plan()


def test_answers_become_a_plan_and_wrong_ones_are_asked_for_again(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("A text.")
    answers = {
        "Folder of documents": [str(tmp_path / "nowhere"), str(tmp_path / "texts")], "Language": ["de", "ja"],
        "File of questions": [str(tmp_path / "q.csv"), ""], "Memory, times less": ["0.5", "4"], "Minutes": ["10"],
        "Memory": ["much", "80 GB"], "Users": ["1,000"], "Hide the text (yes or no)": ["yes"],
    }
    said: list[str] = []

    def ask(explanation: str, question: str, default: str) -> str:
        assert explanation
        return answers[question].pop(0) if question in answers else default

    plan = ask_for_plan(ask, said.append)
    assert len(said) == 5
    assert "does not exist" in said[0]
    assert (plan.folder, plan.lang, plan.questions, plan.redact) == (tmp_path / "texts", "ja", None, True)
    assert (plan.thresholds.memory_reduction, plan.budget_minutes) == (4, 10)
    assert (plan.capacity.memory, plan.capacity.users) == (80 * 2**30, 1000)
    assert not any(answers.values())


def test_every_question_is_about_an_option() -> None:
    for step in STEPS:
        part, _, option = step.name.partition(".")
        fields = type(getattr(Plan(), part)).model_fields if option else Plan.model_fields
        assert (option or part) in fields
