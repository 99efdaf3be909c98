"""Commands of stepscope in forks of a process that has loaded everything, so that a driver starts at once.

The process that forks must have no threads: it opens no store and connects to no Ray, and leaves both to its forks.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.synthetic import Script, synthetic_factory

LEASE_S = 2.0
"""Silence after which another driver takes over, where it cannot see whether this one lives."""
REPLICAS = 2
HUNG_S = 6.0
CRASHED = 70
"""Exit code of a fork that ended with a traceback, which no command may."""


def preload() -> None:
    """Load what drivers need, then prove that nothing of it has started a thread."""
    import tests.chaos.check  # noqa: F401

    threads = os.listdir(f"/proc/{os.getpid()}/task")
    assert len(threads) == 1, f"a process with {len(threads)} threads must not be forked"


@dataclass(frozen=True, kw_only=True)
class Driver:
    """How a driver is started.

    Attributes
    ----------
    config, store : of its command. script : of the synthetic replicas; None for the real model.
    ray : address of the cluster; None for the pool in the driver's own process.
    host : name of the machine that it believes to be on; drivers on one machine see each other's death.
    """

    config: Path
    store: Path
    script: Script | None = None
    ray: str | None = None
    host: str = ""

    def run(self) -> int:
        """Run ``stepscope run`` with what is injected; only for a fork."""
        import pipeline.executors
        import pipeline.sweep
        from pipeline.cli import main
        from pipeline.store import Lease
        from pipeline.store.lease import Holder

        holder = replace(Holder.here(), host=self.host) if self.host else None
        pipeline.sweep.Lease = functools.partial(Lease, ttl=LEASE_S, holder=holder)
        if self.script is not None:
            pipeline.executors.inline_executor = self._inline
            pipeline.executors.ray_executor = self._on_ray
        replicas = REPLICAS if self.ray else 0
        return main(["run", str(self.config), "--store", str(self.store), "--replicas", str(replicas)])

    def _inline(self, plan: Any, place: Any) -> Any:
        from cluster import InlinePool
        from pipeline.executors import pool_options

        return InlinePool(synthetic_factory(plan, place, self.script), pool_options(plan))

    def _on_ray(self, plan: Any, place: Any) -> Any:
        import logging

        import ray

        from cluster.ray_pool import RayPool
        from pipeline.executors import pool_options

        ray.init(address=self.ray, log_to_driver=False, logging_level=logging.ERROR)
        options = replace(pool_options(plan), backoff_s=0.1, max_restarts=20, lease_s=HUNG_S, capacity_wait_s=60)
        return RayPool(synthetic_factory(plan, place, self.script, alone=True), options)


def verify(store: Path, out: Path) -> int:
    """Run ``stepscope verify --json`` into a file; only for a fork."""
    from pipeline.cli import main
    from pipeline.store import Lease

    # The package offers the function of the same name, so that `import ... as` would find that.
    verification = importlib.import_module("pipeline.store.verify")
    verification.Lease = functools.partial(Lease, ttl=LEASE_S)
    with out.open("w") as file, redirect_stdout(file):
        return main(["verify", str(store), "--json"])


def fork(work: Callable[[], int], log: Path) -> int:
    """Run a function in a fork that ends with what it returns; returns the number of the process."""
    process = os.fork()
    if process:
        return process
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        code = work()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        code = CRASHED
    # Neither the exit handlers of the parent nor its buffers are this process's to run.
    os._exit(code)


def call(work: Callable[[], Any], folder: Path) -> Any:
    """Run a function in a fork and return its result, which must be plain data.

    Raises
    ------
    RuntimeError : it raised; the message has its traceback.
    """
    answer, log = folder / "answer.json", folder / "call.log"
    answer.unlink(missing_ok=True)
    log.unlink(missing_ok=True)

    def answered() -> int:
        answer.write_text(json.dumps(work()))
        return 0

    code = wait(fork(answered, log))
    if code:
        raise RuntimeError(f"a check ended with {code}: {log.read_text()}")
    return json.loads(answer.read_text())


def wait(process: int) -> int:
    """Wait for a fork; returns its exit code, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def poll(process: int) -> int | None:
    """Return the exit code of a fork, None while it runs."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None
