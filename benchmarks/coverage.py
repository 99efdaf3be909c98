"""How often the interval of a stopped cell holds the truth: ``python -m benchmarks.coverage [--cells N]``.

Cells of planted differences, of several distributions, are looked at after ``first`` prompts, then as these double up
to 64, and stop when their interval is narrow. Printed as JSON: for each distribution and ``first``, the share of cells
whose interval of level 0.95 holds the planted mean at the look where they stopped, the worst over half-widths from
a quarter of the standard deviation to one and a half of it. Planted with fixed seeds: the same figures everywhere.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.looks import spread_level
from pipeline.precision import mean_bounds

PROMPTS, LEVEL = 64, 0.95
FIRSTS = (6, 8, 16, 32)
HALF_WIDTHS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.5)
"""In standard deviations."""

Draw = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]
DISTRIBUTIONS: dict[str, tuple[Draw, float, float]] = {
    "normal": (lambda g, shape: g.standard_normal(shape), 0.0, 1.0),
    "uniform": (lambda g, shape: g.uniform(0, 1, shape), 0.5, 12**-0.5),
    "Laplace (heavy tails)": (lambda g, shape: g.laplace(size=shape), 0.0, 2**0.5),
    "exponential (skewed)": (lambda g, shape: g.exponential(size=shape), 1.0, 1.0),
    "1 in half of the prompts, else 0": (lambda g, shape: 1.0 * (g.random(shape) < 0.5), 0.5, 0.5),
    "1 in a tenth of the prompts, else 0": (lambda g, shape: 1.0 * (g.random(shape) < 0.1), 0.1, 0.3),
}
"""How differences are drawn, with their mean and standard deviation."""


def looks(first: int) -> list[int]:
    """Return the numbers of prompts at which there is a look."""
    ends = [first]
    while ends[-1] < PROMPTS:
        ends.append(min(PROMPTS, 2 * ends[-1]))
    return ends


def coverage(values: NDArray[np.float64], mean: float, ends: list[int], half_width: float) -> float:
    """Return the share of cells whose interval holds the mean at the look where they stop."""
    going = np.ones(values.shape[1], dtype=np.bool_)
    covered = np.zeros(values.shape[1], dtype=np.bool_)
    level = spread_level(LEVEL, [ends])
    for end in ends:
        bounds = mean_bounds(values[:end], level=level)
        stops = going & ((bounds.half_width <= half_width) | (end == ends[-1]))
        covered[stops] = ((bounds.low <= mean) & (mean <= bounds.high))[stops]
        going &= ~stops
    return float(covered.mean())


def measure(cells: int = 20_000, firsts: tuple[int, ...] = FIRSTS) -> dict[str, Any]:
    """Return the worst coverage of each distribution by prompts before the first look."""
    found: dict[str, Any] = {}
    for number, (name, (draw, mean, deviation)) in enumerate(DISTRIBUTIONS.items()):
        values = draw(np.random.default_rng([0xC0E4, number]), (PROMPTS, cells))
        found[name] = {
            str(first): round(min(coverage(values, mean, looks(first), w * deviation) for w in HALF_WIDTHS), 3)
            for first in firsts
        }
    return {"level": LEVEL, "cells": cells, "prompts": PROMPTS, "coverage_by_first": found}


def main() -> None:
    """Print the coverage of every distribution."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=20_000)
    print(json.dumps(measure(parser.parse_args().cells), indent=2))


if __name__ == "__main__":
    main()
