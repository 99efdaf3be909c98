"""Benchmarks of speed at their smallest: what they compute and compare, not how fast it is."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from benchmarks import engine_efficiency, gpu_efficiency, naive_ratio, scaling
from benchmarks.scaling import Rate
from cluster import ReplicaStarted, UnitDone
from interventions.sites import RUNS
from pipeline.config import load_config
from pipeline.layout import BASELINE
from pipeline.plan import make_plan


class TestNaiveRatio:
    def test_both_ways_compute_the_same_cells(self):
        found = naive_ratio.measure(1, steps=3, stride=2, naive_cells=2)
        assert found["cells"] == {"naive": 2, "stepscope": 18}
        assert found["largest_difference"] <= 1e-5
        assert found["naive_ratio"] == pytest.approx(
            found["seconds_a_cell"]["naive"] / found["seconds_a_cell"]["stepscope"], rel=0.05
        )
        assert set(found["bare_ms_a_row"]) == {"1", "18"}

    def test_a_wrong_result_is_seen(self, monkeypatch):
        right = naive_ratio.NaiveLoop.cell
        monkeypatch.setattr(naive_ratio.NaiveLoop, "cell", lambda self, *site: right(self, *site) + 0.5)
        assert naive_ratio.measure(1, steps=3, stride=2, naive_cells=1)["largest_difference"] > 1e-5

    def test_threads_are_given_back(self):
        before = torch.get_num_threads()
        naive_ratio.measure(1, steps=3, stride=3, naive_cells=1)
        assert torch.get_num_threads() == before


@pytest.fixture(scope="module")
def demo():
    overrides = ["task.mazes=1", "task.pairs=[red/blue]", "sampler.steps=6", "experiments.self_patch.step=[1]"]
    return make_plan(load_config(engine_efficiency.CONFIG, [*overrides, "previews.samples=[]", "previews.patched={}"]))


class TestEngineEfficiency:
    def test_forwards_are_those_of_the_plan(self, demo):
        """Rows times calls is what the plan counts, unit by unit, so no work is told that is not done."""
        for unit in demo.units():
            calls = engine_efficiency.forwards(demo, unit)
            assert sum(rows * times for rows, times in calls.items()) == demo.unit_forwards(unit)

    def test_rows_of_a_call(self, demo):
        (baseline, *_) = [unit for unit in demo.units() if unit.group == BASELINE]
        assert engine_efficiency.forwards(demo, baseline) == Counter({len(RUNS): 6})
        (first, *_) = [unit for unit in demo.units() if unit.group == "noise_frame"]
        # Ten rows, each computed in every step, and nothing captured.
        assert engine_efficiency.forwards(demo, first) == Counter({10: 6})

    def test_a_sweep_is_run_and_measured(self):
        found = engine_efficiency.measure(1, steps=3, rounds=1)
        assert set(found["by_group"]) == {
            BASELINE, "patch_map", "self_patch", "skip", "noise_step", "noise_frame", "shuffle"
        }  # fmt: skip
        assert found["engine_efficiency"] == pytest.approx(
            found["seconds"]["bare"] / found["seconds"]["sweep"], abs=0.1
        )
        assert found["row_forwards"] > 100


class TestGpuEfficiency:
    def test_a_tiny_model(self):
        torch.set_num_threads(1)
        found = gpu_efficiency.measure(
            gpu_efficiency.SHAPES["tiny"], steps=4, rows=2, rounds=1, device="cpu", dtype=torch.float32
        )
        assert (found["device"], found["tokens"], found["rows"]) == ("cpu", 12, 2)
        assert found["as_shipped"]["engine_efficiency"] > 0
        assert found["without_sharing"]["engine_efficiency"] > 0

    def test_the_model_of_the_claim_has_its_size(self):
        shape = gpu_efficiency.SHAPES["wan-1.3b-480p"]
        frames, height, width = shape.latents
        assert frames * (height // 2) * (width // 2) == 32_760
        with torch.device("meta"):
            pipe = gpu_efficiency.pipeline(shape, "meta", torch.bfloat16)
        assert sum(p.numel() for p in pipe.transformer.parameters()) > 1.3e9
        assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
        assert pipe.transformer.scale_shift_table.dtype == torch.float32


class TestRate:
    @staticmethod
    def clocked(monkeypatch, *times):
        moments = iter(times)
        monkeypatch.setattr(scaling.time, "perf_counter", lambda: next(moments))

    @staticmethod
    def done(unit):
        return UnitDone(unit=unit, replica=0, attempt=1, seconds=1.0, receipt=None)

    @staticmethod
    def started():
        return ReplicaStarted(replica=0, hardware="")

    def test_work_counts_from_the_first_unit_with_all_replicas_there(self, monkeypatch):
        self.clocked(monkeypatch, 0.0, 1.0, 2.0, 3.0, 5.0, 7.0)
        rate = Rate(2, lambda unit: 10.0 * unit)
        for event in (self.started(), self.done(1), self.started(), self.done(2), self.done(3), self.done(4)):
            rate.hear(event)
        # Units 3 and 4 in the seconds from 3 to 7.
        assert rate.value == pytest.approx(70 / 4)

    def test_too_few_units(self, monkeypatch):
        self.clocked(monkeypatch, 0.0, 1.0)
        rate = Rate(1, lambda unit: 1.0)
        rate.hear(self.started())
        rate.hear(self.done(1))
        with pytest.raises(ValueError, match="too few units"):
            _ = rate.value


class TestScaling:
    def test_cases_take_turns(self):
        order = []

        def case(name, *rates):
            found = iter(rates)
            return lambda: order.append(name) or next(found)

        told = scaling.compare({"one": case("one", 1.0, 9.0, 2.0), "two": case("two", 4.0, 3.0, 5.0)}, 3)
        assert order == ["one", "two"] * 3
        assert told == {"rates": {"one": [1.0, 9.0, 2.0], "two": [4.0, 3.0, 5.0]}, "speedup": 2.0}

    # One replica: a second one might come when everything is done.
    def test_a_sweep_through_ray(self, ray_session):
        assert scaling.sweep_rate(1, samples=1, steps=4) > 0

    def test_units_that_wait(self, ray_session):
        assert 0 < scaling.simulated_rate(1, 5, 0.01) < 5 / (5 * 0.008)
