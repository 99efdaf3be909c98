"""A short calibration: what one row of a denoiser forward costs on this machine, overheads included."""

from __future__ import annotations

import time

from pipeline.models import ModelError, load_pipeline
from pipeline.plan import Plan
from pipeline.replica import Computer


def seconds_per_row_forward(plan: Plan) -> float:
    """Time one batch of the first experiment, after one to warm up.

    Returns
    -------
    Seconds of one replica for one row of one denoiser forward.

    Raises
    ------
    ModelError : the pipeline refuses its call.
    """
    import torch

    torch.set_num_threads(plan.config.engine.threads)
    model = plan.config.model
    pipe = load_pipeline(plan.model, dtype=model.dtype, device=model.device, device_map=model.device_map)
    computer = Computer(plan, pipe)
    try:
        record = computer.record(0)
    except ValueError as error:
        # The pipeline's own checks of its call, which no plan can know.
        raise ModelError(f"model {plan.model.id!r} refuses this run: {error}") from error
    grid = plan.grids[0]
    rows = list(grid.interventions(range(min(grid.shape[0], plan.window(grid))) if grid.shape else None))
    batches = plan.batches(rows)
    batch = [rows[i] for i in batches[len(batches) // 2]]
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        computer.engine.fork(record, batch)
        seconds.append(time.perf_counter() - started)
    return min(seconds) / max(1, plan.batch_forwards(batch))
