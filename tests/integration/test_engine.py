"""The engine against an independent implementation with plain hooks, and the laws it must keep exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from interventions import kinds  # noqa: F401  (registers every kind)
from interventions.base import KINDS, Intervention
from interventions.engine import Engine, EngineError
from interventions.families.family import family_of
from interventions.record import Record, RunInputs
from interventions.sites import COMPONENTS, Site
from interventions.solvers import UnsupportedSolverError
from pipeline.embedded.build import build_pipeline
from pipeline.tasks.maze import MazeTask
from pipeline.tasks.task import Sampler
from tests.reference.hooks import recompute

STEPS = 5
P, S, F, N = (KINDS[k] for k in ("patch", "step_skip", "frame_shuffle", "noise"))


def loud_pipeline(seed: int, blocks: int):
    """Build a maze pipeline whose weights are large enough for every edit to matter."""
    torch.set_num_threads(1)
    pipe = build_pipeline(seed, num_layers=blocks)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=generator))
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return loud_pipeline(7, blocks=3)


@pytest.fixture(scope="module")
def engine(pipe):
    return Engine(pipe, family_of("WanImageToVideoPipeline"))


def inputs_of(pipe, guidance: float) -> RunInputs:
    task = MazeTask(mazes=1)
    return task.inputs(pipe, task.samples()[0], Sampler(steps=STEPS, guidance_scale=guidance))


@pytest.fixture(scope="module", params=[1.0, 3.0], ids=["no_guidance", "guidance"])
def record(request, pipe, engine) -> Record:
    return engine.record(inputs_of(pipe, request.param))


def bare(pipe, engine: Engine, inputs: RunInputs) -> torch.Tensor:
    """Call a pipeline that was never wrapped, sharing the weights."""
    plain = type(pipe)(
        **{**pipe.components, "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)},
        expand_timesteps=True,
    )
    plain.set_progress_bar_config(disable=True)
    return plain(**inputs.shared, **inputs.per_run, output_type="latent", return_dict=False)[0]


CELLS: dict[str, Intervention] = {
    **{f"patch_{c}": P(step=2, layer=1, component=c) for c in COMPONENTS},
    "patch_noising": P(step=1, layer=2, component="attn2", direction="noising"),
    "patch_alpha": P(step=3, layer=0, component="ffn", alpha=0.4),
    "patch_alpha_beyond": P(step=3, layer=0, component="update", alpha=1.5),
    "patch_frame": P(step=0, layer=1, component="update", frame=3),
    "patch_last_step": P(step=STEPS - 1, layer=2, component="residual"),
    "reuse": S(mode="reuse", step=2),
    "freeze": S(mode="freeze", step=2),
    "freeze_last": S(mode="freeze", step=STEPS - 1),
    "drop": S(mode="drop", step=2),
    "drop_first": S(mode="drop", step=0),
    "drop_last": S(mode="drop", step=STEPS - 1),
    "repeat": S(mode="repeat", step=2),
    "repeat_first": S(mode="repeat", step=0),
    "repeat_last": S(mode="repeat", step=STEPS - 1),
    "skip_corrupted": S(mode="freeze", step=1, run="corrupted"),
    "permute": F(mode="permute", step=2),
    "permute_first": F(mode="permute", step=0),
    "reverse": F(mode="reverse", step=3),
    "freeze_frame": F(mode="freeze", frame=2, step=2),
    "permute_hidden": F(mode="permute", space="hidden", layer=1, step=2),
    "reverse_hidden": F(mode="reverse", space="hidden", layer=2, step=0),
    "noise_step_off": N(at="step", path="off_path", step=2),
    "noise_step_on": N(at="step", path="on_path", step=2),
    "noise_first_step": N(at="step", path="on_path", step=0),
    "noise_frame_off": N(at="frame", path="off_path", frame=3),
    "noise_frame_on": N(at="frame", path="on_path", frame=5),
}


@pytest.mark.parametrize("name", CELLS)
def test_cell_equals_plain_hooks(name, pipe, engine, record):
    """Whatever the engine does by replay and rows equals a full hooked run to 1e-5 of the latents' scale."""
    cell = CELLS[name]
    fork = engine.fork(record, [cell])
    expected = recompute(pipe, record.inputs, record.geometry, cell)
    scale = expected.abs().max()
    assert (fork.final - expected).abs().max() / scale < 1e-5


@pytest.mark.parametrize("name", [n for n in CELLS if n not in ("repeat_last", "noise_first_step")])
def test_cell_has_an_effect(name, engine, record):
    """No intervention is silently a no-op."""
    cell = CELLS[name]
    fork = engine.fork(record, [cell])
    assert (fork.final[0] - record.final[record.row(cell.recipient)]).abs().max() > 1e-5


def test_empty_plan_is_bit_equal_to_the_bare_pipeline(pipe, engine, record):
    assert torch.equal(record.final, bare(pipe, engine, record.inputs))


def test_release_gives_the_scheduler_back():
    pipe = build_pipeline(3, num_layers=1)
    before = pipe.scheduler.step.__func__
    engine = Engine(pipe, family_of("WanImageToVideoPipeline"))
    assert pipe.scheduler.step.__func__ is not before
    engine.release()
    assert pipe.scheduler.step.__func__ is before


@pytest.mark.parametrize("component", COMPONENTS)
def test_self_patch_is_a_bit_exact_identity(component, engine, record):
    """Captured and patched in the same batch composition, a run is not changed by its own activations."""
    cells = [P(step=2, layer=layer, component=component, direction="self") for layer in (0, 2)]
    fork = engine.fork(record, cells)
    assert torch.equal(fork.final, record.final[[0, 0]])


def test_alpha_zero_is_a_bit_exact_identity(engine, record):
    cells = [P(step=1, layer=1, component=c, alpha=0.0) for c in ("attn1", "update")]
    assert torch.equal(engine.fork(record, cells).final, record.final[[1, 1]])


@pytest.mark.parametrize(
    "name", ["patch_update", "freeze", "permute", "noise_step_on", "permute_hidden", "repeat", "drop"]
)
def test_nothing_changes_before_the_intervened_step(name, engine, record):
    """Estimates before the step are those of the recorded run, bit for bit."""
    fork = engine.fork(record, [CELLS[name]], keep_x0_hat=True)
    row = record.row(CELLS[name].recipient)
    for step in range(2):
        assert torch.equal(fork.x0_hat[step][0], record.x0_hat[step][row])


def test_patching_the_last_residual_gives_the_donor_prediction(engine, record):
    """Whole residual of the last block in every branch: the step's estimate moves by the donor's velocity."""
    last = record.geometry.blocks - 1
    fork = engine.fork(record, [P(step=0, layer=last, component="residual")], keep_x0_hat=True)
    # At step 0 both runs hold the same latents, so equal velocity means equal clean estimate.
    assert torch.allclose(fork.x0_hat[0][0], record.x0_hat[0][0], atol=1e-5)


def test_any_block_residual_is_equivalent_where_runs_share_their_prompt(pipe, engine):
    """With one prompt the residual is all that differs; with two, later blocks still read their own."""
    inputs = inputs_of(pipe, 1.0)
    noise = torch.randn(inputs.per_run["latents"].shape, generator=torch.Generator().manual_seed(5))
    one_prompt = inputs.per_run["prompt_embeds"][[0, 0]]
    shared = engine.record(replace(inputs, per_run={"latents": noise, "prompt_embeds": one_prompt}))
    two_prompts = engine.record(replace(inputs, per_run={**inputs.per_run, "latents": noise}))
    rows = [P(step=2, layer=layer, component="residual") for layer in range(shared.geometry.blocks)]
    same, other = (engine.fork(record, rows).final for record in (shared, two_prompts))
    assert torch.allclose(same, same[:1].expand_as(same), atol=1e-4)
    assert not torch.allclose(other, other[:1].expand_as(other), atol=1e-2)


def test_rows_do_not_leak_into_each_other(engine, record):
    """Row i alone equals row i in a batch of different kinds."""
    rows = [c for c in CELLS.values() if c.schedule is None and c.first_computed_step(record.geometry) in (2, 3)]
    together = engine.fork(record, rows).final
    for i, row in enumerate(rows):
        alone = engine.fork(record, [row]).final[0]
        assert torch.allclose(alone, together[i], atol=1e-5 * float(alone.abs().max()))


def test_rows_of_different_first_steps_share_a_fork_exactly(engine, record):
    """Starting earlier than a row needs computes what replay would have given it."""
    late = P(step=4, layer=1, component="update")
    together = engine.fork(record, [P(step=0, layer=0, component="attn1"), late]).final[1]
    assert torch.allclose(engine.fork(record, [late]).final[0], together, atol=1e-4)


def test_same_fork_twice_is_bit_identical(engine, record):
    rows = list(CELLS.values())[:6]
    assert torch.equal(engine.fork(record, rows).final, engine.fork(record, rows).final)


def test_update_patches_add_up_over_components_to_the_residual(engine, record):
    """Patching the update of block 0 equals patching its residual, because its input is shared at step 0."""
    update, residual = P(step=0, layer=0, component="update"), P(step=0, layer=0, component="residual")
    fork = engine.fork(record, [update, residual])
    assert torch.allclose(fork.final[0], fork.final[1], atol=1e-4)


def test_schedules_cannot_be_mixed_in_one_fork(engine, record):
    with pytest.raises(ValueError, match="must share their schedule edit"):
        engine.fork(record, [S(mode="drop", step=1), S(mode="freeze", step=1)])


@pytest.mark.parametrize(
    "site", [Site(1, "cond", 9, "attn1"), Site(9, "cond", 0, "attn1"), Site(1, "cond", 0, "head")], ids=str
)
def test_a_site_that_does_not_exist_is_refused(site, engine, record):
    with pytest.raises(ValueError, match=r"no such site.*(blocks 0 to 2|components attn1, attn2)"):
        engine.capture(record, 1, [site], [0])


def test_a_row_at_a_block_that_does_not_exist_is_refused(engine, record):
    with pytest.raises(ValueError, match="reach beyond the last, layer 2"):
        engine.fork(record, [F(mode="reverse", space="hidden", layer=7, step=1)])


def test_engine_is_usable_after_an_error_inside_a_trace(engine, record):
    """A failing row must not poison the runs after it."""

    class Broken(P):
        def apply(self, point, value, context):
            raise RuntimeError("planted")

    before = engine.record(record.inputs).final
    with pytest.raises(RuntimeError, match="planted"):
        engine.fork(record, [Broken(step=1, layer=0, component="attn1")])
    assert torch.equal(engine.record(record.inputs).final, before)


def test_nan_in_one_row_stays_in_that_row(engine, record):
    class Poison(P):
        def apply(self, point, value, context):
            return torch.full_like(value, float("nan"))

    fork = engine.fork(record, [Poison(step=1, layer=0, component="attn1"), P(step=1, layer=0, component="attn1")])
    assert not torch.isfinite(fork.final[0, :, 1:]).all()
    assert torch.isfinite(fork.final[1]).all()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("FlowMatchLCMScheduler", {}),
    ],
)
def test_solvers_without_proof_are_refused(name, settings):
    """They draw noise, call the denoiser twice a step or keep history: replay and skips would mean something else."""
    import diffusers

    pipe = build_pipeline(3, num_layers=1)
    pipe.scheduler = getattr(diffusers, name)(**settings)
    with pytest.raises(UnsupportedSolverError, match=name):
        Engine(pipe, family_of("WanImageToVideoPipeline"))


def test_a_loop_of_another_length_than_planned_is_an_error(engine, record, monkeypatch):
    original = type(engine.solver)._set_timesteps

    def one_more(self, steps, **kwargs):
        original(self, steps + 1, **kwargs)

    monkeypatch.setattr(
        engine.solver.scheduler,
        "set_timesteps",
        lambda steps, **kwargs: one_more(engine.solver, steps, **kwargs),
    )
    with pytest.raises(EngineError, match=r"noise levels are .* planned were"):
        engine.record(record.inputs)
