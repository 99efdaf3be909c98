"""Screen, then verify: which cells of a screened experiment are computed exactly, from the estimates of all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

ESTIMATE, EXACT, DRAWN = "estimate", "exact", "drawn"
"""Arrays of a screened experiment: estimates, cells that are verified, those of them that were drawn at random."""
ESTIMATED, VERIFIED, OPEN = 0, 1, 255
"""Values of ``exact``; open until every sample is screened."""

RANKING = "|mean over samples of the estimate|; the same cells are verified for every sample"


class Screen(BaseModel):
    """How an experiment is screened.

    Fields
    ------
    top : share of the cells that is computed exactly, those with the largest estimates.
    metric : objective that the estimates are of.
    random : share of the cells that is computed exactly wherever its estimates lie, to judge the ranking by.
    seed : of that draw.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    top: Annotated[float, Field(gt=0, le=1)]
    metric: str
    random: Annotated[float, Field(ge=0, le=1)] = 0.05
    seed: Annotated[int, Field(ge=0)] = 0

    def top_cells(self, cells: int) -> int:
        """Return how many of a grid's cells rank high enough."""
        return min(cells, max(1, _part(self.top, cells)))

    def random_cells(self, cells: int) -> int:
        """Return how many of the other cells are drawn."""
        return min(cells - self.top_cells(cells), _part(self.random, cells))

    def verified_cells(self, cells: int) -> int:
        """Return how many cells are computed exactly."""
        return self.top_cells(cells) + self.random_cells(cells)


def _part(share: float, cells: int) -> int:
    # Rounded first: 0.07 * 100 is a little more than 7 in binary fractions.
    return math.ceil(round(share * cells, 6))


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Cells to compute exactly, as booleans of the grid's shape; ``drawn`` are those chosen at random."""

    exact: NDArray[np.bool_]
    drawn: NDArray[np.bool_]


def select(mean: NDArray[np.float64], screen: Screen) -> Selection:
    """Choose the cells with the largest |mean estimate|, and some of the others at random.

    A function of its arguments alone. Cells without an estimate rank last; of equals the first in C order is taken.

    Parameters
    ----------
    mean : estimates averaged over samples, one a cell.
    """
    size = np.abs(mean).ravel()
    order = np.argsort(-np.where(np.isfinite(size), size, -1.0), kind="stable")
    top, others = np.split(order, [screen.top_cells(size.size)])
    generator = np.random.default_rng([0x5C4EE, screen.seed, size.size])
    chosen = generator.choice(others, screen.random_cells(size.size), replace=False) if others.size else others
    drawn = np.zeros(size.size, dtype=np.bool_)
    drawn[chosen] = True
    exact = drawn.copy()
    exact[top] = True
    return Selection(exact=exact.reshape(mean.shape), drawn=drawn.reshape(mean.shape))


def mean_over_samples(estimates: Iterable[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Average the finite estimates of each cell, one array a sample; NaN where there are none."""
    total: NDArray[np.float64] | float = 0.0
    count: NDArray[np.int64] | int = 0
    for values in estimates:
        finite = np.isfinite(values)
        total = total + np.where(finite, values, 0.0).astype(np.float64)
        count = count + finite
    return np.asarray(np.where(np.asarray(count) > 0, total / np.maximum(count, 1), np.nan), dtype=np.float64)


def share_of_step(levels: Sequence[tuple[float, float]], step: int) -> float:
    """Return how much of a change of a step's clean estimate enters the next latents.

    With x = alpha x0 + sigma eps, a first-order step keeps eps = (x - alpha x0) / sigma, so d x' / d x0 =
    alpha' - sigma' alpha / sigma (DDIM, Song et al. 2020, arXiv 2010.02502, eq. 12). Without it, estimates of early
    steps, whose clean estimate moves freely and counts little, would outrank all others.
    """
    (alpha, sigma), (next_alpha, next_sigma) = levels[step], levels[step + 1]
    return next_alpha - next_sigma * alpha / sigma if sigma > 0 else 1.0
