"""What a metric is: a named function of decoded videos and final latents, a number or a field a row, found by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from interventions.sites import RunName
from pipeline.fields import field_shape, require_field_dims
from pipeline.samples import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricInput:
    """A batch of rows of one sample, and the two recorded runs they are compared with.

    Attributes
    ----------
    video : decoded by the task, (rows, frames, y, x, 3), RGB 0 to 255; without frames if no metric reads it.
    latents : (rows, C, F, H, W).
    clean, corrupted : final latents of the recorded runs, (C, F, H, W).
    sample : the problem.
    recipients : of each row the run that it changed; of a recorded run, itself.
    """

    video: NDArray[np.float32]
    latents: NDArray[np.float32]
    clean: NDArray[np.float32]
    corrupted: NDArray[np.float32]
    sample: Sample
    recipients: tuple[RunName, ...] = ()

    def unchanged(self, row: int) -> NDArray[np.float32]:
        """Return the final latents of the recorded run that a row changed, (C, F, H, W).

        Raises
        ------
        ValueError : the rows were given without the runs that they changed.
        """
        if len(self.recipients) != len(self.latents):
            raise ValueError(
                f"{len(self.latents)} rows with {len(self.recipients)} recipients. Name the run that each row changed."
            )
        return self.clean if self.recipients[row] == "clean" else self.corrupted


Compute = Callable[[MetricInput], NDArray[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A registered metric.

    Attributes
    ----------
    name : of the store's variable; in configs too, but for a function of the user's own. long_name : label of axes and
        colour bars.
    description : the definition in one or two sentences, kept in the store's attributes.
    tasks : names of the tasks it is defined for; empty for any task.
    compute : one value a row, or one field; a registered metric is NaN for rows that hold a non-finite number.
    reads_video : whether it reads ``video``; a sweep decodes only if one of its metrics does.
    floor : value for a video that does nothing (a static first frame), None where that has no meaning.
    source : sha256 of the source of a function of the user's own, empty for the metrics of this package.
    dims : of a field, from ``FIELD_DIMS``; none for one number a row.
    """

    name: str
    long_name: str
    description: str
    tasks: tuple[str, ...]
    compute: Compute
    reads_video: bool = True
    floor: Callable[[Sample], float] | None = None
    source: str = ""
    dims: tuple[str, ...] = ()

    def defined_for(self, task: str) -> bool:
        """Whether the metric can be computed on samples of a task."""
        return not self.tasks or task in self.tasks


METRICS: dict[str, Metric] = {}
"""Every metric that a config can name, by the name it uses."""


def register_metric(metric: Metric) -> Metric:
    """Register a metric under its name and return it as registered: guarded against non-finite rows.

    Raises
    ------
    ValueError : the name is taken, or there is no field of such dimensions.
    """
    require_field_dims(metric.name, metric.dims)
    if metric.name in METRICS:
        raise ValueError(f"metric {metric.name!r} is registered twice. Give one of the two another name.")
    METRICS[metric.name] = guarded(metric)
    return METRICS[metric.name]


def guarded(metric: Metric) -> Metric:
    """Return a metric that is NaN for rows that hold a non-finite number, and computed for the others alone."""
    return replace(metric, compute=_finite_rows_only(metric))


def no_video(rows: int) -> NDArray[np.float32]:
    """Return videos of no frames, in place of those that no metric reads."""
    return np.zeros((rows, 0, 0, 0, 3), dtype=np.float32)


def _finite_rows_only(metric: Metric) -> Compute:
    # A NaN pixel has a nearest palette colour and a NaN video a last frame: without the guard, a run that
    # overflowed would be stored as a plain failure to solve.
    def compute_finite(given: MetricInput) -> NDArray[np.float64]:
        rows = len(given.video)
        finite = _finite(given.video) & _finite(given.latents)
        field = field_shape(metric.dims, given.latents.shape[2:]) if metric.dims else ()
        values = np.full((rows, *field), np.nan)
        if finite.any():
            computed = metric.compute(_rows_of(given, finite))
            if computed.shape != (int(finite.sum()), *field):
                raise ValueError(
                    f"metric {metric.name!r} returned shape {computed.shape} for {int(finite.sum())} rows. "
                    f"Return {f'a field of shape {field}' if metric.dims else 'one value'} a row."
                )
            values[finite] = computed
        return values

    return compute_finite


def _rows_of(given: MetricInput, chosen: NDArray[np.bool_]) -> MetricInput:
    return replace(
        given,
        video=given.video[chosen],
        latents=given.latents[chosen],
        recipients=tuple(compress(given.recipients, chosen)),
    )


def _finite(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    return np.array([np.isfinite(row).all() for row in values], dtype=np.bool_)


def projection(
    values: NDArray[np.floating], zero: NDArray[np.floating], one: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Return where rows lie along the segment from ``zero`` to ``one``: <x - b, a - b> / |a - b|^2.

    0 at ``zero``, 1 at ``one``, outside [0, 1] beyond the ends; NaN if the ends coincide.
    """
    direction = (one.astype(np.float64) - zero).ravel()
    squared = float(direction @ direction)
    if squared == 0:
        return np.full(len(values), np.nan)
    offsets = (values.astype(np.float64) - zero).reshape(len(values), -1)
    result: NDArray[np.float64] = offsets @ direction / squared
    return result
