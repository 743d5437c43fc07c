"""Which policy a request runs with, under a rollout plan and the operator's bounds."""

from __future__ import annotations

from typing import Any

import poc_example
import pytest

from anchorkv.config import AnchorConfig, preset
from anchorkv.poc.rollout import Rollout, rollout
from anchorkv.serve.policies import Chosen, Policies, Wish
from anchorkv.serve.refusals import Refused
from anchorkv.serve.settings_groups import PolicyBounds


@pytest.fixture(scope="module")
def plan() -> Rollout:
    return rollout(poc_example.report())


def policies(chosen: Rollout | AnchorConfig, **bounds: Any) -> Policies:
    return Policies.of(chosen, "own", PolicyBounds(**bounds))


def test_each_area_runs_as_the_plan_says(plan: Rollout) -> None:
    found = policies(plan)
    assert found.choose(Wish()) == Chosen(plan.policy, plan.config(plan.policy, plan.recall))
    assert set(found.areas()) == set(plan.areas)
    full = [area for area, its in plan.areas.items() if its.policy == "full"]
    anchored = [area for area, its in plan.areas.items() if its.policy != "full"]
    assert full
    assert anchored
    for area in full:
        assert found.choose(Wish(area=area)) == Chosen("full", preset("full"))
    for area in anchored:
        assert found.choose(Wish(area=area)).config == plan.policy_for({"area": area})
    with pytest.raises(Refused, match="no area 'nothing'") as caught:
        found.choose(Wish(area="nothing"))
    assert caught.value.status == 400


def test_what_may_be_named(plan: Rollout) -> None:
    assert set(policies(plan).names()) == {"full", *plan.policies}
    assert "full" not in policies(plan, full=False).names()
    with pytest.raises(Refused, match="no policy 'full'"):
        policies(plan, full=False).choose(Wish(policy="full"))


def test_a_document_is_asked_with_the_policy_it_was_read_with() -> None:
    found = policies(preset("default"))
    read = Chosen("paper-ep", preset("paper-ep"))
    assert found.choose(Wish(), read) == read
    assert found.choose(Wish(policy="full"), read).name == "full"


@pytest.mark.parametrize(("wish", "bounds", "status"), [
    (Wish(reduction=40), {}, 403), (Wish(reduction=4), {"smallest_reduction": None, "largest_reduction": None}, 403),
    (Wish(recall="on"), {"recall": ("off", "auto")}, 403), (Wish(policy={"sinks": 1}), {}, 403),
    (Wish(policy="full", reduction=4), {}, 400),
])
def test_the_operators_bounds(wish: Wish, bounds: dict[str, Any], status: int) -> None:
    with pytest.raises(Refused) as caught:
        policies(preset("default"), **bounds).choose(wish)
    assert caught.value.status == status


def test_a_changed_policy_says_so() -> None:
    found = policies(preset("default")).choose(Wish(reduction=6, recall="off"))
    assert found.name == "own, reduction=6, recall=off"
    assert (found.config.reduction, found.config.recall) == (6, "off")
