"""The load-time controls: they pass on a sound pipeline and name what is wrong with a broken one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from interventions.controls import Control, ControlError, require_controls, run_controls
from interventions.engine import Engine
from interventions.families.family import family_of
from pipeline.cli import main
from pipeline.embedded.build import build_pipeline
from pipeline.tasks.maze import MazeTask
from pipeline.tasks.task import Sampler
from tests.sweep_fixture import save_tiny_model, tiny_config, write_config

NAMES = [
    "an empty plan equals the bare pipeline",
    "a self-patch is an identity",
    "the last residual gives the donor's prediction",
    "nothing changes before the intervened step",
]


def made(guidance: float = 1.0, seed: int = 3):
    torch.set_num_threads(1)
    pipe = build_pipeline(seed, num_layers=2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=generator))
    task = MazeTask(mazes=1)
    inputs = task.inputs(pipe, task.samples()[0], Sampler(steps=20, guidance_scale=guidance))
    return Engine(pipe, family_of("WanImageToVideoPipeline")), inputs


@pytest.mark.parametrize("guidance", [1.0, 4.0], ids=["no_guidance", "guidance"])
def test_a_sound_pipeline_passes(guidance):
    engine, inputs = made(guidance)
    controls = run_controls(engine, inputs)
    assert [c.name for c in controls] == NAMES
    assert all(c.passed for c in controls), controls
    require_controls(engine, inputs)


def failing(engine, inputs):
    return [c.name for c in run_controls(engine, inputs) if not c.passed]


def test_a_family_with_the_wrong_block_list_fails_the_donor_control():
    """Without the last block in the list, what is taken for the last residual is not."""
    engine, inputs = made()
    geometry = engine.geometry
    engine.geometry = lambda given: replace(geometry(given), blocks=1)
    assert "the last residual gives the donor's prediction" in failing(engine, inputs)


def test_a_wrap_that_changes_the_loop_fails_the_empty_plan():
    engine, inputs = made()
    original = engine.solver._original_step
    engine.solver._original_step = lambda out, *args, **kwargs: original(1.01 * out, *args, **kwargs)
    assert failing(engine, inputs)[0] == "an empty plan equals the bare pipeline"
    with pytest.raises(ControlError, match=r"an empty plan equals the bare pipeline: off by .*, allowed 0"):
        require_controls(engine, inputs)


def test_a_model_that_is_not_deterministic_fails():
    engine, inputs = made()
    block = engine.pipe.transformer.blocks[0]
    block.ffn.register_forward_hook(lambda module, args, out: out + 0.1 * torch.randn_like(out))
    assert "an empty plan equals the bare pipeline" in failing(engine, inputs)
    assert "a self-patch is an identity" in failing(engine, inputs)


def test_a_model_that_gives_nan_is_not_the_engines_fault():
    engine, inputs = made()
    with torch.no_grad():
        engine.pipe.transformer.proj_out.weight.fill_(float("nan"))
    require_controls(engine, inputs)


@pytest.mark.parametrize(("difference", "passed"), [(0.0, True), (1e-4, True), (2e-4, False), (float("inf"), False)])
def test_a_control_passes_up_to_its_limit(difference, passed):
    assert Control(name="x", difference=difference, limit=1e-4).passed is passed


def test_a_sweep_on_a_pipeline_that_fails_is_refused_with_the_control(tmp_path, monkeypatch, capsys):
    import pipeline.replica

    def refuse(engine, inputs):
        raise ControlError("controls fail on this pipeline: a self-patch is an identity: off by 1")

    monkeypatch.setattr(pipeline.replica, "require_controls", refuse)
    config = write_config(tmp_path / "tiny.yaml", tiny_config(save_tiny_model(tmp_path / "model")))
    assert main(["run", str(config), "--store", str(tmp_path / "run.zarr")]) == 2
    assert "a self-patch is an identity" in capsys.readouterr().err


def test_controls_leave_the_engine_as_it_was():
    engine, inputs = made()
    before = engine.record(inputs).final
    run_controls(engine, inputs)
    assert torch.equal(engine.record(inputs).final, before)
    assert torch.equal(engine.bare(inputs), before)
