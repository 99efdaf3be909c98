"""Mergeable statistics: counts, sums and squared deviations that give the same answer however the data is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import ArrayLike, NDArray

Key = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Count, sum and sum of squared deviations per cell, in float64; a commutative monoid under ``merge``.

    Attributes
    ----------
    n : values that went in.
    missing : values that were not finite, left out of everything but this count.
    total : sum of the values.
    m2 : sum of squared deviations from the mean.
    """

    n: NDArray[np.int64]
    missing: NDArray[np.int64]
    total: NDArray[np.float64]
    m2: NDArray[np.float64]

    @classmethod
    def zero(cls, shape: tuple[int, ...]) -> Moments:
        """Return the state of no data at all, the neutral element of ``merge``."""
        return cls(
            n=np.zeros(shape, np.int64),
            missing=np.zeros(shape, np.int64),
            total=np.zeros(shape),
            m2=np.zeros(shape),
        )

    @classmethod
    def of(cls, values: ArrayLike) -> Moments:
        """Summarise ``values`` over its first axis."""
        array = np.asarray(values, dtype=np.float64)
        finite = np.isfinite(array)
        n = finite.sum(axis=0, dtype=np.int64)
        kept = np.where(finite, array, 0.0)
        total = kept.sum(axis=0)
        deviation = np.where(finite, kept - total / np.maximum(n, 1), 0.0)
        return cls(n=n, missing=len(array) - n, total=total, m2=np.square(deviation).sum(axis=0))

    def merge(self, other: Moments) -> Moments:
        """Return the state of both data sets together (Chan, Golub and LeVeque 1979)."""
        n = self.n + other.n
        both = (self.n > 0) & (other.n > 0)
        shift = np.where(both, other._safe_mean() - self._safe_mean(), 0.0)
        return Moments(
            n=n,
            missing=self.missing + other.missing,
            total=self.total + other.total,
            m2=self.m2 + other.m2 + np.square(shift) * (self.n * other.n / np.maximum(n, 1)),
        )

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean of the finite values, NaN where there are none."""
        return np.where(self.n > 0, self._safe_mean(), np.nan)

    @property
    def sd(self) -> NDArray[np.float64]:
        """Standard deviation with n - 1, NaN below two values."""
        return np.where(self.n > 1, np.sqrt(self.m2 / np.maximum(self.n - 1, 1)), np.nan)

    def row(self, index: int) -> Moments:
        """Return the state at one position of the first cell axis."""
        return Moments(n=self.n[index], missing=self.missing[index], total=self.total[index], m2=self.m2[index])

    def _safe_mean(self) -> NDArray[np.float64]:
        return np.asarray(self.total / np.maximum(self.n, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedMoments:
    """One ``Moments`` per group, for example per prompt: row i of the state belongs to ``keys[i]``.

    Only groups that occur are held, so the state of a chunk is as small as the chunk. Keys are sorted, so the
    order of merging leaves no trace.
    """

    keys: tuple[Key, ...]
    moments: Moments

    @classmethod
    def of(cls, values: ArrayLike, keys: Sequence[Key]) -> GroupedMoments:
        """Summarise the rows of ``values`` that share a key.

        Raises
        ------
        ValueError : rows and keys differ in number.
        """
        array = np.asarray(values)
        if len(array) != len(keys):
            raise ValueError(f"rows and keys differ in number: {len(array)} and {len(keys)}. Give one key per row.")
        unique = tuple(sorted(set(keys)))
        members = {key: [i for i, k in enumerate(keys) if k == key] for key in unique}
        states = [Moments.of(array[members[key]]) for key in unique]
        return cls(keys=unique, moments=_stack(states, array.shape[1:]))

    def merge(self, other: GroupedMoments) -> GroupedMoments:
        """Return the state of both data sets; groups that occur in both are merged."""
        keys = tuple(sorted({*self.keys, *other.keys}))
        return GroupedMoments(keys=keys, moments=self._spread(keys).merge(other._spread(keys)))

    def regroup(self, key: Callable[[Key], Key | None]) -> GroupedMoments:
        """Merge groups that ``key`` maps to the same new key; groups mapped to None are left out."""
        renamed = [key(k) for k in self.keys]
        unique = tuple(sorted({k for k in renamed if k is not None}))
        shape = self.moments.n.shape[1:]
        states = []
        for wanted in unique:
            rows = [self.moments.row(i) for i, k in enumerate(renamed) if k == wanted]
            states.append(reduce(Moments.merge, rows))
        return GroupedMoments(keys=unique, moments=_stack(states, shape))

    def _spread(self, keys: tuple[Key, ...]) -> Moments:
        out = Moments.zero((len(keys), *self.moments.n.shape[1:]))
        where = {k: i for i, k in enumerate(keys)}
        rows = [where[k] for k in self.keys]
        for target, source in (
            (out.n, self.moments.n),
            (out.missing, self.moments.missing),
            (out.total, self.moments.total),
            (out.m2, self.moments.m2),
        ):
            target[rows] = source
        return out


def _stack(states: Sequence[Moments], shape: tuple[int, ...]) -> Moments:
    if not states:
        return Moments.zero((0, *shape))
    return Moments(
        n=np.stack([s.n for s in states]),
        missing=np.stack([s.missing for s in states]),
        total=np.stack([s.total for s in states]),
        m2=np.stack([s.m2 for s in states]),
    )
