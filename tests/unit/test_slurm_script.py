"""The Slurm script, in an allocation of stubs: who gets the token, what happens at a signal, what is left behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[2] / "configs" / "cluster" / "slurm.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

STUBS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do echo "$1" >> "$SEEN/srun"; shift; done; exec "$@"',
    "hostname": "echo 10.0.0.1 fe80::1",
    "scontrol": 'if [ "$1" = show ]; then printf "%s\\n" $NODES; else echo "$@" >> "$SEEN/scontrol"; fi',
    "ray": """
        case "$1 $2" in
            "start --head") kind=head;;
            start*) kind=worker;;
            *) [ ! -e "$SEEN/head-fails" ]; exit;;
        esac
        echo "$@" >> "$SEEN/$kind"
        [ -e "$SEEN/head-fails" ] && exit 1
        stat -c "%a" "$RAY_AUTH_TOKEN_PATH" "$(dirname "$RAY_AUTH_TOKEN_PATH")" > "$SEEN/modes"
        cat "$RAY_AUTH_TOKEN_PATH" > "$SEEN/token"
        echo "$RAY_AUTH_MODE" >> "$SEEN/mode"
        trap 'echo "$kind" >> "$SEEN/ended"; exit 0' TERM
        while :; do sleep 0.05; done""",
    "stepscope": """
        echo "$@" > "$SEEN/stepscope"; echo "$RAY_ADDRESS" > "$SEEN/address"; echo "$RAY_AUTH_MODE" >> "$SEEN/mode"
        trap 'echo drained > "$SEEN/drained"; exit 130' TERM
        while [ ! -e "$SEEN/code" ]; do sleep 0.05; done
        exit "$(cat "$SEEN/code")" """,
}


@pytest.fixture
def allocation(tmp_path):
    """A Slurm allocation of stubs that write down what they see; returns a function that starts the script in it."""
    bin_, seen, shared = tmp_path / "bin", tmp_path / "seen", tmp_path / "shared"
    for folder in (bin_, seen, shared):
        folder.mkdir()
    for name, body in STUBS.items():
        (bin_ / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin_ / name).chmod(0o755)
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, nodes: str = "n1 n2 n3"):
        started.append(
            subprocess.Popen(
                ["bash", str(SLURM), *(arguments or ("c.yaml", "/shared/x.zarr"))],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env={
                    "PATH": f"{bin_}:{os.environ['PATH']}", "SEEN": str(seen), "NODES": nodes, "HOME": str(shared),
                    "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_CPUS_PER_TASK": "6",
                    "SLURM_GPUS_ON_NODE": "2",
                },
            )
        )  # fmt: skip
        return started[-1]

    yield start, seen, shared
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def until_there(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.02)


def test_is_a_script_that_can_be_run():
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    assert SLURM.stat().st_mode & stat.S_IXUSR


def test_is_told_before_it_ends_and_has_time_to_drain():
    text = SLURM.read_text()
    told = int(re.search(r"^#SBATCH --signal=B:TERM@(\d+)$", text, re.MULTILINE).group(1))
    assert int(re.search(r"^drain_s=(\d+)", text, re.MULTILINE).group(1)) < told
    assert "#SBATCH --requeue" in text
    assert "#SBATCH --open-mode=append" in text


def test_never_ends_the_ray_of_others():
    assert "ray stop" not in SLURM.read_text()


@pytest.mark.parametrize("code", [0, 1, 2])
def test_runs_a_sweep_on_every_node_and_leaves_nothing(allocation, code):
    start, seen, shared = allocation
    (seen / "code").write_text(str(code))
    process = start("my sweep.yaml", "/shared/x.zarr", "--set", "task.mazes=3")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    words = (seen / "stepscope").read_text()
    assert words.startswith("run my sweep.yaml --store /shared/x.zarr --replicas 6 --set run.gpus_per_replica=1")
    assert words.rstrip().endswith("--set task.mazes=3")
    assert (seen / "address").read_text().strip() == f"10.0.0.1:{20000 + 4711 * 4}"
    assert "--nodes=2\n--ntasks=2\n--exclude=n1" in (seen / "srun").read_text()
    assert "--cpus-per-task=6" in (seen / "srun").read_text()
    assert list(shared.iterdir()) == []
    assert not (seen / "scontrol").exists()


def test_every_process_has_the_token_and_no_argument_shows_it(allocation):
    start, seen, _ = allocation
    process = start()
    for name in ("token", "worker", "stepscope"):
        until_there(seen / name)
    (seen / "code").write_text("0")
    output, _ = process.communicate(timeout=60)
    token = (seen / "token").read_text()
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert (seen / "modes").read_text().split() == ["600", "700"]
    assert set((seen / "mode").read_text().split()) == {"token"}
    for name in ("head", "worker", "stepscope", "srun"):
        assert token not in (seen / name).read_text()
    assert token not in output
    assert "--dashboard-host=127.0.0.1" in (seen / "head").read_text()


def test_one_node_is_enough(allocation):
    start, seen, _ = allocation
    (seen / "code").write_text("0")
    process = start(nodes="n1")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert not (seen / "worker").exists()


def test_a_preemption_drains_ends_the_steps_and_queues_again(allocation):
    start, seen, shared = allocation
    process = start()
    for name in ("worker", "stepscope"):
        until_there(seen / name)
    until_there(seen / "modes")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert (seen / "drained").exists()
    assert (seen / "scontrol").read_text() == "requeue 4711\n"
    assert sorted((seen / "ended").read_text().split()) == ["head", "worker"]
    assert list(shared.iterdir()) == []


def test_a_sweep_that_was_stopped_on_purpose_is_not_queued_again(allocation):
    start, seen, _ = allocation
    (seen / "code").write_text("130")
    process = start()
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not (seen / "scontrol").exists()


def test_a_head_that_does_not_start_is_said(allocation):
    start, seen, shared = allocation
    (seen / "head-fails").write_text("")
    process = start()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the head of Ray did not start on n1" in output
    assert not (seen / "stepscope").exists()
    assert list(shared.iterdir()) == []


def test_a_store_that_is_missing_is_said_before_anything_starts(allocation):
    start, seen, shared = allocation
    process = start("c.yaml")
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "give a store on storage that all nodes share" in output
    assert [*seen.iterdir(), *shared.iterdir()] == []
