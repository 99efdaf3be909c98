"""Effects of experiments in rounds: intervals and tests that hold although cells were looked at and stopped."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.precision import Floats, describe_interval, level_at_look, mean_and_error, mean_bounds, ratio_bounds
from pipeline.wording import shown

MOST, MOST_LOOKS = 10**9, 1000
"""Prompts and looks that a description may name, which may come from anywhere."""

P_VALUE = (
    "two-sided t test over {unit}s of difference = 0, times the {looks} looks (union bound): at most alpha only where "
    "the interval of level 1 - alpha excludes 0; where all differences are equal, the smallest p of a sign-flip test "
    "instead"
)
CAVEAT = (
    "cells rest on different numbers of {unit}s. Where few {unit}s have a skewed difference, or one of few values, "
    "intervals cover less than their level and small p-values are too small"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Looks:
    """How an experiment was looked at: which effect stopped its cells, and how many prompts there were at each look."""

    by: str
    prompts: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """How many looks there are."""
        return len(self.prompts[0])

    def level(self, unit: str, level: float) -> float:
        """Return the level of an interval at one look; for other units than prompts by the union bound."""
        return level_at_look(self.by if unit == "prompt" else "any", level, self.prompts)


def looks_of(attrs: Mapping[Any, Any]) -> Looks | None:
    """Return how an experiment is looked at, from its attributes; None if it is not computed in rounds.

    Raises
    ------
    ValueError : they do not say so.
    """
    if "precision" not in attrs:
        return None
    try:
        about = json.loads(str(attrs["precision"]))
        prompts = tuple(tuple(int(n) for n in ends) for ends in about["prompts"])
        looks = Looks(by=str(about["by"]), prompts=prompts)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"the attribute precision does not say what looks there are: {error}") from error
    counts = [n for ends in prompts for n in ends]
    steps = [b - a for ends in prompts for a, b in itertools.pairwise((1, *ends))]
    uneven = len({len(ends) for ends in prompts}) > 1
    if not counts or uneven or min(steps) < 1 or max(counts) > MOST or len(prompts[0]) > MOST_LOOKS:
        raise ValueError(f"the attribute precision names looks that cannot be: {shown(about['prompts'])}.")
    return looks


def describe(unit: str, level: float, looks: Looks) -> dict[str, str | int | float]:
    """Return the attributes that say how these effects were estimated."""
    p, at_look = P_VALUE.format(unit=unit, looks=looks.count), looks.level(unit, level)
    by = looks.by if unit == "prompt" else "any"
    return {
        "looks": looks.count,
        "level_at_look": at_look,
        "method_interval": describe_interval(unit, by, level, at_look, looks.count)
        + "; of recoveries, the set of ratios that such an interval does not exclude (Fieller)",
        "method_interval_gap": f"percentile bootstrap over {unit}s",
        "method_p_fdr": f"{p}; adjusted by Benjamini-Hochberg over all cells of one pair kind and metric",
        "method_p_fwer": f"{p}; adjusted by Holm over all cells of one pair kind and metric",
        "caveat": CAVEAT.format(unit=unit),
    }


def estimate(
    difference: Floats, numerator: Floats | None, denominator: Floats | None, *, at_look: float, looks: int
) -> dict[str, NDArray[Any]]:
    """Estimate the effects of cells, (units, cells), each over the units that it was computed for.

    Parameters
    ----------
    at_look : level of the interval at one look. looks : how many there are.
    """
    mean = mean_bounds(difference, level=at_look)
    found: dict[str, NDArray[Any]] = {
        "difference": mean.value,
        "difference_low": mean.low,
        "difference_high": mean.high,
        "p": p_values(difference, looks=looks),
        "n": mean.n,
    }
    if numerator is not None and denominator is not None:
        ratio = ratio_bounds(numerator, denominator, level=at_look)
        found |= {"recovery": ratio.value, "recovery_low": ratio.low, "recovery_high": ratio.high}
    return found


def p_values(difference: Floats, *, looks: int) -> Floats:
    """Return the p-value of each cell, (units, cells), that holds at every look; NaN below two units.

    Of equal differences the t test says 0, whatever their number; a test of signs says 2 ** (1 - n).
    """
    from scipy.special import stdtr

    n, mean, error = mean_and_error(difference)
    equal = error == 0
    p = 2 * stdtr(np.maximum(n - 1.0, 1.0), -np.abs(mean) / np.where(equal, 1.0, error))
    p = np.where(equal, np.where(mean == 0, 1.0, 2.0 ** (1 - n)), p)
    return np.where(n > 1, np.minimum(1.0, looks * p), np.nan)


def holm(p: Floats) -> Floats:
    """Adjust p-values for the family-wise error rate over all finite entries, whatever their dependence."""
    flat = np.asarray(p, dtype=np.float64).ravel()
    out = np.full(flat.shape, np.nan)
    known = np.flatnonzero(np.isfinite(flat))
    order = known[np.argsort(flat[known], kind="stable")]
    out[order] = np.minimum(np.maximum.accumulate(flat[order] * np.arange(known.size, 0, -1)), 1.0)
    return out.reshape(np.shape(p))
