"""Overrides of a config from the command line: what they set, what they refuse, where they say it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.test_config import TINY, bound, refusal


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "path", "value"),
        [
            pytest.param("sampler.steps=2", ("sampler", "steps"), 2, id="existing"),
            pytest.param("engine.threads=3", ("engine", "threads"), 3, id="new-section"),
            pytest.param("metrics=[solved, trajectory]", ("metrics",), ["solved", "trajectory"], id="list"),
            pytest.param("task={name: maze, mazes: 2}", ("task",), {"name": "maze", "mazes": 2}, id="mapping"),
            pytest.param("experiments.map.step=1:2", ("experiments", "map", "step"), "1:2", id="slice"),
            pytest.param(" sampler.steps = 2", ("sampler", "steps"), 2, id="spaces"),
            pytest.param("name=a=b", None, None, id="equals-in-the-value"),
            pytest.param("name=off", ("name",), "off", id="word-that-yaml-1.1-takes-for-false"),
            pytest.param("model.id=embedded:maze", ("model", "id"), "embedded:maze", id="colon-in-the-value"),
        ],
    )
    def test_override_replaces_a_setting(self, tmp_path, override, path, value):
        if path is None:
            assert refusal(tmp_path, TINY, override)[0].startswith("--set: name: String should match")
            return
        node: Any = bound(tmp_path, TINY, override).model_dump(mode="json")
        for part in path:
            node = node[part]
        assert node == value

    def test_last_override_wins(self, tmp_path):
        assert bound(tmp_path, TINY, "sampler.steps=5", "sampler.steps=2").sampler.steps == 2

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            pytest.param(
                "sampler.steps", "expected key.path=value, for example --set sampler.steps=10", id="no-equals"
            ),
            pytest.param("=3", "expected key.path=value", id="no-key"),
            pytest.param("sampler..steps=3", "expected key.path=value", id="two-dots"),
            pytest.param(".steps=3", "expected key.path=value", id="dot-in-front"),
            pytest.param("", "expected key.path=value", id="nothing"),
            pytest.param("name.x=3", "name is 'tiny', not a mapping, so name.x cannot be set in it", id="below-a-word"),
            pytest.param("metrics.0=solved", "metrics is ['goal_evidence'], not a mapping", id="below-a-list"),
            pytest.param("metrics=[a", "not valid YAML: expected ',' or ']'", id="open-bracket"),
            pytest.param("task={a: 1, a: 2}", "key a is given twice", id="duplicate-key"),
        ],
    )
    def test_malformed_override_is_refused_with_its_text(self, tmp_path, override, message):
        (found,) = refusal(tmp_path, TINY, override)
        assert found.startswith(f"--set {override!r}: ")
        assert message in found

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            pytest.param(
                "sampler.stpes=3", "sampler.stpes: unknown key 'stpes': did you mean 'steps'?", id="unknown-key"
            ),
            pytest.param(
                "task.mazes=0", "task.mazes: Input should be greater than or equal to 1, got 0", id="zero-samples"
            ),
            pytest.param("sampler.steps=", "sampler.steps: Input should be a valid integer, got None", id="no-value"),
            pytest.param("experiments.map.step=9", "experiments.map.step: 9 is out of range", id="out-of-range"),
            pytest.param("previews.samples=[9]", "previews.samples.0: sample 9 does not exist", id="preview"),
        ],
    )
    def test_fault_of_an_override_names_the_option_and_not_a_line(self, tmp_path, override, message):
        (found,) = refusal(tmp_path, TINY, override)
        assert found.startswith(f"--set: {message}")
