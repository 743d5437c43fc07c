"""The rollout plan: what a server would run where, when it falls back, and that a bad file is one sentence."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import poc_example
import pytest
import serving
import yaml
from fake_engine import FakeEngine
from test_poc_verdict import LIMITS, area, way

from anchorkv.config import preset
from anchorkv.errors import ConfigError, SavedStateError
from anchorkv.poc.results import AreaResult, FallbackRule, PocReport, Thresholds
from anchorkv.poc.rollout import Rollout, rollout
from anchorkv.serve.policies import Policies
from anchorkv.serve.settings_groups import PolicyBounds

STRONG, MILD = preset("default"), preset("default").replace(reduction=4)


def report(overall: AreaResult, *areas: AreaResult, **changes: Any) -> PocReport:
    fields: dict[str, Any] = {
        "overall": overall, "areas": areas, "documents": (), "worst": (), "policies": {"strong": STRONG, "mild": MILD},
        "thresholds": LIMITS, "rules": (), **changes,
    }
    return poc_example.report(**fields)


@pytest.fixture
def plan() -> Rollout:
    ways = [
        way("strong", memory=12.0), way("strong", "auto", memory=11.0), way("strong", "on", memory=10.0),
        way("mild", memory=6.0),
    ]
    weak = [way("strong", share=0.1, memory=12.0), way("strong", "auto", memory=11.0)]
    return rollout(report(
        area("", *ways), area("prose", *ways), area("asks", *weak), area("lists", way("strong", ratio=9.0)),
        rules=(
            FallbackRule(when="tokens < 500", then="full", because="short_text"),
            FallbackRule(when="features.tables > 0.2", then="milder", because="like_failing_areas"),
            FallbackRule(when="watch.loss_gap > 0.3", then="recall", because="loss_gap_grew"),
        ),
    ))


def test_every_area_runs_as_it_was_found(plan: Rollout) -> None:
    assert (plan.policy, plan.recall, plan.verdict) == ("strong", "off", "adopt")
    assert plan.policy_for({"area": "prose"}) == STRONG.replace(recall="off")
    assert plan.policy_for({"area": "asks"}) == STRONG.replace(recall="auto")
    assert plan.policy_for({"area": "lists"}) == preset("full")
    assert plan.policy_for({"area": "never seen"}) == plan.policy_for({}) == STRONG.replace(recall="off")


def test_rules_go_up_the_ladder(plan: Rollout) -> None:
    assert [(step.policy, step.recall) for step in plan.ladder] == [
        ("strong", "off"), ("strong", "auto"), ("strong", "on"), ("mild", "off"), ("full", "off")
    ]
    assert plan.policy_for({"watch.loss_gap": 0.4}) == STRONG.replace(recall="auto")
    assert plan.policy_for({"area": "asks", "watch.loss_gap": 0.4}) == STRONG.replace(recall="on")
    assert plan.policy_for({"features.tables": 0.3, "watch.loss_gap": 0.4}) == MILD.replace(recall="off")
    assert plan.policy_for({"features.tables": 0.3, "tokens": 499}) == preset("full")
    assert plan.policy_for({"features.tables": 0.2, "tokens": 500}) == STRONG.replace(recall="off")


def test_what_nothing_passed_for_runs_with_the_full_cache() -> None:
    unknown = way("strong", ratio=None, share=None, agreement=None)
    found = rollout(report(area("", way("strong", ratio=9.0)), area("x", unknown)))
    assert (found.policy, found.areas["x"].policy, found.areas["x"].verdict) == ("full", "full", "not_enough_data")
    assert found.policy_for({}) == preset("full")
    only = rollout(report(area("")))
    assert [step.policy for step in only.ladder] == ["full"]


def test_it_has_the_thresholds_of_its_proof_of_concept_and_older_files_the_usual_ones(
    plan: Rollout, tmp_path: Path
) -> None:
    assert plan.thresholds == LIMITS
    path = tmp_path / "rollout.yaml"
    older = plan.model_dump(mode="json")
    del older["thresholds"]
    path.write_text(yaml.safe_dump(older), encoding="utf-8")
    assert Rollout.load(path) == plan.model_copy(update={"thresholds": Thresholds()})


def test_a_servers_dashboard_shows_these_thresholds(plan: Rollout, tmp_path: Path) -> None:
    async def thresholds(policies: Policies, folder: Path) -> Any:
        served = serving.service(folder, FakeEngine(), policies=policies)
        async with serving.client(served) as http:
            return (await http.get("/v1/dashboard")).json()["thresholds"]

    planned, plain = Policies.of(plan, "plan", PolicyBounds()), Policies.of(MILD, "own", PolicyBounds())
    assert asyncio.run(thresholds(planned, tmp_path / "planned")) == LIMITS.model_dump(mode="json")
    assert asyncio.run(thresholds(plain, tmp_path / "plain")) == Thresholds().model_dump(mode="json")


def test_it_survives_its_file(plan: Rollout, tmp_path: Path) -> None:
    path = tmp_path / "rollout.yaml"
    plan.save(path)
    assert Rollout.load(path) == plan
    assert path.read_text(encoding="utf-8").startswith("# How to run")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(SavedStateError, match="cannot be written"):
        plan.save(tmp_path / "nowhere" / "rollout.yaml")


def test_names_of_areas_are_text(tmp_path: Path) -> None:
    path = tmp_path / "rollout.yaml"
    found = rollout(poc_example.report(rules=()))
    found.save(path)
    assert Rollout.load(path) == found
    assert "議事録・稟議書" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "anchorkv-rollout/9"}, "another version"), ({"recall": "sometimes"}, "recall"),
        ({"colour": "red"}, "colour"), ({"policy": "unheard-of"}, "names the policy 'unheard-of'"),
        ({"policies": {"strong": {"reduction": 0}, "mild": {}}}, "reduction"),
        ({"rules": [{"when": "import os", "then": "full", "because": "x"}]}, "no condition"),
        ({"watch": {"loss_gap": "wide"}}, "watch"),
    ],
)
def test_a_bad_field_is_one_sentence(plan: Rollout, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "rollout.yaml"
    path.write_text(yaml.safe_dump({**plan.model_dump(mode="json"), **change}), encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as raised:
        Rollout.load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"- a\n- b\n", b"a: 1\n", b"{", b"\xff\xfe\x00", b"!!python/object:os.x {}"])
def test_what_is_no_rollout_plan_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rollout.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"give the rollout\.yaml"):
        Rollout.load(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        Rollout.load(tmp_path / "none.yaml")
