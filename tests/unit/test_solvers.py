"""Schedulers as read by the solver room: levels, clean estimates and schedule edits against hand-written updates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions.solvers import (
    Solver,
    Steps,
    UnsupportedSolverError,
    check_step_arguments,
    clean_estimate,
    describe,
    edit_schedule,
    levels,
    place,
    solver_of,
)

# diffusers hands tensors to np.array.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
Level = tuple[float, float]
Shape = (2, 3, 2, 4, 4)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@dataclass(frozen=True)
class Case:
    """One scheduler configuration of a video family, and how its pipeline sets its steps."""

    name: str
    scheduler: str
    config: dict[str, Any]
    sigmas: Callable[[int], Any] | None = None
    overwrites_last: bool = False

    def make(self, steps: int) -> Any:
        scheduler = getattr(diffusers, self.scheduler)(**self.config)
        if self.overwrites_last:
            # What Cosmos 2 pipelines do to their scheduler when they are built.
            scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0, final_sigmas_type="sigma_min")
        if self.sigmas is None:
            scheduler.set_timesteps(steps)
        else:
            scheduler.set_timesteps(sigmas=self.sigmas(steps))
        return scheduler


def kinds(name: str, scheduler: str, predictions: str, **config: Any) -> list[Case]:
    return [
        Case(f"{name}-{prediction}", scheduler, {**config, "prediction_type": prediction})
        for prediction in predictions.split()
    ]


ONE_STEP = [
    Case("wan", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    Case(
        "mochi",
        "FlowMatchEulerDiscreteScheduler",
        {"invert_sigmas": True},
        lambda n: torch.linspace(1, 0.05, n).numpy(),
    ),
    Case(
        "cosmos2",
        "FlowMatchEulerDiscreteScheduler",
        {"use_karras_sigmas": True},
        lambda n: torch.linspace(0, 1, n, dtype=torch.float64),
        overwrites_last=True,
    ),
    *kinds("ddim", "DDIMScheduler", "epsilon sample v_prediction", clip_sample=False),
    *kinds("cogvideox", "CogVideoXDDIMScheduler", "epsilon sample v_prediction"),
    Case(
        "cogvideox-zero-snr",
        "CogVideoXDDIMScheduler",
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ),
    *kinds("dpm-first-order", "DPMSolverMultistepScheduler", "epsilon sample v_prediction", solver_order=1),
    Case("dpm-first-order-flow", "DPMSolverMultistepScheduler", {**FLOW, "solver_order": 1}),
    *kinds("euler", "EulerDiscreteScheduler", "epsilon sample v_prediction"),
    Case("euler-log-linear", "EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    Case(
        "svd",
        "EulerDiscreteScheduler",
        {
            "prediction_type": "v_prediction",
            "use_karras_sigmas": True,
            "timestep_type": "continuous",
            "sigma_min": 0.002,
            "sigma_max": 700.0,
        },
    ),
    Case("cosmos1", "EDMEulerScheduler", {"sigma_data": 0.5, "sigma_max": 80.0}),
    Case("cosmos1-v", "EDMEulerScheduler", {"prediction_type": "v_prediction"}),
]
MULTISTEP = [
    Case("unipc-wan", "UniPCMultistepScheduler", FLOW),
    Case("unipc-first-order", "UniPCMultistepScheduler", {**FLOW, "solver_order": 1}),
    Case("unipc-cosmos2.5", "UniPCMultistepScheduler", {**FLOW, "use_karras_sigmas": True}),
    *kinds("unipc", "UniPCMultistepScheduler", "epsilon sample v_prediction"),
    Case("unipc-noise-form", "UniPCMultistepScheduler", {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
    Case("unipc-flow-sample", "UniPCMultistepScheduler", {**FLOW, "prediction_type": "sample"}),
    Case("dpm-sana", "DPMSolverMultistepScheduler", FLOW),
    *kinds("dpm", "DPMSolverMultistepScheduler", "epsilon sample v_prediction"),
    Case("dpm-third-order", "DPMSolverMultistepScheduler", {"solver_order": 3}),
]
STOCHASTIC = [
    *kinds("ancestral", "EulerAncestralDiscreteScheduler", "epsilon v_prediction"),
    *kinds("cogvideox-dpm", "CogVideoXDPMScheduler", "epsilon sample v_prediction"),
    Case("sde-dpm", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    Case("sde-dpm-flow", "DPMSolverMultistepScheduler", {**FLOW, "algorithm_type": "sde-dpmsolver++"}),
]
EVERY = [*ONE_STEP, *MULTISTEP, *STOCHASTIC]


def named(cases: Sequence[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or Shape, generator=torch.Generator().manual_seed(seed))


def predicted(solver: Solver, latents: torch.Tensor, clean: torch.Tensor, level: Level) -> torch.Tensor:
    """What a network that sees ``clean`` in ``latents`` hands to ``step``, from the definition of each prediction."""
    alpha, sigma = level
    eps = (latents - alpha * clean) / sigma
    if solver.prediction == "flow":
        return eps - clean
    if solver.prediction == "inverted_flow":
        return clean - eps
    if solver.prediction == "v_prediction":
        return (alpha * eps - sigma * clean) / math.hypot(alpha, sigma)
    return eps if solver.prediction == "epsilon" else clean


def close(actual: torch.Tensor, expected: torch.Tensor, level: Level = (1.0, 0.0)) -> None:
    """Equal within what float32 keeps of x0 in latents at this level."""
    scale = math.hypot(*level) / max(level[0], 1e-2)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * max(1.0, scale))


Network = Callable[[torch.Tensor, Any], torch.Tensor]


def network(model_input: torch.Tensor, timestep: Any) -> torch.Tensor:
    """A clean guess that depends on the latents as the network sees them and on the timestep, nonlinearly."""
    return torch.tanh(0.7 * model_input + 0.2) * (1.0 + 0.1 * math.cos(float(timestep) / 90.0))


def loop(
    case: Case,
    scheduler: Any,
    latents: torch.Tensor,
    steps: Steps,
    table: Sequence[Level],
    guess: Network = network,
    placed: bool = True,
) -> list[torch.Tensor]:
    """A pipeline's loop around the bare scheduler, with each step in place; returns latents entering and leaving."""
    solver, generator, back, old = solver_of(scheduler), torch.Generator().manual_seed(5), None, None
    if case.overwrites_last:
        scheduler.sigmas[-1] = scheduler.sigmas[-2]
    seen = [latents]
    for i, timestep in enumerate(scheduler.timesteps):
        level = table[steps.order[i]]
        if solver.path == "ve":
            assert float(scheduler.sigmas[i]) == level[1], "pipelines of this kind read sigmas[i] themselves"
        scaled = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        clean = guess(scaled, timestep)
        prediction, more = predicted(solver, latents, clean, level), {}
        if solver.prediction_keyword:
            prediction = converted(scheduler, clean, latents, timestep, level[1])
            more = {solver.prediction_keyword: prediction}
        if solver.stochastic:
            more["generator"] = generator
        with place(scheduler, steps, i) if placed else nullcontext():
            if case.scheduler == "CogVideoXDPMScheduler":
                latents, old = scheduler.step(prediction, old, timestep, back, latents, **more)
            else:
                latents = scheduler.step(prediction, timestep, latents, return_dict=False, **more)[0]
        back = timestep
        seen.append(latents)
    return seen


def converted(scheduler: Any, clean: torch.Tensor, latents: torch.Tensor, timestep: Any, sigma: float) -> torch.Tensor:
    """The first of the two ``step`` calls of Cosmos 1: a raw output turned into x0, the step taken back."""
    data = scheduler.config.sigma_data
    skip, out = data**2 / (sigma**2 + data**2), sigma * data / math.hypot(sigma, data)
    sign = 1.0 if scheduler.config.prediction_type == "epsilon" else -1.0
    raw = (clean - skip * latents) / (sign * out)
    result: torch.Tensor = scheduler.step(raw, timestep, latents, return_dict=False)[1]
    scheduler._step_index -= 1
    return result


def unedited(scheduler: Any) -> Steps:
    return Steps(order=tuple(range(len(scheduler.timesteps))))


def start(table: Sequence[Level], seed: int = 1) -> torch.Tensor:
    return noise(seed) * math.hypot(*table[0])


def by_hand(case: Case, scheduler: Any, moves: Sequence[tuple[int, Level, Level]], latents: torch.Tensor) -> list[Any]:
    """First-order updates written out: x' = alpha' x0 + sigma' eps, the noise kept (DDIM, and Euler on every path)."""
    timesteps, seen = scheduler.timesteps.clone(), [latents]
    for position, (alpha, sigma), (next_alpha, next_sigma) in moves:
        norm = 1.0
        if case.scheduler in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"):
            norm = math.hypot(1.0, sigma)
        if case.scheduler == "EDMEulerScheduler":
            norm = math.hypot(scheduler.config.sigma_data, sigma)
        clean = network(latents / norm, timesteps[position])
        latents = next_alpha * clean + next_sigma * (latents - alpha * clean) / sigma
        seen.append(latents)
    return seen


def moves_of(table: Sequence[Level], edit: str, step: int, other: int | None) -> list[tuple[int, Level, Level]]:
    """Where each iteration of an edited loop starts and ends, from the words of the definition."""
    moves = [(p, table[p], table[p + 1]) for p in range(len(table) - 1)]
    if edit == "repeat":
        return [*moves[: step + 1], *moves[step:]]
    if edit == "swap":
        assert other is not None
        moves[step], moves[other] = moves[other], moves[step]
        return moves
    del moves[step]
    if step > 0:
        moves[step - 1] = (step - 1, table[step - 1], table[step + 1])
    return moves


class TestLevels:
    @named(EVERY)
    @pytest.mark.parametrize("steps", [1, 2, 5, 10])
    def test_levels_end_clean_lose_noise_at_every_step_and_lie_on_the_path(self, case, steps):
        scheduler = case.make(steps)
        table, solver = levels(scheduler), solver_of(scheduler)
        assert len(table) == steps + 1
        ratios = [sigma / max(alpha, 1e-12) for alpha, sigma in table]
        assert all(after <= before for before, after in itertools.pairwise(ratios))
        assert len(set(ratios[:-1])) == steps
        if not case.overwrites_last and "sigma_min" not in case.config.values() and case.name != "euler-log-linear":
            assert table[-1] == (1.0, 0.0)
        for alpha, sigma in table:
            total = {"flow": alpha + sigma, "vp": alpha**2 + sigma**2, "ve": alpha}[solver.path]
            assert total == pytest.approx(1.0, abs=1e-6)

    def test_tables_that_end_above_zero_noise_say_so(self):
        case = next(c for c in ONE_STEP if c.name == "cosmos2")
        assert levels(case.make(4))[-1] == (1.0, pytest.approx(0.002))
        scheduler = diffusers.DDIMScheduler(set_alpha_to_one=False)
        scheduler.set_timesteps(5)
        assert levels(scheduler)[-1][0] == pytest.approx(float(scheduler.alphas_cumprod[0]) ** 0.5)

    @named([*ONE_STEP, *MULTISTEP])
    def test_an_oracle_walks_exactly_along_the_levels(self, case):
        """With a prediction that always knows x0, latents entering step s are alpha_s x0 + sigma_s eps."""
        scheduler, clean, eps = case.make(8), noise(0), noise(1)
        table = levels(scheduler)
        first = table[0][0] * clean + table[0][1] * eps
        seen = loop(case, scheduler, first, unedited(scheduler), table, lambda *_: clean)
        for latents, (alpha, sigma) in zip(seen, table, strict=True):
            close(latents, alpha * clean + sigma * eps, (1.0, sigma))

    @named(STOCHASTIC)
    def test_noisy_solvers_keep_unit_noise_at_the_levels(self, case):
        scheduler, clean, eps = case.make(5), noise(0, 1, 30_000), noise(1, 1, 30_000)
        table = levels(scheduler)
        first = table[0][0] * clean + table[0][1] * eps
        seen = loop(case, scheduler, first, unedited(scheduler), table, lambda *_: clean)
        for latents, (alpha, sigma) in zip(seen[:-1], table[:-1], strict=True):
            residual = (latents - alpha * clean) / sigma
            assert residual.std() == pytest.approx(1.0, abs=0.02)
            assert (residual * clean).mean() == pytest.approx(0.0, abs=0.03)
        close(seen[-1], clean)

    @pytest.mark.parametrize("steps", [5, 7])
    def test_the_last_ddim_level_is_where_its_last_step_goes(self, steps):
        """Seven trailing steps end on timestep 0 instead of below it."""
        scheduler = diffusers.CogVideoXDDIMScheduler(timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        *_, (alpha, sigma), (last_alpha, last_sigma) = levels(scheduler)
        clean, eps = noise(0), noise(1)
        final = scheduler.step(eps, scheduler.timesteps[-1], alpha * clean + sigma * eps, return_dict=False)[0]
        torch.testing.assert_close(final.float(), last_alpha * clean + last_sigma * eps, rtol=1e-5, atol=1e-5)
        assert (last_sigma == 0.0) == (steps == 5)

    def test_a_sigma_off_the_flow_path_is_refused(self):
        scheduler = diffusers.UniPCMultistepScheduler(**FLOW, use_exponential_sigmas=True)
        scheduler.set_timesteps(4)
        with pytest.raises(UnsupportedSolverError, match=r"sigma 1\d\d\.\d+ in the table of a flow solver"):
            levels(scheduler)


class TestCleanEstimate:
    @named(EVERY)
    def test_an_oracle_prediction_gives_x0_back_at_every_step(self, case):
        scheduler, clean = case.make(8), noise(0)
        solver = solver_of(scheduler)
        for s, level in enumerate(levels(scheduler)[:-1]):
            latents = level[0] * clean + level[1] * noise(2 + s)
            estimate = clean_estimate(solver, latents, predicted(solver, latents, clean, level), *level)
            close(estimate, clean, level)

    @named([c for c in EVERY if c.scheduler != "FlowMatchEulerDiscreteScheduler" and c.name != "unipc-noise-form"])
    def test_it_is_the_schedulers_own_estimate(self, case):
        scheduler = case.make(6)
        solver = solver_of(scheduler)
        for s, level in enumerate(levels(scheduler)[:-1]):
            latents, prediction = noise(s) * math.hypot(*level), noise(20 + s)
            timestep = scheduler.timesteps[s]
            if hasattr(scheduler, "convert_model_output"):
                scheduler._step_index = s
                own = scheduler.convert_model_output(prediction, sample=latents)
            elif case.scheduler == "CogVideoXDPMScheduler":
                own = scheduler.step(prediction, None, timestep, None, latents)[1]
            else:
                more = {"pred_original_sample": prediction} if solver.prediction_keyword else {}
                own = scheduler.step(prediction, timestep, latents, return_dict=False, **more)[1]
            estimate = clean_estimate(solver, latents, prediction, *level)
            torch.testing.assert_close(estimate, own.to(estimate.dtype), rtol=2e-4, atol=2e-4)

    def test_it_is_clipped_where_the_scheduler_clips(self):
        scheduler = diffusers.DDIMScheduler(clip_sample=True, clip_sample_range=0.8)
        scheduler.set_timesteps(4)
        latents, prediction, level = noise(0), noise(1), levels(scheduler)[1]
        own = scheduler.step(prediction, scheduler.timesteps[1], latents, return_dict=False)[1]
        estimate = clean_estimate(solver_of(scheduler), latents, prediction, *level)
        assert float(own.abs().max()) == pytest.approx(0.8)
        torch.testing.assert_close(estimate, own)
        assert solver_of(diffusers.CogVideoXDDIMScheduler(clip_sample=True)).clip is None


class TestEdits:
    @named(ONE_STEP)
    @pytest.mark.parametrize(
        ("edit", "step", "other"),
        [
            ("drop", 0, None),
            ("drop", 2, None),
            ("drop", 4, None),
            ("repeat", 0, None),
            ("repeat", 2, None),
            ("repeat", 4, None),
            ("swap", 1, 2),
            ("swap", 0, 4),
            ("swap", 3, 0),
        ],
    )
    def test_one_step_solvers_take_the_steps_of_the_definition(self, case, edit, step, other):
        scheduler, plain = case.make(5), case.make(5)
        table = levels(scheduler)
        moves = moves_of(table, edit, step, other)
        steps = edit_schedule(scheduler, solver_of(scheduler), edit, step, other)
        assert list(steps.order) == [position for position, _, _ in moves]
        first = noise(1) * math.hypot(*table[steps.order[0]])
        seen = loop(case, scheduler, first, steps, table)
        for actual, expected in zip(seen, by_hand(case, plain, moves, first), strict=True):
            torch.testing.assert_close(actual, expected, rtol=5e-4, atol=5e-4)

    @settings(max_examples=40, deadline=None)
    @given(data=st.data(), case=st.sampled_from(ONE_STEP), count=st.integers(2, 12))
    def test_any_edit_of_any_schedule_takes_the_steps_of_the_definition(self, data, case, count):
        edit = data.draw(st.sampled_from(["drop", "repeat", "swap"]))
        step = data.draw(st.integers(0, count - 1))
        other = data.draw(st.integers(0, count - 1).filter(lambda o: o != step)) if edit == "swap" else None
        scheduler, plain = case.make(count), case.make(count)
        table = levels(scheduler)
        moves = moves_of(table, edit, step, other)
        steps = edit_schedule(scheduler, solver_of(scheduler), edit, step, other)
        first = noise(count) * math.hypot(*table[steps.order[0]])
        final = loop(case, scheduler, first, steps, table)[-1]
        torch.testing.assert_close(final, by_hand(case, plain, moves, first)[-1], rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("config", [{"shift": 3.0}, {"shift": 3.0, "invert_sigmas": True}], ids=["wan", "mochi"])
    @pytest.mark.parametrize(
        ("edit", "other", "order"),
        [("drop", None, [0, 2, 3]), ("repeat", None, [0, 1, 1, 2, 3]), ("swap", 2, [0, 2, 1, 3])],
    )
    def test_flow_euler_edits_are_bit_equal_to_euler_updates(self, config, edit, other, order):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
        scheduler.set_timesteps(4)
        sigmas, timesteps = scheduler.sigmas.clone(), scheduler.timesteps.clone()
        ends = {p: p + 1 for p in order} | ({0: 2} if edit == "drop" else {})
        steps = edit_schedule(scheduler, solver_of(scheduler), edit, 1, other)
        latents = expected = noise(0)
        for i, t in enumerate(scheduler.timesteps):
            with place(scheduler, steps, i):
                latents = scheduler.step(network(latents, t), t, latents, return_dict=False)[0]
        for p in order:
            expected = expected + (sigmas[ends[p]] - sigmas[p]) * network(expected, timesteps[p])
        assert torch.equal(latents, expected)

    @named([c for c in STOCHASTIC if c.name.startswith("ancestral")])
    @pytest.mark.parametrize(("edit", "step", "other"), [("drop", 1, None), ("repeat", 2, None), ("swap", 1, 3)])
    def test_ancestral_edits_are_ancestral_updates_with_noise_by_iteration(self, case, edit, step, other):
        scheduler, plain = case.make(5), case.make(5)
        table = levels(scheduler)
        steps = edit_schedule(scheduler, solver_of(scheduler), edit, step, other)
        first = start(table)
        final = loop(case, scheduler, first, steps, table)[-1]
        generator, x = torch.Generator().manual_seed(5), first
        for p, (_, here), (_, there) in moves_of(table, edit, step, other):
            clean = network(x / math.hypot(1.0, here), plain.timesteps[p])
            up = math.sqrt(there**2 * (here**2 - there**2) / here**2)
            x = clean + math.sqrt(there**2 - up**2) * (x - clean) / here + up * torch.randn(Shape, generator=generator)
        torch.testing.assert_close(final, x, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("step", [0, 2, 5])
    def test_unipc_drop_is_the_solver_on_the_shorter_sigmas(self, step):
        config = {**FLOW, "solver_order": 3}
        edited = diffusers.UniPCMultistepScheduler(**config)
        edited.set_timesteps(6)
        table = levels(edited)
        shorter = diffusers.UniPCMultistepScheduler(**config)
        shorter.set_timesteps(sigmas=np.delete(np.linspace(1, 0.001, 7)[:-1], step))
        case, first = MULTISTEP[0], noise(0)
        steps = edit_schedule(edited, solver_of(edited), "drop", step)
        short = [level for i, level in enumerate(table) if i != step]
        final = loop(case, edited, first, steps, table)[-1]
        assert torch.equal(final, loop(case, shorter, first, unedited(shorter), short)[-1])

    @pytest.mark.parametrize("step", [0, 2, 5])
    @named([c for c in MULTISTEP if c.name in ("dpm-sana", "dpm-epsilon", "dpm-v_prediction")])
    def test_dpm_drop_is_second_order_over_the_shorter_levels(self, case, step):
        scheduler, plain = case.make(6), case.make(6)
        table, first = levels(scheduler), noise(0)
        steps = edit_schedule(scheduler, solver_of(scheduler), "drop", step)
        final = loop(case, scheduler, first, steps, table)[-1]
        x, old, before = first, None, 0.0
        for n, (p, (alpha, sigma), (next_alpha, next_sigma)) in enumerate(moves_of(table, "drop", step, None)):
            clean = network(x, plain.timesteps[p])
            here = math.log(alpha / sigma)
            if n == 4:
                x = clean  # the last step goes to zero noise, at first order
            else:
                h = math.log(next_alpha / next_sigma) - here
                guess = clean if old is None else clean + h / (2 * (here - before)) * (clean - old)
                x = next_sigma / sigma * x - next_alpha * math.expm1(-h) * guess
            old, before = clean, here
        torch.testing.assert_close(final, x, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("step", [0, 2, 4])
    @named([c for c in STOCHASTIC if c.name.startswith("cogvideox-dpm")])
    def test_cogvideox_dpm_drop_is_second_order_over_the_shorter_levels(self, case, step):
        scheduler, plain = case.make(5), case.make(5)
        table, first = levels(scheduler), noise(0)
        steps = edit_schedule(scheduler, solver_of(scheduler), "drop", step)
        final = loop(case, scheduler, first, steps, table)[-1]
        generator, x, old, before = torch.Generator().manual_seed(5), first, None, 0.0
        moves = moves_of(table, "drop", step, None)
        for p, (alpha, sigma), (next_alpha, next_sigma) in moves[:-1]:
            clean = network(x, plain.timesteps[p])
            here = math.log(alpha / sigma)
            h = math.log(next_alpha / next_sigma) - here
            draw, guess = torch.randn(Shape, generator=generator), clean
            if old is not None:
                draw = torch.randn(Shape, generator=generator)
                guess = clean + h / (2 * (here - before)) * (clean - old)
            x = next_sigma / sigma * math.exp(-h) * x - next_alpha * math.expm1(-2 * h) * guess
            x = x + next_sigma * math.sqrt(-math.expm1(-2 * h)) * draw
            old, before = clean, here
        torch.testing.assert_close(final.float(), network(x, plain.timesteps[moves[-1][0]]), rtol=1e-3, atol=1e-3)

    @named([*MULTISTEP, *(c for c in STOCHASTIC if "dpm" in c.name)])
    @pytest.mark.parametrize(("edit", "other"), [("repeat", None), ("swap", 2)])
    def test_multistep_solvers_refuse_what_their_formula_does_not_define(self, case, edit, other):
        scheduler = case.make(4)
        before = scheduler.timesteps.clone()
        with pytest.raises(UnsupportedSolverError, match=f"'{edit}' is not exact for {case.scheduler}.*Use drop"):
            edit_schedule(scheduler, solver_of(scheduler), edit, 1, other)
        assert torch.equal(scheduler.timesteps, before)

    @pytest.mark.parametrize(
        ("edit", "step", "other", "message"),
        [
            ("drop", 4, None, "step=4 is outside of the 4 steps"),
            ("repeat", -1, None, "step=-1 is outside"),
            ("swap", 1, 9, "other=9 is outside"),
            ("swap", 1, None, "swap takes two different steps"),
            ("swap", 1, 1, "swap takes two different steps"),
            ("repeat", 1, 2, "the rest one"),
        ],
    )
    def test_a_position_that_makes_no_sense_is_refused(self, edit, step, other, message):
        scheduler = ONE_STEP[0].make(4)
        with pytest.raises(ValueError, match=message):
            edit_schedule(scheduler, solver_of(scheduler), edit, step, other)

    def test_the_only_step_cannot_be_dropped(self):
        scheduler = ONE_STEP[0].make(1)
        with pytest.raises(ValueError, match="no step of a run of 1"):
            edit_schedule(scheduler, solver_of(scheduler), "drop", 0)


class TestPlace:
    @named(EVERY)
    def test_an_unedited_run_is_bit_equal_with_and_without_it(self, case):
        placed, bare = case.make(5), case.make(5)
        table, plan = levels(placed), unedited(placed)
        seen = loop(case, placed, start(table), plan, table)
        assert torch.equal(seen[-1], loop(case, bare, start(table), plan, table, placed=False)[-1])

    @pytest.mark.parametrize("name", ["wan", "cogvideox-v_prediction"])
    def test_a_step_that_fails_leaves_the_scheduler_as_it_was(self, name):
        case = next(c for c in ONE_STEP if c.name == name)
        scheduler = case.make(4)
        steps = edit_schedule(scheduler, solver_of(scheduler), "drop", 2)
        before = {**vars(scheduler)}
        with pytest.raises(RuntimeError, match="boom"), place(scheduler, steps, 1):
            raise RuntimeError("boom")
        after = vars(scheduler)
        assert all(after[key] is before[key] for key in before if key != "_step_index")
        assert scheduler.config.num_train_timesteps == 1000


class TestSolverOf:
    @pytest.mark.parametrize(
        ("name", "config", "description"),
        [
            ("FlowMatchEulerDiscreteScheduler", {}, "order 1, flow path, flow prediction"),
            ("DDIMScheduler", {"prediction_type": "sample"}, "order 1, vp path, sample prediction"),
            ("UniPCMultistepScheduler", FLOW, "order 2, flow path, flow prediction"),
            ("UniPCMultistepScheduler", {"solver_order": 3}, "order 3, vp path, epsilon prediction"),
            ("CogVideoXDPMScheduler", {}, "order 2, vp path, epsilon prediction, draws noise"),
            ("EulerDiscreteScheduler", {}, "order 1, ve path, epsilon prediction"),
            ("EDMEulerScheduler", {}, "order 1, ve path, sample prediction"),
        ],
    )
    def test_a_solver_is_described_in_one_line(self, name, config, description):
        assert describe(solver_of(getattr(diffusers, name)(**config))) == f"{name}, {description}"

    @named(EVERY)
    def test_noise_and_history_are_declared(self, case):
        solver = solver_of(case.make(2))
        assert solver.stochastic == (case in STOCHASTIC)
        assert solver.multistep == (case in MULTISTEP or ("dpm" in case.name and case in STOCHASTIC))
        assert solver.edits == (("drop",) if solver.multistep else ("drop", "repeat", "swap"))

    @pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "LCMScheduler", "DDPMScheduler"])
    def test_an_unknown_scheduler_is_refused_with_the_list(self, name):
        with pytest.raises(UnsupportedSolverError, match=rf"{name} is not supported.*DDIMScheduler, .*UniPCMultistep"):
            solver_of(getattr(diffusers, name)())

    @pytest.mark.parametrize(
        ("name", "config", "message"),
        [
            ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "stochastic_sampling"),
            ("DDIMScheduler", {"thresholding": True}, "thresholding"),
            ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "use_flow_sigmas=False"),
            ("UniPCMultistepScheduler", {**FLOW, "prediction_type": "v_prediction"}, "use_flow_sigmas=True"),
            ("UniPCMultistepScheduler", {**FLOW, "prediction_type": "epsilon"}, "use_flow_sigmas=True"),
            ("DPMSolverMultistepScheduler", {"variance_type": "learned"}, "variance_type='learned'"),
            (
                "DPMSolverMultistepScheduler",
                {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
                "algorithm_type='dpmsolver'",
            ),
            ("EulerDiscreteScheduler", {"prediction_type": "score"}, "prediction_type='score'"),
        ],
    )
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_a_configuration_without_a_known_estimate_is_refused(self, name, config, message):
        with pytest.raises(UnsupportedSolverError, match=f"{name} with .*{message}"):
            solver_of(getattr(diffusers, name)(**config))

    def test_a_solver_given_as_predictor_is_refused(self):
        inner = diffusers.DDIMScheduler()
        with pytest.raises(UnsupportedSolverError, match="solver_p"):
            solver_of(diffusers.UniPCMultistepScheduler(solver_p=inner))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"eta": 0.5}, "eta=0.5"),
            ({"s_churn": 1.0}, "s_churn=1.0"),
            ({"per_token_timesteps": torch.ones(1)}, "per_token_timesteps"),
        ],
    )
    def test_step_arguments_that_change_the_solver_are_refused(self, arguments, message):
        solver = solver_of(diffusers.DDIMScheduler())
        with pytest.raises(UnsupportedSolverError, match=message):
            check_step_arguments(solver, arguments)
        check_step_arguments(solver, {"eta": 0.0, "generator": None})
