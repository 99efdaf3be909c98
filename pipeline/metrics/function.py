"""A function of the user's own as a metric: what it is given, what it must return, and which source it came from."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics.metric import Compute, Metric, MetricInput, guarded
from pipeline.permissions import array_name


def metric_of_function(name: str, function: Callable[[MetricInput], Any]) -> Metric:
    """Return a metric that calls a function with the rows that hold finite numbers only.

    Parameters
    ----------
    name : of the function, as ``package.module:function``; in the store, ``:`` and ``.`` become ``_``.
    """
    source = source_of(name.partition(":")[0], function)
    lines = (inspect.getdoc(function) or "").strip().splitlines()
    about = f"{lines[0].rstrip('.')}. " if lines else ""
    return guarded(
        Metric(
            name=array_name(name),
            long_name=name.rpartition(":")[2].replace("_", " "),
            description=f"{about}Function {name} of the user's own, sha256 of its module's source {source}.",
            tasks=(),
            compute=_checked(name, function),
            source=source,
        )
    )


def source_of(module: str, function: Any) -> str:
    """Return the sha256 over the source files of a module and of the one that defines a function of it."""
    modules = {module, getattr(function, "__module__", None) or module}
    files = {getattr(sys.modules.get(m), "__file__", None) for m in modules}
    digest = hashlib.sha256()
    for file in sorted(f for f in files if f):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def _checked(name: str, function: Callable[[MetricInput], Any]) -> Compute:
    def compute(given: MetricInput) -> NDArray[np.float64]:
        rows = len(given.latents)
        value = function(_read_only(given))
        if not isinstance(value, np.ndarray):
            raise ValueError(
                f"metric {name} returned {type(value).__name__}, not an array. Return one floating number a row."
            )
        if value.dtype.kind != "f" or value.shape != (rows,):
            raise ValueError(
                f"metric {name} returned shape {value.shape} of {value.dtype} for {rows} rows. "
                "Return one floating number a row."
            )
        return value.astype(np.float64)

    return compute


def _read_only(given: MetricInput) -> MetricInput:
    """Return views that cannot be written to: the same arrays go to every metric."""
    views = {}
    for field in ("video", "latents", "clean", "corrupted"):
        views[field] = getattr(given, field).view()
        views[field].flags.writeable = False
    return MetricInput(**views, sample=given.sample, recipients=given.recipients)
