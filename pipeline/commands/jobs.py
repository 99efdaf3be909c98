"""Commands that send a sweep to a Ray cluster and look after it there."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

from cyclopts import Parameter

from pipeline.commands.options import (
    FAILED,
    INTERRUPTED,
    METRICS_HOST,
    OK,
    AllowMetric,
    AllowPickledWeights,
    Config,
    MetricsHost,
    MetricsPort,
    Set,
    UsageError,
    allowed,
    app,
    say,
    whole_number,
)
from pipeline.foreign import require_plain

if TYPE_CHECKING:
    from cluster.jobs import Job, Jobs
    from pipeline.config import SweepConfig

EXCLUDES = ("*.zarr", "runs/", "*.safetensors", "*.bin", "*.ckpt", ".venv", ".git")
"""What never travels: stores, weights and environments belong on the cluster."""

AFTER_DRAIN_S = 60
"""What a stopped driver gets beyond ``run.drain_s``, to write status and let its replicas go."""

LOCAL = "http://127.0.0.1:8265"
_JOB_ID = re.compile(r"stepscope-[0-9a-f]{16}(-\d+)?")

Address = Annotated[
    str, Parameter(env_var="RAY_API_SERVER_ADDRESS", help="Dashboard of the head node, or a tunnel's end here.")
]
Follow = Annotated[
    bool, Parameter(negative="", help="Print what the job prints until it ends, and take its exit code.")
]


@app.command
def submit(
    config: Config,
    *,
    address: Address = LOCAL,
    store: Annotated[str, Parameter(help="Where results go: an absolute path on shared storage, s3:// or gs://.")],
    set_: Set = None,
    replicas: Annotated[int | None, Parameter(converter=whole_number, help="Model replicas.")] = None,
    working_dir: Annotated[
        Path | None, Parameter(help="Folder to send along, with the config in it; default the config alone.")
    ] = None,
    env: Annotated[
        list[str] | None, Parameter(negative="", help="Copy this environment variable to the job; may be repeated.")
    ] = None,
    wait: Annotated[bool, Parameter(negative="", help="Wait until the job ends, and take its exit code.")] = False,
    follow: Follow = False,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = METRICS_HOST,
    allow_metric: AllowMetric = None,
    allow_pickled_weights: AllowPickledWeights = False,
) -> int:
    """Run a sweep as a job of a Ray cluster, where stepscope is installed; print the job's id.

    A sweep that runs there already is refused. Once it has ended, the same command resumes what is left.

    Example: ``stepscope submit configs/maze_demo.yaml --address http://HEAD:8265 --store s3://bucket/demo.zarr``
    """
    from cluster.jobs import Submission, connect
    from pipeline.config import load_config

    overrides = [*(set_ or []), *([f"run.replicas={replicas}"] if replicas is not None else [])]
    permissions = allowed(allow_metric, allow_pickled_weights)
    loaded = load_config(config, overrides)
    require_shared(store)
    values = _chosen(env or [])
    options = permissions.options()
    if metrics_port is not None:
        options += ["--metrics-port", str(metrics_port), "--metrics-host", metrics_host]
    with _upload(config, working_dir) as (folder, name):
        jobs = connect(address)
        job = jobs.submit(
            Submission(
                id=work_id(loaded),
                entrypoint=_entrypoint(name, store, set_ or [], replicas, options),
                working_dir=folder,
                excludes=EXCLUDES,
                env=values,
                metadata={"config": loaded.name, "hash": loaded.hash(), "store": store},
                stop_wait_s=math.ceil(loaded.run.drain_s) + AFTER_DRAIN_S,
            )
        )
    print(job, flush=True)
    say(f"Results go to {store}. Watch: stepscope logs {job} --address {address} --follow")
    say(f"Stop: stepscope cancel {job} --address {address}")
    if follow:
        return _follow(jobs, job)
    return _code(jobs.wait(job)) if wait else OK


@app.command
def logs(
    job: Annotated[str, Parameter(help="Id of a job, or the config it was submitted with.")],
    *,
    address: Address = LOCAL,
    set_: Set = None,
    follow: Follow = False,
) -> int:
    """Print what a job of a Ray cluster has printed.

    Example: ``stepscope logs configs/maze_demo.yaml --address http://HEAD:8265 --follow``
    """
    from cluster.jobs import connect

    name = _work_or_job(job, set_ or [])
    jobs = connect(address)
    if follow:
        return _follow(jobs, name)
    print(jobs.logs(name), end="")
    return OK


@app.command
def cancel(
    target: Annotated[str, Parameter(help="Id of a job, the config it was submitted with, or a store.")],
    *,
    address: Address = LOCAL,
    set_: Set = None,
) -> int:
    """Stop a sweep so that it can be resumed: units that run now are finished, no others are started.

    A job is told by the cluster; a store carries the request to whichever process drives it.

    Example: ``stepscope cancel configs/maze_demo.yaml --address http://HEAD:8265``
    """
    if _is_store(target):
        from pipeline.store import open_store, request_stop

        require_plain(target, chunks=False)
        if request_stop(open_store(target).location, "stepscope cancel") is None:
            raise UsageError(f"nobody drives store {target}. There is nothing to cancel.")
        say(f"Asked the driver of {target} to stop once its running units are done. Running it again resumes.")
        return OK
    from cluster.jobs import connect

    stopped = connect(address).stop(_work_or_job(target, set_ or []))
    say(f"Asked {stopped.id} to stop once its running units are done. Submitting it again resumes.")
    return OK


def work_id(config: SweepConfig) -> str:
    """Return the id under which a sweep is submitted; settings of ``run`` do not change it."""
    return f"stepscope-{config.hash()[:16]}"


def names_job(target: str) -> bool:
    """Whether a target of ``status`` reads as the id of a submitted sweep and is nothing on this machine."""
    return bool(_JOB_ID.fullmatch(target)) and not Path(target).exists()


def job_status(target: str, address: str, *, as_json: bool) -> int:
    """Print the state of a job, given its id or its config, and which store it fills."""
    from cluster.jobs import connect

    name = _work_or_job(target, [])
    job = connect(address).find(name)
    facts = {
        "job": job.id,
        "state": job.state,
        "started": _clock(job.started),
        "ended": _clock(job.ended),
        "exit_code": job.exit_code,
        **{key: job.metadata[key] for key in ("config", "hash", "store") if key in job.metadata},
    }
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        for key, value in facts.items():
            if value is not None:
                print(f"{key.replace('_', ' '):>9}  {value}")
    return FAILED if job.state == "FAILED" else OK


def require_shared(store: str) -> None:
    """Refuse a store that the nodes of a cluster would not share, or whose address would show a secret.

    Raises
    ------
    UsageError : see above.
    """
    scheme, separator, rest = store.partition("://")
    if separator and scheme not in ("s3", "gs"):
        raise UsageError(f"stores cannot be at {scheme}://. Use an absolute path on shared storage, s3:// or gs://.")
    if separator:
        if "@" in urlsplit(store).netloc or "?" in rest:
            raise UsageError(
                "an address of a store holds no credentials, as jobs and logs show it. "
                "Give them to the cluster as a role or a mounted secret, or with --env."
            )
        if not rest.strip("/"):
            raise UsageError(f"{store} names no bucket. Use, for example, {scheme}://BUCKET/run.zarr.")
    elif not store.startswith("/"):
        raise UsageError(
            f"--store {store} would lie in a temporary folder of the head node and be lost. "
            "Use an absolute path on storage that every node shares, s3:// or gs://."
        )


def _entrypoint(config: str, store: str, overrides: list[str], replicas: int | None, options: list[str]) -> str:
    words = ["stepscope", "run", config, "--store", store]
    for text in overrides:
        words += ["--set", text]
    if replicas is not None:
        words += ["--replicas", str(replicas)]
    return shlex.join([*words, *options])


@contextmanager
def _upload(config: Path, working_dir: Path | None) -> Iterator[tuple[Path, str]]:
    """Yield the folder that travels and the config's path in it."""
    if working_dir is None:
        with tempfile.TemporaryDirectory(prefix="stepscope_") as folder:
            shutil.copy(config, folder)
            yield Path(folder), config.name
        return
    if not working_dir.is_dir():
        raise UsageError(f"--working-dir {working_dir} is no folder.")
    root, path = working_dir.resolve(), config.resolve()
    if not path.is_relative_to(root):
        raise UsageError(
            f"{config} lies outside of --working-dir {working_dir}. "
            "Move it inside, or leave out --working-dir to send the config alone."
        )
    relative = path.relative_to(root)
    for pattern in EXCLUDES:
        if any(fnmatch(part, pattern.rstrip("/")) for part in relative.parts):
            raise UsageError(f"{config} would not travel, as {pattern} is left out. Move the config elsewhere.")
    yield root, str(relative)


def _chosen(names: list[str]) -> dict[str, str]:
    """Return the environment variables that are to travel."""
    for name in names:
        if "=" in name:
            raise UsageError("--env takes only a name, and its value from the environment, so that no log shows it.")
        if name == "RAY_AUTH_TOKEN":
            raise UsageError("--env RAY_AUTH_TOKEN would show the cluster's token to whoever lists its jobs.")
        if name not in os.environ:
            raise UsageError(f"--env {name}: there is no such environment variable here. Set it first.")
    return {name: os.environ[name] for name in names}


def _work_or_job(target: str, overrides: list[str]) -> str:
    """Return the id that a target names: a config's, or the target itself."""
    if not target.endswith((".yaml", ".yml")) and not Path(target).is_file():
        if overrides:
            raise UsageError(f"--set belongs to a config, and {target} is none. Give the config, or leave out --set.")
        return target
    from pipeline.config import load_config

    return work_id(load_config(Path(target), overrides))


def _is_store(target: str) -> bool:
    if target.endswith((".yaml", ".yml")) or Path(target).is_file():
        return False
    return "/" in target or target.endswith(".zarr") or Path(target).is_dir()


def _follow(jobs: Jobs, name: str) -> int:
    try:
        for text in jobs.follow(name):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        say(f"\nThe job goes on. Stop it with: stepscope cancel {name}")
        return INTERRUPTED
    return _code(jobs.find(name))


def _code(job: Job) -> int:
    """Return the exit code of an ended job, and say how it ended unless that is plain."""
    if job.state == "SUCCEEDED":
        return OK
    say(f"{job.id} {job.state}: {job.message.splitlines()[0] if job.message else 'no message'}")
    if job.state == "STOPPED":
        return INTERRUPTED
    return FAILED if job.exit_code is None else job.exit_code


def _clock(seconds: float | None) -> str | None:
    return None if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))
