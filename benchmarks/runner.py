"""Benchmarks one after the other, each in a process of its own, and what they found kept in one file.

Each prints its figures, and each target beside its figure. The exit code is 1 if a target is missed or a benchmark
fails; whatever a benchmark has started is gone once it has ended.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks import processes
from benchmarks.figures import sentence

ROOT = Path(__file__).parents[1]
_PATIENCE_S = 20.0
_SHOWN_LINES = 30


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "ray": version("ray"),
        "zarr": version("zarr"),
    }


def run(command: Sequence[str], result: Path, log: Path) -> dict[str, Any] | None:
    """Run one benchmark; return what it has written into ``result``, None if it failed before.

    Parameters
    ----------
    log : takes what it writes to its standard error.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    processes.adopt_orphans()
    others = set(processes.started())
    with log.open("wb") as errors:
        process = subprocess.Popen([*command, "--json", str(result)], cwd=ROOT, env=environment, stderr=errors)
        try:
            process.wait()
        finally:
            # Told to end, it ends in good order; what it leaves behind nonetheless is killed.
            process.terminate()
            process.wait()
            killed = processes.take_away(set(processes.started()) - others, _PATIENCE_S)
    if killed:
        print(f"it left processes behind, which were killed: {killed}", flush=True)
    if not result.exists():
        lines = log.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
        print("\n".join([*lines, f"it ended with code {process.returncode} and without figures"]), flush=True)
        return None
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def run_all(commands: Mapping[str, Sequence[str]], out: Path) -> int:
    """Run benchmarks one after the other, keep what they found in ``out``, and return the exit code.

    What ``out`` has of other benchmarks stays.
    """
    before = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    told = {"machine": machine(), "benchmarks": dict(before.get("benchmarks", {}))}
    verdicts, failed = [], False
    for name, command in commands.items():
        print(f"\n== {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found = run(command, Path(folder, "result.json"), Path(folder, "log"))
        if found is None:
            failed = True
            verdicts.append(f"FAIL: {name} has no figures")
            continue
        told["benchmarks"][name] = found
        out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        failed = failed or not all(target["met"] for target in found["targets"])
        verdicts += map(sentence, found["targets"])
    print("\n== targets", *verdicts, sep="\n", flush=True)
    return 1 if failed else 0


def main(description: str | None, benchmarks: Sequence[str], out: str, options: Sequence[str] = ()) -> int:
    """Run what was chosen on the command line.

    Parameters
    ----------
    benchmarks : modules of this package that there are. out : file in ``docs`` for the results.
    options : more words that every benchmark is given.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / out)
    parser.add_argument("--only", nargs="+", choices=benchmarks, default=benchmarks)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    return run_all({name: [sys.executable, "-m", f"benchmarks.{name}", *options] for name in args.only}, args.out)
