"""Kinds that edit hidden tokens and frames, on whole runs: no-ops, effects, plain hooks, and what they read."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from interventions import kinds  # noqa: F401  (registers every kind)
from interventions.base import Intervention, RowContext, RunRef
from interventions.engine import Engine
from interventions.families.family import family_of
from interventions.kinds.ablate import Ablate
from interventions.kinds.frame_shuffle import FrameShuffle
from interventions.kinds.hidden_noise import HiddenNoise
from interventions.kinds.latent_noise import LatentNoise
from interventions.kinds.noise import Noise
from interventions.kinds.patch import Patch
from interventions.kinds.seed_ensemble import SeedEnsemble
from interventions.kinds.steer import Steer
from interventions.record import Record, RunInputs
from interventions.sites import ALL_HEADS, RUNS
from pipeline.embedded.build import build_pipeline
from pipeline.tasks.maze import MazeTask
from pipeline.tasks.task import Sampler
from tests.families import wan
from tests.families._weights import normal

STEPS, SAMPLES = 4, 3
Inputs = Callable[[int, int], RunInputs]


@dataclass
class Bench:
    """A pipeline with its engine and the records of its samples and seeds."""

    engine: Engine
    inputs: Inputs
    records: dict[tuple[int, int], Record] = field(default_factory=dict)
    asked: list[RunRef] = field(default_factory=list)

    def record(self, sample: int = 0, seed: int = 0) -> Record:
        key = (sample % SAMPLES, seed)
        if key not in self.records:
            self.records[key] = self.engine.record(self.inputs(*key))
        return self.records[key]

    def others(self, ref: RunRef) -> Record:
        """The sample at hand is sample 0, so offsets and fixed numbers are the same."""
        self.asked.append(ref)
        return self.record(ref.sample, ref.seed)

    def fork(self, *rows: Intervention) -> torch.Tensor:
        return self.engine.fork(self.record(), rows, others=self.others).final

    def hooked(self, inputs: RunInputs, edits: dict[tuple[int, str], Callable[..., Any]], step: int) -> torch.Tensor:
        """Run the bare pipeline with plain forward hooks that act at one step: (layer, component) to a function.

        A function gets (branch, what entered the module, what it gives) and returns the output or None.
        """
        calls = self.record().geometry.calls
        handles = [self._hook(layer, component, edit, step, calls) for (layer, component), edit in edits.items()]
        final = self.engine.bare(inputs)
        for handle in handles:
            handle.remove()
        return final

    def _hook(self, layer: int, component: str, edit: Callable[..., Any], step: int, calls: Any) -> Any:
        block = self.engine.pipe.transformer.blocks[layer]
        visit = itertools.count()

        def act(module: Any, args: Any, output: torch.Tensor) -> Any:
            at, call = divmod(next(visit), len(calls))
            return edit(calls[call][0], args[0] if args else None, output) if at == step else None

        module = block if component in ("residual", "update") else getattr(block, component)
        return module.register_forward_hook(act)


def maze_bench() -> Bench:
    pipe = build_pipeline(7, num_layers=3)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=generator))
    task = MazeTask(mazes=SAMPLES)

    def inputs(sample: int, seed: int) -> RunInputs:
        about = replace(task.samples()[sample], seed=seed)
        return task.inputs(pipe, about, Sampler(steps=STEPS, guidance_scale=3))

    return Bench(Engine(pipe, family_of("WanImageToVideoPipeline")), inputs)


def wan_bench() -> Bench:
    pipe = wan.build()
    shared, per_run = wan.arguments(pipe, steps=STEPS)

    def inputs(sample: int, seed: int) -> RunInputs:
        own = dict(per_run)
        own["latents"] = normal(100 + 10 * sample + seed, *own["latents"][:1].shape).expand_as(own["latents"]).clone()
        own["prompt_embeds"] = own["prompt_embeds"] + 0.5 * normal(200 + sample, *own["prompt_embeds"].shape)
        return RunInputs(shared=shared, per_run=own, names=RUNS, seed=(sample, seed))

    return Bench(Engine(pipe, family_of("WanPipeline")), inputs)


@pytest.fixture(scope="module", params=[maze_bench, wan_bench], ids=["maze", "wan"])
def bench(request):
    """Two models: an image-to-video one with Euler steps, and a text-to-video one with a second-order solver."""
    torch.set_num_threads(1)
    return request.param()


AT: dict[str, Any] = {"step": 1, "layer": 1}
EDITS: dict[str, Intervention] = {
    "zero": Ablate(value="zero", component="ffn", **AT),
    "zero_update": Ablate(value="zero", **AT),
    "zero_head": Ablate(value="zero", component="attn1", head=1, **AT),
    "mean": Ablate(value="mean", reference=2, component="attn1", frame=2, **AT),
    "resample": Ablate(value="resample", component="attn2", **AT),
    "gaussian": Ablate(value="gaussian", component="residual", frames="1-2", **AT),
    "steer": Steer(reference=2, component="residual", **AT),
    "steer_tokens": Steer(reference=2, per_token=True, run="clean", strength=-1.0, **AT),
    "ensemble": SeedEnsemble(seeds=2, step=1, layer=0, layers=2),
    "ensemble_update": SeedEnsemble(seeds=2, step=1, layer=0, layers=2, component="update"),
    "hidden_noise": HiddenNoise(strength=0.5, component="attn1", frame=3, **AT),
    "hidden_noise_window": HiddenNoise(strength=0.5, step=1, steps=2, layer=0, layers=2, box="0:1,0:2"),
    "latent_on_path": LatentNoise(step=1, steps=2, frames="2-3"),
    "latent_additive": LatentNoise(step=2, form="additive", strength=0.3, box="0:1,1:2"),
    "latent_first": LatentNoise(step=0, frame=3),
    "drop": FrameShuffle(mode="drop", frame=2, step=1),
    "permute_window": FrameShuffle(mode="permute", step=1, steps=2),
    "reverse_hidden": FrameShuffle(mode="reverse", space="hidden", component="attn1", branch="cond", layers=2, **AT),
    "drop_hidden": FrameShuffle(mode="drop", frame=1, space="hidden", component="update", **AT),
}


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_changes_its_run(name, bench):
    """No intervention is silently a no-op, for either run of the pair."""
    rows = [EDITS[name].model_copy(update={"run": run}) for run in RUNS]
    assert ((bench.fork(*rows) - bench.record().final).abs().amax(dim=(1, 2, 3, 4)) > 1e-4).all()


def no_ops(run: str, last_frame: int) -> dict[str, Intervention]:
    """Parameters at which a kind must leave the run ``run`` of sample 0 alone."""
    own: dict[str, Any] = {**AT, "run": run}
    return {
        "mean_of_itself": Ablate(value="mean", reference=1, reference_run=run, component="ffn", **own),
        "mean_of_itself_update": Ablate(value="mean", reference=1, reference_run=run, layers=2, **own),
        "steer_by_nothing": Steer(strength=0.0, reference=2, component="attn2", **own),
        "one_seed": SeedEnsemble(seeds=1, step=1, layer=0, layers=2, run=run),
        "one_seed_update": SeedEnsemble(seeds=1, step=1, layer=0, layers=2, component="update", run=run),
        "hidden_noise_of_none": HiddenNoise(strength=0, frames="1-2", **own),
        "latent_noise_of_none": LatentNoise(step=1, steps=2, form="additive", strength=0, frame=2, run=run),
        "freeze_at_the_end": FrameShuffle(mode="freeze", frame=last_frame, step=1, steps=2, run=run),
        "freeze_at_the_end_hidden": FrameShuffle(mode="freeze", frame=last_frame, space="hidden", layers=2, **own),
    }


@pytest.mark.parametrize("name", no_ops("clean", 1))
def test_parameters_that_say_nothing_are_bit_exact_no_ops(name, bench):
    """Both runs as rows, so that the batch is composed as it was recorded."""
    last = bench.record().geometry.frames - 1
    assert torch.equal(bench.fork(*(no_ops(run, last)[name] for run in RUNS)), bench.record().final)


def test_steering_where_the_runs_agree_is_zero_up_to_rounding(bench):
    """Negative control: before the prompt is first read, clean and corrupted runs hold the same."""
    rows = [
        Steer(step=0, layer=0, component="attn1", per_token=True, reference=2, strength=3.0, run=run) for run in RUNS
    ]
    final = bench.record().final
    assert (bench.fork(*rows) - final).abs().max() / final.abs().max() < 1e-4


def test_steering_between_runs_of_one_prompt_is_zero_up_to_rounding(bench):
    """Negative control: a pair with one prompt has no direction."""
    inputs = bench.inputs(0, 0)
    one_prompt = {**inputs.per_run, "prompt_embeds": inputs.per_run["prompt_embeds"][[0, 0]]}
    record = bench.engine.record(replace(inputs, per_run=one_prompt))
    rows = [Steer(reference=1, strength=3.0, per_token=True, component="attn2", run=run, **AT) for run in RUNS]
    found = bench.engine.fork(record, rows, others=lambda ref: record).final
    assert (found - record.final).abs().max() / record.final.abs().max() < 1e-4


def test_rows_do_not_leak_into_each_other(bench):
    """A row alone equals the row among all the others, wherever it lies in the batch."""
    together = bench.fork(*EDITS.values())
    backwards = bench.fork(*reversed(EDITS.values())).flip(0)
    scale = float(together.abs().max())
    torch.testing.assert_close(together, backwards, rtol=0, atol=1e-4 * scale)
    for i in (0, 5, 8, 10, 12, 16):
        alone = bench.fork(list(EDITS.values())[i])[0]
        torch.testing.assert_close(alone, together[i], rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zero", set()),
        ("hidden_noise", set()),
        ("mean", {RunRef("clean", 0, fixed=True), RunRef("clean", 1, fixed=True)}),
        ("resample", {RunRef("clean", 1)}),
        ("steer", {RunRef(run, i, fixed=True) for run in RUNS for i in range(2)}),
        ("ensemble", {RunRef("clean", 0, 1)}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_only_the_runs_that_a_kind_names_are_asked_for(name, expected, bench):
    bench.asked.clear()
    bench.fork(EDITS[name])
    assert set(bench.asked) == expected


@pytest.mark.parametrize("name", ["mean", "resample", "steer", "ensemble"])
def test_without_other_records_reading_them_is_refused(name, bench):
    with pytest.raises(ValueError, match="another sample or seed"):
        bench.engine.fork(bench.record(), [EDITS[name]])


@pytest.mark.parametrize("component", ["attn1", "update", "residual"])
def test_ablations_that_amount_to_a_patch_equal_it_bit_for_bit(component, bench):
    """Resampling is patching with another sample's run, and the mean over one run is patching with that run."""
    resample = Ablate(value="resample", component=component, **AT)
    another = Patch(direction="self", donor_sample=1, component=component, **AT)
    assert torch.equal(bench.fork(resample), bench.fork(another))
    mean = Ablate(value="mean", reference=1, reference_run="corrupted", component=component, **AT)
    assert torch.equal(bench.fork(mean), bench.fork(Patch(direction="noising", component=component, **AT)))


def test_zero_of_every_component_is_zero_of_the_update(bench):
    """A block whose attentions and feed-forward give nothing passes its input on."""

    class Parts(Ablate):
        def points(self, geometry):
            points = super().points(geometry)
            return tuple(replace(p, component=c) for c in ("attn1", "attn2", "ffn") for p in points)

    parts, whole = bench.fork(Parts(value="zero", component="ffn", **AT)), bench.fork(EDITS["zero_update"])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_an_ensemble_of_residuals_depends_on_the_last_block_of_its_window_only(bench):
    wide, narrow = (
        SeedEnsemble(seeds=2, step=1, layer=0, layers=3),
        SeedEnsemble(seeds=2, step=1, layer=2),
    )
    assert torch.equal(bench.fork(wide), bench.fork(narrow))


def test_an_ensemble_of_updates_depends_on_every_block_of_its_window(bench):
    rows = [SeedEnsemble(seeds=2, step=1, layer=i, layers=3 - i, component="update") for i in range(3)]
    found = bench.fork(*rows)
    assert all((a - b).abs().max() > 1e-4 for a, b in itertools.combinations(found, 2))


def test_an_ensemble_does_not_depend_on_which_noise_comes_second(bench):
    """Two seeds, averaged at the last residual: swapping the roles of both runs gives one prediction."""
    record, other = bench.record(0, 0), bench.record(0, 1)
    cell = SeedEnsemble(seeds=2, step=0, layer=record.geometry.blocks - 1)

    def velocity(one: Record, two: Record) -> torch.Tensor:
        fork = bench.engine.fork(one, [cell], keep_x0_hat=True, others=lambda ref: two)
        return (one.latents[0][0] - fork.x0_hat[0][0])[:, one.geometry.given_frames :] / one.levels[0][1]

    torch.testing.assert_close(velocity(record, other), velocity(other, record), rtol=1e-4, atol=1e-4)


def eps_of(bench: Bench, value: torch.Tensor, purpose: str, *coordinates: int) -> torch.Tensor:
    record = bench.record()
    return RowContext(geometry=record.geometry, levels=record.levels, seed=record.inputs.seed).noise_like(
        value, purpose, *coordinates
    )


def seen(bench: Bench, sample: int, seed: int, component: str, layer: int, step: int) -> dict[str, torch.Tensor]:
    """Return what a module gives in an untouched run, (runs, tokens, channels) by branch, from plain hooks."""
    found: dict[str, torch.Tensor] = {}
    bench.hooked(
        bench.inputs(sample, seed), {(layer, component): lambda b, _, out: found.__setitem__(b, out.clone())}, step
    )
    return found


class TestAgainstPlainHooks:
    """The whole effect of a kind, computed again with nothing but forward hooks on the bare pipeline."""

    def compare(self, bench: Bench, cell: Intervention, edits: dict[tuple[int, str], Callable[..., Any]]) -> None:
        expected = bench.hooked(bench.inputs(0, 0), edits, step=1)
        found = bench.fork(*(cell.model_copy(update={"run": run}) for run in RUNS))
        assert (found - expected).abs().max() / expected.abs().max() < 1e-5

    def test_zero(self, bench):
        self.compare(bench, EDITS["zero"], {(1, "ffn"): lambda b, _, out: torch.zeros_like(out)})

    def test_zero_update(self, bench):
        self.compare(bench, EDITS["zero_update"], {(1, "update"): lambda b, entering, out: entering})

    def test_mean_of_one_frame(self, bench):
        clean = [seen(bench, i, 0, "attn1", 1, 1) for i in range(2)]
        n = bench.record().geometry.tokens_per_frame

        def edit(branch, _, out):
            new = out.clone()
            new[:, 2 * n : 3 * n] = ((clean[0][branch][0] + clean[1][branch][0]) / 2)[2 * n : 3 * n]
            return new

        self.compare(bench, EDITS["mean"], {(1, "attn1"): edit})

    def test_resample(self, bench):
        other = seen(bench, 1, 0, "attn2", 1, 1)
        self.compare(bench, EDITS["resample"], {(1, "attn2"): lambda b, _, out: other[b]})

    def test_gaussian(self, bench):
        n = bench.record().geometry.tokens_per_frame

        def edit(branch, _, out):
            eps = eps_of(bench, out[0], "ablate residual video", 1, 1, ALL_HEADS)
            mean = out.mean(1, keepdim=True)
            drawn = mean + (out - mean).square().mean(1, keepdim=True).sqrt() * eps
            return torch.cat([out[:, :n], drawn[:, n : 3 * n], out[:, 3 * n :]], dim=1)

        self.compare(bench, EDITS["gaussian"], {(1, "residual"): edit})

    @pytest.mark.parametrize("per_token", [False, True])
    def test_steer(self, bench, per_token):
        pairs = [seen(bench, i, 0, "residual", 1, 1) for i in range(2)]

        def edit(branch, _, out):
            direction = sum(p[branch][0] - p[branch][1] for p in pairs) / 2
            return out + 0.5 * (direction if per_token else direction.mean(0))

        cell = Steer(reference=2, strength=0.5, per_token=per_token, component="residual", **AT)
        self.compare(bench, cell, {(1, "residual"): edit})

    def test_seed_ensemble(self, bench):
        both = [seen(bench, 0, i, "residual", 1, 1) for i in range(2)]
        self.compare(bench, EDITS["ensemble"], {(1, "residual"): lambda b, _, out: (both[0][b] + both[1][b]) / 2})

    def test_hidden_noise(self, bench):
        n = bench.record().geometry.tokens_per_frame

        def edit(branch, _, out):
            eps = eps_of(bench, out[0], "hidden_noise attn1 video", 1, 1, ALL_HEADS)[3 * n : 4 * n]
            new = out.clone()
            chosen = out[:, 3 * n : 4 * n]
            spread = (chosen - chosen.mean(1, keepdim=True)).square().mean(1, keepdim=True).sqrt()
            new[:, 3 * n : 4 * n] = chosen + 0.5 * spread * eps
            return new

        self.compare(bench, EDITS["hidden_noise"], {(1, "attn1"): edit})

    def test_drop_of_hidden_frames(self, bench):
        geometry = bench.record().geometry
        first, n = geometry.given_frames, geometry.tokens_per_frame
        cell = FrameShuffle(mode="drop", frame=first, space="hidden", component="attn1", branch="uncond", **AT)

        def edit(branch, _, out):
            new = out.clone()
            new[:, first * n : (first + 1) * n] = out[:, (first + 1) * n : (first + 2) * n]
            return new if branch == "uncond" else out

        self.compare(bench, cell, {(1, "attn1"): edit})


def test_latent_noise_of_all_latents_at_the_first_step_is_a_run_from_that_noise(bench):
    """At step 0 there is no estimate: what follows is the bare pipeline from other initial noise."""
    inputs, sigma = bench.inputs(0, 0), bench.record().levels[0][1]
    noise = sigma * eps_of(bench, inputs.per_run["latents"][0], "latent_noise", 0)
    fresh = replace(inputs, per_run={**inputs.per_run, "latents": noise.expand_as(inputs.per_run["latents"]).clone()})
    found = bench.fork(*(LatentNoise(step=0, run=run) for run in RUNS))
    torch.testing.assert_close(found, bench.engine.bare(fresh), rtol=1e-4, atol=1e-4)


def test_on_path_windows_never_read_the_recorded_run_again(bench):
    """All latents re-noised at every step from the first on: nothing of the original noise is left."""
    record, other = bench.record(0, 0), bench.record(0, 1)
    cell = LatentNoise(step=0, steps=STEPS)
    same_draws = replace(other.inputs, seed=record.inputs.seed)
    elsewhere = bench.engine.record(same_draws)
    torch.testing.assert_close(
        bench.engine.fork(record, [cell]).final, bench.engine.fork(elsewhere, [cell]).final, rtol=1e-4, atol=1e-4
    )


def test_noise_at_a_step_does_read_it(bench):
    """The contrast to the law above: the older kind mixes the recorded estimate of that very step."""
    record, other = bench.record(0, 0), bench.record(0, 1)
    elsewhere = bench.engine.record(replace(other.inputs, seed=record.inputs.seed))
    cell = Noise(at="step", step=2)
    found = [bench.engine.fork(r, [cell]).final for r in (record, elsewhere)]
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_reversing_latents_at_every_step_differs_from_once(bench):
    once, twice = (FrameShuffle(mode="reverse", step=1, steps=n) for n in (1, 2))
    assert (bench.fork(once) - bench.fork(twice)).abs().max() > 1e-3
