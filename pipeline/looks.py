"""The level of an interval at one look, so high that it holds at the look where a cell stops."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

POINTS = 2**14
"""Of the numerical expectation; more change the third digit of 1 - level by nothing."""
SLACK = 0.99
"""Taken of 1 - level, which covers the error of the expectation many times."""


def union_level(level: float, looks: int) -> float:
    """Return the level at which intervals of all looks hold together, whatever stops a cell and however they depend."""
    return 1 - (1 - level) / looks


def spread_level(level: float, prompts: Sequence[Sequence[int]]) -> float:
    """Return the level at which t intervals hold at the look where something stops that knows of spreads alone.

    Of normal values the mean at a look is independent of all deviations until then. So, for a rule that sees nothing
    else, the interval at the look k where a cell stops holds its mean with probability E[2 Phi(t_k s_k / sigma) - 1];
    at least E[min over k of it], whatever the rule. The squared deviations of looks are sums of independent
    chi-squared steps in units of sigma, so this is a number without an unknown, and the level solves it.

    Parameters
    ----------
    prompts : how many there are at each look; one such list for each pair kind that differs.
    """
    return max(_spread_level(level, tuple(ends)) for ends in prompts)


@functools.lru_cache(maxsize=256)
def _spread_level(level: float, ends: tuple[int, ...]) -> float:
    if len(ends) == 1:
        return level
    spreads, low, high = _spreads(ends), (1 - level) / len(ends), 1 - level
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if _least_coverage(middle, ends, spreads) >= level else (low, middle)
    # Rounded, as a level is kept in the store and must be the same wherever it is computed.
    return round(1 - SLACK * low, 5)


def _least_coverage(miss: float, ends: tuple[int, ...], spreads: NDArray[np.float64]) -> float:
    """Return E[min over k of (2 Phi(t_k s_k / sigma) - 1)], the t_k being those of intervals of level 1 - miss."""
    from scipy.special import erf, stdtrit

    reach = stdtrit(np.array(ends, dtype=np.float64) - 1, 1 - miss / 2)
    return float(erf((reach[:, None] * spreads).min(axis=0) / math.sqrt(2)).mean())


def _spreads(ends: tuple[int, ...]) -> NDArray[np.float64]:
    """Return s_k / sigma at every look, (looks, points), over evenly spread points instead of random ones."""
    from scipy.special import gammaincinv

    steps = np.diff([1, *ends])
    # The additive recurrence of the root of x^(d+1) = x + 1, which fills d dimensions evenly (Roberts 2018).
    root = 2.0
    for _ in range(60):
        root = (1 + root) ** (1 / (len(ends) + 1))
    shares = (0.5 + np.arange(1, POINTS + 1) * root ** -np.arange(1.0, len(ends) + 1)[:, None]) % 1
    squares = np.cumsum(2 * gammaincinv(steps[:, None] / 2, shares), axis=0)
    return np.asarray(np.sqrt(squares / (np.array(ends)[:, None] - 1)), dtype=np.float64)
