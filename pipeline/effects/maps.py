"""Effect maps: estimates with intervals for every experiment of a store, written beside the experiments."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import xarray as xr
from dask.base import compute
from dask.delayed import delayed
from numpy.typing import NDArray

from pipeline.effects import sequential
from pipeline.effects.agreement import ATTRIBUTE, agreement
from pipeline.effects.experiment import ALL_PAIRS as ALL_PAIRS
from pipeline.effects.experiment import (
    DONE,
    FAILED,
    PENDING,
    CellStates,
    Experiment,
    Floats,
    Recorded,
    Unit,
    cell_blocks,
    experiment_names,
    group_names,
)
from pipeline.effects.fields import METHOD as FIELD_METHOD
from pipeline.effects.fields import FieldMetric, computing, field_variables
from pipeline.effects.inference import (
    SMALLEST_GAP,
    benjamini_hochberg,
    bootstrap_mean,
    bootstrap_ratio,
    max_t,
    resample_counts,
    sign_flips,
)
from pipeline.effects.state import GroupedMoments, Key, Moments
from pipeline.fields import FIELD_DIMS
from pipeline.screening import DRAWN, ESTIMATE, EXACT
from pipeline.store import CODEC, Place, consolidate, locate

log = logging.getLogger(__name__)

ESTIMANDS = {
    "difference": (
        "mean over experimental units of (metric in the cell - metric of the recipient run), "
        "seeds of a unit averaged first"
    ),
    "recovery": (
        "sum over units of (metric in the cell - metric of the corrupted run) / sum over units of "
        "(metric of the clean run - metric of the corrupted run): a ratio of means, because a ratio per unit "
        f"explodes where the two runs agree; NaN where the mean gap is below {SMALLEST_GAP:g}"
    ),
}
SIGN = (
    "difference > 0: the intervention raises the metric above its recipient run; "
    "recovery 0: as the corrupted run, 1: as the clean run"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How effects are estimated."""

    unit: Unit
    replicates: int
    seed: int
    level: float

    def attrs(self) -> dict[str, str | int | float]:
        """Describe the method, for the attributes of a written group."""
        return {
            "estimand_difference": ESTIMANDS["difference"],
            "estimand_recovery": ESTIMANDS["recovery"],
            "sign_convention": SIGN,
            "experimental_unit": self.unit,
            "replicates": self.replicates,
            "seed": self.seed,
            "level": self.level,
            "method_interval": f"percentile bootstrap over {self.unit}s, resampled together across cells",
            "method_p_fdr": (
                f"two-sided sign-flip test over {self.unit}s of difference = 0, "
                "adjusted by Benjamini-Hochberg over all cells of one pair kind and metric"
            ),
            "method_p_fwer": (
                f"two-sided sign-flip test over {self.unit}s of difference = 0, "
                "adjusted by the largest statistic of any cell (max-T) of one pair kind and metric"
            ),
            "caveat": "percentile intervals cover less than their nominal level when there are few units",
        }


def compute_effects(
    place: Place,
    *,
    unit: Unit = "prompt",
    replicates: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    chunk_samples: int = 64,
) -> list[str]:
    """Estimate the effects of every experiment and write them to ``effects/<experiment>``.

    Existing effect groups are replaced, so running it on a growing store refreshes the maps.

    Parameters
    ----------
    unit : what counts as independent. "prompt" averages the seeds of a prompt first; "sample" treats every seed
        as a unit of its own, which makes intervals too narrow unless each prompt has one seed.
    replicates : bootstrap replicates, and the most sign patterns of the test.
    level : confidence level of the intervals.
    chunk_samples : samples read at once; memory grows with it times the cells of a sample. Of fields, which are read
        chunk by chunk, the samples of one task.

    Returns
    -------
    The names of the written groups, "effects/<experiment>" each.
    """
    if not 0 < level < 1 or replicates < 1:
        raise ValueError(f"out of range: level {level}, replicates {replicates}. Need 0 < level < 1 <= replicates.")
    names = experiment_names(place)
    recorded = Recorded.read(place, unit)
    settings = Settings(unit=unit, replicates=replicates, seed=seed, level=level)
    written = []
    for name in names:
        experiment = Experiment.open(place, name)
        fields = [FieldMetric.open(place, experiment, m, recorded) for m in experiment.fields if m in recorded.fields]
        effects = estimate(experiment, recorded, settings, fields, chunk_samples=chunk_samples)
        if effects is not None:
            with computing(fields):
                written.append(_write(place, f"effects/{name}", effects))
    consolidate(place)
    return written


def open_effects(place: Place) -> xr.DataTree:
    """Open the effects of a store, one child per experiment.

    Raises
    ------
    FileNotFoundError : effects were not computed yet.
    """
    if "effects" not in group_names(place):
        raise FileNotFoundError(f"no effects in {place}. Run `stepscope effects {place}` first.")
    return xr.open_datatree(locate(place).zarr(read_only=True), group="effects", engine="zarr")


def estimate(
    experiment: Experiment,
    recorded: Recorded,
    settings: Settings,
    fields: Sequence[FieldMetric] = (),
    *,
    chunk_samples: int = 64,
) -> xr.Dataset | None:
    """Estimate the effects of one experiment; None when nothing in it can be compared with a recorded run.

    Parameters
    ----------
    fields : metrics that are a field; their maps are lazy.
    """
    unpaired = [m for m in experiment.metrics if m not in recorded.clean]
    unpaired += [m for m in experiment.fields if m not in recorded.fields]
    metrics = [m for m in experiment.metrics if m in recorded.clean]
    if unpaired:
        log.warning("experiment %r: no baseline for metrics %s; they get no effects", experiment.name, unpaired)
    if not metrics and not fields:
        return None
    states = {m: experiment.states(m, recorded, chunk_samples=chunk_samples) for m in metrics}
    variables: dict[str, xr.Variable] = {}
    for metric, state in states.items():
        variables |= _metric_variables(experiment, metric, state, recorded, settings)
    for field in fields:
        for name, (dims, values) in field_variables(field, settings.level, chunk_samples).items():
            about = _describe(field.name, name, settings)
            variables[f"{field.name}_{name}"] = xr.Variable(dims, values, about)
    attrs = {k: v for k, v in experiment.dataset.attrs.items() if not k.startswith("_")} | settings.attrs()
    if (looks := sequential.looks_of(experiment.dataset.attrs)) is not None:
        attrs |= sequential.describe(settings.unit, settings.level, looks)
    attrs |= _counts(experiment, recorded, unpaired)
    if fields:
        attrs["method_fields"] = FIELD_METHOD.format(unit=settings.unit)
    if experiment.screened:
        variables |= _screening(experiment, recorded, chunk_samples)
        attrs[ATTRIBUTE] = json.dumps(agreement(experiment, states))
    return xr.Dataset(variables, coords=_coordinates(experiment, recorded), attrs=attrs)


def _metric_variables(
    experiment: Experiment, metric: str, state: CellStates, recorded: Recorded, settings: Settings
) -> dict[str, xr.Variable]:
    shape = tuple(experiment.dataset.sizes[a] for a in experiment.axes)
    maps: dict[str, list[NDArray[Any]]] = {}
    looks, dims = sequential.looks_of(experiment.dataset.attrs), ("pair", *experiment.axes)
    for pair in _pair_names(recorded):
        failed = np.sum([c for p, c in state.failed.items() if pair in (ALL_PAIRS, p)], axis=0, dtype=np.int64)
        found = _estimate_pair(state, pair, settings, looks) | {"failed": failed}
        for name, values in found.items():
            maps.setdefault(name, []).append(values.reshape(shape))
    variables = {
        f"{metric}_{name}": xr.Variable(dims, np.stack(values), _describe(metric, name, settings, looks))
        for name, values in maps.items()
    }
    for name, values in _run_means(experiment, metric, recorded, settings).items():
        variables[f"{metric}_{name}"] = xr.Variable(("pair",), values, _describe(metric, name, settings))
    return variables


def _screening(experiment: Experiment, recorded: Recorded, chunk_samples: int) -> dict[str, xr.Variable]:
    """Return the mean estimate of every cell per pair kind, and which cells are verified; never mixed with effects."""
    array, states = experiment.dataset[ESTIMATE], []
    for start in range(0, array.sizes["sample"], chunk_samples):
        cut = slice(start, start + chunk_samples)
        values = array[cut].values
        states.append(GroupedMoments.of(values.reshape(len(values), -1), recorded.keys[cut]))
    grouped = reduce(GroupedMoments.merge, states)
    rows = []
    for pair in _pair_names(recorded):
        units = grouped.regroup(lambda k, pair=pair: (k[1],) if pair in (ALL_PAIRS, k[0]) else None).moments.mean  # type: ignore[misc]
        rows.append(Moments.of(units).mean.reshape(array.shape[1:]))
    about = {**array.attrs, "long_name": f"mean of the {array.attrs.get('long_name', ESTIMATE)}"}
    exact = experiment.dataset[EXACT]
    return {
        ESTIMATE: xr.Variable(("pair", *experiment.axes), np.stack(rows), about),
        EXACT: xr.Variable(experiment.axes, np.asarray(exact.values, dtype=np.uint8), dict(exact.attrs)),
    }


def _estimate_pair(
    state: CellStates, pair: str, settings: Settings, looks: sequential.Looks | None
) -> dict[str, NDArray[Any]]:
    """Estimate all cells of one pair kind, in blocks of cells; in a way that holds at every look, if there are some."""

    def of_pair(key: Key) -> Key | None:
        return (key[1],) if pair in (ALL_PAIRS, key[0]) else None

    def unit_means(state: GroupedMoments | None) -> Floats | None:
        return None if state is None else state.regroup(of_pair).moments.mean

    difference = unit_means(state.difference)
    assert difference is not None
    numerator, denominator = unit_means(state.numerator), unit_means(state.denominator)
    if looks is not None:
        level = looks.level(settings.unit, settings.level)
        found = sequential.estimate(difference, numerator, denominator, at_look=level, looks=looks.count)
        p = found.pop("p")
        return found | {"p_fdr": benjamini_hochberg(p), "p_fwer": sequential.holm(p)}
    counts = resample_counts(len(difference), replicates=settings.replicates, seed=settings.seed)
    parts = [
        delayed(_estimate_block)(
            difference[:, cut],
            None if numerator is None else numerator[:, cut],
            None if denominator is None else denominator[:, cut],
            counts,
            settings,
        )
        for cut in cell_blocks(difference.shape[1], settings.replicates)
    ]
    blocks = compute(*parts, scheduler="threads")  # type: ignore[no-untyped-call]
    joined = {name: np.concatenate([b[name] for b, _ in blocks]) for name in blocks[0][0]}
    joined["p_fdr"] = benjamini_hochberg(joined.pop("p"))
    joined["p_fwer"] = max_t(joined.pop("statistic"), np.max([largest for _, largest in blocks], axis=0))
    return joined


def _estimate_block(
    difference: Floats, numerator: Floats | None, denominator: Floats | None, counts: Floats, settings: Settings
) -> tuple[dict[str, NDArray[Any]], Floats]:
    mean = bootstrap_mean(difference, counts, level=settings.level)
    flips = sign_flips(difference, replicates=settings.replicates, seed=settings.seed)
    found: dict[str, NDArray[Any]] = {
        "difference": mean.value,
        "difference_low": mean.low,
        "difference_high": mean.high,
        "p": flips.p,
        "statistic": flips.statistic,
        "n": np.isfinite(difference).sum(axis=0, dtype=np.int64),
    }
    if numerator is not None and denominator is not None:
        ratio = bootstrap_ratio(numerator, denominator, counts, level=settings.level)
        found |= {"recovery": ratio.value, "recovery_low": ratio.low, "recovery_high": ratio.high}
    return found, flips.largest


def _run_means(experiment: Experiment, metric: str, recorded: Recorded, settings: Settings) -> dict[str, Floats]:
    """Return the means of the two recorded runs and their gap with its interval, per pair kind."""
    clean, corrupted = recorded.clean[metric], recorded.corrupted[metric]
    runs = np.stack([clean, corrupted, clean - corrupted], axis=1)
    grouped = GroupedMoments.of(runs, recorded.keys)
    rows = []
    for pair in _pair_names(recorded):
        units = grouped.regroup(lambda k, pair=pair: (k[1],) if pair in (ALL_PAIRS, k[0]) else None).moments.mean  # type: ignore[misc]
        counts = resample_counts(len(units), replicates=settings.replicates, seed=settings.seed)
        mean = bootstrap_mean(units, counts, level=settings.level)
        rows.append([mean.value[0], mean.value[1], mean.value[2], mean.low[2], mean.high[2]])
    columns = np.array(rows).T
    return dict(zip(("clean", "corrupted", "gap", "gap_low", "gap_high"), columns, strict=True))


def _pair_names(recorded: Recorded) -> tuple[str, ...]:
    return (ALL_PAIRS, *recorded.pairs)


def _counts(experiment: Experiment, recorded: Recorded, unpaired: list[str]) -> dict[str, int | str]:
    status = experiment.status
    return {
        "samples": experiment.dataset.sizes["sample"],
        "experimental_units": len({unit for _, unit in recorded.keys}),
        "units_pending": int((status == PENDING).sum()),
        "units_done": int((status == DONE).sum()),
        "units_failed": int((status == FAILED).sum()),
        "metrics_without_baseline": ", ".join(unpaired),
    }


def _coordinates(experiment: Experiment, recorded: Recorded) -> dict[str, Any]:
    found: dict[str, Any] = {"pair": ("pair", np.array(_pair_names(recorded), dtype=object))}
    for name, coordinate in experiment.dataset.variables.items():
        of_cells = coordinate.dims and set(coordinate.dims) <= {*experiment.axes, *FIELD_DIMS}
        if name in ("sample", "status", EXACT, DRAWN) or not of_cells:
            continue
        values = coordinate.values
        # Fixed-width numpy strings have no stable Zarr v3 type; objects become its `string`.
        values = values.astype(object) if values.dtype.kind in "UT" else values
        found[str(name)] = (coordinate.dims, values, dict(coordinate.attrs))
    return found


_TEXTS = {
    "difference": "difference of {m} from the recipient run: {difference}",
    "recovery": "recovery of {m} between corrupted (0) and clean (1): {recovery}",
    "p_fdr": "FDR-adjusted p-value of the difference of {m}",
    "p_fwer": "family-wise ({adjusted}) adjusted p-value of the difference of {m}",
    "n": "{unit}s with a finite difference of {m}",
    "failed": "cells (one intervention on one sample) that were due and have no finite {m}",
    "clean": "mean {m} of the clean run",
    "corrupted": "mean {m} of the corrupted run",
    "gap": "mean over {unit}s of {m} in the clean run minus the corrupted run",
}


def _describe(metric: str, name: str, settings: Settings, looks: sequential.Looks | None = None) -> dict[str, str]:
    base, _, bound = name.rpartition("_")
    base = base if bound in ("low", "high") else name
    prefix = f"{bound}er bound of the " if bound == "low" else "upper bound of the " if bound == "high" else ""
    suffix = f" ({settings.level:.0%} interval)" if prefix else ""
    adjusted = "max-T" if looks is None else "Holm"
    text = _TEXTS[base].format(m=metric, unit=settings.unit, adjusted=adjusted, **ESTIMANDS)
    return {"long_name": f"{prefix}{text.split(':')[0]}{suffix}", "units": "1", "description": prefix + text}


def _write(place: Place, group: str, effects: xr.Dataset) -> str:
    checked = {str(name): {"compressors": [CODEC]} for name in effects.variables}
    effects.to_zarr(
        locate(place).zarr(), group=group, mode="w", consolidated=False, encoding=checked, write_empty_chunks=True
    )
    return group
