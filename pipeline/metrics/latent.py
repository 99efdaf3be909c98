"""Metrics of the final latents, for any task and model: they need no decoder and no truth."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics.metric import Metric, MetricInput, projection, register_metric


def _clean_projection(given: MetricInput) -> NDArray[np.float64]:
    return projection(given.latents, given.corrupted, given.clean)


def _latent_distance(given: MetricInput) -> NDArray[np.float64]:
    difference = given.latents.astype(np.float64) - given.clean
    result: NDArray[np.float64] = np.sqrt((difference**2).reshape(len(difference), -1).mean(axis=1))
    return result


clean_projection = register_metric(
    Metric(
        name="clean_projection",
        long_name="position from corrupted to clean run",
        description="Projection of the final latents onto the segment from the recorded corrupted run (0) to the "
        "recorded clean run (1): <x - b, a - b> / |a - b|^2; NaN if the two runs are equal.",
        tasks=(),
        reads_video=False,
        compute=_clean_projection,
    )
)

latent_distance = register_metric(
    Metric(
        name="latent_distance",
        long_name="distance from the clean run",
        description="Root mean square difference between the final latents and those of the recorded clean run, in "
        "units of the latents.",
        tasks=(),
        reads_video=False,
        compute=_latent_distance,
    )
)
