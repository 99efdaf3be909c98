"""How well the estimates of a screened experiment rank its cells, judged by those that are verified."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from pipeline.effects.experiment import CellStates, Experiment, Floats, Recorded
from pipeline.screening import DRAWN, ESTIMATE, EXACT, OPEN, VERIFIED, mean_over_samples
from pipeline.store import Place, locate

ATTRIBUTE = "agreement"
METHOD = (
    "over verified cells, means over samples; a cell drawn at random stands for all that were not verified, so both "
    "numbers are of the whole grid. spearman: rank correlation of estimate and difference from the recipient run. "
    "recall: of the strongest true differences, as many as rank as top, the share that did rank as top"
)


def agreement(experiment: Experiment, states: Mapping[str, CellStates]) -> dict[str, Any] | None:
    """Return how estimates and verified differences agree for each metric; None while cells are not chosen.

    Parameters
    ----------
    states : of the experiment's metrics, over any experimental unit.
    """
    dataset = experiment.dataset
    exact, drawn = (np.asarray(dataset[name].values).ravel() for name in (EXACT, DRAWN))
    if (exact == OPEN).any():
        return None
    estimates = mean_over_samples(dataset[ESTIMATE][s].values for s in range(dataset.sizes["sample"])).ravel()
    weight = weights(exact == VERIFIED, drawn == VERIFIED)
    found: dict[str, dict[str, float | None]] = {}
    for metric in sorted(states):
        difference = states[metric].difference.regroup(lambda key: ("all",)).moments.mean.ravel()
        found[metric] = compare(estimates, difference, weight, drawn == VERIFIED)
    return {
        "metrics": found,
        "cells": exact.size,
        "top_cells": int(((exact == VERIFIED) & (drawn != VERIFIED)).sum()),
        "random_cells": int((drawn == VERIFIED).sum()),
        "method": METHOD,
    }


def write_agreement(place: Place, name: str, *, again: bool) -> bool:
    """Write the agreement of one experiment into its attributes; return whether there was something to write.

    Parameters
    ----------
    again : also if it is there already.
    """
    group = zarr.open_group(locate(place).zarr(), path=name, mode="r+", zarr_format=3, use_consolidated=False)
    if ATTRIBUTE in group.attrs and not again:
        return False
    experiment, recorded = Experiment.open(place, name), Recorded.read(place, "sample")
    metrics = [m for m in experiment.metrics if m in recorded.clean]
    found = agreement(experiment, {m: experiment.states(m, recorded, chunk_samples=64) for m in metrics})
    if found is None:
        return False
    group.attrs[ATTRIBUTE] = json.dumps(found)
    return True


def weights(exact: NDArray[np.bool_], drawn: NDArray[np.bool_]) -> Floats:
    """Return how many cells of the grid each verified cell stands for; 0 for the others."""
    outside = exact.size - int((exact & ~drawn).sum())
    weight = np.where(exact, 1.0, 0.0)
    weight[drawn] = outside / max(1, int(drawn.sum()))
    return weight


def compare(estimate: Floats, difference: Floats, weight: Floats, drawn: NDArray[np.bool_]) -> dict[str, float | None]:
    """Return weighted rank correlation and recall; None where verified cells cannot tell.

    Parameters
    ----------
    estimate, difference : one value a cell. weight : from ``weights``. drawn : cells chosen at random.
    """
    kept = (weight > 0) & np.isfinite(estimate) & np.isfinite(difference)
    unseen = weight.sum() < 0.999 * weight.size
    if unseen or kept.sum() < 3:
        return {"spearman": None, "recall": None}
    weight, top = weight[kept], ~drawn[kept]
    a, b = weighted_ranks(estimate[kept], weight), weighted_ranks(difference[kept], weight)
    return {
        "spearman": _correlation(a, b, weight),
        "recall": _recall(np.abs(difference[kept]), weight, top),
    }


def weighted_ranks(values: Floats, weight: Floats) -> Floats:
    """Return the weight below each value plus half the weight at it; with weights of one, ranks with ties averaged."""
    distinct, where = np.unique(values, return_inverse=True)
    at = np.bincount(where, weights=weight, minlength=distinct.size)
    result: Floats = (np.cumsum(at) - at / 2)[where]
    return result


def _correlation(a: Floats, b: Floats, weight: Floats) -> float | None:
    a, b = (x - np.average(x, weights=weight) for x in (a, b))
    scale = np.sqrt((weight * a * a).sum() * (weight * b * b).sum())
    return float((weight * a * b).sum() / scale) if scale > 0 else None


def _recall(size: Floats, weight: Floats, top: NDArray[np.bool_]) -> float | None:
    distinct, at = np.unique(-size, return_inverse=True)
    wanted = weight[top].sum()
    if distinct.size < 2 or not wanted:
        return None
    # Of the cells at the border, which may be of one size, only the share that still belongs to the strongest counts.
    whole = np.bincount(at, weights=weight)
    chosen = np.bincount(at, weights=weight * top)
    counted = np.clip(wanted - (np.cumsum(whole) - whole), 0.0, whole)
    return float((counted / whole * chosen).sum() / wanted)
