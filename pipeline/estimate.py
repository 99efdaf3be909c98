"""What ``stepscope plan`` says of rows and seconds: measured on this machine, or what is known without measuring."""

from __future__ import annotations

import os
from typing import Any

from pipeline.batching import known_rows
from pipeline.config import AUTO
from pipeline.forecast import forecast
from pipeline.hardware import hardware_of, kind_of
from pipeline.plan import Plan
from pipeline.rehearsal import rehearse
from pipeline.start_cost import start_seconds


def known(plan: Plan) -> tuple[Plan, dict[str, Any]]:
    """Return a plan with the rows of one forward that it would have here, and that number, without loading a model.

    The word "auto" stands for a number that nobody knows, as this model was never measured here.
    """
    if plan.config.engine.batch_rows != AUTO:
        return plan, {"batch_rows": plan.rows}
    rows = known_rows(plan, hardware_of(kind_of(plan.config.model.device)))
    return (plan, {"batch_rows": AUTO}) if rows is None else (plan.with_rows(rows), {"batch_rows": rows})


def timed(plan: Plan, prepared_s: float) -> tuple[Plan, dict[str, Any]]:
    """Return a plan with the rows of one forward that it would have here, that number, and how long its sweep takes.

    Parameters
    ----------
    prepared_s : that this process took to make the plan; the sweep's driver does that too.

    Raises
    ------
    ModelError : the model cannot be loaded, or refuses its call.
    """
    calibration = rehearse(plan)
    plan = plan.with_rows(calibration.rows)
    starts_ray = plan.config.run.replicas and not os.environ.get("RAY_ADDRESS")
    found = forecast(plan, calibration, overhead_s=prepared_s + (start_seconds() if starts_ray else 0.0))
    return plan, {
        "batch_rows": plan.rows,
        "seconds_per_row_forward": round(found.compute_s / max(1, plan.cost().row_forwards), 6),
        "estimated_seconds": round(found.seconds),
    }
