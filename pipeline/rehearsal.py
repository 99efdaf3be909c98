"""A rehearsal: the calibration of as many replicas at once as would share this machine, each in its own process.

``python -m pipeline.rehearsal`` is one of them: settings on its input as JSON, a line when it is ready, a go on its
input, and its calibration on its output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.calibrate import Calibration, CellCost, calibrate
from pipeline.config import AUTO, SweepConfig
from pipeline.models import ModelError
from pipeline.permissions import Permissions
from pipeline.plan import Plan, make_plan

MOST_PROCESSES = 4
"""Replicas that are rehearsed at once; more of them disturb one another no more than that."""
READY, REFUSED = "ready", "refused"
_ROOT = Path(__file__).parents[1]


def rehearse(plan: Plan) -> Calibration:
    """Calibrate a plan as its replicas would run: alone in this process, or several at once that share its cores.

    Raises
    ------
    ModelError : the model cannot be loaded, or refuses its call.
    """
    count = processes_for(plan)
    return perform(plan) if count == 0 else _together(plan, count)


def processes_for(plan: Plan) -> int:
    """Return how many processes a rehearsal needs; 0 is this one."""
    run, engine = plan.config.run, plan.config.engine
    if run.replicas == 0:
        return 0
    if run.gpus_per_replica or os.environ.get("RAY_ADDRESS"):
        # Replicas with a GPU of their own, or on other machines, do not share cores.
        return 1
    return max(1, min(run.replicas, (os.cpu_count() or 1) // engine.threads, MOST_PROCESSES))


def perform(plan: Plan, began: float | None = None, ready: Any = None) -> Calibration:
    """Load the model, prove it like a replica, and calibrate.

    Parameters
    ----------
    began : time at which the process began; now if it is this one's own. ready : called before anything is timed.
    """
    import torch

    from interventions.controls import ControlError
    from pipeline.batching import chosen_rows
    from pipeline.hardware import hardware_of
    from pipeline.replica import load_proven

    began = time.time() if began is None else began
    torch.set_num_threads(plan.config.engine.threads)
    try:
        computer = load_proven(plan)
    except (ModelError, ControlError):
        raise
    except ValueError as error:
        # The pipeline's own checks of its call, which no plan can know.
        raise ModelError(f"model {plan.model.id!r} refuses this run: {error}") from error
    start_s = time.time() - began
    if plan.config.engine.batch_rows == AUTO:
        computer.plan = plan.with_rows(chosen_rows(plan, computer, hardware_of(computer.pipe.device)))
    if ready is not None:
        ready()
    return replace(calibrate(computer), start_s=start_s)


def mean(found: Sequence[Calibration]) -> Calibration:
    """Return the mean of calibrations; an experiment that not all have timed is of those that have."""
    names = dict.fromkeys(name for each in found for name in each.cells)
    cells = {name: _mean_cost(each.cells[name] for each in found if name in each.cells) for name in names}
    seconds = {
        name: fmean(getattr(each, name) for each in found)
        for name in ("record_s", "measure_s", "preview_s", "screen_s", "start_s")
    }
    return Calibration(**seconds, cells=cells, rows=found[0].rows)


def _mean_cost(costs: Iterable[CellCost]) -> CellCost:
    kept = list(costs)
    return CellCost(group_s=fmean(c.group_s for c in kept), forward_s=fmean(c.forward_s for c in kept))


def _together(plan: Plan, count: int) -> Calibration:
    from pipeline.executors import ENVIRONMENT

    paths = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**ENVIRONMENT, **os.environ, "PYTHONPATH": paths}
    settings = {"config": plan.config.model_dump(mode="json"), "permissions": asdict(plan.permissions)}
    children: list[_Child] = []
    try:
        for _ in range(count):
            children.append(_Child(environment))
            children[-1].tell({**settings, "began": time.time()})
        for child in children:
            child.answer()
        for child in children:
            # Only now, so that they compute at the same time.
            child.tell({"go": True})
        return mean([Calibration.of(child.answer()) for child in children])
    finally:
        for child in children:
            child.end()


class _Child:
    """One process of a rehearsal, as the one that started it sees it."""

    def __init__(self, environment: dict[str, str]) -> None:
        # A file, as a pipe that nobody reads would stop a talkative library.
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `end`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.rehearsal"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=environment,
        )

    def tell(self, data: dict[str, Any]) -> None:
        """Send a line; that a process is dead shows where it should answer."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(data) + "\n")
            self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Wait for the next line.

        Raises
        ------
        ModelError : the process says why there is none, or has died.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._said.seek(0)
            said = self._said.read().strip().splitlines() or [f"exit code {code}"]
            raise ModelError(
                f"the process that times the model has ended: {said[-1][:300]}. Plan without it: --no-calibrate."
            )
        answer: dict[str, Any] = json.loads(line)
        if REFUSED in answer:
            raise ModelError(answer[REFUSED])
        return answer

    def end(self) -> None:
        """Kill the process, if it still runs."""
        self._process.kill()
        with suppress(BrokenPipeError):
            self._process.communicate()
        self._said.close()


def main() -> None:
    """Be one of the processes of a rehearsal."""
    # Whatever libraries print must not come between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(data: dict[str, Any]) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    def ready() -> None:
        answer({READY: True})
        sys.stdin.readline()

    told = json.loads(sys.stdin.readline())
    permissions = Permissions(**{**told["permissions"], "metrics": tuple(told["permissions"]["metrics"])})
    permissions.apply()
    try:
        plan = make_plan(SweepConfig.model_validate(told["config"]), checked=True, permissions=permissions)
        answer(perform(plan, told["began"], ready).as_dict())
    except ValueError as error:
        answer({REFUSED: str(error)})


if __name__ == "__main__":
    main()
