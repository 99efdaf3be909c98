"""How the axes of an experiment become a picture: what runs along x and y, what makes panels and lines."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pipeline.effects.experiment import recipients

SIGMA = "\u03c3"
ALONG_X = ("step", "frame", "layer", "alpha")
ALONG_Y = ("layer", "frame")
_ROW = tuple(f"{e}{bound}" for e in ("difference", "recovery") for bound in ("", "_low", "_high"))
_ROW = (*_ROW, "p_fwer", "p_fdr", "n")
AXIS_LABELS = {"step": "denoising step", "frame": "latent frame", "layer": "layer", "alpha": "strength alpha"}


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The part each axis of an experiment plays in its picture.

    Attributes
    ----------
    x, y : axes of a heat map; y is None for curves, both are None when no axis is numeric.
    others : the remaining axes, one panel or line for each combination of their values.
    """

    x: str | None
    y: str | None
    others: tuple[str, ...]

    @property
    def shape(self) -> str:
        """One of "map", "curve" and "points"."""
        return "map" if self.y else "curve" if self.x else "points"


def view_of(effects: xr.Dataset, metric: str) -> View:
    """Choose the picture of an experiment by its axes; axes of one value never become x or y."""
    array = effects[f"{metric}_difference"]
    axes = [str(d) for d in array.dims if d != "pair"]
    numeric = [a for a in axes if array.sizes[a] > 1 and a in effects.coords and effects[a].dtype.kind in "iuf"]
    x = next((a for a in (*ALONG_X, *numeric) if a in numeric), None)
    y = next((a for a in ALONG_Y if a in numeric and a != x), None)
    return View(x=x, y=y, others=tuple(a for a in axes if a not in (x, y)))


def combinations(effects: xr.Dataset, dims: tuple[str, ...]) -> list[tuple[str, dict[str, int]]]:
    """List a label and a position for every combination of values along ``dims``."""
    ranges = [range(effects.sizes[d]) for d in dims]
    found = []
    for index in itertools.product(*ranges):
        parts = [value_label(effects, d, i) for d, i in zip(dims, index, strict=True)]
        found.append((", ".join(p for p in parts if p), dict(zip(dims, index, strict=True))))
    return found


def value_label(effects: xr.Dataset, dim: str, index: int) -> str:
    """Name one value of an axis: words as they are, numbers and sets of them with the axis."""
    if dim not in effects.coords:
        return f"{dim} {index}"
    value = effects[dim].values[index]
    name = dim.replace("_", " ")
    if isinstance(value, np.bool_):
        return name if value else f"not {name}"
    if not isinstance(value, str):
        return f"{name} {value:g}"
    if dim == "run":
        return f"{value} run"
    return f"{name} {value}" if value[:1].isdigit() else value.replace("_", " ")


def sigma_of(dataset: xr.Dataset, x: str | None) -> NDArray[np.float64] | None:
    """Return sigma along x when x is the step axis and the group stores it."""
    if x != "step" or "sigma" not in dataset.variables or dataset["sigma"].dims != ("step",):
        return None
    return np.asarray(dataset["sigma"].values, dtype=np.float64)


def ticks(count: int, most: int) -> list[int]:
    """Choose at most ``most`` evenly spaced positions out of ``count``, the first among them."""
    stride = max(1, -(-count // most))
    nice = next(s for s in (1, 2, 5, 10, 20, 25, 50, 100, 200, 500, stride) if s >= stride)
    return list(range(0, count, nice))


def reference_of(effects: xr.Dataset, metric: str, pair: str, position: dict[str, int]) -> tuple[str, float]:
    """Return the recipient run of a line and that run's mean metric."""
    run = recipients(effects)
    if not isinstance(run, str):
        (axis, runs), *_ = run.items()
        run = runs[position.get(axis, 0)]
    return run, float(effects[f"{metric}_{run}"].sel(pair=pair))


def fixed_text(attrs: dict[Any, Any]) -> str:
    """Spell out the fields that an experiment holds fixed."""
    try:
        fixed = json.loads(attrs.get("fixed", "{}"))
    except (TypeError, ValueError):
        return ""
    return ", ".join(f"{k} = {v}" for k, v in fixed.items() if v is not None) if isinstance(fixed, dict) else ""


def main_estimand(effects: xr.Dataset, metric: str) -> str:
    """Choose what a map shows: recovery where it is defined and 0 means no change, else the difference."""
    usable = recipients(effects) == "corrupted" and f"{metric}_recovery" in effects and gap_is_clear(effects, metric)
    return "recovery" if usable else "difference"


def gap_is_clear(effects: xr.Dataset, metric: str) -> bool:
    """Whether the interval of the gap between clean and corrupted run excludes 0, over all pair kinds."""
    low, high = (float(effects[f"{metric}_gap_{bound}"].sel(pair="all")) for bound in ("low", "high"))
    return low > 0 or high < 0


def strongest(effects: xr.Dataset, metric: str, count: int) -> list[dict[str, Any]]:
    """List the cells with the largest absolute difference over all pair kinds together, strongest first.

    Ranking by recovery would put a noising patch that changes nothing (recovery 1) on top.
    """
    chosen = effects.sel(pair="all")
    values = chosen[f"{metric}_difference"]
    flat = np.abs(values.values.ravel())
    order = [int(i) for i in np.argsort(-np.nan_to_num(flat, nan=-1), kind="stable") if np.isfinite(flat[i])]
    rows = []
    for i in order[:count]:
        index = np.unravel_index(i, values.shape)
        where = {str(d): int(k) for d, k in zip(values.dims, index, strict=True)}
        row: dict[str, Any] = {"cell": ", ".join(_named(effects, d, k) for d, k in where.items()) or "the only cell"}
        for name in _ROW:
            if f"{metric}_{name}" in chosen:
                row[name] = float(chosen[f"{metric}_{name}"].isel(where))
        rows.append(row)
    return rows


def _named(effects: xr.Dataset, dim: str, index: int) -> str:
    label = value_label(effects, dim, index)
    sigma = sigma_of(effects, dim)
    return label if sigma is None else f"{label} ({SIGMA} {sigma[index]:.2f})"
