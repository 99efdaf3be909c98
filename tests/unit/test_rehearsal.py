"""Rehearsals in processes of their own: how many, what they agree on, and what is said when one cannot."""

from __future__ import annotations

import json
import os
import sys

import pytest

from pipeline import rehearsal as module
from pipeline.calibrate import Calibration, CellCost
from pipeline.config import SweepConfig
from pipeline.models import ModelError
from pipeline.permissions import Permissions
from pipeline.plan import make_plan
from pipeline.rehearsal import mean, processes_for, rehearse


def plan_of(permissions=None, **changes):
    raw = {
        "name": "rehearsal",
        "model": {"id": "embedded:maze"},
        "task": {"name": "maze", "mazes": 1, "pairs": ["red/blue"]},
        "sampler": {"steps": 2},
        "metrics": ["goal_evidence"],
        "experiments": {"map": {"kind": "patch", "step": "all", "layer": [0, 1]}},
        "previews": {"samples": []},
        **changes,
    }
    return make_plan(SweepConfig.model_validate(raw), permissions=permissions or Permissions())


class TestHowMany:
    @pytest.mark.parametrize(
        ("run", "engine", "address", "count"),
        [
            ({"replicas": 0}, {}, "", 0),
            ({"replicas": 1}, {}, "", 1),
            ({"replicas": 3}, {}, "", 3),
            ({"replicas": 99}, {}, "", module.MOST_PROCESSES),
            ({"replicas": 99}, {"threads": 4}, "", 2),
            ({"replicas": 99}, {"threads": 99}, "", 1),
            ({"replicas": 3, "gpus_per_replica": 1}, {}, "", 1),
            ({"replicas": 3}, {}, "10.0.0.1:6379", 1),
        ],
        ids=[
            "inline",
            "one",
            "each",
            "only a few",
            "as cores allow",
            "threads for all",
            "own GPUs",
            "a cluster",
        ],
    )
    def test_processes(self, run, engine, address, count, monkeypatch):
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert processes_for(plan_of(run=run, engine=engine)) == count


def calibration(record_s, rows=4, **cells):
    costs = {name: CellCost(group_s=cost, forward_s=2 * cost) for name, cost in cells.items()}
    return Calibration(record_s=record_s, measure_s=1.0, preview_s=0.0, screen_s=0.0, cells=costs, rows=rows)


class TestMean:
    def test_of_one_is_itself(self):
        assert mean([calibration(1.0, a=2.0)]) == calibration(1.0, a=2.0)

    def test_is_taken_figure_by_figure(self):
        assert mean([calibration(1.0, a=2.0), calibration(3.0, a=4.0)]) == calibration(2.0, a=3.0)

    def test_an_experiment_that_one_has_not_timed_is_of_the_others(self):
        assert mean([calibration(1.0, a=2.0), calibration(1.0, a=2.0, b=5.0)]) == calibration(1.0, a=2.0, b=5.0)


class TestProcesses:
    def test_two_at_once_time_the_same_plan(self, monkeypatch):
        monkeypatch.setattr(os, "cpu_count", lambda: 2)
        found = rehearse(plan_of(run={"replicas": 2}))
        assert found.rows == 18
        assert set(found.cells) == {"map"}
        assert min(found.start_s, found.record_s, found.measure_s, found.cells["map"].forward_s) > 0

    def test_what_the_command_allowed_holds_there_too(self, tmp_path, monkeypatch):
        (tmp_path / "own_metrics.py").write_text("def brightness(given):\n    return given.video.mean((1, 2, 3, 4))\n")
        monkeypatch.chdir(tmp_path)
        allowed = Permissions(metrics=("own_metrics:brightness",), folder=str(tmp_path))
        allowed.apply()
        try:
            plan = plan_of(allowed, metrics=["own_metrics:brightness"], run={"replicas": 1})
            assert rehearse(plan).measure_s > 0
        finally:
            Permissions().apply()

    def test_a_model_that_cannot_be_loaded_is_one_sentence(self, tmp_path, monkeypatch):
        plan = plan_of(run={"replicas": 1}, model={"id": "embedded:maze", "device": "cuda"})
        with pytest.raises(ModelError, match="no CUDA device is seen here"):
            rehearse(plan)

    @pytest.mark.parametrize(
        ("code", "said"),
        [
            ("raise SystemExit('not enough of anything')", "has ended: not enough of anything"),
            ("import os; os._exit(3)", "has ended: exit code 3"),
            ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "has ended: exit code -9"),
        ],
        ids=["says why", "says nothing", "is killed"],
    )
    def test_a_process_that_dies_is_one_sentence(self, code, said, tmp_path, monkeypatch):
        script = tmp_path / "python"
        script.write_text(f"#!{sys.executable}\n{code}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        with pytest.raises(ModelError, match=rf"{said}\. Plan without it: --no-calibrate"):
            rehearse(plan_of(run={"replicas": 1}))

    def test_libraries_that_print_do_not_come_between_the_answers(self, monkeypatch, capsys):
        class Input:
            lines = iter(
                [
                    json.dumps(
                        {"config": plan_of().config.model_dump(mode="json"), "permissions": {"metrics": []}, "began": 0}
                    ),
                    "{}",
                ]
            )

            def readline(self):
                return next(self.lines)

        def perform(plan, began, ready):
            print("Loading pipeline components")
            ready()
            print("done")
            return calibration(1.0, a=2.0)

        monkeypatch.setattr(sys, "stdin", Input())
        monkeypatch.setattr(module, "perform", perform)
        out = sys.stdout
        try:
            module.main()
        finally:
            sys.stdout = out
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert lines[0] == {"ready": True}
        assert Calibration.of(lines[1]) == calibration(1.0, a=2.0)
