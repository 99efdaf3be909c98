"""Watching real sweeps: metrics scraped while one runs, a status while it runs elsewhere, and after it was killed."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from pipeline.cli import BAD_INPUT, FAILED, OK, main
from pipeline.commands import sweeps
from pipeline.config import SweepConfig
from pipeline.plan import make_plan
from pipeline.status import PATIENCE_SECONDS, Watch
from pipeline.store import Journal
from pipeline.sweep import run_sweep
from pipeline.watch import show
from tests.sweep_fixture import save_tiny_model, tiny_config, write_config

ROOT = Path(__file__).parents[2]
UNITS = 2 * (1 + 2 + 1)
"""Of two samples: a baseline, two windows of the map and one of the skip."""
EXPERIMENTS = {
    "map": {"kind": "patch", "step": "all", "layer": "all", "component": ["attn2", "update"]},
    "skip": {"kind": "step_skip", "mode": ["freeze", "drop"], "step": "all"},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A sweep of seconds in eight units."""
    folder = tmp_path_factory.mktemp("watched")
    raw = tiny_config(save_tiny_model(folder / "model"), experiments=EXPERIMENTS, previews={"samples": []})
    return write_config(folder / "c.yaml", raw)


@pytest.fixture(scope="module")
def finished(config):
    store = config.parent / "finished.zarr"
    assert main(["run", str(config), "--store", str(store)]) == OK
    return store


def plan_of(config):
    from pipeline.config import load_config

    return make_plan(load_config(config), config)


def scrape(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {(s.name, *sorted(s.labels.values())): s.value for f in families for s in f.samples}


class Gate:
    """An observer that stops the sweep after its first unit until the test has looked."""

    def __init__(self):
        self.reached, self.open, self.units = threading.Event(), threading.Event(), 0

    def __call__(self, event, unit):
        if type(event).__name__ == "UnitDone":
            self.units += 1
            if self.units == 3:
                self.reached.set()
                assert self.open.wait(60)


def test_metrics_of_a_real_sweep_are_those_of_its_journal(config, tmp_path):
    from pipeline.observers import fan_out
    from pipeline.telemetry import MetricsServer, Telemetry

    telemetry, gate, store = Telemetry(), Gate(), tmp_path / "run.zarr"
    observe = fan_out(telemetry.observe, gate)
    runner = threading.Thread(
        target=run_sweep, args=(plan_of(config), store), kwargs={"observe": observe, "on_start": telemetry.start}
    )
    with MetricsServer(telemetry, 0) as server:
        runner.start()
        try:
            assert gate.reached.wait(60)
            during = scrape(server.url)
        finally:
            gate.open.set()
            runner.join(60)
        after = scrape(server.url)
    assert during["stepscope_units_pending",] == UNITS - 3
    assert after["stepscope_units_pending",] == 0
    assert during["stepscope_replicas_up",] == after["stepscope_replicas_up",] == 1
    entries = list(Journal(store).entries())
    for name, field in (
        ("cells_total", "cells"),
        ("written_bytes_total", "bytes"),
        ("row_forwards_total", "row_forwards"),
    ):
        for group in ("baseline", "map", "skip"):
            expected = sum(e[field] for e in entries if e["group"] == group)
            assert after[f"stepscope_{name}", group] == expected > 0
    assert sum(after.get(("stepscope_units_done_total", g), 0) for g in ("baseline", "map", "skip")) == UNITS
    assert after["stepscope_unit_seconds_count", "map"] == 4
    assert all(e["gpu_bytes"] == 0 for e in entries)


class TestMetricsPort:
    def test_command_serves_until_the_sweep_ends(self, config, tmp_path, capsys, monkeypatch):
        seen = {}

        def sweep(plan, path, *, observe, on_start, **rest):
            seen["url"] = capsys.readouterr().err.split()[-1]
            on_start(5, 5, 50)
            seen["values"] = scrape(seen["url"])
            from pipeline.sweep import SweepResult

            return SweepResult(done=5)

        monkeypatch.setattr("pipeline.sweep.run_sweep", sweep)
        assert main(["run", str(config), "--store", str(tmp_path / "x.zarr"), "--metrics-port", "0"]) == OK
        assert seen["values"]["stepscope_units_pending",] == 5
        assert seen["url"].startswith("http://127.0.0.1:")
        with pytest.raises(OSError, match="refused"):
            scrape(seen["url"])

    def test_port_in_use_is_one_sentence_and_nothing_is_made(self, config, tmp_path, capsys):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            code = main(["run", str(config), "--store", str(tmp_path / "x.zarr"), "--metrics-port", str(port)])
        told = capsys.readouterr().err
        assert code == BAD_INPUT
        assert told.startswith(f"stepscope: metrics cannot be served at 127.0.0.1:{port}: Address already in use.")
        assert told.count("\n") == 1
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            pytest.param(["--metrics-port", "70000"], "no such port: 70000", id="too-large"),
            pytest.param(["--metrics-port", "http"], "http", id="word"),
            pytest.param(["--metrics-port", "1.5"], "1.5", id="fraction"),
            pytest.param(["--metrics-port", "0", "--metrics-host", "203.0.113.7"], "203.0.113.7:0", id="foreign-host"),
        ],
    )
    def test_place_that_cannot_be_is_one_sentence(self, config, tmp_path, capsys, options, message):
        assert main(["run", str(config), "--store", str(tmp_path / "x.zarr"), *options]) == BAD_INPUT
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1

    def test_without_a_port_prometheus_is_not_loaded(self):
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "from pipeline.commands.sweeps import watched\n"
            "with watched(None, '127.0.0.1') as (observe, start): start(1, 1, 1)\n"
            "print('prometheus_client' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "False"


def test_broken_progress_bar_does_not_stop_a_sweep(config, tmp_path, monkeypatch):
    def broken(self, event, unit):
        raise ValueError("no terminal any more")

    monkeypatch.setattr("pipeline.progress.SweepProgress.observe", broken)
    with sweeps.watched(None, "127.0.0.1") as (observe, start):
        result = run_sweep(plan_of(config), tmp_path / "run.zarr", observe=observe, on_start=start)
    assert (result.done, result.failed) == (UNITS, 0)


class TestStatus:
    @pytest.mark.parametrize("option", [[], ["--watch"], ["--watch", "--every", "0.5"]], ids=["once", "watch", "every"])
    def test_finished_store_is_shown_once(self, finished, capsys, option):
        assert main(["status", str(finished), *option]) == OK
        out = capsys.readouterr().out
        assert f"{finished}: finished; last heard of" in out
        assert "\x1b" not in out

    def test_cells_are_those_of_the_plan(self, finished, config):
        plan = plan_of(config)
        cells = dict.fromkeys(("baseline", *plan.by_name), 0)
        for unit in plan.units():
            cells[unit.group] += plan.unit_cells(unit)
        assert {g.group: g.cells for g in Watch(finished).look().groups} == cells

    def test_cells_of_a_screened_sweep_are_those_that_were_chosen(self, config, tmp_path):
        raw = tiny_config(config.parent / "model", previews={"samples": []}, experiments={
            "map": {**EXPERIMENTS["map"], "screen": {"top": 0.25, "metric": "latent_difference"}}
        })  # fmt: skip
        from pipeline.metrics.objective import OBJECTIVES

        raw["experiments"]["map"]["screen"]["metric"] = next(iter(OBJECTIVES))
        plan = make_plan(SweepConfig.model_validate(raw))
        before, after = [], []

        def on_start(todo, total, cells):
            before.append({g.group: g.cells for g in Watch(tmp_path / "s.zarr").look().groups})

        run_sweep(plan, tmp_path / "s.zarr", on_start=on_start)
        after = {g.group: g.cells for g in Watch(tmp_path / "s.zarr").look().groups}
        exact = 2 * plan.grids[0].experiment.screen.verified_cells(plan.grids[0].cells)
        assert after["map"] == exact
        assert before[0]["map"] == pytest.approx(exact, rel=0.5)
        cells = sum(e["cells"] for e in Journal(tmp_path / "s.zarr").entries() if e["group"] == "map")
        assert cells == exact

    def test_json_lines_end_when_the_sweep_has(self, finished, capsys):
        assert main(["status", str(finished), "--watch", "--json"]) == OK
        (line,) = capsys.readouterr().out.splitlines()
        told = json.loads(line)
        assert told["state"] == "finished"
        assert told["speed"]["units_per_s"] > 0

    def test_failures_by_cause_and_exit_code(self, finished, tmp_path, capsys):
        import shutil

        store = Path(shutil.copytree(finished, tmp_path / "copy.zarr"))
        for index in (0, 1):
            Journal(store).append(unit=index, group="map", index=index, error=f"ValueError: bad {index}", failed=8)
        assert main(["status", str(store)]) == FAILED
        out = capsys.readouterr().out
        assert "  2 units: ValueError: bad <n>\n      map 1: ValueError: bad 1\n" in out

    @pytest.mark.parametrize("every", ["0", "0.01", "-1", "nan", "inf", "1e9"])
    def test_every_out_of_range_is_one_sentence(self, finished, capsys, every):
        assert main(["status", str(finished), "--watch", f"--every={every}"]) == BAD_INPUT
        told = capsys.readouterr().err
        assert told.startswith("stepscope: out of range: --every ")
        assert told.count("\n") == 1

    def test_every_that_is_a_word(self, finished, capsys):
        assert main(["status", str(finished), "--watch", "--every", "often"]) == BAD_INPUT
        assert "often" in capsys.readouterr().err


def start_elsewhere(config, store, mazes=2):
    """Run the sweep in a process of its own."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pipeline.cli import console; console()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "run", str(config), "--store", str(store), "--set", f"task.mazes={mazes}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def await_store(store, process):
    """Wait until the store is there; a sweep that ends before is a failure."""
    while not (store / "zarr.json").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


class TestElsewhere:
    def test_running_sweep_is_watched_to_its_end(self, config, tmp_path):
        store = tmp_path / "run.zarr"
        process = start_elsewhere(config, store)
        await_store(store, process)
        # It stands still until it was seen for the first time.
        os.kill(process.pid, signal.SIGSTOP)
        screen = Console(file=io.StringIO(), force_terminal=True, width=100, height=40)

        def pause(seconds):
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(seconds)

        shown = show(store, live=True, every=0.2, console=screen, pause=pause)
        assert process.wait(60) == OK
        assert (shown.state, shown.total("done")) == ("finished", UNITS)
        assert shown.speed is not None
        assert [r.units for r in shown.replicas] == [UNITS]
        assert "running" in screen.file.getvalue()

    def test_killed_sweep_is_said_to_be_silent(self, config, tmp_path, capsys):
        store = tmp_path / "run.zarr"
        # Many units, so that it is killed long before the last one.
        process = start_elsewhere(config, store, mazes=100)
        await_store(store, process)
        watch = Watch(store)
        while watch.look().total("done") < 2:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        # Its own session: the whole of it goes.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
        process.stderr.close()
        left = watch.look()
        assert left.total("pending") > 0
        later = Watch(store, lambda: time.time() + PATIENCE_SECONDS + 60).look()
        assert later.state == "silent"
        assert later.heard_s > PATIENCE_SECONDS
        assert later.total("done") == left.total("done")
        assert later.left_s is not None
