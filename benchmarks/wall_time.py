"""What ``stepscope plan`` predicts against what the sweep takes: ``python -m benchmarks.wall_time``.

Both commands run as a user runs them, one after the other in processes of their own, on the demo and on a reduced one.
Printed as JSON: seconds of both and the error of the prediction, as a share of what the sweep took. A machine that does
something else meanwhile makes both wrong, each in its own way: the load is printed too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Bench, Target

DEMO = Path(__file__).parents[1] / "configs" / "maze_demo.yaml"
REDUCED = ("task.mazes=2", "sampler.steps=12", "previews.samples=[0]")
TARGETS = (
    Target(what="error of the predicted wall time of the demo", figure="demo.error", bound="at most", limit=0.25),
)
Run = Callable[[Sequence[str]], str]


def stepscope(arguments: Sequence[str]) -> str:
    """Run the command line in a process of its own and return what it prints.

    Raises
    ------
    RuntimeError : it failed, with what it said.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"stepscope {arguments[0]} ended with {done.returncode}: {done.stderr[-1000:]}")
    return done.stdout


def compare(config: Path, overrides: Sequence[str] = (), run: Run = stepscope) -> dict[str, Any]:
    """Predict a sweep, run it, and return both times in seconds with the error as a share of the true one."""
    options = [word for override in overrides for word in ("--set", override)]
    predicted = float(json.loads(run(["plan", str(config), "--json", *options]))["estimated_seconds"])
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run(["run", str(config), "--store", str(Path(folder) / "run.zarr"), *options])
        actual = time.perf_counter() - began
    return {
        "predicted_s": predicted,
        "actual_s": round(actual, 1),
        "error": round(abs(predicted - actual) / actual, 3),
        "ratio": round(predicted / actual, 3),
    }


def measure(*, quick: bool = False, run: Run = stepscope) -> dict[str, Any]:
    """Compare on the reduced demo, and on the whole one unless it has to be quick."""
    found = {"reduced": compare(DEMO, REDUCED, run)}
    return found if quick else {**found, "demo": compare(DEMO, (), run)}


def main(arguments: Sequence[str] | None = None, run: Run = stepscope) -> int:
    """Measure and print; return 1 if the demo's prediction is too far off."""
    bench = Bench(__doc__)
    bench.parser.add_argument("--quick", action="store_true", help="the reduced demo alone, about a minute")
    args = bench.parser.parse_args(arguments)
    return bench.conclude(args, measure(quick=args.quick, run=run), () if args.quick else TARGETS)


if __name__ == "__main__":
    sys.exit(main())
