"""The naive engine is the reference: one row a forward, whole runs, nothing shared; the other one agrees with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import zarr

from interventions.engine import Engine
from interventions.families.family import family_of
from pipeline.config import ConfigError, SweepConfig, validate
from pipeline.layout import BASELINE
from pipeline.models import load_pipeline
from pipeline.plan import make_plan
from pipeline.replica import Computer
from pipeline.sweep import run_sweep
from tests.integration.test_engine import CELLS, inputs_of
from tests.integration.test_engine import pipe as pipe
from tests.sweep_fixture import STEPS, save_tiny_model, tiny_config

AGREES = 1e-5
"""Largest difference, relative to the largest value."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    return save_tiny_model(tmp_path_factory.mktemp("naive") / "model")


@pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["no_guidance", "guidance"])
def test_cells_agree(pipe, guidance):
    """Every kind of cell, computed by replay in a batch of its own kind and alone from the first step."""
    family = family_of("WanImageToVideoPipeline")
    inputs = inputs_of(pipe, guidance)
    replaying = Engine(pipe, family)
    try:
        record = replaying.record(inputs)
        fast = {name: replaying.fork(record, [cell, cell]).final[1] for name, cell in CELLS.items()}
    finally:
        replaying.release()
    naive = Engine(pipe, family, shares=False, replays=False)
    try:
        record = naive.record(inputs)
        slow = {name: naive.fork(record, [cell]).final[0] for name, cell in CELLS.items()}
    finally:
        naive.release()
    apart = {name: float((fast[name] - slow[name]).abs().max() / slow[name].abs().max()) for name in CELLS}
    assert {name: gap for name, gap in apart.items() if gap > AGREES} == {}


def test_it_computes_every_step_of_every_row(pipe):
    naive = Engine(pipe, family_of("WanImageToVideoPipeline"), shares=False, replays=False)
    calls: list[int] = []
    try:
        record = naive.record(inputs_of(pipe, 1.0))
        handle = pipe.transformer.patch_embedding.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
        naive.fork(record, [CELLS["patch_last_step"]])
        handle.remove()
    finally:
        naive.release()
    steps = record.geometry.steps
    # The capture of both recorded runs up to the last step, then the row itself.
    assert calls == [2] * steps + [1] * steps


class TestSweep:
    def test_arrays_agree(self, model, tmp_path):
        """The whole sweep, computed both ways, holds the same values."""
        stores = {}
        for mode in ("replay", "naive"):
            config = SweepConfig.model_validate(tiny_config(model, engine={"mode": mode}))
            result = run_sweep(make_plan(config), tmp_path / mode)
            assert (result.failed, result.pending) == (0, 0)
            stores[mode] = zarr.open_group(tmp_path / mode, mode="r")
        compared = 0
        for name in (BASELINE, *tiny_config(model)["experiments"]):
            for key in stores["replay"][name]:
                if not key.startswith(("goal_evidence", "latent_distance")):
                    continue
                one, other = (np.asarray(stores[mode][f"{name}/{key}"][...]) for mode in ("replay", "naive"))
                assert np.isfinite(other).all()
                assert np.abs(one - other).max() <= AGREES * max(1.0, np.abs(other).max()), f"{name}/{key}"
                compared += other.size
        assert compared > 100

    def test_what_it_costs(self, model):
        plans = {
            mode: make_plan(SweepConfig.model_validate(tiny_config(model, engine={"mode": mode})))
            for mode in ("replay", "naive")
        }
        plan = plans["naive"]
        rows = plan.interventions(next(unit for unit in plan.units() if unit.group == "skip"))
        assert all(len(batch) == 1 for batch in plan.batches(rows))
        (freeze,) = [row for row in rows if row.mode == "freeze" and row.step == 2]
        assert plan.batch_forwards([freeze]) == STEPS
        assert plans["replay"].batch_forwards([freeze]) == STEPS - 3
        (patch, *_) = plan.interventions(next(unit for unit in plan.units() if unit.group == "patch_map"))
        # Both recorded runs up to the donor's step, and the row's own run.
        assert plan.batch_forwards([patch]) == 2 * (patch.step + 1) + STEPS
        assert plan.cost().row_forwards > plans["replay"].cost().row_forwards


class TestConfig:
    def test_short_form(self, model):
        short = SweepConfig.model_validate(tiny_config(model, engine="naive"))
        long = SweepConfig.model_validate(tiny_config(model, engine={"mode": "naive"}))
        assert short == long
        assert short.hash() == long.hash()

    def test_identity_of_other_configs_has_no_word_of_it(self, model):
        plain = SweepConfig.model_validate(tiny_config(model))
        assert plain.identity()["engine"] == {"batch_rows": 18, "threads": 1}
        assert plain.hash() == SweepConfig.model_validate(tiny_config(model, engine={"mode": "replay"})).hash()
        assert plain.hash() != SweepConfig.model_validate(tiny_config(model, engine="naive")).hash()

    @pytest.mark.parametrize("engine", ["fast", {"mode": "fast"}], ids=["word", "mapping"])
    def test_an_unknown_engine_is_refused(self, model, engine):
        with pytest.raises(ConfigError, match=r"engine\.mode: Input should be 'replay' or 'naive', got 'fast'"):
            validate(tiny_config(model, engine=engine), {}, "c.yaml")


def test_a_replica_uses_the_engine_of_its_config(model):
    for mode, plain in (("naive", True), ("replay", False)):
        plan = make_plan(SweepConfig.model_validate(tiny_config(model, engine={"mode": mode})))
        engine = Computer(plan, load_pipeline(plan.model, dtype="float32", device="cpu")).engine
        assert (engine.shares, engine.replays) == (not plain, not plain)
