"""Sweeps as jobs of a real Ray head with its dashboard and token authentication, on this machine."""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

import cluster.jobs
from cluster.jobs import Jobs, Submission
from pipeline.cli import BAD_INPUT, OK, main
from pipeline.commands.jobs import work_id
from pipeline.config import load_config
from pipeline.store import Journal
from tests.integration.ray_head import Head, ray_head
from tests.integration.test_cli import TINY

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]
PATIENCE_S = 90


@pytest.fixture(scope="module")
def head():
    pytest.importorskip("ray")
    with ray_head() as head:
        yield head


@pytest.fixture(scope="module")
def jobs(head) -> Jobs:
    """The head's jobs, as a user of this process sees them; others need a process with their own environment."""
    from ray.job_submission import JobSubmissionClient

    return Jobs(JobSubmissionClient(head.address, headers={"Authorization": f"Bearer {head.token}"}), head.address)


@dataclass(frozen=True)
class Ran:
    """What a command left: its exit code, and what it printed where."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def command(jobs):
    """Run a command in this process, with every address leading to the head."""

    def run(*arguments: object) -> Ran:
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err, pytest.MonkeyPatch.context() as mp:
            mp.setattr(cluster.jobs, "connect", lambda address: jobs)
            code = main([*map(str, arguments)])
        return Ran(code, out.getvalue(), err.getvalue())

    return run


def until(condition, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.05)


@dataclass(frozen=True)
class Sweep:
    """A sweep that was submitted, submitted twice, cancelled and then resumed."""

    config: Path
    store: Path
    name: str
    submitted: subprocess.CompletedProcess[str]
    twice: Ran
    cancelled: Ran
    state: str
    log: str
    left: dict[str, int]
    resumed: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def sweep(head: Head, jobs: Jobs, command, tmp_path_factory) -> Sweep:
    """Each start of a job takes many seconds, so that one sweep serves several tests."""
    folder = tmp_path_factory.mktemp("sweep")
    config, store = folder / "c.yaml", folder / "run.zarr"
    config.write_text(TINY.replace("mazes: 1", "mazes: 20").replace("replicas: 0", "replicas: 1"))
    name = work_id(load_config(config))
    submitted = head.stepscope("submit", config, "--address", head.address, "--store", store, cwd=folder)
    twice = command("submit", config, "--address", head.address, "--store", store)
    # Not earlier: before the pool is made, a signal ends the driver at once.
    until(lambda: store.exists() and any(Journal(store).entries()), "the first unit")
    cancelled = command("cancel", config, "--address", head.address)
    state = jobs.wait(name, every_s=0.2).state
    log, left = jobs.logs(name), units(command("status", store, "--json"))
    resumed = head.run(
        "ray", "job", "submit", "--address", head.address, "--working-dir", folder, "--",
        "stepscope", "run", "c.yaml", "--store", store, "--replicas", "0", cwd=folder,
    )  # fmt: skip
    return Sweep(config, store, name, submitted, twice, cancelled, state, log, left, resumed)


def units(status: Ran) -> dict[str, int]:
    """Count the units of a store by their status."""
    rows = json.loads(status.out)["groups"]
    return {key: sum(row[key] for row in rows) for key in ("units", "done", "pending", "failed")}


def test_a_sweep_is_submitted_under_its_hash(sweep, head):
    assert sweep.submitted.returncode == OK, sweep.submitted.stderr
    assert sweep.submitted.stdout == f"{sweep.name}\n"
    assert f"stepscope logs {sweep.name} --address {head.address} --follow" in sweep.submitted.stderr


def test_a_double_submit_is_refused(sweep):
    assert sweep.twice.code == BAD_INPUT
    assert sweep.twice.err.startswith(f"stepscope: job {sweep.name} is ")
    assert sweep.twice.out == ""


def test_a_cancelled_sweep_keeps_what_it_has_and_says_how_to_go_on(sweep):
    assert sweep.cancelled.code == OK
    assert sweep.state == "STOPPED"
    assert "Interrupted (SIGTERM): " in sweep.log, sweep.log
    assert "Resume with: stepscope run c.yaml --store " in sweep.log
    assert sweep.left["done"] >= 1
    assert sweep.left["pending"] >= 1
    assert sweep.left["done"] + sweep.left["pending"] == sweep.left["units"] == 40


def test_ray_job_submit_runs_the_rest(sweep, command):
    assert sweep.resumed.returncode == OK, sweep.resumed.stdout + sweep.resumed.stderr
    rest = f"{sweep.left['pending']} of 40 units to run, {sweep.left['done']} already in the store"
    assert rest in sweep.resumed.stdout
    assert units(command("status", sweep.store, "--json")) == {"units": 40, "done": 40, "pending": 0, "failed": 0}


def test_submitting_a_finished_sweep_computes_nothing(sweep, head, command):
    again = command("submit", sweep.config, "--address", head.address, "--store", sweep.store, "--follow")
    assert again.code == OK, again.err
    assert again.out.startswith(f"{sweep.name}-2\n")
    assert "(0 computed now)" in again.out

    logs = command("logs", sweep.config, "--address", head.address)
    assert logs.code == OK
    assert f"Done: 40 units in {sweep.store} (0 computed now)." in logs.out
    status = command("status", sweep.name, "--address", head.address)
    assert status.code == OK
    assert f"{sweep.name}-2" in status.out
    assert "SUCCEEDED" in status.out
    assert str(sweep.store) in status.out
    assert head.token not in again.out + again.err + logs.out + status.out + sweep.log


def test_a_stopped_job_gets_its_own_time_to_end(jobs, tmp_path):
    """Ray's supervisor would kill it after 3 s; what it prints after 4 s shows that it waited longer."""
    script = "trap 'sleep 4; echo drained; exit 0' TERM; echo ready; while :; do sleep 0.1; done"
    name = jobs.submit(Submission(id="patient", entrypoint=script, working_dir=tmp_path, stop_wait_s=60))
    until(lambda: "\nready" in jobs.logs(name), "the job")
    jobs.stop(name)
    assert jobs.wait(name, every_s=0.2).state == "STOPPED"
    assert "drained" in jobs.logs(name)


def test_following_a_job_ends_with_it(jobs, tmp_path):
    (tmp_path / "here.txt").write_text("travelled")
    (tmp_path / "left.zarr").mkdir()
    (tmp_path / "left.zarr" / "x").write_text("x")
    name = jobs.submit(
        Submission(id="short", entrypoint="ls; cat here.txt; exit 3", working_dir=tmp_path, excludes=("*.zarr",))
    )
    log = "".join(jobs.follow(name))
    assert log.rstrip().endswith("travelled")
    assert "left.zarr" not in log
    ended = jobs.find("short")
    assert (ended.state, ended.exit_code) == ("FAILED", 3)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RAY_AUTH_TOKEN": "not-the-token"}, "refused the token"),
        ({"RAY_AUTH_MODE": "disabled"}, "asks for a token, and none was found"),
    ],
    ids=["wrong-token", "no-token"],
)
def test_who_has_no_token_is_told_so_in_one_sentence(head, tmp_path, environment, words):
    refused = head.stepscope("logs", "x", "--address", head.address, cwd=tmp_path, **environment)
    assert refused.returncode == BAD_INPUT
    assert refused.stdout == ""
    assert refused.stderr.startswith(f"stepscope: the Ray cluster at {head.address} {words}. Set RAY_AUTH_MODE=token,")
    assert refused.stderr.count("\n") == 1
    assert "not-the-token" not in refused.stderr
