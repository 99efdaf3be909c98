"""A Ray head with its dashboard and token authentication, as a process tree of its own, for tests of submitted jobs."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
START_S = 90


@dataclass(frozen=True)
class Head:
    """Where the head's dashboard is, and the environment of a user who may use it."""

    address: str
    token: str
    environment: dict[str, str]

    def run(self, *arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command line as that user."""
        return subprocess.run(
            [*map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=cwd,
            env={**self.environment, **environment},
            timeout=150,
        )

    def stepscope(self, *arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("stepscope", *arguments, cwd=cwd, **environment)


@contextmanager
def ray_head() -> Iterator[Head]:
    """Start a head, yield it once its dashboard asks for a token, end its processes and no others."""
    # Ray's sockets lie in it, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="ssj", dir="/tmp"))
    token = secrets.token_hex(24)
    (folder / "token").write_text(token)
    bin_ = folder / "bin"
    bin_.mkdir()
    script = bin_ / "stepscope"
    script.write_text(f"#!{sys.executable}\nfrom pipeline.cli import console\nconsole()\n")
    script.chmod(0o755)
    gcs, dashboard, agent, client = _free_ports(4)
    inherited = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    environment = {
        **inherited,
        "PATH": f"{bin_}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={gcs}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}", f"--temp-dir={folder / 'ray'}", "--num-cpus=2",
        "--object-store-memory=100000000", "--disable-usage-stats",
    ]  # fmt: skip
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        _await_dashboard(address, process, folder / "head.log")
        yield Head(address=address, token=token, environment=environment)
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _await_dashboard(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5)
        except urllib.error.HTTPError as error:
            if error.code == 401:
                return
            raise
        except OSError:
            time.sleep(0.2)
        else:
            raise AssertionError("the dashboard let a stranger in")
    raise AssertionError(f"no dashboard at {address}: {log.read_text()[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        root = psutil.Process(process.pid)
        tree = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        tree = []
    for each in tree:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(tree, timeout=20)
    process.wait()


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports
