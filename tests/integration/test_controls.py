"""The load-time controls: they pass on a sound pipeline and name what is wrong with a broken one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from interventions.controls import Control, ControlError, require_controls, run_controls
from interventions.engine import Engine
from interventions.families.family import Tap, family_of
from interventions.families.wan import BLOCKS
from pipeline.cli import main
from pipeline.embedded.build import build_pipeline
from pipeline.tasks.maze import MazeTask
from pipeline.tasks.task import Sampler
from tests.sweep_fixture import save_tiny_model, tiny_config, write_config

NAMES = [
    "an empty plan equals the bare pipeline",
    "blocks run in the declared order",
    "one latent frame is its slice of tokens",
    "a self-patch is an identity",
    "a restored last residual restores the run",
    "nothing changes before the intervened step",
    "all heads of attn1 are attn1",
    "all heads of attn2 are attn2",
    "cutting no edge of attn1 changes nothing",
    "cutting no edge of attn2 changes nothing",
]


def made(guidance: float = 1.0, seed: int = 3, layers: int = 2):
    torch.set_num_threads(1)
    pipe = build_pipeline(seed, num_layers=layers)
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


@pytest.mark.parametrize(
    ("wrong", "control"),
    [
        pytest.param({"count": "num_attention_heads"}, "blocks run in the declared order", id="a-block-too-few"),
        pytest.param({"taps": {**BLOCKS.taps, "residual": Tap(path="ffn")}}, "a restored last residual", id="residual"),
        pytest.param(
            {"taps": {**BLOCKS.taps, "attn1.heads": Tap(path="attn1.to_q", end="input")}},
            "all heads of attn1",
            id="heads",
        ),
    ],
)
def test_a_family_that_declares_something_else_fails_its_control(wrong, control):
    engine, inputs = made(layers=3)
    engine.family = replace(engine.family, blocks=(replace(BLOCKS, **wrong),))
    assert any(name.startswith(control) for name in failing(engine, inputs))


def test_a_family_with_the_wrong_token_grid_fails_the_frame_control():
    engine, inputs = made()
    engine.family = replace(engine.family, patch=lambda config: (1, 1, 2))
    assert failing(engine, inputs) == ["one latent frame is its slice of tokens"]


@pytest.mark.parametrize("cache", ["first_block", "pyramid"])
def test_an_active_step_cache_is_refused_by_name(cache):
    from diffusers.hooks import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

    engine, inputs = made()
    config = FirstBlockCacheConfig(threshold=0.1)
    if cache == "pyramid":
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        )
    engine.pipe.transformer.enable_cache(config)
    with pytest.raises(ControlError, match=r"step cache '.*' is active on transformer.*disable_cache"):
        require_controls(engine, inputs)


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
