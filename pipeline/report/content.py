"""What a report shows, read from a store: whatever is there, and a list of what is not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
import zarr

from pipeline.effects.experiment import NOT_EXPERIMENTS, group_names, open_group
from pipeline.effects.inference import Interval, bootstrap_mean, resample_counts
from pipeline.effects.maps import ALL_PAIRS
from pipeline.effects.state import GroupedMoments, Key
from pipeline.fields import field_dims_of
from pipeline.permissions import array_name
from pipeline.store import Place, locate


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """The parts of a store that a report reads; None or absent where the store lacks them.

    Attributes
    ----------
    attrs : root attributes. config : the sweep config from them.
    experiments : experiment groups in config order, metrics not loaded. effects : their effects.
    missing : sentences about what is not there. fields : by experiment, its metrics with a field a cell, which are not
        read, with the dimensions of the field.
    """

    attrs: dict[str, Any]
    config: dict[str, Any]
    samples: xr.Dataset | None
    baseline: xr.Dataset | None
    previews: xr.Dataset | None
    experiments: dict[str, xr.Dataset]
    effects: dict[str, xr.Dataset]
    missing: list[str] = field(default_factory=list)
    fields: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)

    @classmethod
    def read(cls, place: Place) -> Sweep:
        """Read a store.

        Raises
        ------
        FileNotFoundError : there is no store at the path.
        """
        groups = set(group_names(place))
        store = locate(place).zarr(read_only=True)
        attrs = dict(zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=False).attrs)
        config = as_mapping(attrs.get("config_json"))
        names = in_order(groups - NOT_EXPERIMENTS, config.get("experiments", {}))
        experiments = {n: open_group(place, n) for n in names}
        computed = set(group_names(place, "effects")) if "effects" in groups else set()
        return cls(
            attrs=attrs,
            config=config,
            samples=open_group(place, "samples").load() if "samples" in groups else None,
            baseline=_scalars(open_group(place, "baseline")).load() if "baseline" in groups else None,
            previews=open_group(place, "previews") if "previews" in groups else None,
            experiments=experiments,
            effects={n: _scalars(open_group(place, f"effects/{n}")).load() for n in names if n in computed},
            missing=_missing(groups, names, computed),
            fields={n: fields_of(dataset) for n, dataset in experiments.items()},
        )

    @property
    def metrics(self) -> list[str]:
        """Metrics in config order, then any other that has a baseline or an effect."""
        found = [n for n, v in (self.baseline or {}).items() if v.dims == ("sample", "run")]
        for effects in self.effects.values():
            found += effect_metrics(effects)
        return in_order(set(map(str, found)), (array_name(str(name)) for name in self.config.get("metrics", ())))

    def long_name(self, metric: str) -> str:
        """Return a metric's label for axes and headings."""
        return str(self._about(metric).get("long_name", metric.replace("_", " ")))

    def description(self, metric: str) -> str:
        """Return a metric's definition, empty if the store records none."""
        return str(self._about(metric).get("description", ""))

    def _about(self, metric: str) -> Mapping[Any, Any]:
        for dataset in (self.baseline, *self.experiments.values()):
            if dataset is not None and metric in dataset:
                return dataset[metric].attrs
        return {}

    @property
    def pairs(self) -> list[str]:
        """Pair kinds of the samples, "all" first."""
        if self.samples is None:
            return [ALL_PAIRS]
        return [ALL_PAIRS, *dict.fromkeys(str(p) for p in self.samples["pair"].values)]

    def keys(self) -> list[Key]:
        """Return (pair, prompt) per sample."""
        assert self.samples is not None
        pair, prompt = self.samples["pair"].values, self.samples["prompt"].values
        return [(str(a), str(b)) for a, b in zip(pair, prompt, strict=True)]

    def over_prompts(self, values: xr.DataArray, pair: str, *, level: float = 0.95) -> Interval:
        """Average values with ``sample`` as first dimension over seeds, then over the prompts of a pair kind."""
        array = np.asarray(values.values, dtype=np.float64)
        grouped = GroupedMoments.of(array.reshape(len(array), -1), self.keys())
        units = grouped.regroup(lambda k: (k[1],) if pair in (ALL_PAIRS, k[0]) else None).moments.mean
        counts = resample_counts(len(units), replicates=2000, seed=0)
        mean = bootstrap_mean(units, counts, level=level)
        shape = array.shape[1:]
        return Interval(value=mean.value.reshape(shape), low=mean.low.reshape(shape), high=mean.high.reshape(shape))

    def prompts(self, pair: str = ALL_PAIRS) -> int:
        """Count the prompts of a pair kind."""
        return len({k[1] for k in self.keys() if pair in (ALL_PAIRS, k[0])}) if self.samples is not None else 0


def effect_metrics(effects: xr.Dataset) -> list[str]:
    """List the metrics that an effects group holds."""
    return [str(n).removesuffix("_difference") for n in effects.data_vars if str(n).endswith("_difference")]


def in_order(found: set[str], wanted: Iterable[object]) -> list[str]:
    """Sort names by the order of the config, names it does not list after them."""
    first = [str(n) for n in wanted if str(n) in found]
    return first + sorted(found - set(first))


def as_mapping(text: object) -> dict[str, Any]:
    """Parse a JSON attribute that should be a mapping; anything else gives an empty one."""
    try:
        value = json.loads(str(text))
    except (TypeError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def fields_of(dataset: xr.Dataset) -> dict[str, tuple[str, ...]]:
    """Return the variables of a group that are a field, which no figure shows, with the dimensions of the field."""
    found = {str(n): field_dims_of(map(str, v.dims)) for n, v in dataset.data_vars.items()}
    return {name: dims for name, dims in sorted(found.items()) if dims}


def _scalars(dataset: xr.Dataset) -> xr.Dataset:
    # Fields may be larger than memory.
    return dataset.drop_vars(fields_of(dataset))


def _missing(groups: set[str], names: list[str], computed: set[str]) -> list[str]:
    lines = [
        f"The store has no {name} group, so {what}."
        for name, what in (
            ("samples", "prompts cannot be told apart"),
            ("baseline", "there are no reference scores"),
            ("previews", "there are no film strips"),
        )
        if name not in groups
    ]
    if not names:
        lines.append("The store has no experiments.")
    lines += [f"Experiment {n} has no effects yet: run `stepscope effects`." for n in names if n not in computed]
    return lines
