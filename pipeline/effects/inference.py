"""Intervals and p-values over experimental units: a bootstrap as one matrix product, sign flips, BH-FDR and max-T.

Every function takes one row per experimental unit (a prompt) and one column per cell. NaN marks a unit without a
value in a cell; it gets weight 0 there.

Caveats
-------
The percentile bootstrap covers less than its nominal level when there are few units: with 8 prompts a 95 % interval
of a mean covers about 88 to 90 %, with 20 about 93 %. It cannot see beyond the prompts it was given. A ratio
(recovery) has heavy tails when the gap between the two runs is small against its own spread; look at the interval
of the gap first. The sign-flip test assumes that an effect of zero is symmetric around zero, and with n units its
smallest possible p is 2 ** (1 - n): below six prompts nothing can reach 0.05. Benjamini-Hochberg multiplies that
floor by the size of the map, so with few prompts a large map has no FDR-significant cell however strong its effects;
the max-T p-value pays no such price.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SMALLEST_GAP = 1e-6
"""Mean difference between two runs below which a recovery is undefined."""

_ROUNDING = 1e-9
"""Slack of comparisons, so that a pattern counts as at least as extreme as itself whatever the rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate per cell with the bounds of its interval, NaN where undefined."""

    value: Floats
    low: Floats
    high: Floats


def resample_counts(units: int, *, replicates: int, seed: int) -> Floats:
    """Draw how often each unit occurs in each bootstrap replicate, (replicates, units).

    Raises
    ------
    ValueError : there is no unit or no replicate to draw.
    """
    if units < 1 or replicates < 1:
        raise ValueError(f"nothing to resample: {units} units, {replicates} replicates. Both must be at least 1.")
    draws = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=replicates)
    return draws.astype(np.float64)


def bootstrap_mean(values: Floats, counts: Floats, *, level: float) -> Interval:
    """Estimate the mean over units with a percentile interval.

    Parameters
    ----------
    values : (units, cells).
    counts : from ``resample_counts``; sharing it between cells keeps their dependence.
    level : confidence level, between 0 and 1.
    """
    return _ratio(values, np.isfinite(values).astype(np.float64), counts, level, smallest=0.0)


def bootstrap_ratio(numerator: Floats, denominator: Floats, counts: Floats, *, level: float) -> Interval:
    """Estimate the ratio of means over units, numerator and denominator resampled together.

    A unit counts only where both are finite. NaN where the mean denominator is smaller than ``SMALLEST_GAP``,
    in the estimate as in single replicates.
    """
    both = np.isfinite(numerator) & np.isfinite(denominator)
    top = np.where(both, numerator, np.nan)
    bottom = np.where(both, denominator, 0.0)
    smallest = SMALLEST_GAP * np.maximum(both.sum(axis=0), 1)
    return _ratio(top, bottom, counts, level, smallest=smallest)


def _ratio(
    numerator: Floats, denominator: Floats, counts: Floats, level: float, *, smallest: float | Floats
) -> Interval:
    finite = np.isfinite(numerator)
    top, n = np.where(finite, numerator, 0.0), finite.sum(axis=0)
    value = _divide(top.sum(axis=0), denominator.sum(axis=0), smallest)
    value = np.where(n > 0, value, np.nan)
    draws = _divide(counts @ top, counts @ denominator, smallest)
    low, high = _quantiles(draws, level)
    # One unit resamples to itself: an interval of width zero would claim certainty.
    known = np.isfinite(value) & (n > 1)
    return Interval(value=value, low=np.where(known, low, np.nan), high=np.where(known, high, np.nan))


def _divide(top: Floats, bottom: Floats, smallest: float | Floats) -> Floats:
    usable = np.abs(bottom) > smallest
    out = np.full(top.shape, np.nan)
    np.divide(top, bottom, out=out, where=usable)
    return out


def _quantiles(draws: Floats, level: float) -> tuple[Floats, Floats]:
    tails = [(1 - level) / 2, (1 + level) / 2]
    whole = np.isfinite(draws).all(axis=0)
    # nanquantile is about a thousand times slower than quantile, so only incomplete columns take it.
    low, high = np.quantile(draws, tails, axis=0)
    for column in np.flatnonzero(~whole):
        kept = draws[:, column][np.isfinite(draws[:, column])]
        low[column], high[column] = np.quantile(kept, tails) if kept.size else (np.nan, np.nan)
    return low, high


@dataclass(frozen=True, slots=True, kw_only=True)
class SignFlips:
    """A sign-flip test of zero mean per cell, in a form that joins over blocks of cells.

    The statistic is |sum of values| / sqrt(sum of squares), which has variance 1 under the null whatever the scale
    and the number of units of a cell, and grows with |t|.

    Attributes
    ----------
    statistic : per cell, NaN without a value.
    p : per cell, two-sided, not adjusted.
    largest : per sign pattern, the largest statistic of any cell.
    """

    statistic: Floats
    p: Floats
    largest: Floats


def sign_flips(values: Floats, *, replicates: int, seed: int) -> SignFlips:
    """Flip the signs of whole units: all patterns if there are at most ``replicates``, else that many random ones.

    The unflipped pattern is always among them, so no p-value is 0.
    """
    finite = np.isfinite(values)
    kept = np.where(finite, values, 0.0)
    scale = np.sqrt(np.square(kept).sum(axis=0))
    signs = _sign_patterns(len(values), replicates, seed)
    flipped = np.abs(signs @ kept)
    np.divide(flipped, scale, out=flipped, where=scale > 0)
    observed = flipped[0]
    p = (flipped >= observed - _ROUNDING).mean(axis=0)
    known = finite.any(axis=0)
    largest = flipped.max(axis=1, initial=0.0)
    return SignFlips(statistic=np.where(known, observed, np.nan), p=np.where(known, p, np.nan), largest=largest)


def max_t(statistic: Floats, largest: Floats) -> Floats:
    """Adjust for the family-wise error rate: how often does any cell, flipped, reach this cell's statistic?

    Parameters
    ----------
    statistic : per cell, from ``sign_flips``.
    largest : per pattern, the maximum of ``SignFlips.largest`` over all blocks of the map.
    """
    ordered = np.sort(largest)
    below = np.searchsorted(ordered, np.nan_to_num(statistic) - _ROUNDING, side="left")
    return np.where(np.isfinite(statistic), (len(ordered) - below) / len(ordered), np.nan)


def _sign_patterns(units: int, replicates: int, seed: int) -> Floats:
    if 2**units <= replicates:
        bits = (np.arange(2**units)[:, None] >> np.arange(units)) & 1
    else:
        bits = np.random.default_rng(seed).integers(0, 2, size=(replicates + 1, units))
        bits[0] = 0
    return np.where(bits, -1.0, 1.0)


def benjamini_hochberg(p: Floats) -> Floats:
    """Adjust p-values for the false discovery rate over all finite entries; NaN stays NaN.

    Controls the rate under independence and positive dependence, the usual case on a smooth map.
    """
    flat = np.asarray(p, dtype=np.float64).ravel()
    out = np.full(flat.shape, np.nan)
    known = np.flatnonzero(np.isfinite(flat))
    if known.size:
        order = known[np.argsort(flat[known], kind="stable")]
        scaled = flat[order] * known.size / np.arange(1, known.size + 1)
        out[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return out.reshape(np.shape(p))
