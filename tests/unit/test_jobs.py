"""Jobs of a cluster, against a client that plays the cluster: a table of job states by action."""

from __future__ import annotations

import http.server
import os
import threading
from pathlib import Path

import aiohttp
import pytest

from cluster.jobs import STOP_WAIT, Job, JobError, Submission, connect
from tests.jobs_fixture import ADDRESS, Details, FakeClient, jobs_of

STATES = ("PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED")
ENDED = STATES[2:]
BREAKS = [
    pytest.param([RuntimeError("WebSocket connection closed unexpectedly with close code 1006")], id="cut"),
    pytest.param([ConnectionResetError("reset by peer")], id="reset"),
    pytest.param([aiohttp.ServerDisconnectedError()], id="disconnected"),
]


def submission(**changes):
    return Submission(**{"id": "work", "entrypoint": "run it", "working_dir": Path("/here"), **changes})


def with_jobs(*pairs):
    """A cluster whose jobs are attempts of one work, by id and state."""
    return FakeClient({id_: Details(id_, state, {"attempt_of": "work"}) for id_, state in pairs})


class TestSubmit:
    def test_everything_travels_as_given(self):
        client = FakeClient()
        jobs_of(client).submit(
            submission(excludes=("*.zarr",), env={"REGION": "x"}, metadata={"store": "s3://b"}, stop_wait_s=180)
        )
        assert client.submitted == [
            {
                "id": "work",
                "entrypoint": "run it",
                "env": {
                    "working_dir": "/here",
                    "excludes": ["*.zarr"],
                    "env_vars": {"REGION": "x", STOP_WAIT: "180"},
                },
                "meta": {"store": "s3://b", "attempt_of": "work"},
            }
        ]

    def test_values_of_the_environment_are_not_in_the_metadata(self):
        client = FakeClient()
        jobs_of(client).submit(submission(env={"KEY": "hush"}))
        assert "hush" not in str(client.submitted[0]["meta"]) + client.submitted[0]["entrypoint"]

    @pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
    @pytest.mark.parametrize("attempt", ["work", "work-2"])
    def test_work_that_has_not_ended_is_refused_with_how_to_follow_it(self, state, attempt):
        client = with_jobs(("work", "FAILED"), (attempt, state))
        with pytest.raises(JobError) as caught:
            jobs_of(client).submit(submission())
        assert str(caught.value) == (
            f"job {attempt} is {state.lower()} already at {ADDRESS}. "
            f"Follow it with: stepscope logs {attempt} --address {ADDRESS} --follow"
        )
        assert client.submitted == []

    @pytest.mark.parametrize("state", ENDED)
    @pytest.mark.parametrize(
        ("ids", "expected"),
        [
            pytest.param(["work"], "work-2", id="second"),
            pytest.param(["work", "work-2"], "work-3", id="third"),
            pytest.param(["work-9", "work", "work-10"], "work-11", id="not-by-the-alphabet"),
            pytest.param(["work-4"], "work-5", id="earlier-ones-forgotten"),
        ],
    )
    def test_work_that_has_ended_is_attempted_again_under_a_new_id(self, state, ids, expected):
        client = with_jobs(*((id_, state) for id_ in ids))
        assert jobs_of(client).submit(submission()) == expected
        assert all(client.jobs[id_].status == state for id_ in ids), "an ended job stays as it was"

    def test_other_work_does_not_matter(self):
        client = FakeClient({"other": Details("other", "RUNNING"), "work-7": Details("work-7", "RUNNING")})
        assert jobs_of(client).submit(submission()) == "work"

    def test_work_submitted_by_hand_under_the_same_id_counts(self):
        client = FakeClient({"work": Details("work", "RUNNING", None)})
        with pytest.raises(JobError, match="job work is running already"):
            jobs_of(client).submit(submission())

    def test_a_race_for_one_id_has_one_winner(self):
        client = FakeClient()
        first, second = jobs_of(client), jobs_of(client)
        second.attempts = lambda work: []  # it looked before the first had submitted
        assert first.submit(submission()) == "work"
        with pytest.raises(JobError, match="job work was submitted by someone else just now"):
            second.submit(submission())
        assert len(client.submitted) == 1

    @pytest.mark.parametrize(
        "words",
        [
            "Request failed with status code 413: Maximum request body size 104857600 exceeded..",
            "Request failed with status code 500: Traceback: Package size (600MiB) exceeds the maximum size of 512MiB",
        ],
        ids=["dashboard", "store-of-packages"],
    )
    def test_a_folder_that_is_too_large_is_one_sentence(self, words):
        client = FakeClient(raises=[RuntimeError(words)])
        with pytest.raises(JobError, match=r"^/here is too large to travel with a job: .*\.rayignore") as caught:
            jobs_of(client).submit(submission())
        assert "\n" not in str(caught.value)


class TestFind:
    def test_a_work_names_its_latest_attempt(self):
        client = with_jobs(("work-2", "STOPPED"), ("work-10", "RUNNING"), ("work", "FAILED"))
        assert jobs_of(client).find("work").id == "work-10"

    def test_an_attempt_names_itself(self):
        client = with_jobs(("work", "FAILED"), ("work-2", "RUNNING"))
        assert jobs_of(client).find("work-2").id == "work-2"

    @pytest.mark.parametrize("others", [[], ["b", "a"]], ids=["none", "some"])
    @pytest.mark.parametrize("action", ["find", "logs", "stop", "wait"])
    def test_unknown_job_is_one_sentence_with_the_known_ones(self, others, action):
        client = FakeClient({name: Details(name, "RUNNING") for name in others})
        with pytest.raises(JobError) as caught:
            getattr(jobs_of(client), action)("work")
        assert str(caught.value) == f"no job work at {ADDRESS}. Jobs there: {', '.join(sorted(others)) or 'none'}."

    def test_drivers_that_nobody_submitted_are_not_jobs(self):
        client = FakeClient({"x": Details(None, "RUNNING"), "work": Details("work", "RUNNING")})
        assert [job.id for job in jobs_of(client).listed()] == ["work"]

    def test_times_are_seconds_and_what_is_missing_is_empty(self):
        client = FakeClient({"work": Details("work", "FAILED", None, None, 2, 1_500, 2_500)})
        assert jobs_of(client).find("work") == Job(id="work", state="FAILED", exit_code=2, started=1.5, ended=2.5)


class TestStop:
    @pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
    def test_a_job_that_has_not_ended_is_asked(self, state):
        client = with_jobs(("work", "FAILED"), ("work-2", state))
        assert jobs_of(client).stop("work").id == "work-2"
        assert client.stopped == ["work-2"]

    @pytest.mark.parametrize("state", ENDED)
    def test_a_job_that_has_ended_is_left_alone(self, state):
        client = with_jobs(("work", state))
        with pytest.raises(JobError, match=f"job work has ended already: {state}. There is nothing to cancel"):
            jobs_of(client).stop("work")
        assert client.stopped == []


class TestWait:
    @pytest.mark.parametrize("state", ENDED)
    def test_returns_what_has_ended_at_once(self, state):
        slept = []
        assert jobs_of(with_jobs(("work", state)), slept).wait("work").state == state
        assert slept == []

    def test_asks_until_it_ends(self):
        client, slept = with_jobs(("work", "PENDING")), []
        client.states = ["PENDING", "RUNNING", "RUNNING", "SUCCEEDED"]
        assert jobs_of(client, slept).wait("work", every_s=3).state == "SUCCEEDED"
        assert slept == [3, 3, 3, 3]

    def test_a_head_that_is_silent_for_a_while_is_borne(self):
        client, slept = with_jobs(("work", "RUNNING")), []
        client.states = ["SUCCEEDED"]
        client.raises = [ConnectionError("gone")] * 4
        assert jobs_of(client, slept).wait("work", every_s=1).state == "SUCCEEDED"
        assert slept == [1, 2, 4, 8, 16]

    def test_a_head_that_stays_silent_is_an_error(self):
        client = with_jobs(("work", "RUNNING"))
        client.raises = [ConnectionError("gone\nfar away")] * 5
        with pytest.raises(JobError, match=rf"^the Ray dashboard at {ADDRESS} stopped answering: gone\.$"):
            jobs_of(client).wait("work")


class TestLogs:
    def test_logs_are_those_of_the_latest_attempt(self):
        assert jobs_of(with_jobs(("work", "FAILED"), ("work-2", "FAILED"))).logs("work") == "log of work-2\n"

    def test_following_ends_with_the_job(self):
        client = with_jobs(("work", "RUNNING"))
        client.streams, client.states = [["one\n", "two\n"]], ["SUCCEEDED"]
        assert list(jobs_of(client).follow("work")) == ["one\n", "two\n"]

    @pytest.mark.parametrize("breaks", [pytest.param([], id="closed"), *BREAKS])
    @pytest.mark.parametrize("pieces", [["one\n"], ["on", "e\n", "t"], []], ids=["line", "mid-word", "nothing"])
    def test_a_connection_that_breaks_loses_and_repeats_nothing(self, pieces, breaks):
        client = with_jobs(("work", "RUNNING"))
        client.streams = [[*pieces, *breaks], ["one\ntwo\n", "three\n"]]
        client.states = ["RUNNING", "SUCCEEDED"]
        assert "".join(jobs_of(client).follow("work")) == "one\ntwo\nthree\n"

    @pytest.mark.parametrize("breaks", BREAKS)
    def test_a_connection_that_breaks_as_the_job_ends_loses_nothing(self, breaks):
        """The last lines say why it failed."""
        client = with_jobs(("work", "RUNNING"))
        client.streams, client.states = [["log of", *breaks]], ["FAILED"]
        assert "".join(jobs_of(client).follow("work")) == "log of work\n"

    def test_a_head_that_is_gone_for_good_is_an_error(self):
        client = with_jobs(("work", "RUNNING"))
        client.streams, client.raises = [["one\n", OSError("refused")]], [OSError("refused")] * 5
        with pytest.raises(JobError, match=f"the Ray dashboard at {ADDRESS} stopped answering: refused"):
            list(jobs_of(client).follow("work"))

    def test_a_reader_that_leaves_closes_the_connection(self):
        client = with_jobs(("work", "RUNNING"))
        client.streams = [["one\n", "two\n"]]
        reading = jobs_of(client).follow("work")
        assert next(reading) == "one\n"
        reading.close()
        assert list(reading) == []

    @pytest.mark.parametrize(("status", "words"), [(401, "asks for a token"), (403, "refused the token")])
    def test_a_refused_connection_is_one_sentence(self, status, words):
        class HandshakeError(Exception):
            pass

        error = HandshakeError("no")
        error.status = status
        client = with_jobs(("work", "RUNNING"))
        client.streams = [[error]]
        with pytest.raises(JobError, match=words):
            list(jobs_of(client).follow("work"))

    def test_a_bug_is_no_error_of_the_cluster(self):
        client = with_jobs(("work", "RUNNING"))
        client.raises = [ZeroDivisionError("a bug")]
        with pytest.raises(ZeroDivisionError):
            jobs_of(client).logs("work")


class Dashboard(http.server.BaseHTTPRequestHandler):
    """Answers every request with one status and body."""

    status, body = 200, b"{}"

    def do_GET(self):
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args):
        pass


@pytest.fixture
def answering():
    """Start a server that answers as told, and return its address."""
    servers = []

    def start(status, body=b""):
        handler = type("Told", (Dashboard,), {"status": status, "body": body})
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=[0.01], daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class TestConnect:
    def test_nobody_at_the_address(self):
        with pytest.raises(JobError, match=r"^no Ray dashboard answers at http://127.0.0.1:9: .*tunnel"):
            connect("http://127.0.0.1:9")

    @pytest.mark.parametrize(
        ("status", "body"),
        [(404, b""), (500, b"{}"), (200, b"<html>"), (200, b"[]"), (200, b'{"a": 1}'), (200, b"3"), (200, b"\xff")],
        ids=["not-found", "broken", "page", "list", "other", "number", "bytes"],
    )
    def test_somebody_else_at_the_address(self, answering, status, body):
        address = answering(status, body)
        with pytest.raises(JobError, match=f"^what answers at {address} is no Ray dashboard"):
            connect(address)

    @pytest.mark.parametrize(
        ("status", "words"),
        [(401, "asks for a token, and none was found"), (403, "refused the token")],
        ids=["missing", "wrong"],
    )
    @pytest.mark.parametrize("slash", ["", "/"], ids=["bare", "slash"])
    def test_a_token_that_does_not_fit(self, answering, status, words, slash):
        address = answering(status)
        with pytest.raises(JobError) as caught:
            connect(address + slash)
        assert str(caught.value) == (
            f"the Ray cluster at {address} {words}. "
            "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file that holds the cluster's token."
        )

    @pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
    def test_the_address_given_wins_over_the_environment(self, answering, monkeypatch, variable):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
        address = answering(200, b'{"ray_version": "2.60.0"}')
        assert connect(address.removeprefix("http://")) is not None
        assert os.environ[variable] == "http://127.0.0.1:9"

    @pytest.mark.parametrize(
        ("address", "words"),
        [
            ("ray://head:10001", "is no address of a dashboard"),
            ("os://head", "is no address of a dashboard"),
            ("http://", "is no address of a dashboard"),
            ("http://[", "is no address"),
            ("http://head:many", "is no address"),
        ],
        ids=["client-port", "module-of-python", "empty", "bracket", "port-word"],
    )
    def test_what_is_no_address(self, address, words):
        with pytest.raises(JobError, match=words):
            connect(address)

    def test_a_password_in_the_address_is_refused_and_not_repeated(self):
        with pytest.raises(JobError) as caught:
            connect("http://me:hush@head:8265")
        assert "head" in str(caught.value)
        assert "hush" not in str(caught.value)
