"""How a process learns that its machine will be taken away: a cloud's metadata service, or a file that appears."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

Notice: TypeAlias = Callable[[], str | None]
"""Returns why the machine will go, or None."""

_TIMEOUT_S = 1.0
_LINK_LOCAL = "http://169.254.169.254"
BASES: Mapping[str, str] = {"aws": _LINK_LOCAL, "gcp": "http://metadata.google.internal", "azure": _LINK_LOCAL}
"""Where each cloud answers, from inside its machines only."""

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
        path = Path(name.removeprefix("file:"))
        return lambda: f"{path} is there" if path.exists() else None
    if name not in _CLOUDS:
        raise ValueError(f"no source of notices is called {name!r}. Use {', '.join(_CLOUDS)} or file:PATH.")
    cloud, base = _CLOUDS[name], bases[name]
    return lambda: cloud(base)


def _aws(base: str) -> str | None:
    # Version 2 of the service wants a session token; machines of version 1 ignore it.
    token = _ask(f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
    headers = {"X-aws-ec2-metadata-token": token} if token else {}
    action = _ask(f"{base}/latest/meta-data/spot/instance-action", headers)
    return f"the spot instance will go: {action}" if action else None


def _gcp(base: str) -> str | None:
    preempted = _ask(f"{base}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return "the machine is being preempted" if preempted == "TRUE" else None


def _azure(base: str) -> str | None:
    text = _ask(f"{base}/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})
    try:
        events = json.loads(text or "{}").get("Events", [])
        kinds = [event["EventType"] for event in events if event["EventType"] in _GOING]
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return f"the machine is scheduled to {kinds[0].lower()}" if kinds else None


def _ask(url: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
    """Return what the service answers; None where it does not answer, as on any other machine."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as reply:
            return str(reply.read(4096).decode(errors="replace")).strip()
    except (OSError, ValueError):
        return None


_CLOUDS: Mapping[str, Callable[[str], str | None]] = {"aws": _aws, "gcp": _gcp, "azure": _azure}
