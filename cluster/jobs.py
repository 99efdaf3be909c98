"""Jobs of a Ray cluster, through its Jobs API: submit, find, read, follow, stop.

A piece of work has one id for good; each run of it is an attempt with an id of its own: ``work``, ``work-2`` and so on.
Ray can delete an ended job and take its id again, but then mistakes the end of the old job for the end of the new one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

ACTIVE = ("PENDING", "RUNNING")
"""States of a job that has not ended; the others are SUCCEEDED, FAILED and STOPPED."""

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Read by Ray's supervisor of a job: seconds from SIGTERM to SIGKILL when the job is stopped, by default 3."""

_ATTEMPT_OF = "attempt_of"
_ANSWER_S = 10.0
_PATIENCE = 5
_AUTHENTICATE = "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file that holds the cluster's token."
_ADDRESS = "Give the dashboard of the head node, such as http://HEAD:8265."


class JobError(RuntimeError):
    """A cluster that does not answer as asked, or a job that is not as the caller believes."""


class _SilentError(JobError):
    """A cluster that did not answer this time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What to run, and what travels with it.

    Attributes
    ----------
    id : names the work, so that it runs once at a time.
    entrypoint : a shell command; it starts in a copy of ``working_dir`` on the head node.
    excludes : patterns, as in ``.gitignore``, of what stays here.
    env : environment of the job and its workers. Whoever may read the cluster's jobs can read it.
    stop_wait_s : seconds from SIGTERM to SIGKILL when the job is stopped.
    """

    id: str
    entrypoint: str
    working_dir: Path
    excludes: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    stop_wait_s: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as the cluster knows it; ``started`` and ``ended`` are Unix times in seconds."""

    id: str
    state: str
    message: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    exit_code: int | None = None
    started: float | None = None
    ended: float | None = None

    @property
    def active(self) -> bool:
        """Whether it has yet to end."""
        return self.state in ACTIVE


class Client(Protocol):
    """The part of Ray's ``JobSubmissionClient`` that is used."""

    def submit_job(
        self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> str: ...
    def list_jobs(self) -> Iterable[Any]: ...
    def get_job_info(self, job_id: str) -> Any: ...
    def get_job_logs(self, job_id: str) -> str: ...
    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]: ...
    def stop_job(self, job_id: str) -> bool: ...


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, client: Client, address: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._client = client
        self._address = address
        self._sleep = sleep

    def submit(self, submission: Submission) -> str:
        """Start a job and return the id of this attempt.

        Raises
        ------
        JobError : an attempt of the same work has not ended, or the working directory cannot travel.
        """
        attempts = self.attempts(submission.id)
        for job in attempts:
            if job.active:
                raise self._taken(job.id, f"is {job.state.lower()} already")
        last = _number(attempts[-1].id, submission.id) if attempts else 0
        attempt = submission.id if not last else f"{submission.id}-{last + 1}"
        with self._plainly():
            try:
                return self._client.submit_job(
                    entrypoint=submission.entrypoint,
                    submission_id=attempt,
                    runtime_env={
                        "working_dir": str(submission.working_dir),
                        "excludes": list(submission.excludes),
                        "env_vars": {**submission.env, STOP_WAIT: str(submission.stop_wait_s)},
                    },
                    metadata={**submission.metadata, _ATTEMPT_OF: submission.id},
                )
            except RuntimeError as error:
                if "already exists" in str(error):
                    raise self._taken(attempt, "was submitted by someone else just now") from error
                if "status code 413" in str(error) or "exceeds the maximum size" in str(error):
                    raise JobError(
                        f"{submission.working_dir} is too large to travel with a job: a cluster takes 100 MiB, packed. "
                        "Name a smaller folder, or leave files out with a .rayignore or .gitignore in it."
                    ) from error
                raise

    def attempts(self, work: str) -> list[Job]:
        """Return every attempt of a piece of work, oldest first."""
        found = [job for job in self.listed() if job.id == work or job.metadata.get(_ATTEMPT_OF) == work]
        return sorted(found, key=lambda job: _number(job.id, work))

    def find(self, name: str) -> Job:
        """Return a job by its id, or the latest attempt of a piece of work.

        Raises
        ------
        JobError : there is none.
        """
        jobs = self.listed()
        attempts = [job for job in jobs if job.id == name or job.metadata.get(_ATTEMPT_OF) == name]
        if attempts:
            return max(attempts, key=lambda job: _number(job.id, name))
        known = ", ".join(sorted(job.id for job in jobs)) or "none"
        raise JobError(f"no job {name} at {self._address}. Jobs there: {known}.")

    def listed(self) -> list[Job]:
        """Return the submitted jobs, in no order."""
        with self._plainly():
            # Drivers that were not submitted are listed as well, without a submission id.
            return [_job(details) for details in self._client.list_jobs() if details.submission_id]

    def logs(self, name: str) -> str:
        """Return all that a job has printed so far."""
        job = self.find(name)
        with self._plainly():
            return self._client.get_job_logs(job.id)

    def follow(self, name: str) -> Iterator[str]:
        """Yield what a job has printed and prints, in pieces, until it ends."""
        job = self.find(name)
        seen = 0
        while True:
            position, broken = 0, False
            try:
                # A connection that breaks starts again from the first character.
                for text in self._stream(job.id):
                    position += len(text)
                    if position > seen:
                        yield text[seen - position :]
                        seen = position
            except _SilentError:
                # Whether it was the connection or the head is seen by asking for the job.
                broken = True
            if not self._state(job.id).active:
                if broken:
                    with self._plainly():
                        yield self._client.get_job_logs(job.id)[seen:]
                return
            self._sleep(1.0)

    def wait(self, name: str, *, every_s: float = 2.0) -> Job:
        """Return a job once it has ended."""
        job = self.find(name)
        while job.active:
            self._sleep(every_s)
            job = self._state(job.id)
        return job

    def stop(self, name: str) -> Job:
        """Ask a job to end: SIGTERM now, SIGKILL once its own time limit for that has passed.

        Raises
        ------
        JobError : it has ended already.
        """
        job = self.find(name)
        if not job.active:
            raise JobError(f"job {job.id} has ended already: {job.state}. There is nothing to cancel.")
        with self._plainly():
            self._client.stop_job(job.id)
        return job

    def _state(self, attempt: str) -> Job:
        """Return a job that is known to be there; a cluster may fail to answer a few times in a row."""
        failures = 0
        while True:
            try:
                with self._plainly():
                    return _job(self._client.get_job_info(attempt))
            except JobError:
                failures += 1
                if failures == _PATIENCE:
                    raise
                self._sleep(2.0**failures)

    def _stream(self, attempt: str) -> Iterator[str]:
        chunks = aiter(self._client.tail_job_logs(attempt))
        loop = asyncio.new_event_loop()
        try:
            while True:
                with self._plainly():
                    text = loop.run_until_complete(_next(chunks))
                if text is None:
                    return
                yield text
        finally:
            loop.run_until_complete(_close(chunks))
            loop.close()

    def _taken(self, attempt: str, how: str) -> JobError:
        return JobError(
            f"job {attempt} {how} at {self._address}. "
            f"Follow it with: stepscope logs {attempt} --address {self._address} --follow"
        )

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        with _plainly(self._address):
            yield


def connect(address: str) -> Jobs:
    """Return the jobs of the cluster whose dashboard is at ``address``.

    Raises
    ------
    JobError : no dashboard of Ray answers there, or it refuses this user.
    """
    address = _http(address)
    _require_dashboard(address)
    import ray.job_submission

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
    with _plainly(address), _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        return Jobs(ray.job_submission.JobSubmissionClient(address), address)


def _http(address: str) -> str:
    address = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError as error:
        raise JobError(f"{address} is no address: {error}. {_ADDRESS}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise JobError(f"{address} is no address of a dashboard. {_ADDRESS}")
    if parts.username or parts.password:
        raise JobError(f"the address of {parts.hostname} holds a password, which would be shown. {_AUTHENTICATE}")
    return address.rstrip("/")


def _require_dashboard(address: str) -> None:
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=_ANSWER_S) as answer:
            known = "ray_version" in json.loads(answer.read())
    except urllib.error.HTTPError as error:
        known = error.code in (401, 403)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError):
        known = False
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise JobError(
            f"no Ray dashboard answers at {address}: {reason}. "
            "Is the head node up, and does the tunnel or port-forward to it stand?"
        ) from error
    if not known:
        raise JobError(f"what answers at {address} is no Ray dashboard. {_ADDRESS}")


@contextmanager
def _plainly(address: str) -> Iterator[None]:
    """Turn what Ray's client raises into one sentence."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except JobError:
        raise
    except Exception as error:
        # A handshake that is refused is an error of aiohttp, with the status of HTTP.
        status = getattr(error, "status", None)
        if isinstance(error, AuthenticationError) or status in (401, 403):
            raise _refused(address, wrong=status == 403 or "Authentication failed" in str(error)) from error
        # Not every broken connection is an OSError in aiohttp, which streams logs.
        of_stream = type(error).__module__.startswith("aiohttp.") or "WebSocket" in str(error)
        if isinstance(error, OSError) or of_stream:
            raise _SilentError(f"the Ray dashboard at {address} stopped answering: {_first_line(error)}.") from error
        if isinstance(error, RuntimeError | ValueError):
            raise JobError(f"the Ray cluster at {address} refused: {_first_line(error)}.") from error
        raise


def _refused(address: str, *, wrong: bool) -> JobError:
    why = "refused the token" if wrong else "asks for a token, and none was found"
    return JobError(f"the Ray cluster at {address} {why}. {_AUTHENTICATE}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Hide environment variables that Ray would follow instead of the address given."""
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id,
        state=str(getattr(details.status, "value", details.status)),
        message=details.message or "",
        metadata=details.metadata or {},
        exit_code=details.driver_exit_code,
        started=_seconds(details.start_time),
        ended=_seconds(details.end_time),
    )


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _number(attempt: str, work: str) -> int:
    """Return which attempt of a piece of work an id names, counted from 1."""
    match = re.fullmatch(re.escape(work) + r"-(\d+)", attempt)
    return int(match.group(1)) if match else 1


async def _next(chunks: AsyncIterator[str]) -> str | None:
    return await anext(chunks, None)


async def _close(chunks: AsyncIterator[str]) -> None:
    if hasattr(chunks, "aclose"):
        await chunks.aclose()
