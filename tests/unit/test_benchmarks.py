"""What benchmarks share: targets, the runner, what it leaves behind, and the counting of requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

from benchmarks import counted, processes, runner
from benchmarks.counted import DRIVER, REPLICA, Tally
from benchmarks.figures import Bench, Target, sentence
from benchmarks.million_units import NoWork, config_of, measure
from pipeline.plan import make_plan


class TestTarget:
    @pytest.mark.parametrize(
        ("bound", "value", "met"),
        [
            ("at least", 999, False),
            ("at least", 1000, True),
            ("at least", 1001, True),
            ("at most", 999, True),
            ("at most", 1000, True),
            ("at most", 1001, False),
        ],
        ids=["below least", "equals least", "above least", "below most", "equals most", "above most"],
    )
    def test_bounds(self, bound, value, met):
        target = Target(what="units a second", figure="rates.median", bound=bound, limit=1000)
        judged = target.judge({"rates": {"median": value}})
        assert (judged["value"], judged["met"]) == (value, met)
        verdict = "pass" if met else "FAIL"
        assert sentence(judged) == f"{verdict}: units a second: {value:,}, target {bound} 1,000"

    def test_a_figure_that_is_not_there_is_no_pass(self):
        with pytest.raises(KeyError):
            Target(what="units", figure="units", bound="at most", limit=0).judge({})


class TestBench:
    TARGET = Target(what="units", figure="units", bound="at least", limit=10)

    @pytest.mark.parametrize(("units", "code"), [(10, 0), (9, 1)], ids=["met", "missed"])
    def test_exit_code_output_and_file(self, units, code, tmp_path, capsys):
        bench = Bench("a benchmark")
        args = bench.parser.parse_args(["--json", str(tmp_path / "result.json")])
        assert bench.conclude(args, {"units": units}, [self.TARGET]) == code
        shown = capsys.readouterr().out
        assert f"units: {units}, target at least 10" in shown
        assert "load of the machine" in shown
        kept = json.loads((tmp_path / "result.json").read_text())
        assert kept["figures"] == {"units": units}
        assert [target["met"] for target in kept["targets"]] == [code == 0]
        assert len(kept["load_before"]) == len(kept["load_after"]) == 3

    def test_without_a_file_only_printed(self, capsys):
        bench = Bench(None)
        assert bench.conclude(bench.parser.parse_args([]), {"units": 12}) == 0
        assert '"units": 12' in capsys.readouterr().out


def script(tmp_path: Path, name: str, body: str) -> list[str]:
    """Return the command of a benchmark with a body of its own."""
    path = tmp_path / f"{name}.py"
    path.write_text(f"import json, os, subprocess, sys\nfrom pathlib import Path\nout = Path(sys.argv[-1])\n{body}\n")
    return [sys.executable, str(path)]


def result(met: bool, units: int = 7) -> str:
    target = {"what": "units", "figure": "units", "bound": "at least", "limit": 7, "value": units, "met": met}
    return repr(
        {
            "figures": {"units": units},
            "targets": [target],
            "seconds": 1,
            "load_before": [0.0] * 3,
            "load_after": [0.0] * 3,
        }
    )


class TestRunner:
    def writes(self, tmp_path, name, *, met=True, then="", units=7):
        return script(tmp_path, name, f"out.write_text(json.dumps({result(met, units)}))\n{then}")

    @pytest.mark.parametrize(
        ("second", "code", "line"),
        [
            ("met", 0, "pass: units: 7, target at least 7"),
            ("missed", 1, "FAIL: units: 7, target at least 7"),
            ("crashed", 1, "FAIL: second has no figures"),
        ],
        ids=["met", "missed", "crashed"],
    )
    def test_exit_code_and_verdicts(self, second, code, line, tmp_path, capsys):
        commands = {
            "first": self.writes(tmp_path, "first"),
            "second": script(tmp_path, "second", "sys.exit('out of luck')")
            if second == "crashed"
            else self.writes(tmp_path, "second", met=second == "met"),
        }
        assert runner.run_all(commands, tmp_path / "all.json") == code
        shown = capsys.readouterr().out
        assert line in shown.partition("== targets")[2]
        assert ("out of luck" in shown) == (second == "crashed")
        kept = json.loads((tmp_path / "all.json").read_text())
        assert set(kept["benchmarks"]) == {"first"} | ({"second"} if second != "crashed" else set())
        assert kept["machine"]["cores"] == os.cpu_count()

    def test_figures_of_other_benchmarks_stay(self, tmp_path):
        out = tmp_path / "all.json"
        runner.run_all({name: self.writes(tmp_path, name) for name in ("first", "second")}, out)
        runner.run_all({"second": self.writes(tmp_path, "again", units=8)}, out)
        kept = json.loads(out.read_text())["benchmarks"]
        assert {name: found["figures"]["units"] for name, found in kept.items()} == {"first": 7, "second": 8}

    @pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)"], ids=["ends", "is killed"])
    def test_what_a_benchmark_leaves_behind_is_killed(self, end, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(runner, "_PATIENCE_S", 0.1)
        note = tmp_path / "child"
        child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
        start = (
            f"subprocess.Popen([sys.executable, '-c', {child!r}, {str(note)!r}], start_new_session=True)\n"
            f"while not (Path({str(note)!r}).exists() and Path({str(note)!r}).read_text()): pass\n{end}"
        )
        bystander = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
        try:
            command = self.writes(tmp_path, "leaves", then=start)
            assert runner.run(command, tmp_path / "result.json", tmp_path / "log") is not None
            assert bystander.poll() is None
        finally:
            bystander.communicate()
        number = int(note.read_text())
        assert not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE
        assert str(number) in capsys.readouterr().out


class TestProcesses:
    @pytest.mark.parametrize(
        ("command", "kind"),
        [
            ("/x/ray/core/src/ray/gcs/gcs_server --log_dir=/tmp", "gcs"),
            ("/x/ray/core/src/ray/raylet/raylet --agent=dashboard/agent.py", "raylet"),
            ("ray::DashboardAgent", "dashboard agent"),
            ("python dashboard/agent.py", "dashboard agent"),
            ("python dashboard/dashboard.py --host=127.0.0.1", "dashboard"),
            ("ray::RuntimeEnvAgent", "runtime env agent"),
            ("ray::_Replica.run", "worker"),
            ("ray::IDLE", "worker"),
            ("python -m benchmarks.many_nodes", "driver"),
            ("sh", "other"),
        ],
        ids=["gcs", "raylet", "agent", "young agent", "dashboard", "env agent", "replica", "idle", "driver", "other"],
    )
    def test_kinds(self, command, kind):
        assert processes.kind_of(command) == kind

    def test_memory_and_time_are_those_of_the_kind(self):
        busy = "import sys\nx = bytearray(30 * 2**20)\nprint('there', flush=True)\nwhile True: pass  # benchmarks"
        child = subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE)
        try:
            assert child.stdout is not None
            child.stdout.readline()
            (own,) = [process for process in processes.started() if process.pid == child.pid]
            watch = processes.Stopwatch([own])
            while own.cpu_times().user < 0.2:
                pass
            assert 0 < watch.cores()["driver"] < 1.5
            found = processes.memory([own])["driver"]
            assert found["processes"] == 1
            assert 30 <= found["mib_each"] < 60
        finally:
            child.kill()
            child.communicate()
        assert processes.take_away([own]) == []


class TestCountedFolder:
    def test_operations_by_kind_and_by_who_asked(self, tmp_path):
        tally = Tally()
        (tmp_path / "run").mkdir()
        with counted.folder(tmp_path, tally):
            (tmp_path / "run" / "a").write_text("1")
            with tally.replica():
                (tmp_path / "run" / "b").write_text("2")
                (tmp_path / "run" / "b").read_text()
                os.rename(tmp_path / "run" / "b", tmp_path / "run" / "c")
                # A heartbeat comes from a thread of its own.
                (tmp_path / "run" / "lease").mkdir()
            os.listdir(tmp_path / "run")
        (tmp_path / "run" / "d").write_text("3")
        assert tally.of(DRIVER) == {"list": 1, "mkdir": 1, "open to write": 1}
        assert tally.of(REPLICA) == {"open to read": 1, "open to write": 1, "rename": 1}

    def test_another_folder_is_not_counted_and_none_twice(self, tmp_path):
        for name in ("first", "second"):
            (tmp_path / name / "run").mkdir(parents=True)
            tally = Tally()
            with counted.folder(tmp_path / name, tally):
                (tmp_path / name / "run" / "a").write_text("1")
                (tmp_path / "aside").write_text("1")
            assert tally.requests == Counter({(DRIVER, "open to write"): 1})


class TestMillionUnits:
    def test_a_small_one_does_every_unit_and_resumes(self):
        found = measure(300)
        assert found["units"] == 300 == len(make_plan(config_of(300)).layout)
        assert found["mib_above_start"] < 300
        assert found["journal_bytes_a_unit"] > 100

    def test_the_worker_does_nothing(self):
        assert NoWork().run(None).failed == 0
