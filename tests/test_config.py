"""The policy object: validated in one sentence, frozen, the same after a trip through JSON."""

from __future__ import annotations

from pathlib import Path

import pytest

from anchorkv.config import PRESETS, AnchorConfig, preset
from anchorkv.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"ac_tokens": 0}, "ac_tokens"),
        ({"reduction": 1}, "reduction"),
        ({"reduction": -3}, "reduction"),
        ({"sinks": -1}, "sinks"),
        ({"recent_window": -1}, "recent_window"),
        ({"anchors": ("EP", "EP")}, "twice"),
        ({"anchors": ("XX",)}, "anchors"),
        ({"min_segment": 30, "max_segment": 20}, "smaller than min_segment"),
        ({"recall": "on", "recall_cells": 0}, "recall_cells is 0"),
        ({"recall": "maybe"}, "recall"),
        ({"cell_budget": 64, "max_segment": 48, "recent_window": 1}, "no room for anchors"),
        ({"pinned": (" ",)}, "pinned span is empty"),
        ({"reductoin": 4}, "reductoin"),
    ],
)
def test_bad_options_get_one_sentence(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        AnchorConfig(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str, tmp_path: Path) -> None:
    preset(name).save(tmp_path / "policy.json")
    assert AnchorConfig.load(tmp_path / "policy.json") == preset(name)


def test_the_paper_presets_are_the_paper() -> None:
    for name, kind in (("paper-ep", "EP"), ("paper-ac", "AC")):
        policy = preset(name)
        assert policy.anchors == (kind,)
        assert (policy.sinks, policy.recent_window, policy.ac_tokens) == (0, 0, 1)
        assert policy.isolated
        assert policy.recall == "off"
        assert not policy.pin_prompt


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="paper-ep"):
        preset("papre-ep")


def test_a_policy_cannot_be_changed_in_place() -> None:
    with pytest.raises(Exception, match="frozen"):
        preset("default").sinks = 9  # type: ignore[misc]


def test_replace_validates_again() -> None:
    assert preset("default").replace(reduction=20).reduction == 20
    with pytest.raises(ConfigError):
        preset("default").replace(reduction=0)


@pytest.mark.parametrize("text", ["{", "[]", '{"sinks": "many"}'])
def test_bad_policy_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        AnchorConfig.load(path)
    with pytest.raises(ConfigError):
        AnchorConfig.load(tmp_path / "missing.json")


def test_a_budget_of_the_window_grows_with_the_model() -> None:
    policy = AnchorConfig(reduction=12, cell_budget="window")
    assert policy.budget_for(8192) == 768
    assert policy.budget_for(131072) == 12288
    assert policy.budget_for(64) == 2 * policy.most_whole
    assert policy.replace(cell_budget=500).budget_for(8192) == 500
    assert policy.replace(cell_budget=None).budget_for(8192) is None
    with pytest.raises(ConfigError, match="cell_budget"):
        policy.replace(cell_budget="half")
