"""What is understood of each diffusers scheduler: its noise levels, its clean estimate and the edits it can take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

Edit = Literal["drop", "repeat", "swap"]
Path = Literal["flow", "vp", "ve"]
Prediction = Literal["flow", "inverted_flow", "epsilon", "v_prediction", "sample"]

ONE_STEP_EDITS: tuple[Edit, ...] = ("drop", "repeat", "swap")
# At a repeated noise level the divided difference of a multistep solver divides by zero, and in another order its
# history belongs to other steps: only the shorter list is still the solver's own formula.
MULTISTEP_EDITS: tuple[Edit, ...] = ("drop",)


class UnsupportedSolverError(ValueError):
    """The pipeline's scheduler, or the way it is configured or called, is not one whose steps are understood."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solver:
    """What is understood of one scheduler: how to read a step of it and which schedule edits are exact.

    Attributes
    ----------
    name : class of the scheduler.
    path : how the loop's latents mix x0 and noise: "flow" (alpha + sigma = 1), "vp" (alpha^2 + sigma^2 = 1) or
        "ve" (alpha = 1).
    prediction : what ``step`` receives: "flow" eps - x0, "inverted_flow" x0 - eps, "epsilon" eps, "sample" x0, or
        "v_prediction" alpha eps - sigma x0 in the scale where alpha^2 + sigma^2 = 1.
    multistep : whether a step also reads what earlier steps left behind.
    order : of accuracy, the scheduler's ``solver_order``.
    stochastic : whether ``step`` draws noise; rows then need a generator each to be comparable across batches. The
        draw belongs to the loop iteration, not to the step, so after a drop or repeat later steps draw other noise.
    edits : schedule edits that are exact for this solver.
    clip : bound that the scheduler puts on the clean estimate, None if it does not.
    latents_at : position of the latents among the positional arguments of ``step``.
    prediction_keyword : keyword of ``step`` that carries the prediction besides the first argument. A call without it
        only converts a model output, is taken back by the pipeline, and must not count as a step.
    """

    name: str
    path: Path
    prediction: Prediction
    multistep: bool
    order: int
    stochastic: bool
    edits: tuple[Edit, ...]
    clip: float | None = None
    latents_at: int = 2
    prediction_keyword: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The steps that a loop takes, and what a scheduler must be told before some of them.

    Attributes
    ----------
    order : position in the unedited table of each loop iteration.
    index : step index of each loop iteration in ``sigmas``.
    sigmas : the table that ``step`` walks along, or None to leave the scheduler alone.
    bridge : the loop iteration before a dropped step and the timesteps it descends, for schedulers that compute the
        next timestep instead of looking it up, else None.
    """

    order: tuple[int, ...]
    index: tuple[int, ...] = ()
    sigmas: torch.Tensor | None = None
    bridge: tuple[int, int] | None = None


def describe(solver: Solver) -> str:
    """Return the solver in one line, for store attributes: class, order, path, prediction and whether it draws."""
    noise = ", draws noise" if solver.stochastic else ""
    return f"{solver.name}, order {solver.order}, {solver.path} path, {solver.prediction} prediction{noise}"


def solver_of(scheduler: Any) -> Solver:
    """Return what is understood of a scheduler, read from its class and configuration.

    Raises
    ------
    UnsupportedSolverError : the class is unknown, or configured in a way that no clean estimate is known for.
    """
    name = type(scheduler).__name__
    if name not in _READERS:
        raise UnsupportedSolverError(f"scheduler {name} is not supported. Use one of {', '.join(sorted(_READERS))}.")
    if scheduler.config.get("thresholding"):
        _refuse(name, "thresholding=True", "thresholding=False")
    return _READERS[name](name, scheduler.config)


def check_step_arguments(solver: Solver, arguments: Mapping[str, Any]) -> None:
    """Refuse keyword arguments of ``step`` that make it another solver than ``solver`` describes.

    Raises
    ------
    UnsupportedSolverError : noise is asked for (eta, s_churn), or every token has its own timestep.
    """
    for argument in ("eta", "s_churn"):
        if arguments.get(argument):
            _refuse(solver.name, f"{argument}={arguments[argument]}", f"{argument}=0")
    if arguments.get("per_token_timesteps") is not None:
        _refuse(solver.name, "per_token_timesteps", "one timestep a step")


def levels(scheduler: Any) -> tuple[tuple[float, float], ...]:
    """Return the (alpha, sigma) of the latents x = alpha x0 + sigma eps entering each step, then the final ones.

    They are in the scale in which the loop holds its latents, from the table after ``set_timesteps`` and before any
    edit; length steps + 1. The last is (1, 0) unless the table ends above zero noise. A level is what the scheduler
    takes its latents for: DDIM kinds with a step count that does not divide their training steps end a step beside it.

    Raises
    ------
    UnsupportedSolverError : a level of the table does not lie on the solver's path.
    """
    solver = solver_of(scheduler)
    if solver.name in _BY_TIMESTEP:
        products = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps]
        end = int(scheduler.timesteps[-1]) - _descent(scheduler)
        products.append(float(scheduler.alphas_cumprod[end] if end >= 0 else scheduler.final_alpha_cumprod))
        return tuple((product**0.5, (1.0 - product) ** 0.5) for product in products)
    return tuple(_level(solver, sigma) for sigma in _table(scheduler, solver).tolist())


def clean_estimate(
    solver: Solver, latents: torch.Tensor, prediction: torch.Tensor, alpha: float, sigma: float
) -> torch.Tensor:
    """Return x0_hat, the clean latents that a prediction at level (alpha, sigma) stands for.

    ``latents`` and ``prediction`` are what ``step`` receives, of any one shape; (alpha, sigma) is the step's entry of
    ``levels``. Formulas: flow x - sigma v and epsilon (x - sigma eps) / alpha solve x = alpha x0 + sigma eps;
    v_prediction is x0 = alpha x - sigma v of Salimans and Ho 2022 (arXiv 2202.00512) for latents of any scale.
    """
    if solver.prediction == "flow":
        estimate = latents - sigma * prediction
    elif solver.prediction == "inverted_flow":
        estimate = latents + sigma * prediction
    elif solver.prediction == "epsilon":
        estimate = (latents - sigma * prediction) / alpha
    elif solver.prediction == "v_prediction":
        square = alpha**2 + sigma**2
        estimate = (alpha / square) * latents - (sigma / square**0.5) * prediction
    else:
        estimate = prediction
    return estimate if solver.clip is None else estimate.clamp(-solver.clip, solver.clip)


def edit_schedule(scheduler: Any, solver: Solver, edit: Edit, step: int, other: int | None = None) -> Steps:
    """Edit the step list of a scheduler after its ``set_timesteps``; each ``step`` call must then be in ``place``.

    "drop" leaves ``step`` out: the step before it goes on to where ``step`` would have ended. "repeat" takes ``step``
    twice. "swap" takes ``other`` in the place of ``step`` and ``step`` in the place of ``other``. A step that is
    repeated or moved keeps its own timestep and its own sigma increment. Outside of ``step`` the scheduler's tables
    are in loop order, as ``scale_model_input`` and pipelines that read ``sigmas[i]`` expect.

    The DDIM kinds have no table of next timesteps but subtract a constant from the current one. Repeat and swap need
    nothing else; the step before a dropped one descends further, which ``place`` brings about by changing the two
    numbers that the constant is computed from.

    Parameters
    ----------
    step, other : positions in the unedited table; ``other`` for "swap" only.

    Raises
    ------
    UnsupportedSolverError : the edit is not exact for this solver.
    ValueError : a position is outside of the table, missing or not asked for, or no step would be left.
    """
    count = len(scheduler.timesteps)
    _check_edit(solver, edit, count, step, other)
    order = list(range(count))
    if edit == "drop":
        order.remove(step)
    elif edit == "repeat":
        order.insert(step, step)
    else:
        assert other is not None
        order[step], order[other] = other, step
    timesteps = scheduler.timesteps
    if solver.name in _BY_TIMESTEP:
        scheduler.timesteps = timesteps[order]
        if edit != "drop" or step == 0:
            return Steps(order=tuple(order))
        descent = int(timesteps[step - 1] - timesteps[step]) + _descent(scheduler)
        return Steps(order=tuple(order), bridge=(step - 1, descent))
    table = _table(scheduler, solver)
    in_loop_order = table[[*order, count]]
    scheduler.timesteps, scheduler.sigmas = timesteps[order], in_loop_order
    if edit == "drop":
        return Steps(order=tuple(order), index=tuple(range(count - 1)), sigmas=in_loop_order.clone())
    return Steps(order=tuple(order), index=tuple(order), sigmas=table)


@contextmanager
def place(scheduler: Any, steps: Steps, loop: int) -> Iterator[None]:
    """Put the scheduler where iteration ``loop`` is in the unedited table while the block calls its ``step``.

    Where there is nothing to tell it, which includes every unedited schedule, the scheduler is not touched.
    """
    inside: dict[str, Any] = {}
    if steps.sigmas is not None:
        # Set, because a timestep that occurs twice is ambiguous to the scheduler's own look-up.
        inside = {"sigmas": steps.sigmas, "_step_index": steps.index[loop]}
    elif steps.bridge is not None and steps.bridge[0] == loop:
        config = type(scheduler.config)({**scheduler.config, "num_train_timesteps": steps.bridge[1]})
        inside = {"_internal_dict": config, "num_inference_steps": 1}
    after = {name: loop + 1 if name == "_step_index" else getattr(scheduler, name) for name in inside}
    vars(scheduler).update(inside)
    try:
        yield
    finally:
        vars(scheduler).update(after)


def _check_edit(solver: Solver, edit: Edit, count: int, step: int, other: int | None) -> None:
    if edit not in solver.edits:
        raise UnsupportedSolverError(
            f"schedule edit {edit!r} is not exact for {describe(solver)}. Use {' or '.join(solver.edits)}, "
            "or a one-step solver such as FlowMatchEulerDiscreteScheduler."
        )
    for name, position in (("step", step), ("other", other)):
        if position is not None and not 0 <= position < count:
            raise ValueError(f"schedule edit {edit!r}: {name}={position} is outside of the {count} steps of the run")
    if (edit == "swap") != (other is not None) or step == other:
        raise ValueError(
            f"schedule edit {edit!r} of step {step} with other={other}: swap takes two different steps, the rest one"
        )
    if edit == "drop" and count == 1:
        raise ValueError("schedule edit 'drop' would leave no step of a run of 1. Use more steps.")


def _descent(scheduler: Any) -> int:
    """Return how far the DDIM kinds go down in one step, the formula of their ``step``."""
    return int(scheduler.config.num_train_timesteps // scheduler.num_inference_steps)


def _table(scheduler: Any, solver: Solver) -> torch.Tensor:
    """Return sigmas entering each step, then the final one; log-linear tables hold one more that is never used."""
    table: torch.Tensor = scheduler.sigmas[: len(scheduler.timesteps) + 1]
    if solver.name == "FlowMatchEulerDiscreteScheduler" and scheduler.config.get("final_sigmas_type") == "sigma_min":
        # The scheduler has no such setting: Cosmos 2 pipelines register it and overwrite the last entry themselves.
        table = torch.cat([table[:-1], table[-2:-1]])
    return table


def _level(solver: Solver, sigma: float) -> tuple[float, float]:
    if solver.path == "ve":
        return 1.0, sigma
    if solver.path == "vp":
        alpha = 1.0 / (sigma**2 + 1.0) ** 0.5
        return alpha, sigma * alpha
    if not 0.0 <= sigma <= 1.0:
        raise UnsupportedSolverError(
            f"{solver.name}: sigma {sigma} in the table of a flow solver, which runs from 1 to 0. "
            "Use flow sigmas, and neither exponential nor beta ones."
        )
    return (sigma, 1.0 - sigma) if solver.prediction == "inverted_flow" else (1.0 - sigma, sigma)


def _refuse(name: str, setting: str, instead: str) -> None:
    raise UnsupportedSolverError(f"scheduler {name} with {setting} is not supported. Use {instead}.")


def _solver(name: str, path: Path, prediction: Any, **more: Any) -> Solver:
    """Fill in what most solvers share: one step, first order, no noise, predictions of the usual three kinds."""
    if prediction not in ("flow", "inverted_flow", "epsilon", "v_prediction", "sample"):
        _refuse(name, f"prediction_type={prediction!r}", "epsilon, v_prediction or sample")
    multistep = more.pop("multistep", False)
    edits = MULTISTEP_EDITS if multistep else ONE_STEP_EDITS
    common: Any = {"order": 1, "stochastic": False, "multistep": multistep, "edits": edits}
    return Solver(name=name, path=path, prediction=prediction, **(common | more))


def _flow_euler(name: str, config: Any) -> Solver:
    if config.get("stochastic_sampling"):
        _refuse(name, "stochastic_sampling", "stochastic_sampling=False")
    rescaled = any(config.get(f"use_{kind}_sigmas") for kind in ("karras", "exponential", "beta"))
    if rescaled and (config.get("sigma_max") or 0.0) > 1.0:
        if config.get("invert_sigmas"):
            _refuse(name, "invert_sigmas on variance-exploding sigmas", "invert_sigmas=False")
        # Cosmos 2 registers EDM sigmas and hands over (x - x0_hat) / sigma, which is the noise.
        return _solver(name, "ve", "epsilon")
    # Mochi's table rises from 0 to 1, so its Euler step needs the velocity towards the data.
    return _solver(name, "flow", "inverted_flow" if config.get("invert_sigmas") else "flow")


def _multistep(name: str, config: Any, **more: Any) -> Solver:
    flow, kind = bool(config.get("use_flow_sigmas")), config.prediction_type
    if kind != "sample" and flow != (kind == "flow_prediction"):
        # The scheduler would apply the formula of one path to latents of the other.
        _refuse(name, f"prediction_type={kind!r} and use_flow_sigmas={flow}", "flow_prediction with flow sigmas")
    kind = "flow" if kind == "flow_prediction" else kind
    return _solver(name, "flow" if flow else "vp", kind, order=config.solver_order, **more)


def _unipc(name: str, config: Any) -> Solver:
    if config.get("solver_p") is not None:
        _refuse(name, "solver_p", "solver_p=None")
    # Even at order 1 its corrector reads the sample and the prediction of the step before.
    return _multistep(name, config, multistep=True)


def _dpm(name: str, config: Any) -> Solver:
    if config.algorithm_type not in ("dpmsolver++", "sde-dpmsolver++"):
        _refuse(name, f"algorithm_type={config.algorithm_type!r}", "dpmsolver++ or sde-dpmsolver++")
    if config.get("variance_type") is not None:
        _refuse(name, f"variance_type={config.variance_type!r}", "variance_type=None")
    draws = config.algorithm_type == "sde-dpmsolver++"
    return _multistep(name, config, multistep=config.solver_order > 1, stochastic=draws)


def _ddim(name: str, config: Any) -> Solver:
    return _solver(name, "vp", config.prediction_type, clip=config.clip_sample_range if config.clip_sample else None)


def _configured(name: str, config: Any, path: Path, **more: Any) -> Solver:
    kind = config.prediction_type
    return _solver(name, path, "sample" if kind == "original_sample" else kind, **more)


def _edm_euler(name: str, config: Any) -> Solver:
    # Cosmos 1 calls step once to turn both branches into x0_hat, guides those, and steps with the guided x0_hat.
    return _solver(name, "ve", "sample", prediction_keyword="pred_original_sample")


_READERS: dict[str, Callable[[str, Any], Solver]] = {
    # Its configuration has clip_sample like DDIM's, but its step does not clip.
    "CogVideoXDDIMScheduler": partial(_configured, path="vp"),
    "CogVideoXDPMScheduler": partial(_configured, path="vp", multistep=True, order=2, stochastic=True, latents_at=4),
    "DDIMScheduler": _ddim,
    "DPMSolverMultistepScheduler": _dpm,
    "EDMEulerScheduler": _edm_euler,
    "EulerAncestralDiscreteScheduler": partial(_configured, path="ve", stochastic=True),
    "EulerDiscreteScheduler": partial(_configured, path="ve"),
    "FlowMatchEulerDiscreteScheduler": _flow_euler,
    "UniPCMultistepScheduler": _unipc,
}
_BY_TIMESTEP = frozenset({"CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMScheduler"})
