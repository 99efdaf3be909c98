"""Counts what is asked of a store: requests to a local S3 server, or operations on the files of a folder."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

DRIVER, REPLICA = "driver", "replica"
_DRIVERS_OWN = ("lease", "journal", "stop.json")
"""What the driver asks for from a thread of its own while a replica in the same process is at work."""
_OPERATIONS = {
    "os.rename": "rename",
    "os.link": "link",
    "os.mkdir": "mkdir",
    "os.listdir": "list",
    "os.scandir": "list",
    "os.remove": "delete",
}
"""What Python tells of before it asks the system; ``open`` is told apart by its mode."""


@dataclass
class Tally:
    """Requests by who asked and what for, and the bytes that were sent.

    Attributes
    ----------
    at_work : whether a replica is at work: what is asked meanwhile is its own, but for what only drivers ask for.
    """

    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    at_work: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def replica(self) -> Iterator[None]:
        """Count what is asked meanwhile as a replica's."""
        self.at_work = True
        try:
            yield
        finally:
            self.at_work = False

    def count(self, kind: str, key: str, sent: int = 0) -> None:
        """Count one request for a key below the store."""
        own = self.at_work and not key.startswith(_DRIVERS_OWN)
        who = REPLICA if own else DRIVER
        with self._lock:
            self.requests[who, kind] += 1
            self.sent[who] += sent

    def of(self, who: str) -> dict[str, int]:
        """Return the requests of one side, by kind."""
        return {kind: n for (asked, kind), n in sorted(self.requests.items()) if asked == who}

    def clear(self) -> None:
        """Begin anew."""
        with self._lock:
            self.requests.clear()
            self.sent.clear()


@contextmanager
def bucket(tally: Tally) -> Iterator[str]:
    """Give a new bucket of an S3 server in this process that counts; credentials are in the environment meanwhile."""
    # All servers of a process share their buckets.
    name = f"counted-{next(_numbers)}"
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    counted = _Counting(DomainDispatcherApplication(create_backend_app), f"/{name}", tally)
    # HTTP/1.1, so that connections are kept as a real server keeps them.
    handler = type("Handler", (MotoRequestHandler,), {"protocol_version": "HTTP/1.1", "log": lambda *_: None})
    server = make_server("127.0.0.1", 0, counted, threaded=True, request_handler=handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    before = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    ours = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_REGION": "us-east-1",
    }
    for key in before:
        del os.environ[key]
    os.environ.update(ours)
    try:
        urllib.request.urlopen(urllib.request.Request(f"{address}/{name}", method="PUT")).close()
        tally.clear()
        yield f"s3://{name}"
    finally:
        for key in ours:
            os.environ.pop(key, None)
        os.environ.update(before)
        server.shutdown()
        server.server_close()


class _Counting:
    """A web application in front of another one."""

    def __init__(self, app: Callable[..., Iterable[bytes]], path: str, tally: Tally) -> None:
        self._app, self._path, self._tally = app, path, tally

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path, method = environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"]
        query = parse_qs(environ.get("QUERY_STRING", ""))
        listed = method == "GET" and "list-type" in query
        asked = query.get("prefix", [""])[0] if listed else path.removeprefix(self._path).lstrip("/")
        # Below the bucket comes the store's own name.
        key = asked.partition("/")[2]
        self._tally.count("LIST" if listed else method, key, int(environ.get("CONTENT_LENGTH") or 0))
        return self._app(environ, start_response)


_numbers = itertools.count(1)
_folders: dict[str, Tally] = {}
_hooks: list[str] = []


@contextmanager
def folder(path: Path, tally: Tally) -> Iterator[Path]:
    """Count what this process does with the files below a folder."""
    if not _hooks:
        # It can never be removed again, and does nothing while no folder is counted.
        sys.addaudithook(_hear)
        _hooks.append("heard")
    _folders[f"{path}/"] = tally
    try:
        yield path
    finally:
        del _folders[f"{path}/"]


def _hear(event: str, args: tuple[Any, ...]) -> None:
    if not _folders or (event != "open" and event not in _OPERATIONS):
        return
    path = str(args[0]) if args and isinstance(args[0], str | os.PathLike) else ""
    for root, tally in list(_folders.items()):
        if path.startswith(root):
            # Below the folder comes the store's own name.
            key = path.removeprefix(root).partition("/")[2]
            tally.count(_OPERATIONS.get(event) or _opened(args), key)


def _opened(args: tuple[Any, ...]) -> str:
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    mode, flags = args[1], args[2]
    return "open to write" if (isinstance(mode, str) and set(mode) & set("wax+")) or flags & writing else "open to read"
