"""Mergeable moments of large arrays, updated in place, cut by cut so that the work stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Finite = NDArray[np.bool_] | None
"""Which values are finite; None if all of them are."""

CUT = 2**14
"""Values of a cut: its five arrays in float64 fit a second-level cache."""
Cut = tuple[slice, slice]


def cuts(cells: int, positions: int) -> Iterator[Cut]:
    """Cut an array (cells, positions) into pieces of at most ``CUT`` values, each value in one of them."""
    rows, width = max(1, CUT // max(1, positions)), min(positions, CUT)
    for start in range(0, cells, rows):
        for left in range(0, positions, max(1, width)):
            yield slice(start, min(start + rows, cells)), slice(left, min(left + width, positions))


def all_finite(values: NDArray[np.floating]) -> bool:
    """Whether a large array surely holds finite numbers only; a sum that overflows says no as well."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(values.sum(dtype=np.float64)))


def difference(values: NDArray[np.floating], reference: NDArray[np.float32] | None, cut: Cut) -> Floats:
    """Return values minus reference in one cut, as float64 of its own.

    Parameters
    ----------
    reference : (cells, positions), or (1, positions) for all cells alike; None for zero.
    """
    if reference is None:
        return values[cut].astype(np.float64)
    rows = cut[0] if len(reference) > 1 else slice(None)
    return np.subtract(values[cut], reference[rows, cut[1]], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class FieldMoments:
    """Count, mean and sum of squared deviations at every position of every cell, each (cells, positions)."""

    n: Floats
    mean: Floats
    m2: Floats

    @classmethod
    def zero(cls, shape: tuple[int, ...]) -> FieldMoments:
        """Return the state of no data at all."""
        return cls(np.zeros(shape), np.zeros(shape), np.zeros(shape))

    def take(self, values: NDArray[np.floating], reference: NDArray[np.float32] | None, finite: Finite) -> None:
        """Take in the differences of one experimental unit (Welford 1962); what is not finite leaves no trace."""
        for cut in cuts(*self.n.shape):
            n, mean, m2 = self.n[cut], self.mean[cut], self.m2[cut]
            found = difference(values, reference, cut)
            if finite is None:
                n += 1.0
                shift = found - mean
                mean += shift / n
            else:
                n += finite[cut]
                np.copyto(found, mean, where=~finite[cut])
                shift = found - mean
                mean += shift / np.maximum(n, 1.0)
            found -= mean
            found *= shift
            m2 += found

    def merge(self, other: FieldMoments) -> FieldMoments:
        """Take in another state of other units (Chan, Golub and LeVeque 1979) and return this one, changed in place."""
        for cut in cuts(*self.n.shape):
            n, mean, m2, more = self.n[cut], self.mean[cut], self.m2[cut], other.n[cut]
            whole = np.maximum(n + more, 1.0)
            shift = other.mean[cut] - mean
            # Where one of the two has no value its mean of zero must not count.
            share = np.where(n > 0, more / whole, (more > 0).astype(np.float64))
            m2 += other.m2[cut] + np.square(shift) * (n * more / whole)
            mean += shift * share
            n += more
        return self


@dataclass(frozen=True, slots=True)
class UnitMean:
    """Sum and count over the samples of one experimental unit, each (cells, positions)."""

    total: Floats
    count: Floats

    @classmethod
    def zero(cls, shape: tuple[int, ...]) -> UnitMean:
        """Return the sum of no samples."""
        return cls(np.zeros(shape), np.zeros(shape))

    def add(self, values: NDArray[np.floating], reference: NDArray[np.float32] | None, finite: Finite) -> None:
        """Add the differences of one sample where they are finite."""
        for cut in cuts(*self.total.shape):
            found = difference(values, reference, cut)
            if finite is not None:
                found[~finite[cut]] = 0.0
            self.total[cut] += found
            self.count[cut] += 1.0 if finite is None else finite[cut]

    def into(self, moments: FieldMoments) -> None:
        """Take the mean over the samples into moments over units."""
        finite = self.count > 0
        np.divide(self.total, self.count, out=self.total, where=finite)
        moments.take(self.total, None, None if finite.all() else finite)
