"""Whole sweeps: finish, resume after any kill, survive failing units and NaN, and agree with plain hooks."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

import pipeline.ledger
import pipeline.replica
import pipeline.stopping
import pipeline.store
from cluster.events import ReplicaLost, UnitDone
from pipeline.cli import main
from pipeline.config import load_config
from pipeline.executors import inline_executor, ray_executor
from pipeline.plan import make_plan
from pipeline.store import (
    DONE,
    FAILED,
    PENDING,
    Journal,
    Lease,
    LeaseLostError,
    StoreError,
    open_store,
    request_stop,
    verify,
)
from pipeline.store.errors import writing
from pipeline.sweep import run_sweep
from tests.reference.recompute import TOLERANCE, worst_differences
from tests.sweep_fixture import arrays, assert_same_arrays, save_tiny_model, tiny_config, write_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def config(model, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config") / "tiny.yaml", tiny_config(model))


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    """The store of one uninterrupted run."""
    store = tmp_path_factory.mktemp("undisturbed") / "run.zarr"
    assert main(["run", str(config), "--store", str(store)]) == 0
    return store


def plan_of(config: Path):
    return make_plan(load_config(config), config)


def test_every_unit_is_done_and_every_cell_finite(undisturbed, config):
    store = open_store(undisturbed)
    for group in store.groups():
        assert (store.status(group) == DONE).all()
    for name, value in arrays(undisturbed).items():
        if value.dtype.kind == "f":
            assert np.isfinite(value).all(), name


def test_a_second_call_computes_nothing(undisturbed, config):
    before = list(Journal(undisturbed).entries())
    result = run_sweep(plan_of(config), undisturbed)
    assert result.computed == 0
    assert result.pending == 0
    assert list(Journal(undisturbed).entries()) == before


def test_ten_random_cells_agree_with_plain_hooks(undisturbed):
    """Batch 1, whole run, no engine: the stored metric is the same to 1e-4."""
    rows = worst_differences(open_store(undisturbed), cells=10, seed=3)
    assert len(rows) == 10
    assert max(worst for _, _, worst in rows) < TOLERANCE


def test_interventions_do_something_and_controls_do_not(undisturbed):
    root = zarr.open_group(str(undisturbed), mode="r")
    clean = np.asarray(root["baseline/latent_distance"])[:, 0]
    assert (clean == 0).all()
    patch = np.asarray(root["patch_map/latent_distance"])
    directions = list(root["patch_map/direction"][:])
    assert root["patch_map/latent_distance"].metadata.dimension_names[-1] == "direction"
    assert (patch[..., directions.index("self")] < 1e-5).all()
    assert (np.asarray(root["noise_step/latent_distance"]) > 1e-3).all()
    assert (np.asarray(root["skip/latent_distance"]) > 1e-5).all()


def test_baseline_follows_the_run_to_its_end(undisturbed):
    """At the last step the clean estimate is nearly the final video."""
    root = zarr.open_group(str(undisturbed), mode="r")
    by_step, final = np.asarray(root["baseline/goal_evidence_by_step"]), np.asarray(root["baseline/goal_evidence"])
    assert by_step.shape == (2, 2, 4)
    assert np.abs(by_step[:, :, -1] - final).max() < np.abs(by_step[:, :, 0] - final).max() + 0.05


def test_estimates_are_measured_with_the_given_frame_put_back(undisturbed):
    """Without it the clean run's own estimate would stay a noisy frame away from its final video."""
    by_step = np.asarray(zarr.open_group(str(undisturbed), mode="r")["baseline/latent_distance_by_step"])
    assert by_step[:, 0, -1].max() < 1e-3


def test_previews_hold_three_different_films(undisturbed):
    film = np.asarray(zarr.open_group(str(undisturbed), mode="r")["previews/x0_hat"])[0]
    assert film.shape == (3, 4, 6, 5, 5, 3)
    corrupted, patched = film[1], film[2]
    assert (patched[0] == corrupted[0]).all()
    assert (patched[2] != corrupted[2]).any()


def start(config: Path, store: Path, *extra: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline.cli", "run", str(config), "--store", str(store), *extra]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # A shell that puts the tests in the background makes them ignore Ctrl-C, and their children inherit it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def kill_when(process: subprocess.Popen[bytes], store: Path, lines: int, sig: int) -> None:
    """Send a signal as soon as the journal has that many lines."""
    journal = store / "journal.jsonl"
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if journal.exists() and journal.read_bytes().count(b"\n") >= lines:
            process.send_signal(sig)
            break
        time.sleep(0.005)
    process.wait(timeout=120)


def test_resume_after_sigkill_is_bit_identical(config, undisturbed, tmp_path):
    """Kill at random moments, several times over, then run to the end."""
    store = tmp_path / "run.zarr"
    moments = sorted(random.Random(0).sample(range(1, 14), 2))
    for moment in moments:
        process = start(config, store)
        kill_when(process, store, moment, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    assert any((open_store(store).status(g) == PENDING).any() for g in open_store(store).groups())
    assert main(["run", str(config), "--store", str(store)]) == 0
    assert_same_arrays(store, undisturbed)


@pytest.mark.ray
def test_resume_after_the_driver_of_ray_replicas_was_killed_is_bit_identical(config, undisturbed, tmp_path):
    """The replicas outlive their driver for a moment; what they still write is what the next driver writes."""
    store = tmp_path / "run.zarr"
    process = start(config, store, "--replicas", "2")
    kill_when(process, store, 4, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert main(["run", str(config), "--store", str(store)]) == 0
    assert_same_arrays(store, undisturbed)


def test_sigkill_between_data_and_status_is_bit_identical(config, undisturbed, tmp_path):
    """Wipe status and journal of a half-done store: all data is there, nothing is marked; everything runs again."""
    store = tmp_path / "run.zarr"
    process = start(config, store)
    kill_when(process, store, 5, signal.SIGKILL)
    (store / "journal.jsonl").unlink()
    (store / "baseline" / "leftover.0123.partial").write_bytes(b"torn")
    assert main(["run", str(config), "--store", str(store)]) == 0
    assert_same_arrays(store, undisturbed)
    assert not list(store.rglob("*.partial"))


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM], ids=["ctrl_c", "sigterm"])
def test_interruption_leaves_a_resumable_store_and_says_how(sig, config, undisturbed, tmp_path):
    store = tmp_path / "run.zarr"
    process = start(config, store)
    kill_when(process, store, 2, sig)
    assert process.stderr is not None
    text = process.stderr.read().decode()
    assert process.returncode == 130, text
    assert "Resume with: stepscope run" in text
    assert "Traceback" not in text
    held = sum(int((open_store(store).status(g) == DONE).sum()) for g in open_store(store).groups())
    assert held >= 2
    assert main(["run", str(config), "--store", str(store)]) == 0
    assert_same_arrays(store, undisturbed)


@pytest.mark.ray
def test_sigterm_lets_units_in_flight_finish(config, undisturbed, tmp_path):
    """What the replicas had begun is in the store; nothing is charged to a unit, and the rest is as it was."""
    store = tmp_path / "run.zarr"
    process = start(config, store, "--replicas", "2")
    kill_when(process, store, 3, signal.SIGTERM)
    assert process.stderr is not None
    text = process.stderr.read().decode()
    assert process.returncode == 130, text
    assert "units in flight may finish within 120 s" in text
    assert "Interrupted (SIGTERM)" in text
    assert not [entry for entry in Journal(store).entries() if entry.get("retried") or entry.get("error")]
    assert main(["run", str(config), "--store", str(store)]) == 0
    assert_same_arrays(store, undisturbed)


def test_a_request_in_the_store_stops_the_sweep(config, undisturbed, tmp_path, capsys, monkeypatch):
    store = tmp_path / "run.zarr"
    monkeypatch.setattr(pipeline.stopping, "ASK_SECONDS", 0.0)
    run = pipeline.replica.Replica.run

    def requesting(self, unit):
        if unit.id == 3:
            request_stop(store, "cancelled by ada")
        return run(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.replica.Replica, "run", requesting)
        assert main(["run", str(config), "--store", str(store)]) == 130
    assert "Interrupted (cancelled by ada): 4 units are safe" in capsys.readouterr().err
    assert main(["run", str(config), "--store", str(store)]) == 0
    assert_same_arrays(store, undisturbed)


@pytest.mark.parametrize(
    ("code", "word"), [(errno.ENOSPC, "free space"), (errno.EROFS, "make it writable")], ids=["full", "read_only"]
)
def test_storage_that_takes_no_more_stops_the_sweep_and_parks_no_unit(
    code, word, config, undisturbed, tmp_path, monkeypatch, capsys
):
    store = tmp_path / "run.zarr"
    write = pipeline.store.Store.write_cells

    def refused(self, group, values, sample, start, stop):
        if sample == 1 and group == "skip":
            with writing(self.location, f"{group}[{sample}]"):
                raise OSError(code, os.strerror(code))
        return write(self, group, values, sample, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.store.Store, "write_cells", refused)
        assert main(["run", str(config), "--store", str(store)]) == 2
    text = capsys.readouterr().err
    assert os.strerror(code) in text
    assert word in text
    assert "Traceback" not in text
    status = {group: open_store(store).status(group) for group in open_store(store).groups()}
    assert not any((values == FAILED).any() for values in status.values())
    assert sum((values == DONE).sum() for values in status.values()) >= 3
    assert main(["run", str(config), "--store", str(store)]) == 0
    assert_same_arrays(store, undisturbed)


class _LosesAReplica:
    """An executor one of whose replicas was killed in the middle of a write, while another did its unit."""

    def __init__(self, inner, leftover: Path) -> None:
        self._inner, self._leftover = inner, leftover
        self.close = inner.close

    def run(self, units, on_event, stop):
        self._leftover.write_bytes(b"torn")
        on_event(ReplicaLost(replica=1, error="killed"))
        return self._inner.run(units, on_event, stop)


def test_a_replica_killed_in_a_write_leaves_nothing_behind(config, undisturbed, tmp_path):
    store = tmp_path / "run.zarr"
    leftover = store / "baseline" / "goal_evidence" / "c.1.partial"
    result = run_sweep(
        plan_of(config), store, make_executor=lambda *given: _LosesAReplica(inline_executor(*given), leftover)
    )
    assert result.pending == result.failed == 0
    assert not leftover.exists()
    assert_same_arrays(store, undisturbed)


def test_a_driver_that_was_taken_over_from_stops_and_harms_nothing(config, undisturbed, tmp_path, monkeypatch):
    """It was silent for long, say suspended; when it comes back another one drives the store."""
    store = tmp_path / "run.zarr"
    monkeypatch.setattr(pipeline.ledger, "FLUSH_SECONDS", 0.0)
    run, others = pipeline.replica.Replica.run, []

    def taken_over(self, unit):
        if unit.id == 4 and not others:
            others.append(Lease(store, beats=False, lives=lambda holder: False))
            others[0].acquire()
        return run(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.replica.Replica, "run", taken_over)
        with pytest.raises(LeaseLostError, match="was taken over by process"):
            run_sweep(plan_of(config), store)
    others[0].release()
    assert main(["run", str(config), "--store", str(store)]) == 0
    assert_same_arrays(store, undisturbed)


def test_nan_from_the_model_fails_the_cell_and_not_the_sweep(config, undisturbed, tmp_path, monkeypatch, capsys):
    store = tmp_path / "run.zarr"
    fork = pipeline.replica.Engine.fork

    def poisoned(self, record, rows, **kwargs):
        result = fork(self, record, rows, **kwargs)
        if rows[0].kind == "noise" and rows[0].at == "frame":
            result.final[1] = float("nan")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.replica.Engine, "fork", poisoned)
        assert main(["run", str(config), "--store", str(store)]) == 1
    assert "2 cells have no finite value" in capsys.readouterr().err
    found = arrays(store)
    assert np.isnan(found["noise_frame/goal_evidence"]).sum() == 2
    assert np.isfinite(found["patch_map/goal_evidence"]).all()
    assert (found["noise_frame/status"] == FAILED).all()
    assert main(["status", str(store)]) == 1
    assert main(["run", str(config), "--store", str(store)]) == 0
    assert_same_arrays(store, undisturbed)


def test_a_unit_that_raises_is_retried_then_reported(config, tmp_path, monkeypatch, capsys):
    store = tmp_path / "run.zarr"
    attempts = []

    def broken(self, sample):
        attempts.append(sample)
        if sample == 1:
            raise RuntimeError("planted failure")
        return original(self, sample)

    original = pipeline.replica.Computer.baseline
    monkeypatch.setattr(pipeline.replica.Computer, "baseline", broken)
    assert main(["run", str(config), "--store", str(store), "--set", "run.max_attempts=2"]) == 1
    assert attempts.count(1) == 2
    text = capsys.readouterr().err
    assert "1 units hold failures: 2 cells have no finite value" in text
    assert "planted failure" in text
    assert "Traceback" not in text
    status = open_store(store).status("baseline")
    assert list(status) == [DONE, FAILED]
    assert (open_store(store).status("skip") == DONE).all()
    errors = [e for e in Journal(store).entries() if e.get("error")]
    assert len(errors) == 1


def test_two_drivers_on_one_store_are_refused(config, undisturbed):
    lease = Lease(undisturbed)
    lease.acquire()
    try:
        with pytest.raises(StoreError, match="is being driven by process"):
            run_sweep(plan_of(config), undisturbed)
    finally:
        lease.release()


def test_a_store_of_another_config_is_refused_with_the_differing_keys(config, undisturbed, capsys):
    code = main(["run", str(config), "--store", str(undisturbed), "--set", "sampler.steps=5"])
    assert code == 2
    assert "sampler.steps is 4 in the store, 5 in the config" in capsys.readouterr().err


def test_receipts_add_up_to_the_plan(undisturbed, config):
    cost = plan_of(config).cost()
    entries = list(Journal(undisturbed).entries())
    assert len(entries) == cost.units
    assert sum(e["row_forwards"] for e in entries) == cost.row_forwards
    assert sum(e["cells"] for e in entries if e["group"] != "baseline") == cost.cells


@pytest.mark.ray
def test_ray_replicas_give_the_same_bits_as_this_process(ray_session, model, undisturbed, tmp_path):
    """Two replicas, any order, other processes: the same arrays."""
    raw = tiny_config(model, run={"replicas": 2, "cpus_per_replica": 1})
    plan = plan_of(write_config(tmp_path / "two.yaml", raw))
    replicas = set()
    result = run_sweep(
        plan,
        tmp_path / "run.zarr",
        make_executor=ray_executor,
        observe=lambda event, unit: replicas.add(event.replica) if isinstance(event, UnitDone) else None,
    )
    assert result.failed == 0
    assert replicas == {0, 1}
    assert_same_arrays(tmp_path / "run.zarr", undisturbed)


def test_store_of_a_sweep_is_what_its_replicas_wrote(undisturbed, config):
    found = verify(undisturbed)
    assert found.good
    assert found.checked == found.units == plan_of(config).cost().units
    assert found.undigested == 0


def test_store_attributes_tell_where_results_come_from(undisturbed):
    attrs = zarr.open_group(str(undisturbed), mode="r").attrs
    assert json.loads(attrs["config_json"])["sampler"]["steps"] == 4
    assert len(attrs["config_sha256"]) == len(attrs["model_digest"]) == 64
    assert attrs["experimental_unit"] == "prompt"
    assert {"torch", "diffusers", "nnsight", "zarr"} <= json.loads(attrs["libraries"]).keys()


def test_store_opens_with_xarray_alone_and_without_a_warning(undisturbed):
    script = (
        "import sys, xarray; tree = xarray.open_datatree(sys.argv[1], engine='zarr'); "
        "print(tree['patch_map']['goal_evidence'].sel(step=1, component='attn2').dims)"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(undisturbed)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    assert "'sample'" in done.stdout
    assert done.stderr == ""
