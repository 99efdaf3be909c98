"""The load-time proof that engine and family understand a pipeline: controls whose outcome is known beforehand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from interventions.engine import Engine
from interventions.kinds.patch import Patch
from interventions.record import Record, RunInputs

STEPS = 2
"""Solver steps of the runs that the controls make."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Largest difference, relative to the latents' scale, where a control is exact up to rounding; else 0.05."""


class ControlError(ValueError):
    """A pipeline on which a control fails: effects measured on it would be wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """One control and its outcome.

    Attributes
    ----------
    name : what must hold. difference : largest absolute difference from that, relative to the latents' scale.
    limit : largest difference that passes; 0 where the control is exact by construction.
    """

    name: str
    difference: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within its limit."""
        return self.difference <= self.limit


def run_controls(engine: Engine, inputs: RunInputs) -> list[Control]:
    """Run the controls on short runs of one sample's inputs.

    The empty plan equals the bare pipeline; a self-patch is an identity; patching the whole residual of the last
    block gives the donor's prediction; nothing changes before the intervened step.
    """
    inputs = replace(inputs, shared={**inputs.shared, "num_inference_steps": STEPS})
    record = engine.record(inputs)
    geometry = record.geometry
    rounding = TOLERANCE.get(getattr(engine.pipe, engine.family.denoiser).dtype, 0.05)
    last = geometry.blocks - 1
    itself = [Patch(direction="self", step=1, layer=last // 2, component=c) for c in geometry.components]
    donor = Patch(step=0, layer=last, component="residual")
    late = Patch(step=1, layer=last, component="residual")
    scale = float(record.final.abs().nan_to_num().max()) or 1.0

    def control(name: str, found: torch.Tensor, expected: torch.Tensor, limit: float) -> Control:
        return Control(name=name, difference=_difference(found, expected) / scale, limit=limit)

    self_patched = engine.fork(record, itself).final
    patched = engine.fork(record, [donor], keep_x0_hat=True).x0_hat[0][0]
    before = engine.fork(record, [late], keep_x0_hat=True).x0_hat[0][0]
    return [
        control("an empty plan equals the bare pipeline", record.final, engine.bare(inputs), 0.0),
        control("a self-patch is an identity", self_patched, record.final[[0] * len(itself)], rounding),
        control("the last residual gives the donor's prediction", *_velocities(record, patched), rounding),
        control("nothing changes before the intervened step", before, record.x0_hat[0][record.row("corrupted")], 0.0),
    ]


def require_controls(engine: Engine, inputs: RunInputs) -> None:
    """Run the controls and refuse the pipeline if one fails.

    Raises
    ------
    ControlError : naming every failing control with its figures.
    """
    failed = [c for c in run_controls(engine, inputs) if not c.passed]
    if failed:
        figures = "; ".join(f"{c.name}: off by {c.difference:.3g}, allowed {c.limit:.3g}" for c in failed)
        raise ControlError(
            f"controls fail on this {type(engine.pipe).__name__} as family {engine.family.name}: {figures}. "
            "Its effects cannot be trusted; check that the family fits and that no step cache is active."
        )


def _velocities(record: Record, patched: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the prediction at step 0 of the patched corrupted run and of the clean run, from their estimates."""
    noise, sigma = record.inputs.per_run["latents"], record.sigmas[0]
    clean, corrupted = record.row("clean"), record.row("corrupted")
    return (noise[corrupted] - patched) / sigma, (noise[clean] - record.x0_hat[0][clean]) / sigma


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute difference; NaN equals NaN, because a broken model is not a broken engine."""
    gap = (found.float() - expected.float()).abs()
    both = found.isnan() & expected.isnan()
    return float(gap.masked_fill(both, 0.0).nan_to_num(nan=float("inf")).max())
