"""The command line as a user meets it: exit codes, what is printed where, and one sentence for every mistake."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import zarr

from pipeline.cli import BAD_INPUT, FAILED, INTERRUPTED, OK, main
from pipeline.store import Journal, Lease, open_store

ROOT = Path(__file__).parents[2]
TINY = """\
name: tiny
model:
  id: embedded:maze
task:
  name: maze
  mazes: 1
sampler:
  steps: 3
metrics: [goal_evidence]
experiments:
  map:
    kind: patch
    step: all
    layer: [0]
previews:
  samples: []
run:
  replicas: 0
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An own working directory with a good config in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(TINY)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a config and its finished store."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "c.yaml").write_text(TINY)
    assert main(["run", str(folder / "c.yaml"), "--store", str(folder / "run.zarr")]) == OK
    return folder


def script(*arguments, cwd):
    """Run the installed entry point in a process of its own."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pipeline.cli import console; console()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd
    )


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            pytest.param(["rnu"], 'Unknown command "rnu". Did you mean "run"?', id="command-typo"),
            pytest.param(["run"], "requires an argument", id="config-missing"),
            pytest.param(["plan", "c.yaml", "--stroe", "x"], "Unknown option", id="option-typo"),
            pytest.param(["plan", "c.yaml", "d.yaml"], "Unused", id="two-configs"),
            pytest.param(["run", "c.yaml", "--replicas", "many"], "many", id="replicas-word"),
            pytest.param(["run", "c.yaml", "--replicas"], "requires an argument", id="replicas-without-value"),
            pytest.param(["effects", "x.zarr", "--seed", "two"], "two", id="seed-word"),
            pytest.param(["effects", "x.zarr", "--seed", "1.5"], "1.5", id="seed-fraction"),
            pytest.param(["effects", "x.zarr", "--replicates", "1e3"], "1e3", id="replicates-exponent"),
            pytest.param(["run", "c.yaml", "--replicas", "0.4"], "0.4", id="replicas-fraction"),
            pytest.param(["models", "extra"], "extra", id="argument-of-a-command-without"),
            pytest.param(["plan", "c.yaml", "--json=maybe"], "maybe", id="flag-with-word"),
        ],
    )
    def test_wrong_arguments_are_one_line(self, here, capsys, arguments, message):
        assert main(arguments) == BAD_INPUT
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("stepscope: ")
        assert message in captured.err
        assert captured.err.count("\n") == 1


BAD_CONFIGS = [
    pytest.param(
        "  steps: 3",
        "  stpes: 3",
        "c.yaml:8: sampler.stpes: unknown key 'stpes': did you mean 'steps'?",
        id="unknown-key",
    ),
    pytest.param(
        "  steps: 3", "  steps: three", "c.yaml:8: sampler.steps: Input should be a valid integer", id="wrong-type"
    ),
    pytest.param(
        "embedded:maze",
        "embedded:mase",
        "unknown embedded model 'embedded:mase'. Did you mean 'embedded:maze'?",
        id="model",
    ),
    pytest.param("embedded:maze", "/no/such/model", "unknown model '/no/such/model'", id="model-folder"),
    pytest.param(
        "[goal_evidence]",
        "[gaol_evidence]",
        "c.yaml:9: metrics.0: unknown metric 'gaol_evidence': did you mean 'goal_",
        id="metric",
    ),
    pytest.param(
        "  name: maze", "  name: amaze", "c.yaml:5: task.name: unknown task 'amaze': did you mean 'maze'?", id="task"
    ),
    pytest.param(
        "kind: patch",
        "kind: ptach",
        "c.yaml:12: experiments.map.kind: unknown intervention 'ptach': did you mean 'patch'?",
        id="kind",
    ),
    pytest.param(
        "step: all",
        "step: 3",
        "c.yaml:13: experiments.map.step: 3 is out of range; this model and sampler have steps 0 to 2",
        id="step",
    ),
    pytest.param(
        "layer: [0]",
        "layer: [6]",
        "c.yaml:14: experiments.map.layer: 6 is out of range; this model and sampler have layers 0",
        id="layer",
    ),
    pytest.param(
        "layer: [0]", "layer: [0]\n    frame: 6", "c.yaml:15: experiments.map.frame: 6 is out of range", id="frame"
    ),
    pytest.param(
        "layer: [0]", "layer: []", "c.yaml:14: experiments.map.layer: an empty list sweeps nothing", id="empty-axis"
    ),
    pytest.param(
        "layer: [0]", "layer: [0]\n    component: mlp", "'attn1', 'attn2' or 'ffn', got 'mlp'", id="component"
    ),
    pytest.param(
        "layer: [0]", "layer: [0]\n    branch: uncond", "branch 'uncond' is not computed by this sampler", id="branch"
    ),
    pytest.param(
        "patch\n    step: all\n    layer: [0]",
        "noise\n    at: step",
        "c.yaml:11: experiments.map: give step with",
        id="noise-without-step",
    ),
    pytest.param(
        "patch\n    step: all\n    layer: [0]",
        "frame_shuffle\n    mode: freeze\n    step: 1",
        "frame is needed with `mode: freeze`",
        id="freeze",
    ),
    pytest.param(
        "patch\n    step: all\n    layer: [0]",
        "step_skip\n    mode: reuse\n    step: 0",
        "start at step 1",
        id="reuse-at-0",
    ),
    pytest.param(
        "  mazes: 1",
        "  mazes: 0",
        "c.yaml:6: task.mazes: Input should be greater than or equal to 1, got 0",
        id="zero-samples",
    ),
    pytest.param(
        "samples: []",
        "samples: [1]",
        "c.yaml:16: previews.samples.0: sample 1 does not exist; there are samples 0 to 0",
        id="preview",
    ),
    pytest.param("name: tiny", "name: [tiny", "not valid YAML", id="invalid-yaml"),
    pytest.param(
        "name: tiny", "name: tiny\nname: tin", "c.yaml:2: key name is given twice (first on line 1)", id="duplicate-key"
    ),
    pytest.param("name: tiny", "name: &a [*a]", "an alias inside of what it names", id="alias-of-itself"),
    pytest.param("kind: patch", "kind: [patch]", "unknown intervention ['patch']", id="kind-list"),
    pytest.param("  name: maze", "  name: {maze: 1}", "unknown task {'maze': 1}", id="task-mapping"),
]


class TestBadConfig:
    @pytest.mark.parametrize("command", [["plan", "--no-calibrate"], ["run"]], ids=["plan", "run"])
    @pytest.mark.parametrize(("old", "new", "message"), BAD_CONFIGS)
    def test_fault_is_one_sentence_and_nothing_is_made(self, here, capsys, command, old, new, message):
        assert TINY.count(old) == 1
        (here / "c.yaml").write_text(TINY.replace(old, new))
        assert main([command[0], "c.yaml", *command[1:]]) == BAD_INPUT
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("stepscope: ")
        assert message in captured.err
        assert "Traceback" not in captured.err
        assert captured.err.count("\n") == 1
        assert [p.name for p in here.iterdir()] == ["c.yaml"]

    def test_every_fault_is_a_line(self, here, capsys):
        (here / "c.yaml").write_text(
            TINY.replace("mazes: 1", "mazes: 0").replace("steps: 3", "stpes: 3").replace("patch", "pach")
        )
        assert main(["run", "c.yaml"]) == BAD_INPUT
        lines = capsys.readouterr().err.removeprefix("stepscope: ").splitlines()
        assert [line.split(": ")[:2] for line in lines] == [
            ["c.yaml:6", "task.mazes"],
            ["c.yaml:8", "sampler.stpes"],
            ["c.yaml:12", "experiments.map.kind"],
        ]

    @pytest.mark.parametrize(
        ("path", "reason"),
        [
            pytest.param("no.yaml", "cannot read config no.yaml: No such file or directory", id="missing"),
            pytest.param(".", "cannot read config .: Is a directory", id="folder"),
            pytest.param("c.yaml/x", "cannot read config c.yaml/x: Not a directory", id="below-a-file"),
            pytest.param("binary.yaml", "cannot read config binary.yaml: not UTF-8 text", id="binary"),
            pytest.param("empty.yaml", "empty.yaml:1: no settings in it", id="empty"),
        ],
    )
    def test_file_that_cannot_be_read(self, here, capsys, path, reason):
        (here / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
        (here / "empty.yaml").write_text("")
        assert main(["plan", path, "--no-calibrate"]) == BAD_INPUT
        assert capsys.readouterr().err.startswith(f"stepscope: {reason}")

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            pytest.param(
                "sampler.steps",
                "--set 'sampler.steps': expected key.path=value, for example --set sampler.steps=10",
                id="no-equals",
            ),
            pytest.param("=1", "--set '=1': expected key.path=value", id="no-key"),
            pytest.param("name.x=1", "--set 'name.x=1': name is 'tiny', not a mapping", id="below-a-word"),
            pytest.param("metrics=[a", "--set 'metrics=[a': not valid YAML", id="bad-yaml"),
            pytest.param(
                "sampler.stpes=1", "--set: sampler.stpes: unknown key 'stpes': did you mean 'steps'?", id="unknown-key"
            ),
            pytest.param(
                "sampler.steps=no", "--set: sampler.steps: Input should be a valid integer, got 'no'", id="wrong-type"
            ),
            pytest.param(
                "task.mazes=0",
                "--set: task.mazes: Input should be greater than or equal to 1, got 0",
                id="zero-samples",
            ),
            pytest.param(
                "experiments.map.layer=9", "--set: experiments.map.layer: 9 is out of range", id="out-of-range"
            ),
        ],
    )
    def test_override_that_cannot_be_used(self, here, capsys, override, message):
        assert main(["plan", "c.yaml", "--no-calibrate", "--set", override]) == BAD_INPUT
        captured = capsys.readouterr().err
        assert captured.startswith(f"stepscope: {message}")
        assert captured.count("\n") == 1

    def test_negative_replicas(self, here, capsys):
        assert main(["run", "c.yaml", "--replicas", "-1"]) == BAD_INPUT
        assert "run.replicas: Input should be greater than or equal to 0, got -1" in capsys.readouterr().err


class TestBadStore:
    @pytest.mark.parametrize("command", ["status", "effects", "report"])
    @pytest.mark.parametrize(
        ("path", "what"),
        [
            pytest.param(
                "no.zarr", "no.zarr does not exist. Create one with: stepscope run CONFIG --store no.zarr", id="missing"
            ),
            pytest.param("c.yaml", "c.yaml is not a stepscope store.", id="file"),
            pytest.param(".", ". is not a stepscope store.", id="folder"),
            pytest.param("c.yaml/x", "c.yaml/x does not exist.", id="below-a-file"),
            pytest.param("n" * 300, "does not exist.", id="long-name"),
            pytest.param("other.zarr", "other.zarr is not a stepscope store.", id="zarr-of-others"),
        ],
    )
    def test_path_that_is_no_store(self, here, capsys, command, path, what):
        zarr.create_group("other.zarr")
        assert main([command, path]) == BAD_INPUT
        captured = capsys.readouterr()
        assert captured.out == ""
        assert what in captured.err
        assert captured.err.count("\n") == 1

    @pytest.mark.parametrize(
        ("path", "what"),
        [
            pytest.param("c.yaml", "c.yaml exists and is not a stepscope store. Use another --store.", id="file"),
            pytest.param(".", ". has no name of its own.", id="working-directory"),
            pytest.param("filled", "filled exists and is not a stepscope store.", id="filled-folder"),
            pytest.param("c.yaml/run.zarr", "cannot create store c.yaml/run.zarr: ", id="parent-is-a-file"),
            pytest.param("/proc/nowhere/run.zarr", "cannot create store /proc/nowhere/run.zarr: ", id="not-writable"),
            pytest.param("n" * 300, "File name too long. Choose a writable --store.", id="long-name"),
        ],
    )
    def test_place_where_no_store_can_be(self, here, capsys, path, what):
        (here / "filled").mkdir()
        (here / "filled" / "x").write_text("x")
        assert main(["run", "c.yaml", "--store", path]) == BAD_INPUT
        captured = capsys.readouterr().err
        assert what in captured
        assert captured.count("\n") == 1
        assert sorted(p.name for p in here.iterdir()) == ["c.yaml", "filled"]

    def test_store_of_another_config_names_the_keys(self, finished, capsys):
        code = main(
            ["run", str(finished / "c.yaml"), "--store", str(finished / "run.zarr"), "--set", "sampler.steps=4"]
        )
        captured = capsys.readouterr().err
        assert code == BAD_INPUT
        assert captured.count("\n") == 1
        assert "holds another config. Differing: sampler.steps is 3 in the store, 4 in the config." in captured

    def test_store_that_another_process_drives(self, finished, capsys):
        lease = Lease(finished / "run.zarr")
        lease.acquire()
        try:
            assert main(["run", str(finished / "c.yaml"), "--store", str(finished / "run.zarr")]) == BAD_INPUT
        finally:
            lease.release()
        assert "is being driven by process" in capsys.readouterr().err

    @pytest.mark.parametrize("option", [["--replicates", "0"], ["--replicates=-1"], ["--seed=-1"]], ids="".join)
    def test_numbers_of_the_bootstrap_out_of_range(self, finished, capsys, option):
        assert main(["effects", str(finished / "run.zarr"), *option]) == BAD_INPUT
        captured = capsys.readouterr().err
        assert captured.startswith("stepscope: out of range: --replicates ")
        assert captured.endswith("They start at 1 and 0.\n")

    def test_report_before_effects_says_what_to_run_first(self, finished, capsys):
        assert main(["report", str(finished / "run.zarr")]) == BAD_INPUT
        store = finished / "run.zarr"
        assert (
            capsys.readouterr().err == f"stepscope: {store} has no effects yet. Run first: stepscope effects {store}\n"
        )

    def test_report_into_a_place_that_cannot_be_written(self, finished, capsys, monkeypatch):
        def refuse(store, out):
            (out / "report.html").write_text("x")

        import pipeline.report

        monkeypatch.setattr(pipeline.report, "write_report", refuse)
        zarr.open_group(str(finished / "run.zarr"), use_consolidated=False).create_group("effects")
        try:
            code = main(["report", str(finished / "run.zarr"), "--out", str(finished / "c.yaml")])
        finally:
            shutil.rmtree(finished / "run.zarr" / "effects")
        assert code == BAD_INPUT
        captured = capsys.readouterr().err
        assert (
            captured
            == f"stepscope: {finished}/c.yaml/report.html: Not a directory. Choose a path that can be written.\n"
        )


class TestPlan:
    def test_says_what_a_sweep_would_take(self, here, capsys):
        assert main(["plan", "c.yaml", "--no-calibrate"]) == OK
        text = capsys.readouterr().out
        assert re.search(r"map\s+step 3 x layer 1", text)
        for fact in ("cells", "units", "row forwards", "bytes", "store"):
            assert re.search(rf"^\s+{fact}\s", text, re.MULTILINE), fact
        assert [p.name for p in here.iterdir()] == ["c.yaml"]

    def test_json_is_the_same_in_numbers(self, here, capsys):
        assert main(["plan", "c.yaml", "--no-calibrate", "--json"]) == OK
        facts = json.loads(capsys.readouterr().out)
        assert (facts["samples"], facts["cells"], facts["units"]) == (1, 3, 2)
        assert facts["experiments"] == {"map": {"step": 3, "layer": 1}}
        assert facts["store"] == "runs/tiny.zarr"
        assert "estimated_seconds" not in facts

    def test_overrides_count(self, here, capsys):
        main(["plan", "c.yaml", "--no-calibrate", "--json", "--set", "task.mazes=5", "--set", "sampler.steps=2"])
        facts = json.loads(capsys.readouterr().out)
        assert (facts["samples"], facts["cells"]) == (5, 10)

    @pytest.mark.parametrize(
        ("override", "rows"), [([], 18), (["--set", "engine.batch_rows=7"], 7)], ids=["default", "given"]
    )
    def test_names_the_rows_of_a_forward(self, here, capsys, override, rows):
        assert main(["plan", "c.yaml", "--no-calibrate", "--json", *override]) == OK
        assert json.loads(capsys.readouterr().out)["batch_rows"] == rows

    def test_rows_left_to_the_tool_are_known_once_they_were_measured(self, here, capsys, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        auto = ["c.yaml", "--set", "engine.batch_rows=auto", "--set", "experiments.map.layer=all"]
        main(["plan", *auto, "--no-calibrate"])
        assert re.search(r"^ +batch rows  auto$", capsys.readouterr().out, re.MULTILINE)
        main(["plan", *auto, "--json"])
        measured = json.loads(capsys.readouterr().out)
        assert 1 <= measured["batch_rows"] <= 6
        main(["plan", *auto, "--no-calibrate", "--json"])
        known = json.loads(capsys.readouterr().out)
        assert known["batch_rows"] == measured["batch_rows"]
        assert known["row_forwards"] == measured["row_forwards"]

    def test_calibration_adds_a_duration(self, here, capsys):
        assert main(["plan", "c.yaml", "--json"]) == OK
        facts = json.loads(capsys.readouterr().out)
        assert facts["seconds_per_row_forward"] > 0
        assert facts["estimated_seconds"] >= 0

    def test_demo_can_be_planned(self, here, capsys):
        assert main(["plan", str(ROOT / "configs" / "maze_demo.yaml"), "--no-calibrate", "--json"]) == OK
        assert json.loads(capsys.readouterr().out)["samples"] == 16


class TestRun:
    def test_finished_store_is_done(self, finished, capsys):
        assert main(["status", str(finished / "run.zarr"), "--json"]) == OK
        told = json.loads(capsys.readouterr().out)
        counts = {"units": 1, "done": 1, "pending": 0, "failed": 0}
        assert told["groups"] == [
            {"group": "baseline", **counts, "cells": 2, "cells_done": 2, "cells_pending": 0},
            {"group": "map", **counts, "cells": 3, "cells_done": 3, "cells_pending": 0},
        ]
        assert told["state"] == "finished"

    def test_status_is_a_table(self, finished, capsys):
        assert main(["status", str(finished / "run.zarr")]) == OK
        header, *rows = capsys.readouterr().out.splitlines()
        assert header.split() == ["group", "units", "done", "pending", "failed"]
        assert [row.split() for row in rows[:2]] == [["baseline", "1", "1", "0", "0"], ["map", "1", "1", "0", "0"]]
        assert re.fullmatch(r".*/run\.zarr: finished; last heard of .* ago", rows[3])
        assert [row.split()[0] for row in rows[4:]] == ["speed", "work", "replicas", "driver"]

    def test_same_command_again_computes_nothing(self, finished, capsys):
        before = len(list(Journal(finished / "run.zarr").entries()))
        assert main(["run", str(finished / "c.yaml"), "--store", str(finished / "run.zarr")]) == OK
        assert "(0 computed now)" in capsys.readouterr().err
        assert len(list(Journal(finished / "run.zarr").entries())) == before

    def test_store_goes_to_runs_by_default(self, here, capsys):
        assert main(["run", "c.yaml", "--set", "name=elsewhere"]) == OK
        assert open_store(here / "runs" / "elsewhere.zarr").groups() == ["baseline", "map"]
        assert "Done: 2 units in runs/elsewhere.zarr (2 computed now)." in capsys.readouterr().err

    def test_failed_units_are_exit_code_1_of_status(self, finished, capsys, tmp_path):
        import shutil

        copy = Path(shutil.copytree(finished / "run.zarr", tmp_path / "copy.zarr"))
        Journal(copy).append(unit=1, group="map", index=0, error="boom")
        assert main(["status", str(copy)]) == FAILED
        lines = capsys.readouterr().out.splitlines()
        assert lines[2].split() == ["map", "1", "0", "0", "1"]
        assert lines[-3:] == ["failures by cause:", "  1 unit: boom", "      map 0"]

    @pytest.mark.parametrize(
        ("result", "code", "words"),
        [
            pytest.param({"done": 2, "computed": 2}, OK, ["Done: 2 units in x.zarr (2 computed now)."], id="done"),
            pytest.param(
                {"done": 1, "failed": 1, "failed_cells": 3, "errors": ["unit 1 (map, sample 0): boom"]},
                FAILED,
                [
                    "1 units hold failures: 3 cells have no finite value",
                    "unit 1 (map, sample 0): boom",
                    "Running the same command",
                ],
                id="failed",
            ),
            pytest.param(
                {"done": 1, "pending": 1, "stopped": "SIGTERM"},
                INTERRUPTED,
                [
                    "Interrupted (SIGTERM): 1 units are safe in x.zarr, 1 are left.",
                    "Resume with: stepscope run c.yaml --store x.zarr",
                ],
                id="interrupted",
            ),
        ],
    )
    def test_end_of_a_sweep_has_its_exit_code_and_words(self, here, capsys, monkeypatch, result, code, words):
        from pipeline import sweep

        monkeypatch.setattr(sweep, "run_sweep", lambda *args, **options: sweep.SweepResult(**result))
        arguments = ["run", "c.yaml", "--store", "x.zarr"]
        monkeypatch.setattr(sys, "argv", ["stepscope", *arguments])
        assert main(arguments) == code
        told = capsys.readouterr().err
        assert all(word in told for word in words), told

    def test_interrupt_outside_the_sweep_is_one_word(self, here, capsys, monkeypatch):
        from pipeline import sweep

        def interrupt(*args, **options):
            raise KeyboardInterrupt

        monkeypatch.setattr(sweep, "run_sweep", interrupt)
        assert main(["run", "c.yaml"]) == INTERRUPTED
        assert capsys.readouterr().err.splitlines()[-1] == "Interrupted."

    def test_own_bug_is_not_dressed_as_bad_input(self, here, monkeypatch):
        from pipeline import sweep

        def fail(*args, **options):
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(sweep, "run_sweep", fail)
        with pytest.raises(ZeroDivisionError, match="a bug"):
            main(["run", "c.yaml"])


class TestProcess:
    """A few checks in a process of its own: exit codes reach the shell, and nothing prints a traceback."""

    def test_help(self, tmp_path):
        done = script("--help", cwd=tmp_path)
        assert done.returncode == OK
        assert "Usage: stepscope" in done.stdout
        assert done.stderr == ""

    def test_bad_config(self, here):
        (here / "c.yaml").write_text(TINY.replace("steps: 3", "stpes: 3").replace("mazes: 1", "mazes: 0"))
        done = script("run", "c.yaml", cwd=here)
        assert done.returncode == BAD_INPUT
        assert done.stdout == ""
        lines = done.stderr.splitlines()
        assert len(lines) == 2
        assert lines[0].startswith("stepscope: c.yaml:6: task.mazes: ")
        assert lines[1].startswith("c.yaml:8: sampler.stpes: ")

    def test_missing_store(self, tmp_path):
        done = script("status", "no.zarr", cwd=tmp_path)
        assert done.returncode == BAD_INPUT
        assert done.stderr.splitlines() == [
            "stepscope: no.zarr does not exist. Create one with: stepscope run CONFIG --store no.zarr"
        ]

    def test_whole_sweep(self, here):
        done = script("run", "c.yaml", "--store", "run.zarr", cwd=here)
        assert done.returncode == OK, done.stderr
        assert done.stdout == ""
        assert "2 of 2 units to run" in done.stderr
        assert done.stderr.splitlines()[-1] == "Done: 2 units in run.zarr (2 computed now)."


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=["disk", "quota"])
def test_a_full_disk_is_one_sentence(here, capsys, monkeypatch, code):
    import pipeline.sweep

    def full(*args, **kwargs):
        raise OSError(code, "No space left on device")

    monkeypatch.setattr(pipeline.sweep, "run_sweep", full)
    assert main(["run", "c.yaml", "--replicas", "0"]) == BAD_INPUT
    assert capsys.readouterr().err.count("the disk is full") == 1


@pytest.mark.parametrize("out", ["c.yaml", "c.yaml/deep", "/proc/nowhere", "x" * 300, "loop/x"])
def test_a_path_that_cannot_be_is_one_sentence(here, capsys, monkeypatch, out):
    """Whatever a command does with it, on whatever kind of file system."""
    import pipeline.sweep

    os.symlink("loop", here / "loop")

    def write(*args, **kwargs):
        Path(out).mkdir(parents=True)

    monkeypatch.setattr(pipeline.sweep, "run_sweep", write)
    assert main(["run", "c.yaml", "--replicas", "0"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stepscope: ")
    assert line.endswith(". Choose a path that can be written.")
