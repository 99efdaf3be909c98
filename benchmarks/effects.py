"""Effects of large stores against a plain numpy loop: ``python -m benchmarks.effects``, ``--quick`` for a tenth of it.

Stores of a field-valued metric are written through the real template, in chunks of 6 MB, one sample a prompt. Two
processes then read them in turn, on the same core: a loop of plain numpy that decodes chunk by chunk and keeps count,
mean and squared deviations of the differences from the recipient run; and ``compute_effects``, which writes its maps as
well. The values are random, rounded to eight bits of mantissa, so that they compress to about half; none is missing.
Files are in the page cache for both. Ratios are of processor seconds, which a busy machine moves less than the clock's;
the clock's are given too. Both leave out the start of Python and its imports; peak memory (VmHWM) holds everything.
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
ALL_CORES = "dask_all_cores"
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


class Timer:
    """Seconds since it was made, of the processor (all threads) and of the clock."""

    def __init__(self) -> None:
        self._processor, self._clock = time.process_time(), time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """Return both."""
        return {"processor": time.process_time() - self._processor, "clock": time.perf_counter() - self._clock}


def loop(place: Path) -> dict[str, Any]:
    """Reduce a store with plain numpy, chunk by chunk; return seconds of all of it, and of the arithmetic alone."""
    store = open_store(place)
    values, baseline = store.array(f"{EXPERIMENT}/{METRIC}"), store.array(f"baseline/{METRIC}")
    run = list(store.root["baseline/run"][:]).index(str(store.root[EXPERIMENT].attrs["recipient"]))
    n, mean, m2 = (np.zeros(values.shape[1:]) for _ in range(3))
    width, arithmetic = values.chunks[1], 0.0
    timer = Timer()
    for sample in range(values.shape[0]):
        reference = baseline[sample][run]
        for start in range(0, values.shape[1], width):
            window = slice(start, start + width)
            chunk = values[sample, window]
            decoded = time.process_time()
            difference = chunk.astype(np.float64) - reference
            finite = np.isfinite(difference)
            n[window] += finite
            difference = np.where(finite, difference, mean[window])
            shift = difference - mean[window]
            mean[window] += shift / np.maximum(n[window], 1)
            m2[window] += shift * (difference - mean[window])
            arithmetic += time.process_time() - decoded
    return {**timer.seconds(), "arithmetic": arithmetic, "check": _check(np.where(n > 0, mean, np.nan))}


def effects(place: Path) -> dict[str, Any]:
    """Compute the effects of a store; return the seconds."""
    from pipeline.effects import compute_effects

    timer = Timer()
    compute_effects(place)
    seconds = timer.seconds()
    found = open_store(place).array(f"effects/{EXPERIMENT}/{METRIC}_difference")
    return {**seconds, "check": _check(np.asarray(found[0]))}


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
    """Write stores of so many GB, then run both cases on each of them in turn, round by round."""
    cores = sorted(os.sched_getaffinity(0))
    runs: dict[float, dict[str, list[dict[str, Any]]]] = {
        size: {case: [] for case in (*CASES, ALL_CORES)} for size in sizes
    }
    with tempfile.TemporaryDirectory() as folder:
        places = {size: Path(folder) / f"{number}.zarr" for number, size in enumerate(sizes)}
        written = {size: write(place, size * GB) for size, place in places.items()}
        disk = {size: sum(f.stat().st_size for f in place.rglob("*") if f.is_file()) for size, place in places.items()}
        for _ in range(rounds):
            for size, place in places.items():
                for case in CASES:
                    runs[size][case].append(run_case(case, place, {cores[0]}))
                runs[size][ALL_CORES].append(run_case("dask", place, set(cores)))
    found = {size: _of_size(written[size], disk[size], runs[size]) for size in sizes}
    largest, smallest = found[max(sizes)], found[min(sizes)]
    a_gb = [of["dask"]["processor"] / of["gb"] for of in (largest, smallest)]
    return {
        "sizes": {f"{size:g}_gb": of for size, of in found.items()},
        **{name: largest[name] for name in ("speed", "speed_by_the_clock", "speed_against_arithmetic_alone")},
        "peak_mb": max(of["peak_mb"] for of in found.values()),
        "linear": round(a_gb[0] / a_gb[1], 3),
        "cores": len(cores),
    }


def _of_size(written: int, disk: int, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    seconds = {
        case: {kind: round(min(run[kind] for run in found), 2) for kind in ("processor", "clock")}
        for case, found in runs.items()
    }
    arithmetic = min(run["arithmetic"] for run in runs["numpy"])
    checks = [np.array(run["check"]) for found in runs.values() for run in found]
    dask = seconds["dask"]
    return {
        "gb": round(written / GB, 3),
        "gb_on_disk": round(disk / GB, 3),
        **seconds,
        "numpy_arithmetic": round(arithmetic, 2),
        "speed": round(seconds["numpy"]["processor"] / dask["processor"], 3),
        "speed_by_the_clock": round(seconds["numpy"]["clock"] / dask["clock"], 3),
        "speed_against_arithmetic_alone": round(arithmetic / dask["processor"], 3),
        "peak_mb": round(max(run["peak"] for case in ("dask", ALL_CORES) for run in runs[case]) / MB),
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
