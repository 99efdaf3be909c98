"""How a process learns that its machine will be taken away: a cloud's metadata service, or a file that appears."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from typing import Any, TypeAlias

Notice: TypeAlias = Callable[[], str | None]
"""Returns why the machine will go, or None."""

_TIMEOUT_S = 1.0
_LONGEST = 2**16
_LINK_LOCAL = "http://169.254.169.254"
BASES: Mapping[str, str] = {"aws": _LINK_LOCAL, "gcp": "http://metadata.google.internal", "azure": _LINK_LOCAL}
"""Where each cloud answers, from inside its machines only."""

_AZURE = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
_AZURE_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
_GOING = ("Preempt", "Terminate")


def watch_for(names: Sequence[str], bases: Mapping[str, str] = BASES) -> Notice:
    """Return a function that asks every source once.

    Parameters
    ----------
    names : "aws", "gcp", "azure", or "file:" and a path that somebody creates when the machine will go.

    Raises
    ------
    ValueError : a name that is none of these.
    """
    sources = [_source(name, bases) for name in names]
    return lambda: next((reason for source in sources if (reason := source()) is not None), None)


def _source(name: str, bases: Mapping[str, str]) -> Notice:
    if name.startswith("file:") and len(name) > len("file:"):
        path = name.removeprefix("file:")
        return lambda: f"{path} is there" if os.path.exists(path) else None
    if name not in _CLOUDS:
        raise ValueError(f"no source of notices is called {name!r}. Use {', '.join(_CLOUDS)} or file:PATH.")
    cloud, base = _CLOUDS[name], bases[name]
    return lambda: cloud(base)


def _aws(base: str) -> str | None:
    # Version 2 of the service wants a session token; machines of version 1 ignore it.
    token = _ask(f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
    headers = {"X-aws-ec2-metadata-token": token} if token else {}
    notice = _parse(_ask(f"{base}/latest/meta-data/spot/instance-action", headers))
    # Anything else that answers at this address is not that service.
    if not isinstance(notice, dict) or not isinstance(action := notice.get("action"), str):
        return None
    return f"the spot instance will {action} at {notice.get('time', 'a time not given')}"


def _gcp(base: str) -> str | None:
    preempted = _ask(f"{base}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return "the machine is being preempted" if preempted == "TRUE" else None


def _azure(base: str) -> str | None:
    answer = _parse(_ask(f"{base}{_AZURE_EVENTS}", {"Metadata": "true"}))
    try:
        going = [event for event in answer["Events"] if event["EventType"] in _GOING]
        # Every machine of a scale set hears of the events of all.
        name = _ask(f"{base}{_AZURE}", {"Metadata": "true"}) if going else None
        kinds = [event["EventType"].lower() for event in going if name in event["Resources"]]
    except (LookupError, TypeError, AttributeError):
        return None
    return f"the machine is scheduled to {kinds[0]}" if kinds else None


def _parse(text: str | None) -> Any:
    try:
        return json.loads(text or "null")
    except ValueError:
        return None


def _ask(url: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
    """Return what the service answers; None where it does not answer, as on any other machine."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as reply:
            return str(reply.read(_LONGEST).decode(errors="replace")).strip()
    except (OSError, ValueError, HTTPException):
        return None


_CLOUDS: Mapping[str, Callable[[str], str | None]] = {"aws": _aws, "gcp": _gcp, "azure": _azure}
