"""The benchmarks of precision count what sweeps compute: on values planted without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tests.synthetic
from benchmarks import coverage
from benchmarks.precision import LEVEL, Effects, _forwards, _in_rounds, measure, plan_for, replay
from pipeline.plan import Plan
from pipeline.store import Journal, Store, open_store
from tests.rounds_fixture import sweep
from tests.sweep_fixture import arrays

MAZES, FIRST = 14, 6


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_for(MAZES, 4)


def planted(group: str, name: str, sample: int, shape: tuple[int, ...]) -> Any:
    """Steady cells without an effect everywhere, but for two components of the map, which have one and spread."""
    values = PLAIN(group, name, sample, shape)
    if group == "baseline":
        return 0 * values
    values = np.float32(0.01) * values
    if group == "patch_map":
        values[..., :2] = 0.5 + 30 * values[..., :2]
    return values


PLAIN = tests.synthetic.sample_values


@pytest.fixture(scope="module", autouse=True)
def values() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tests.synthetic, "sample_values", planted)
        yield


@pytest.fixture(scope="module")
def store(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("full") / "run.zarr"
    assert sweep(plan, path).failed == 0
    return open_store(path)


@pytest.fixture(scope="module")
def found(plan: Plan, store: Store) -> dict[str, Any]:
    return measure(plan, store, first=FIRST)


def test_what_is_counted_is_what_a_sweep_in_rounds_computes(plan, store, found, tmp_path):
    exact = Effects(plan, store)
    half_width = exact.widest(len(plan.samples), found["level_at_look"], exact.matters())
    in_rounds = _in_rounds(plan, half_width, FIRST, 1.5)
    sweep(in_rounds, tmp_path / "run.zarr")
    lines = list(Journal(tmp_path / "run.zarr").entries())
    assert found["runs"]["rounds"] == sum(line["cells"] for line in lines)
    used = replay(in_rounds, store)
    for name, rounds in used.items():
        computed = np.isfinite(arrays(tmp_path / "run.zarr")[f"{name}/goal_evidence"]).sum(axis=0)
        assert np.array_equal(np.array(in_rounds.rounds[name].samples)[rounds - 1], computed)


def test_cells_that_matter_are_those_with_an_effect(plan, store, found):
    matters = Effects(plan, store).matters()
    assert matters["patch_map"].reshape(4, 6, 3)[..., :2].all()
    assert found["cells_that_matter"] == sum(int(m.sum()) for m in matters.values())


def test_both_designs_are_as_narrow_where_it_matters(plan, store, found):
    effects, samples = Effects(plan, store), len(plan.samples) // MAZES
    matters, fixed = effects.matters(), found["problems_fixed"]
    assert effects.widest(fixed * samples, LEVEL, matters) <= found["half_width"] + 1e-5
    assert effects.widest((fixed - 1) * samples, LEVEL, matters) > found["half_width"] - 1e-5
    assert found["runs"]["fixed"] == fixed * samples * (found["cells_of_a_sample"] + 2)
    assert fixed <= MAZES, "intervals that need not hold at every look are narrower"


def test_steady_cells_stop_first_and_spread_ones_go_on(found):
    problems = found["problems_in_rounds"]
    assert set(problems["cells"]) <= {"6", "9", "14"}
    assert sum(problems["cells"].values()) == found["cells_of_a_sample"]
    assert problems["mean"] < problems["mean_of_cells_that_matter"]
    assert found["runs"]["ratio"] == round(found["runs"]["fixed"] / found["runs"]["rounds"], 2) > 1
    assert found["row_forwards"]["ratio"] > 1


def test_forwards_of_all_cells_are_those_of_the_plan(plan):
    whole = {name: np.ones(grid.shape, dtype=bool) for name, grid in plan.by_name.items()}
    assert _forwards(plan, whole) * len(plan.samples) == plan.cost().row_forwards


def test_without_any_effect_there_is_nothing_to_compare(plan, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tests.synthetic, "sample_values", lambda *given: 0 * PLAIN(*given))
    sweep(plan, tmp_path / "run.zarr")
    with pytest.raises(ValueError, match="no cell matters"):
        measure(plan, open_store(tmp_path / "run.zarr"))


class TestCoverage:
    def test_is_high_for_normal_and_low_for_rare_differences(self):
        found = coverage.measure(cells=1500, firsts=(8, 32))["coverage_by_first"]
        assert found["normal"]["8"] > 0.945
        assert found["1 in a tenth of the prompts, else 0"]["8"] < 0.7
        assert found["1 in a tenth of the prompts, else 0"]["32"] > found["1 in a tenth of the prompts, else 0"]["8"]
        assert found.keys() == coverage.DISTRIBUTIONS.keys()

    def test_is_the_same_again(self):
        assert coverage.measure(cells=50, firsts=(8,)) == coverage.measure(cells=50, firsts=(8,))

    def test_distributions_are_planted_as_they_say(self):
        for draw, mean, deviation in coverage.DISTRIBUTIONS.values():
            values = draw(np.random.default_rng(0), (400, 500))
            assert values.mean() == pytest.approx(mean, abs=0.01)
            assert values.std() == pytest.approx(deviation, rel=0.02)
