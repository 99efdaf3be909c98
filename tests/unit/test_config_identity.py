"""What a config means: spellings that mean the same, and settings that make it another sweep."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.config import SweepConfig, load_config
from pipeline.plan import make_plan
from tests.unit.test_config import DEMO, TINY, bound, refusal, write


class TestSpellings:
    """What people write and mean."""

    @pytest.mark.parametrize(
        ("old", "new", "path", "value"),
        [
            pytest.param(
                "  steps: 3", "  steps: 3\n  guidance_scale: 2", "sampler.guidance_scale", 2.0, id="whole-for-real"
            ),
            pytest.param(
                "  steps: 3", "  steps: 3\n  guidance_scale: 1e-3", "sampler.guidance_scale", 0.001, id="exponent"
            ),
            pytest.param("  mazes: 1", "  balanced: yes", "task.balanced", "yes", id="bare-yes"),
            pytest.param("  mazes: 1", "  balanced: no", "task.balanced", "no", id="bare-no"),
            pytest.param("name: tiny", "name: off", "name", "off", id="off-as-name"),
            pytest.param("name: tiny", "name: 2024-01-31", "name", "2024-01-31", id="date-as-name"),
            pytest.param("step: all", "step: 1:", "experiments.map.step", "1:", id="bare-slice-is-a-key"),
            pytest.param("step: all", "step: 0:2", "experiments.map.step", "0:2", id="bare-slice"),
            pytest.param("[0]\np", "[0]\n    alpha: 1e-3\np", "experiments.map.alpha", 0.001, id="alpha-exponent"),
            pytest.param("[0]\np", "[00, 05]\np", "experiments.map.layer", [0, 5], id="zeros-in-front"),
        ],
    )
    def test_value_is_taken_as_written(self, tmp_path, old, new, path, value):
        if new == "step: 1:":
            found = refusal(tmp_path, TINY.replace(old, new))
            assert found == ["c.yaml:13: not valid YAML: mapping values are not allowed here"]
            return
        node: Any = bound(tmp_path, TINY.replace(old, new)).model_dump(mode="json")
        for part in path.split("."):
            node = node[part]
        assert node == value

    @pytest.mark.parametrize("name", ["off", "3", "no", "1e3", "007", "a-b_c"])
    def test_experiment_name_is_a_word_however_yaml_sees_it(self, tmp_path, name):
        assert list(bound(tmp_path, TINY.replace("  map:", f"  {name}:")).experiments) == [name]


class TestIdentity:
    def test_of_rows_left_to_the_tool_is_the_word(self, tmp_path):
        """The number is chosen later, and belongs to a store."""
        auto = bound(tmp_path, TINY, "engine.batch_rows=auto")
        assert auto.identity()["engine"]["batch_rows"] == "auto"
        assert SweepConfig.model_validate_json(auto.model_dump_json()).hash() == auto.hash()

    def test_of_the_demo_is_what_it_was(self):
        """Stores of earlier versions can be resumed."""
        assert load_config(DEMO).identity()["engine"] == {"batch_rows": 18, "threads": 1}

    def test_survives_json(self, tmp_path):
        config = bound(tmp_path, TINY)
        again = SweepConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
        assert again == config
        assert again.hash() == config.hash()

    def test_of_the_demo_survives_json(self):
        config = load_config(DEMO)
        assert SweepConfig.model_validate_json(config.model_dump_json()).hash() == config.hash()

    def test_is_plain_json_with_the_tasks_defaults(self, tmp_path):
        identity = bound(tmp_path, TINY).identity()
        assert json.loads(json.dumps(identity)) == identity
        assert identity["task"]["seeds"] == 1

    def test_is_a_sha256(self, tmp_path):
        assert len(bytes.fromhex(bound(tmp_path, TINY).hash())) == 32

    @pytest.mark.parametrize(
        "override",
        [
            "run.replicas=0",
            "run.replicas=7",
            "run.gpus_per_replica=1",
            "run.cpus_per_replica=2",
            "run.max_attempts=9",
            "model.device=cpu",
            "task.seeds=1",
            "sampler.guidance_scale=1.0",
        ],
    )
    def test_is_the_same_whatever_cannot_change_a_result(self, tmp_path, override):
        assert bound(tmp_path, TINY, override).hash() == bound(tmp_path, TINY).hash()

    def test_is_the_same_in_another_order_of_keys(self, tmp_path):
        turned = "".join(reversed([f"{k}\n" for k in TINY.split("\n") if k and not k.startswith(" ")]))
        assert turned.startswith("previews")
        raw = load_config(write(tmp_path, TINY)).model_dump(mode="json")
        mixed = {key: dict(reversed(v.items())) if isinstance(v, dict) else v for key, v in reversed(raw.items())}
        assert SweepConfig.model_validate(mixed).hash() == SweepConfig.model_validate(raw).hash()

    def test_equal_identities_lay_out_equal_arrays(self, tmp_path):
        one = TINY.replace("    layer: [0]", "    layer: [0, 1]\n    component: [attn1, ffn]")
        other = TINY.replace("    layer: [0]", "    component: [attn1, ffn]\n    layer: [0, 1]")
        a, b = bound(tmp_path, one), bound(tmp_path, other)
        assert a.hash() == b.hash()
        assert make_plan(a).grids[0].dims == make_plan(b).grids[0].dims

    @pytest.mark.parametrize(
        "override",
        [
            "name=other",
            "model.dtype=bfloat16",
            "model.id=/another/folder",
            "task.mazes=2",
            "task.seeds=2",
            "task.first_maze=1",
            "task.balanced=yes",
            "task.pairs=[red/any]",
            "sampler.steps=4",
            "sampler.guidance_scale=2",
            "engine.batch_rows=4",
            "engine.batch_rows=auto",
            "engine.threads=2",
            "engine=naive",
            "metrics=[solved]",
            "metrics=[goal_evidence, solved]",
            "experiments.map.layer=[1]",
            "experiments.map.alpha=0.5",
            "experiments.map.step=[0, 1, 2]",
            "experiments.second={kind: step_skip, mode: drop, step: 0}",
            "previews.samples=[]",
            "previews.patched={kind: patch, step: 0, layer: 0}",
            "unit_cells=7",
        ],
    )
    def test_changes_with_whatever_can_change_a_result_or_its_place(self, tmp_path, override):
        path = write(tmp_path, TINY)
        assert load_config(path, [override]).hash() != load_config(path).hash()

    def test_every_setting_is_known_to_these_tests(self):
        """A new setting needs a decision: does it change results?"""
        assert list(SweepConfig.model_fields) == [
            "name", "model", "task", "sampler", "engine", "metrics", "experiments", "previews", "unit_cells", "run"
        ]  # fmt: skip
