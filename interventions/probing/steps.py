"""How a pipeline sets the steps of its scheduler."""

from __future__ import annotations

from interventions.families.facts import EvenSteps, StepsAsSeen
from interventions.probing.run import Loop, Probe

COUNTS = (2, 5)
"""Numbers of steps of the runs that are looked at."""


def find_steps(probe: Probe, shape: tuple[int, int, int]) -> tuple[EvenSteps | StepsAsSeen | None, str]:
    """Return what sets a scheduler's steps as the pipeline does, None for their number alone, and what was seen.

    Parameters
    ----------
    shape : (frames, height, width) of the latents.
    """
    runs = {steps: probe.loop(steps=steps, first_step_only=True) for steps in COUNTS}
    tables = {n: {k: v for k, v in r.settings.items() if k != "device" and v is not None} for n, r in runs.items()}
    counts = " and ".join(map(str, COUNTS))
    if all(list(table) == ["num_inference_steps"] for table in tables.values()):
        return None, f"Steps are set by their number, seen with {counts} steps."
    for candidate in (EvenSteps(), EvenSteps(shifted=True)):
        if all(_gives(probe, candidate, shape, steps, run) for steps, run in runs.items()):
            shifted = ", shifted by the number of latent pixels" if candidate.shifted else ""
            return candidate, f"Steps are even sigmas from 1 to 1/n{shifted}, seen with {counts} steps."
    plain = {n: {k: v.tolist() if hasattr(v, "tolist") else v for k, v in t.items()} for n, t in tables.items()}
    return StepsAsSeen(plain), (
        f"How the pipeline chooses its noise levels is not known: they are declared as seen for {counts} steps, and no "
        "other number of steps can be planned. Write set_steps by hand."
    )


def _gives(probe: Probe, candidate: EvenSteps, shape: tuple[int, int, int], steps: int, run: Loop) -> bool:
    """Tell whether a scheduler like the pipeline's has the run's timesteps after ``candidate``."""
    scheduler = type(probe.pipe.scheduler).from_config(probe.pipe.scheduler.config)
    try:
        candidate(scheduler, steps, shape)
    except (TypeError, ValueError, AttributeError):
        return False
    found = [float(t) for t in scheduler.timesteps]
    return len(found) == len(run.timesteps) and all(
        abs(a - b) < 1e-3 for a, b in zip(found, run.timesteps, strict=True)
    )
