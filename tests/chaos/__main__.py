"""Run the chaos trials: ``python -m tests.chaos --trials 60 --seed 0``; exit code 1 if anything was lost or wrong."""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# Forks of a process with threads are no safe drivers, so numerical libraries must not start any.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.update(RAY_ENABLE_UV_RUN_RUNTIME_ENV="0", RAY_USAGE_STATS_ENABLED="0")

from tests.chaos import forks  # noqa: E402
from tests.chaos.draw import KINDS, MODEL, RAY, draw, kind_of  # noqa: E402
from tests.chaos.nodes import Nodes  # noqa: E402
from tests.chaos.tally import Tally  # noqa: E402
from tests.chaos.trial import Runner  # noqa: E402
from tests.synthetic import Script  # noqa: E402

METRICS = ["goal_evidence", "latent_distance"]
SYNTHETIC: dict[str, Any] = {
    "name": "chaos",
    "model": {"id": "embedded:maze"},
    "task": {"name": "maze", "mazes": 3, "pairs": ["red/blue"]},
    "sampler": {"steps": 4},
    "metrics": METRICS,
    "experiments": {
        "patch_map": {"kind": "patch", "step": "all", "layer": "all", "component": ["attn2", "update"]},
        "skip": {"kind": "step_skip", "mode": ["freeze", "drop", "repeat"], "step": "all"},
        "noise": {"kind": "noise", "at": "step", "step": "all"},
        "single": {"kind": "patch", "step": 1, "layer": 1, "component": "residual"},
        "screened": {
            "kind": "patch",
            "step": "all",
            "layer": "all",
            "component": ["attn1", "update"],
            "screen": {"top": 0.2, "metric": "latent_distance", "random": 0.1},
        },
    },
    "previews": {"samples": [1]},
    "unit_cells": 4,
}
"""Every shape that a unit can have: many windows, one, none, chosen cells; a baseline with estimates and a preview."""


class Ground:
    """What trials of one kind stand on: a config, its plan and the store of an undisturbed run."""

    def __init__(self, kind: str, folder: Path) -> None:
        from pipeline.config import load_config
        from pipeline.plan import make_plan

        folder.mkdir()
        self.config, self.reference = folder / "config.yaml", folder / "reference.zarr"
        raw = SYNTHETIC if kind != MODEL else forks.call(functools.partial(_tiny_model, folder / "model"), folder)
        self.config.write_text(json.dumps(raw))
        self.plan = make_plan(load_config(self.config), self.config)
        script = None if kind == MODEL else Script(folder=folder / "script")
        driver = forks.Driver(config=self.config, store=self.reference, script=script)
        code = forks.wait(forks.fork(driver.run, folder / "reference.log"))
        if code:
            raise RuntimeError(f"the undisturbed run failed: {(folder / 'reference.log').read_text()}")


def _tiny_model(folder: Path) -> dict[str, Any]:
    import torch

    from tests.sweep_fixture import save_tiny_model, tiny_config

    torch.set_num_threads(1)
    return tiny_config(save_tiny_model(folder))


def main() -> int:
    """Run the trials, print a line each and the tally, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this trial alone, and tell everything")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--out", type=Path, help="write the tally there, as JSON")
    args = parser.parse_args()
    forks.preload()
    numbers = range(args.trials) if args.only is None else [args.only]
    kinds = {number: kind_of(number, tuple(args.kinds)) for number in numbers}
    began, total = time.monotonic(), Tally()
    by_kind = dict.fromkeys(args.kinds, 0)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    with ExitStack() as stack:
        # Before the undisturbed runs, as it takes a while to come up.
        nodes = stack.enter_context(Nodes(folder / "nodes.log")) if RAY in kinds.values() else None
        grounds = {kind: Ground(kind, folder / f"ground-{kind}") for kind in dict.fromkeys(kinds.values())}
        for number, kind in kinds.items():
            by_kind[kind] += 1
            total.add(_run(args.seed, number, kind, grounds[kind], nodes, folder, loud=args.only is not None))
    result = {"seed": args.seed, "seconds": round(time.monotonic() - began), "cores": os.cpu_count()}
    result |= {"machine": platform.machine(), "trials_by_kind": by_kind, **total.as_dict()}
    print(json.dumps(result, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    if total.clean:
        shutil.rmtree(folder)
        return 0
    print(f"What is left of the trials lies in {folder}. One alone, in full: --only N --seed {args.seed}.")
    return 1


def _run(seed: int, number: int, kind: str, ground: Ground, nodes: Nodes | None, folder: Path, *, loud: bool) -> Tally:
    began = time.monotonic()
    trial = draw(seed, number, kind, len(ground.plan.layout))
    told: list[str] = [repr(trial)]
    say = functools.partial(print, "   ", flush=True) if loud else told.append
    runner = Runner(trial, folder / f"trial-{number}", ground.config, ground.plan, ground.reference, nodes, say)
    tally = runner.run()
    if nodes is not None and kind == RAY:
        nodes.settle()
    print(f"{number:>3} {kind:<6} {time.monotonic() - began:5.1f} s  {tally.line()}", flush=True)
    if not tally.clean:
        print("\n".join(told) if not loud else "", file=sys.stderr, flush=True)
    else:
        shutil.rmtree(runner.folder)
    return tally


if __name__ == "__main__":
    sys.exit(main())
