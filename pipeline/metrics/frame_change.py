"""Which frames an intervention changed: one number a latent frame."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics.metric import Metric, MetricInput, register_metric


def _frame_change(given: MetricInput) -> NDArray[np.float64]:
    # Row by row: a batch in float64 would be the largest array of a replica's process.
    squares = (
        np.square(row.astype(np.float64) - given.unchanged(i)).mean(axis=(0, 2, 3))
        for i, row in enumerate(given.latents)
    )
    return np.sqrt(np.stack(list(squares)))


frame_change = register_metric(
    Metric(
        name="frame_change",
        long_name="change of each latent frame",
        description="Root mean square difference over channels and space, in every frame of the final latents, from "
        "those of the recorded run that the intervention changes, in units of the latents; 0 for a recorded run "
        "itself.",
        tasks=(),
        reads_video=False,
        dims=("latent_frame",),
        compute=_frame_change,
    )
)
