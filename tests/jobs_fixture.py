"""A cluster for tests that is a dict: jobs, and errors with the words that Ray uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.jobs import Jobs

ADDRESS = "http://head:8265"


@dataclass
class Details:
    """A job as Ray's client returns it; times are in milliseconds."""

    submission_id: str | None
    status: str
    metadata: dict[str, str] | None = None
    message: str | None = None
    driver_exit_code: int | None = None
    start_time: int | None = 1_700_000_000_000
    end_time: int | None = None


@dataclass
class FakeClient:
    """Plays Ray's client: jobs in a dict, and errors with the words that Ray uses."""

    jobs: dict[str, Details] = field(default_factory=dict)
    submitted: list[dict[str, Any]] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    raises: list[BaseException | None] = field(default_factory=list)
    streams: list[list[str | BaseException]] = field(default_factory=list)
    states: list[str] = field(default_factory=list)

    def _trouble(self):
        if self.raises and (error := self.raises.pop(0)) is not None:
            raise error

    def submit_job(self, *, entrypoint, submission_id, runtime_env, metadata):
        self._trouble()
        if submission_id in self.jobs:
            raise RuntimeError(f"Request failed with status code 500: Traceback\nJob {submission_id} already exists.")
        self.jobs[submission_id] = Details(submission_id, "PENDING", metadata)
        self.submitted.append({"id": submission_id, "entrypoint": entrypoint, "env": runtime_env, "meta": metadata})
        return submission_id

    def list_jobs(self):
        return list(self.jobs.values())

    def get_job_info(self, job_id):
        self._trouble()
        if self.states:
            self.jobs[job_id].status = self.states.pop(0)
        return self.jobs[job_id]

    def get_job_logs(self, job_id):
        self._trouble()
        return f"log of {job_id}\n"

    async def tail_job_logs(self, job_id):
        for item in self.streams.pop(0):
            if isinstance(item, BaseException):
                raise item
            yield item

    def stop_job(self, job_id):
        self._trouble()
        self.stopped.append(job_id)
        return True


def jobs_of(client, slept=None):
    return Jobs(client, ADDRESS, sleep=(slept if slept is not None else []).append)
