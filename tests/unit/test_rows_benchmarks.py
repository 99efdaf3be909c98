"""The benchmarks of memory and of the predicted wall time compute what they say, at tiny size and without speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks import memory, wall_time
from benchmarks.memory_bare import peak_of_process
from pipeline.executors import inline_executor


class TestMemory:
    def test_both_peaks_are_real_and_their_ratio_is_given(self):
        found = memory.measure(quick=True, make_executor=inline_executor)
        assert found["bare_mib"] > 150, "torch and diffusers are loaded"
        assert found["replica_mib"] > found["bare_mib"] / 2
        assert found["memory_ratio"] == pytest.approx(found["replica_mib"] / found["bare_mib"], abs=0.01)
        assert 1 <= found["rows_per_forward"] <= 18

    @pytest.mark.parametrize(("ratio", "code"), [(1.29, 0), (1.31, 1)], ids=["within", "beyond"])
    def test_target(self, ratio, code, capsys):
        assert memory.main(["--quick"], lambda quick: {"memory_ratio": ratio}) == code
        assert "target at most 1.3" in capsys.readouterr().out

    def test_the_mark_of_another_process_is_its_own(self):
        code = "x = bytearray(300 * 2**20); del x; print('there', flush=True); input()"
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert child.stdout is not None
            child.stdout.readline()
            assert 300 * 2**20 < peak_of_process(child.pid) < 400 * 2**20
        finally:
            child.communicate(b"\n")
        assert memory.mark(child.pid) == 0
        assert memory.mark("self") == memory.mark(os.getpid()) > 0

    def test_a_sweep_that_fails_gives_no_figure(self, tmp_path, monkeypatch):
        monkeypatch.setattr("pipeline.replica.Computer.fork", lambda *given, **options: 1 / 0)
        with pytest.raises(RuntimeError, match="did not end well"):
            memory.replica_peak(memory.plan_of(quick=True), tmp_path / "run.zarr", inline_executor)


class Commands:
    """Stands for the command line: the plan's prediction, and a sweep of known length on the test's clock."""

    def __init__(self, monkeypatch, predicted, actual):
        self.predicted, self.actual, self.ran, self.now = predicted, actual, [], 0.0
        monkeypatch.setattr(wall_time.time, "perf_counter", lambda: self.now)

    def __call__(self, arguments):
        self.ran.append(list(arguments))
        if arguments[0] == "run":
            self.now += self.actual
            return ""
        return json.dumps({"estimated_seconds": self.predicted})


class TestWallTime:
    @pytest.mark.parametrize(
        ("predicted", "actual", "error", "code"),
        [(80, 100.0, 0.2, 0), (125, 100.0, 0.25, 0), (126, 100.0, 0.26, 1), (70, 100.0, 0.3, 1)],
        ids=["below", "at the bound", "above", "far below"],
    )
    def test_error_is_a_share_of_what_it_took(self, monkeypatch, capsys, predicted, actual, error, code):
        commands = Commands(monkeypatch, predicted, actual)
        assert wall_time.main([], commands) == code
        found = json.loads(capsys.readouterr().out.partition("\n}\n")[0] + "\n}")
        assert found["demo"] == found["reduced"]
        assert found["demo"]["error"] == error

    def test_both_commands_get_the_same_settings(self, monkeypatch):
        commands = Commands(monkeypatch, 1, 1.0)
        assert list(wall_time.measure(quick=True, run=commands)) == ["reduced"]
        plan, run = commands.ran
        settings = [word for override in wall_time.REDUCED for word in ("--set", override)]
        assert (plan[0], run[0]) == ("plan", "run")
        assert plan[-len(settings) :] == run[-len(settings) :] == settings

    def test_a_command_that_fails_says_why(self, tmp_path):
        with pytest.raises(RuntimeError, match=r"plan ended with 2: .*nowhere\.yaml"):
            wall_time.stepscope(["plan", str(tmp_path / "nowhere.yaml")])
