"""Notices that a machine will go, asked of a local server that answers by a table."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.notice import BASES, Notice, watch_for

TOKEN = "/latest/api/token"
ACTION = "/latest/meta-data/spot/instance-action"
PREEMPTED = "/computeMetadata/v1/instance/preempted"
EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
TERMINATE = '{"action": "terminate", "time": "2026-11-25T05:00:00Z"}'


@dataclass
class Cloud:
    """Pages by method and path, the header that each of them demands, and what was asked."""

    pages: dict[tuple[str, str], str | bytes] = field(default_factory=dict)
    demands: dict[str, tuple[str, str]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    address: str = ""

    def notice(self, *names: str) -> Notice:
        return watch_for(names, dict.fromkeys(BASES, self.address))


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    it = Cloud()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            it.asked.append((self.command, self.path))
            page = it.pages.get((self.command, self.path))
            header, value = it.demands.get(self.path, ("Host", self.headers["Host"]))
            if isinstance(page, bytes):
                # What no HTTP server says.
                self.wfile.write(page)
            elif page is None or self.headers.get(header) != value:
                self.send_error(404 if page is None else 401)
            else:
                self.send_response(200)
                self.send_header("Content-Length", str(len(page.encode())))
                self.end_headers()
                self.wfile.write(page.encode())

        do_GET = do_PUT = answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    it.address = f"http://127.0.0.1:{server.server_address[1]}"
    yield it
    server.shutdown()
    server.server_close()


def scheduled(kind: str, *names: str) -> str:
    return json.dumps({"DocumentIncarnation": 1, "Events": [{"EventType": kind, "Resources": list(names)}]})


def azure(cloud: Cloud, events: str, name: str | None = "vm_3") -> None:
    cloud.pages["GET", EVENTS] = events
    cloud.demands[EVENTS] = cloud.demands[NAME] = ("Metadata", "true")
    if name is not None:
        cloud.pages["GET", NAME] = name


def gcp(cloud: Cloud, value: str) -> None:
    cloud.pages["GET", PREEMPTED] = value
    cloud.demands[PREEMPTED] = ("Metadata-Flavor", "Google")


def aws(cloud: Cloud, action: str | None, *, token: str | None = "secret") -> None:
    if token is not None:
        cloud.pages["PUT", TOKEN] = token
        cloud.demands[TOKEN] = ("X-aws-ec2-metadata-token-ttl-seconds", "60")
        cloud.demands[ACTION] = ("X-aws-ec2-metadata-token", token)
    if action is not None:
        cloud.pages["GET", ACTION] = action


@pytest.mark.parametrize(
    ("source", "prepare", "reason"),
    [
        pytest.param("aws", lambda c: aws(c, TERMINATE), "the spot instance will terminate at 2026", id="aws"),
        pytest.param("aws", lambda c: aws(c, '{"action": "stop"}', token=None), "will stop", id="aws without tokens"),
        pytest.param("gcp", lambda c: gcp(c, "TRUE"), "is being preempted", id="gcp"),
        pytest.param("azure", lambda c: azure(c, scheduled("Preempt", "vm_3")), "to preempt", id="azure spot"),
        pytest.param(
            "azure", lambda c: azure(c, scheduled("Terminate", "vm_1", "vm_3")), "to terminate", id="azure scale set"
        ),
    ],
)
def test_a_machine_that_will_go_says_why(
    cloud: Cloud, source: str, prepare: Callable[[Cloud], None], reason: str
) -> None:
    notice = cloud.notice(source)
    assert notice() is None
    prepare(cloud)
    assert reason in str(notice())


@pytest.mark.parametrize(
    ("source", "prepare"),
    [
        pytest.param("aws", lambda c: aws(c, None), id="aws, nothing planned"),
        pytest.param("aws", lambda c: aws(c, "<html>sign in</html>"), id="not the service of aws"),
        pytest.param("aws", lambda c: aws(c, '["terminate"]'), id="aws, other data"),
        pytest.param("aws", lambda c: aws(c, '{"action": null}'), id="aws, no action"),
        pytest.param("gcp", lambda c: gcp(c, "FALSE"), id="gcp, not preempted"),
        pytest.param("azure", lambda c: azure(c, '{"Events": []}'), id="azure, nothing planned"),
        pytest.param("azure", lambda c: azure(c, scheduled("Reboot", "vm_3")), id="azure, only a reboot"),
        pytest.param("azure", lambda c: azure(c, scheduled("Preempt", "vm_1")), id="azure, another machine of the set"),
        pytest.param("azure", lambda c: azure(c, scheduled("Preempt", "vm_3"), name=None), id="azure, no name"),
        pytest.param("azure", lambda c: azure(c, "[1, 2]"), id="azure, a list"),
        pytest.param("azure", lambda c: azure(c, '{"Events": 3}'), id="azure, events that are none"),
        pytest.param("azure", lambda c: azure(c, '{"Events": [{}]}'), id="azure, an empty event"),
        pytest.param("azure", lambda c: azure(c, '{"Events": [{"EventType": "Pre'), id="azure, cut off"),
    ],
)
def test_a_machine_that_stays_says_nothing(cloud: Cloud, source: str, prepare: Callable[[Cloud], None]) -> None:
    prepare(cloud)
    assert cloud.notice(source)() is None
    assert cloud.asked


@pytest.mark.parametrize("source", ["aws", "gcp", "azure"])
@pytest.mark.parametrize(
    "nonsense",
    [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nTRU"],
    ids=["ssh", "cut off"],
)
def test_what_speaks_no_http_says_nothing(cloud: Cloud, source: str, nonsense: bytes) -> None:
    for method, path in (("PUT", TOKEN), ("GET", ACTION), ("GET", PREEMPTED), ("GET", EVENTS)):
        cloud.pages[method, path] = nonsense
    assert cloud.notice(source)() is None


@pytest.mark.parametrize("source", ["aws", "gcp", "azure"])
def test_a_service_that_is_not_there_says_nothing(source: str) -> None:
    # Port 9 of this machine has no listener: the connection is refused at once.
    assert watch_for([source], dict.fromkeys(BASES, "http://127.0.0.1:9"))() is None


def test_proxies_of_the_environment_are_not_asked(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    gcp(cloud, "TRUE")
    assert cloud.notice("gcp")() is not None


def test_a_file_that_appears_is_a_notice(tmp_path: Path) -> None:
    path = tmp_path / "going"
    notice = watch_for([f"file:{path}"])
    assert notice() is None
    path.touch()
    assert notice() == f"{path} is there"


def test_a_file_that_cannot_be_looked_for_is_no_notice() -> None:
    assert watch_for(["file:/" + "x" * 5000])() is None


def test_the_first_source_that_knows_is_enough(cloud: Cloud, tmp_path: Path) -> None:
    notice = cloud.notice(f"file:{tmp_path / 'going'}", "gcp", "aws")
    assert notice() is None
    gcp(cloud, "TRUE")
    assert notice() == "the machine is being preempted"


def test_no_source_gives_no_notice() -> None:
    assert watch_for([])() is None


@pytest.mark.parametrize("name", ["oracle", "file:", "", "AWS"])
def test_a_source_that_is_unknown_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"no source of notices is called .*\. Use aws, gcp, azure or file:PATH\."):
        watch_for([name])
