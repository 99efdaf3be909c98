"""Samples in rounds: which cells of an experiment are known narrowly enough, and what an interval under looks is."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from pipeline.looks import spread_level, union_level
from pipeline.samples import Sample

STOPPED, LOOK, LOOK_SAMPLES = "stopped", "look", "look_samples"
"""Arrays of such an experiment: which cells have stopped by each look, and the problems and samples before it."""
GOES_ON, HAS_STOPPED, NOT_LOOKED = 0, 1, 255
"""Values of ``stopped``; not looked until a round is computed."""
LEAST_FIRST = 6
"""Prompts before the first look: with fewer, planted skewed differences are covered too rarely (docs/precision.md)."""

Floats = NDArray[np.float64]
Key = tuple[str, str]
METHOD = (
    "Student t over {unit}s, at each of {looks} looks that were fixed beforehand at level {look:g}, so high that at "
    "whatever look a cell stops, its interval holds the mean with probability {level:g} at least: {why}. Assumes that "
    "means over {unit}s are as those of normal values. Valid at the looks alone, so once no unit is pending"
)
WHY = {
    "spread": "cells stop for their spread, and the mean of normal values at a look is independent of all spreads "
    "until then",
    "union": "the looks share what may be missed (union bound)",
}


def describe_interval(unit: str, by: str, level: float, at_look: float, looks: int) -> str:
    """Say in words what an interval of an experiment in rounds is."""
    why = WHY["spread" if by == "difference" else "union"]
    return METHOD.format(unit=unit, level=level, look=at_look, looks=looks, why=why.format(unit=unit))


class Precision(BaseModel):
    """How precisely the effects of an experiment are wanted.

    Fields
    ------
    half_width : of the interval of the effect; a cell that is as narrow is not computed for later samples.
    metric : whose effect. by : which effect. level : of the interval.
    first : prompts of each pair kind before the first look. growth : problems at a look over those at the one before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    half_width: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    metric: str
    by: Literal["difference", "recovery"] = "difference"
    level: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    first: Annotated[int, Field(ge=LEAST_FIRST)] = 8
    growth: Annotated[float, Field(ge=1.1, le=100)] = 1.5


class NoRoundsError(ValueError):
    """The samples of a task cannot be computed in rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """Where the rounds of an experiment end, a function of its settings and the samples.

    Attributes
    ----------
    problems, samples : how many there are by the end of each round; the last one ends with all of them.
    prompts : the prompts by then, of all pair kinds together and of each; every list once.
    """

    problems: tuple[int, ...]
    samples: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, settings: Precision, samples: Sequence[Sample]) -> Rounds:
        """Cut the samples into rounds of whole problems.

        Raises
        ------
        NoRoundsError : no cell could stop before the last problem, or the samples of a problem lie apart.
        """
        ends = _ends(samples)
        first = _enough(settings.first, samples)
        if first is None or first >= len(ends):
            raise NoRoundsError(
                f"no cell could stop: the first look is at {settings.first} prompts of each pair kind, and the task "
                f"has {len(ends)} problems. Give it more problems, or leave precision out"
            )
        problems = [first]
        while problems[-1] < len(ends):
            # Rounded first: 1.1 * 10 is a little more than 11 in binary fractions.
            grown = math.ceil(round(problems[-1] * settings.growth, 6))
            problems.append(min(len(ends), max(problems[-1] + 1, grown)))
        cuts = tuple(ends[p - 1] for p in problems)
        return cls(problems=tuple(problems), samples=cuts, prompts=_prompts(samples, cuts))

    @property
    def looks(self) -> int:
        """How often an interval is looked at: after every round, the last one included."""
        return len(self.problems)

    def level(self, settings: Precision) -> float:
        """Return the level of the interval at one look."""
        return level_at_look(settings.by, settings.level, self.prompts)

    def round_of(self, sample: int) -> int:
        """Return the round that a sample is computed in, from 0 on."""
        return bisect.bisect_right(self.samples, sample)


def _ends(samples: Sequence[Sample]) -> list[int]:
    """Return how many samples there are by the end of each problem."""
    ends: dict[str, int] = {}
    for i, sample in enumerate(samples):
        if sample.prompt in ends and ends[sample.prompt] != i:
            raise NoRoundsError(
                f"samples of problem {sample.prompt} lie apart, and a round is whole problems. Order them by problem"
            )
        ends[sample.prompt] = i + 1
    return list(ends.values())


def _prompts(samples: Sequence[Sample], cuts: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    kinds = [None, *dict.fromkeys(sample.pair for sample in samples)]
    counted = [
        tuple(len({s.prompt for s in samples[:cut] if kind in (None, s.pair)}) for cut in cuts) for kind in kinds
    ]
    return tuple(dict.fromkeys(counted))


def level_at_look(by: str, level: float, prompts: Sequence[Sequence[int]]) -> float:
    """Return the level of the interval at one look, such that the one at which a cell stops is of this level.

    Where it stops for the width of a difference, spreads alone decide; that of a recovery knows of means too.

    Parameters
    ----------
    prompts : see ``Rounds``.
    """
    return spread_level(level, prompts) if by == "difference" else union_level(level, len(prompts[0]))


def _enough(first: int, samples: Sequence[Sample]) -> int | None:
    """Return the number of problems at which every pair kind has so many; None if one of them never has."""
    found: dict[str, set[str]] = {sample.pair: set() for sample in samples}
    problems: set[str] = set()
    for sample in samples:
        problems.add(sample.prompt)
        found[sample.pair].add(sample.prompt)
        if all(len(prompts) >= first for prompts in found.values()):
            return len(problems)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """An estimate of each cell with the bounds of its interval: NaN where undefined, infinite where unbounded.

    Attributes
    ----------
    n : experimental units with a value.
    """

    value: Floats
    low: Floats
    high: Floats
    n: NDArray[np.int64]

    @property
    def half_width(self) -> Floats:
        """Half the distance of the bounds."""
        return np.asarray((self.high - self.low) / 2)


def quantile(n: NDArray[np.int64], *, level: float) -> Floats:
    """Return the quantile of Student's t with n - 1 degrees of freedom that an interval takes."""
    from scipy.special import stdtrit

    degrees = np.maximum(n - 1, 1).astype(np.float64)
    return np.asarray(stdtrit(degrees, (1 + level) / 2), dtype=np.float64)


def mean_bounds(values: Floats, *, level: float) -> Bounds:
    """Return the mean over units with its t interval: a function of each cell's own values.

    Values that are all equal have an interval of no width; fewer than two have none.

    Parameters
    ----------
    values : (units, cells), NaN where a unit has no value.
    """
    n, mean, error = mean_and_error(values)
    reach = quantile(n, level=level) * error
    return Bounds(value=mean, low=mean - reach, high=mean + reach, n=n)


def mean_and_error(values: Floats) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Return count, mean and standard error of each cell, (units, cells); the error is NaN below two units."""
    n, mean, squares = _moments(values)
    error = np.sqrt(squares / np.maximum(n - 1, 1) / np.maximum(n, 1))
    return n, mean, np.where(n > 1, error, np.nan)


def ratio_bounds(numerator: Floats, denominator: Floats, *, level: float) -> Bounds:
    """Return the ratio of means over units with the interval of Fieller (1954).

    It holds the ratios r for which the t interval of numerator - r denominator includes 0. Where the interval of the
    denominator does, no ratio is ruled out, and the bounds are infinite.

    Parameters
    ----------
    numerator, denominator : (units, cells); a unit counts where both are finite.
    """
    both = np.isfinite(numerator) & np.isfinite(denominator)
    top, bottom = np.where(both, numerator, np.nan), np.where(both, denominator, np.nan)
    n, a, aa = _moments(top)
    _, b, bb = _moments(bottom)
    ab = _products(top - a, bottom - b)
    scale = quantile(n, level=level) ** 2 / np.maximum(n - 1, 1) / np.maximum(n, 1)
    square, product, rest = b * b - scale * bb, a * b - scale * ab, a * a - scale * aa
    bounded = (n > 1) & (square > 0)
    divisor = np.where(bounded, square, 1.0)
    root = np.sqrt(np.maximum(product * product - square * rest, 0.0))
    low = np.where(bounded, (product - root) / divisor, np.where(n > 1, -np.inf, np.nan))
    high = np.where(bounded, (product + root) / divisor, np.where(n > 1, np.inf, np.nan))
    value = np.divide(a, b, out=np.full(a.shape, np.nan), where=b != 0)
    return Bounds(value=value, low=low, high=high, n=n)


def _moments(values: Floats) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Return count, mean and squared deviations of each cell, NaN left out."""
    finite = np.isfinite(values)
    n = finite.sum(axis=0, dtype=np.int64)
    mean = np.where(n > 0, _total(np.where(finite, values, 0.0)) / np.maximum(n, 1), np.nan)
    # The mean of equal values may be off in its last digit, and they have no deviation at all.
    low = np.where(finite, values, np.inf).min(axis=0, initial=np.inf)
    equal = low == np.where(finite, values, -np.inf).max(axis=0, initial=-np.inf)
    mean = np.where(equal, low, mean)
    return n, mean, _products(values - mean, values - mean)


def _products(a: Floats, b: Floats) -> Floats:
    return _total(np.where(np.isfinite(a) & np.isfinite(b), a * b, 0.0))


def _total(values: Floats) -> Floats:
    # Row by row: the order in which numpy adds up depends on how many cells lie beside each other.
    total = np.zeros(values.shape[1:])
    for row in values:
        total += row
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Stored values of some cells of an experiment.

    Attributes
    ----------
    values : the metric in the cells, (samples, cells). reference : of the recipient run, the same or (samples, 1).
    clean, corrupted : of the recorded runs, (samples,). keys : pair kind and prompt of each sample.
    """

    values: Floats
    reference: Floats
    clean: Floats
    corrupted: Floats
    keys: Sequence[Key]


def narrow(observed: Observed, settings: Precision, level: float) -> NDArray[np.bool_]:
    """Return which cells have an interval that is narrow enough, in every pair kind and over all of them together.

    A function of each cell's own values. Samples of a prompt are averaged first. A cell is not judged before it has a
    value in ``first`` prompts of each pair kind, so values that are missing never stop it.

    Parameters
    ----------
    level : of the interval at this look; see ``level_at_look``.
    """
    pairs = list(dict.fromkeys(pair for pair, _ in observed.keys))
    found = np.ones(observed.values.shape[1], dtype=np.bool_)
    for pair in [None, *pairs] if len(pairs) > 1 else pairs:
        bounds = _bounds_of(observed, pair, settings.by, level)
        found &= (bounds.n >= settings.first) & (bounds.half_width <= settings.half_width)
    return found


def _bounds_of(observed: Observed, pair: str | None, by: str, level: float) -> Bounds:
    rows = [i for i, key in enumerate(observed.keys) if pair is None or key[0] == pair]
    prompts = [observed.keys[i][1] for i in rows]
    values = observed.values[rows]
    if by == "difference":
        means = prompt_means(values - observed.reference[rows], prompts)
        return mean_bounds(means, level=level)
    above = values - observed.corrupted[rows, None]
    gap = np.broadcast_to((observed.clean - observed.corrupted)[rows, None], above.shape)
    both = np.isfinite(above) & np.isfinite(gap)
    return ratio_bounds(
        prompt_means(np.where(both, above, np.nan), prompts),
        prompt_means(np.where(both, gap, np.nan), prompts),
        level=level,
    )


def prompt_means(values: Floats, prompts: Sequence[str]) -> Floats:
    """Average the finite values of each prompt, (samples, cells) to (prompts, cells); NaN where there are none."""
    where = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    total = np.zeros((len(where), values.shape[1]))
    count = np.zeros(total.shape, dtype=np.int64)
    for prompt, value in zip(prompts, values, strict=True):
        finite = np.isfinite(value)
        total[where[prompt]] += np.where(finite, value, 0.0)
        count[where[prompt]] += finite
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
