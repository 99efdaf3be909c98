"""Effects of large stores against a plain numpy loop: ``python -m benchmarks.effects``, ``--quick`` for a tenth of it.

A store of a field-valued metric is written through the real template, in chunks of 6 MB, one sample a prompt. Two
processes then read it in turn, on the same core: a loop of plain numpy that decodes chunk by chunk and keeps count,
mean and squared deviations of the differences from the recipient run; and ``compute_effects``, which writes its maps as
well. The values are random, rounded to eight bits of mantissa, so that they compress to about half; none is missing.
Files are in the page cache for both. Seconds leave out the start of Python and its imports; peak memory (VmHWM) holds
everything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.figures import Bench, Target
from pipeline.config import SweepConfig
from pipeline.plan import Plan, make_plan
from pipeline.store import DONE, open_or_create, open_store
from pipeline.tasks.maze import MazeTask

METRIC, EXPERIMENT = "change_map", "map"
LATENT = (21, 60, 104)
"""Of 81 frames of 480p."""
STEPS, LAYERS, UNIT_CELLS = 4, 6, 12
GB, MB = 10**9, 10**6
CASES = ("numpy", "dask")
TARGETS = (
    Target(what="effects: speed against a numpy loop, same core", figure="speed", bound="at least", limit=0.5),
    Target(what="effects: peak memory, MB", figure="peak_mb", bound="at most", limit=1000),
    Target(what="effects: seconds a GB, largest store over smallest", figure="linear", bound="at most", limit=1.25),
)


class _Wide(MazeTask):
    """A maze of another size, as a store is only told the shape."""

    def latent_shape(self, model: Any = None) -> tuple[int, int, int]:
        return LATENT


def plan_of(nbytes: float) -> Plan:
    """Return the plan of a store with about so many bytes of a field."""
    a_sample = 4 * STEPS * LAYERS * int(np.prod(LATENT))
    samples = max(2, round(nbytes / a_sample))
    config = SweepConfig.model_validate(
        {
            "name": "effects",
            "model": {"id": "embedded:maze"},
            "task": {"name": "maze", "mazes": samples},
            "sampler": {"steps": STEPS},
            "metrics": [METRIC],
            "experiments": {EXPERIMENT: {"kind": "patch", "step": "all", "layer": "all"}},
            "previews": {"samples": []},
            "unit_cells": UNIT_CELLS,
        }
    )
    return replace(make_plan(config), task=_Wide(mazes=samples))


def write(place: Path, nbytes: float) -> int:
    """Write a store whole and return the bytes of its field, decoded."""
    plan = plan_of(nbytes)
    store = open_or_create(place, plan)
    rng = np.random.default_rng(0)
    written = 0
    units = list(plan.units())
    width = plan.window(plan.grids[0])
    noise = rng.standard_normal((width, *plan.grids[0].shape[1:], *LATENT), dtype=np.float32)
    for unit in units:
        scale, shift = rng.normal(1.0, 0.2, 2)
        if unit.group == EXPERIMENT:
            values = _rounded(noise[: unit.stop - unit.start] * np.float32(scale) + np.float32(shift))
            written += store.write_cells(EXPERIMENT, {METRIC: values}, unit.sample, unit.start, unit.stop)
        else:
            store.write_sample(unit.group, {METRIC: _rounded(noise[0, :2] * np.float32(scale))}, unit.sample)
    for group in store.groups():
        store.write_status(group, np.full(plan.group_units(group), DONE, np.uint8))
    return written


def _rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return (values.view(np.uint32) & np.uint32(0xFFFF8000)).view(np.float32)


def loop(place: Path) -> dict[str, Any]:
    """Reduce a store with plain numpy, chunk by chunk; return seconds of all of it, and of the arithmetic alone."""
    store = open_store(place)
    values, baseline = store.array(f"{EXPERIMENT}/{METRIC}"), store.array(f"baseline/{METRIC}")
    run = list(store.root["baseline/run"][:]).index(str(store.root[EXPERIMENT].attrs["recipient"]))
    n, mean, m2 = (np.zeros(values.shape[1:]) for _ in range(3))
    width, arithmetic = values.chunks[1], 0.0
    began = time.perf_counter()
    for sample in range(values.shape[0]):
        reference = baseline[sample][run]
        for start in range(0, values.shape[1], width):
            window = slice(start, start + width)
            chunk = values[sample, window]
            decoded = time.perf_counter()
            difference = chunk.astype(np.float64) - reference
            finite = np.isfinite(difference)
            n[window] += finite
            difference = np.where(finite, difference, mean[window])
            shift = difference - mean[window]
            mean[window] += shift / np.maximum(n[window], 1)
            m2[window] += shift * (difference - mean[window])
            arithmetic += time.perf_counter() - decoded
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "arithmetic": arithmetic, "check": _check(np.where(n > 0, mean, np.nan))}


def effects(place: Path) -> dict[str, Any]:
    """Compute the effects of a store; return the seconds."""
    from pipeline.effects import compute_effects

    began = time.perf_counter()
    compute_effects(place)
    seconds = time.perf_counter() - began
    found = open_store(place).array(f"effects/{EXPERIMENT}/{METRIC}_difference")
    return {"seconds": seconds, "check": _check(np.asarray(found[0]))}


def _check(mean: NDArray[Any]) -> list[float]:
    """Return some numbers of a map, by which the two cases are compared."""
    return [float(v) for v in mean.reshape(-1)[:: max(1, mean.size // 999)]]


def run_case(case: str, place: Path, cores: set[int]) -> dict[str, Any]:
    """Run one case in a process of its own on some cores, and return its figures with its peak memory."""
    command = [sys.executable, "-m", "benchmarks.effects", "--case", case, "--store", str(place)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, preexec_fn=lambda: os.sched_setaffinity(0, cores)
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def peak_bytes() -> int:
    """Return the most memory that this process has held (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure(sizes: tuple[float, ...] = (1, 2, 4), rounds: int = 2) -> dict[str, Any]:
    """Write stores of so many GB, one after the other, and run both cases on each in turn."""
    cores = sorted(os.sched_getaffinity(0))
    by_size = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "run.zarr"
            written = write(place, size * GB)
            disk = sum(f.stat().st_size for f in place.rglob("*") if f.is_file())
            runs: dict[str, list[dict[str, Any]]] = {case: [] for case in (*CASES, "dask_all_cores")}
            for _ in range(rounds):
                for case in CASES:
                    runs[case].append(run_case(case, place, {cores[0]}))
                runs["dask_all_cores"].append(run_case("dask", place, set(cores)))
            by_size[size] = _of_size(written, disk, runs)
    largest, smallest = by_size[max(sizes)], by_size[min(sizes)]
    return {
        "sizes": {f"{size:g}_gb": found for size, found in by_size.items()},
        "speed": largest["speed"],
        "speed_against_arithmetic_alone": largest["speed_against_arithmetic_alone"],
        "peak_mb": max(found["peak_mb"] for found in by_size.values()),
        "linear": round(
            largest["dask_seconds"] / largest["gb"] / (smallest["dask_seconds"] / smallest["gb"]),
            3,
        ),
        "cores": len(cores),
    }


def _of_size(written: int, disk: int, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    seconds = {case: min(run["seconds"] for run in found) for case, found in runs.items()}
    arithmetic = min(run["arithmetic"] for run in runs["numpy"])
    checks = [np.array(run["check"]) for found in runs.values() for run in found]
    return {
        "gb": round(written / GB, 3),
        "gb_on_disk": round(disk / GB, 3),
        "numpy_seconds": round(seconds["numpy"], 2),
        "numpy_arithmetic_seconds": round(arithmetic, 2),
        "dask_seconds": round(seconds["dask"], 2),
        "dask_seconds_all_cores": round(seconds["dask_all_cores"], 2),
        "speed": round(seconds["numpy"] / seconds["dask"], 3),
        "speed_against_arithmetic_alone": round(arithmetic / seconds["dask"], 3),
        "peak_mb": round(max(run["peak"] for case in ("dask", "dask_all_cores") for run in runs[case]) / MB),
        "numpy_peak_mb": round(max(run["peak"] for run in runs["numpy"]) / MB),
        "largest_disagreement": float(max(np.abs(check - checks[0]).max() for check in checks)),
    }


def main() -> int:
    """Measure and print; or run one case of it."""
    bench = Bench(__doc__)
    bench.parser.add_argument("--quick", action="store_true", help="stores of a tenth of the size, once")
    bench.parser.add_argument("--case", choices=CASES, help="run one case on a store and print its figures")
    bench.parser.add_argument("--store", type=Path)
    args = bench.parser.parse_args()
    if args.case is not None:
        found = (loop if args.case == "numpy" else effects)(args.store)
        print(json.dumps({**found, "peak": peak_bytes()}))
        return 0
    figures = measure((0.1, 0.2, 0.4), 1) if args.quick else measure()
    return bench.conclude(args, figures, TARGETS)


if __name__ == "__main__":
    sys.exit(main())
