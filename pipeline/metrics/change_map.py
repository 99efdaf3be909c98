"""Where in frames and space an intervention changed the final latents: one number a latent position."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.fields import FIELD_DIMS
from pipeline.metrics.metric import Metric, MetricInput, register_metric


def _change_map(given: MetricInput) -> NDArray[np.float64]:
    # Row by row: a batch in float64 would be the largest array of a replica's process.
    squares = (
        np.square(row.astype(np.float64) - given.unchanged(i)).mean(axis=0) for i, row in enumerate(given.latents)
    )
    return np.sqrt(np.stack(list(squares)))


change_map = register_metric(
    Metric(
        name="change_map",
        long_name="change of each latent position",
        description="Root mean square difference over channels, at every position of the final latents, from those of "
        "the recorded run that the intervention changes, in units of the latents; 0 for a recorded run itself.",
        tasks=(),
        reads_video=False,
        dims=FIELD_DIMS,
        compute=_change_map,
    )
)
