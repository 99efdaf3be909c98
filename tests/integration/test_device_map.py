"""One replica over several devices: the engine on a pipeline whose modules carry the hooks that move tensors."""

from __future__ import annotations

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from interventions.controls import require_controls, run_controls
from interventions.engine import Engine
from interventions.families.family import family_of
from pipeline.cli import BAD_INPUT, main
from pipeline.config import SweepConfig
from pipeline.executors import pool_options
from pipeline.models import ModelError, describe, load_pipeline
from pipeline.plan import BASELINE, make_plan
from pipeline.replica import Computer
from tests.sweep_fixture import save_tiny_model, tiny_config, write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def plan(folder):
    return make_plan(SweepConfig.model_validate(tiny_config(folder)))


def with_model(folder, **settings):
    return {**tiny_config(folder), "model": {"id": str(folder), **settings}}


def loaded(plan):
    return load_pipeline(plan.model, dtype="float32", device="cpu")


def dispatched(plan):
    """Load a pipeline and give every module of it the hooks that a device map of several devices brings."""
    pipe = loaded(plan)
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            children = [child for child, _ in component.named_children()]
            blocks = [f"blocks.{i}" for i in range(len(getattr(component, "blocks", ())))]
            parts = dict.fromkeys(["", *children, *blocks], "cpu")
            accelerate.dispatch_model(component, parts, main_device="cpu", force_hooks=True)
            assert getattr(component, "hf_device_map", None) == parts, name
    return pipe


def hooks(pipe) -> int:
    return sum(hasattr(module, "_hf_hook") for module in pipe.transformer.modules())


def test_the_hooks_are_there(plan):
    assert hooks(dispatched(plan)) > 3
    assert hooks(loaded(plan)) == 0


def test_controls_pass_with_hooks(plan):
    pipe = dispatched(plan)
    engine = Engine(pipe, family_of(type(pipe).__name__))
    inputs = plan.task.inputs(pipe, plan.samples[0], plan.config.sampler)
    require_controls(engine, inputs)
    bare = Engine(loaded(plan), family_of(type(pipe).__name__))
    assert run_controls(engine, inputs) == run_controls(bare, inputs)


def test_a_sweep_gives_the_same_bits(plan):
    plain, spread = Computer(plan, loaded(plan)), Computer(plan, dispatched(plan))
    kinds = set()
    for unit in plan.units():
        if unit.sample:
            continue
        if unit.group == BASELINE:
            both = [computer.baseline(unit.sample) for computer in (plain, spread)]
        else:
            everything = np.ones(len(plan.interventions(unit)), dtype=np.bool_)
            both = [computer.cells(unit, everything) for computer in (plain, spread)]
            kinds.add(plan.by_name[unit.group].experiment.kind)
        assert both[0].keys() == both[1].keys()
        for name, value in both[0].items():
            assert value.tobytes() == both[1][name].tobytes(), (unit.group, name)
            assert np.isfinite(value).any()
    assert kinds == {"patch", "step_skip", "frame_shuffle", "noise"}


def test_estimates_give_the_same_bits(folder):
    """A backward goes through the hooks as well."""
    experiment = {
        "kind": "patch", "step": "all", "layer": "all", "component": "attn2",
        "screen": {"top": 0.5, "metric": "latent_distance"},
    }  # fmt: skip
    plan = make_plan(SweepConfig.model_validate(tiny_config(folder, experiments={"map": experiment})))
    (grid,) = plan.screened
    plain, spread = (Computer(plan, pipe).estimates(grid, 0) for pipe in (loaded(plan), dispatched(plan)))
    assert np.isfinite(plain).all()
    assert plain.tobytes() == spread.tobytes()


class TestLoading:
    @pytest.mark.parametrize("count", [0, 1])
    def test_fewer_than_two_gpus_are_one_sentence(self, folder, monkeypatch, count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        with pytest.raises(ModelError, match=rf"device_map balanced: {count} GPUs are seen here, it needs 2\. Set run"):
            load_pipeline(describe(str(folder)), dtype="float32", device="auto", device_map="balanced")

    def test_diffusers_spreads_the_pipeline(self, folder, monkeypatch):
        asked = {}

        class Pipeline:
            def set_progress_bar_config(self, **settings): ...

            def to(self, device):
                raise AssertionError("a pipeline that is spread stays where it is")

        def from_pretrained(cls, path, **settings):
            asked.update(settings)
            return Pipeline()

        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
        pipe = load_pipeline(describe(str(folder)), dtype="bfloat16", device="auto", device_map="balanced")
        assert isinstance(pipe, Pipeline)
        assert asked["device_map"] == "balanced"
        assert asked["use_safetensors"] is True
        assert "trust_remote_code" not in asked

    def test_without_a_map_none_is_asked_for(self, folder, monkeypatch):
        from_pretrained = diffusers.DiffusionPipeline.from_pretrained.__func__

        def watched(cls, path, **settings):
            assert "device_map" not in settings
            return from_pretrained(cls, path, **settings)

        monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(watched))
        assert load_pipeline(describe(str(folder)), dtype="float32", device="cpu") is not None


class TestConfig:
    def test_it_is_no_part_of_the_identity(self, folder):
        plain, spread = (
            SweepConfig.model_validate(with_model(folder, **more))
            for more in ({}, {"device_map": "balanced", "device": "cuda"})
        )
        assert plain.hash() == spread.hash()
        assert "device_map" not in plain.identity()["model"]

    @pytest.mark.parametrize(
        ("model", "run", "said"),
        [
            pytest.param(
                {"device_map": "balanced", "device": "cpu"}, {"replicas": 0},
                "model.device_map: balanced spreads a pipeline over GPUs, and device is cpu", id="cpu",
            ),
            pytest.param(
                {"device_map": "balanced"}, {"replicas": 1, "gpus_per_replica": 1},
                "model.device_map: balanced needs run.gpus_per_replica of 2 or more, got 1", id="one-gpu",
            ),
            pytest.param(
                {"device_map": "auto"}, {"replicas": 0},
                "model.device_map: Input should be 'none' or 'balanced', got 'auto'", id="unknown",
            ),
        ],
    )  # fmt: skip
    def test_what_makes_no_sense_is_refused(self, folder, tmp_path, capsys, model, run, said):
        raw = {**with_model(folder, **model), "run": run}
        assert main(["plan", str(write_config(tmp_path / "c.yaml", raw)), "--no-calibrate"]) == BAD_INPUT
        assert said in capsys.readouterr().err

    def test_two_gpus_a_replica_are_reserved(self, folder):
        raw = {**with_model(folder, device_map="balanced"), "run": {"gpus_per_replica": 2}}
        assert pool_options(make_plan(SweepConfig.model_validate(raw))).gpus_per_replica == 2
