"""What a replica needs at its peak against the model alone: ``python -m benchmarks.memory``.

Bare: a process of its own that imports torch and diffusers, loads the pipeline, runs it as diffusers does on the pair
of runs of one sample as a batch of two, and decodes both videos. Replica: the Ray actor of a sweep of the same sample
with ``engine.batch_rows: auto``, from its start to its last unit. Both are the high-water mark of resident memory as
the kernel keeps it, libraries and loading included; on a GPU, what torch has allocated there at its peak. Printed as
JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from benchmarks import processes
from benchmarks.figures import Bench, Target
from benchmarks.memory_bare import peak_of_process
from pipeline.config import SweepConfig
from pipeline.executors import MakeExecutor, ray_executor
from pipeline.models import load_pipeline
from pipeline.plan import Plan, make_plan
from pipeline.store import Journal
from pipeline.store.rows import RowsRecord
from pipeline.sweep import run_sweep

STEPS = 20
_MIB = 2**20
TARGETS = (Target(what="peak of a replica over the bare peak", figure="memory_ratio", bound="at most", limit=1.3),)


def plan_of(*, quick: bool = False) -> Plan:
    """Return the plan of a sweep of one sample, with cells of the kinds that the demo has."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = {
        "patch_map": {"kind": "patch", "step": "::4", "layer": "all", "component": ["attn1", "attn2", "ffn"]},
        "skip": {"kind": "step_skip", "mode": ["freeze", "repeat"], "step": "2::4"},
        "noise_step": {"kind": "noise", "at": "step", "path": ["off_path", "on_path"], "step": "::4"},
    }
    raw = {
        "name": "memory",
        "model": {"id": "embedded:maze", "device": device},
        "task": {"name": "maze", "mazes": 1, "pairs": ["red/blue"]},
        "sampler": {"steps": 4 if quick else STEPS},
        "engine": {"batch_rows": "auto"},
        "metrics": ["goal_evidence", "solved"],
        "experiments": kinds,
        "run": {"replicas": 1, "gpus_per_replica": float(device == "cuda")},
    }
    return make_plan(SweepConfig.model_validate(raw))


def measure(*, quick: bool = False, make_executor: MakeExecutor = ray_executor) -> dict[str, Any]:
    """Return both peaks in MiB, their ratio and the rows that the tool chose.

    Parameters
    ----------
    quick : fewer steps. make_executor : where the sweep runs; in this process, this process is the replica.
    """
    plan = plan_of(quick=quick)
    with tempfile.TemporaryDirectory() as folder:
        bare = bare_peak(plan, Path(folder))
        replica, rows = replica_peak(plan, Path(folder) / "run.zarr", make_executor)
    return {
        "bare_mib": round(bare / _MIB, 1),
        "replica_mib": round(replica / _MIB, 1),
        "memory_ratio": round(replica / bare, 3),
        "rows_per_forward": rows,
        "device": plan.config.model.device,
    }


def bare_peak(plan: Plan, folder: Path) -> int:
    """Return the peak of the bare pipeline on the first sample's pair, in a process of its own, in bytes."""
    pipe = load_pipeline(plan.model, dtype="float32", device="cpu")
    inputs = plan.task.inputs(pipe, plan.samples[0], plan.config.sampler)
    call = dict(inputs.shared)
    if (image := call.pop("image", None)) is not None:
        image.save(folder / "image.png")
    (folder / "call.json").write_text(json.dumps({"model": str(plan.model.folder), "call": call}), encoding="utf-8")
    rows = inputs.rows(range(len(inputs.names)))
    save_file({name: value.contiguous() for name, value in rows.items()}, folder / "rows.safetensors")
    command = [sys.executable, "-m", "benchmarks.memory_bare", str(folder), plan.config.model.device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def replica_peak(plan: Plan, place: Path, make_executor: MakeExecutor) -> tuple[int, int]:
    """Return the peak of the replica of a whole sweep in bytes, and the rows that were chosen for it."""
    peaks = [0]

    def look(event: object, unit: object) -> None:
        # The mark never falls, so what is read last, while the replica still lives, is its peak.
        peaks.append(max((mark(process.pid) for process in workers()), default=0) or mark("self"))

    result = run_sweep(plan, place, make_executor=make_executor, observe=look)
    if result.failed or result.pending:
        raise RuntimeError(f"the sweep did not end well: {result}")
    rows = RowsRecord(place).read()
    assert rows is not None
    if plan.config.model.device == "cuda":
        return max(int(entry.get("gpu_bytes", 0)) for entry in Journal(place).entries()), rows
    return max(peaks), rows


def workers() -> list[psutil.Process]:
    """Return the processes of this one's Ray that can be replicas."""
    found = []
    for process in processes.started():
        with suppress(psutil.Error):
            if processes.kind_of(" ".join(process.cmdline())) == "worker":
                found.append(process)
    return found


def mark(number: int | str) -> int:
    """Return the high-water mark of a process; 0 if it is gone."""
    try:
        return peak_of_process(number)
    except OSError:
        return 0


def main(arguments: Sequence[str] | None = None, measured: Callable[..., dict[str, Any]] = measure) -> int:
    """Measure and print."""
    bench = Bench(__doc__)
    bench.parser.add_argument("--quick", action="store_true", help="four steps instead of twenty")
    args = bench.parser.parse_args(arguments)
    return bench.conclude(args, measured(quick=args.quick), TARGETS)


if __name__ == "__main__":
    sys.exit(main())
