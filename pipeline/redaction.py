"""No secret in a message: what looks like a credential in the environment or in a URL is written as ``***``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote

HIDDEN = "***"
SHORTEST = 8
"""Characters from which on the value of a variable is hidden; shorter ones are words that occur anywhere."""

_SECRET_NAME = re.compile(r"(?:^|_)(?:TOKEN|KEY|SECRET|PASSPHRASE)$|PASSWORD|PASSWD", re.IGNORECASE)
_USER_IN_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*:/{1,2})(?P<secret>[^\s/?#@:]*:[^\s/]*|[^\s/?#@:]{20,})(?=@)"
)
_SIGNED = re.compile(
    r"(?P<name>[?&;](?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|Signature|AWSAccessKeyId|sig|token"
    r"|access_token)=)(?P<secret>[^\s&#;\"'<>]+)",
    re.IGNORECASE,
)


def secrets_in(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables whose names say that they hold a secret, and whose values are long enough to be one."""
    return {
        name: value
        for name, value in environment.items()
        if _SECRET_NAME.search(name) and len(value.strip()) >= SHORTEST
    }


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Replace every secret of the environment, user and password in a URL, and signature of a URL by ``***``.

    Parameters
    ----------
    environment : by default that of this process.
    """
    secrets = secrets_in(os.environ if environment is None else environment)
    written = sorted({form for value in secrets.values() for form in _forms(value)})
    while (cleaner := _hidden(text, written)) != text:
        # What is left on both sides of a replacement may spell another secret.
        text = cleaner
    return text


def credentials_in(text: str, environment: Mapping[str, str] | None = None) -> str | None:
    """Say which credential a setting holds, without showing it; None if there is none."""
    if any(match["secret"] != HIDDEN for match in _USER_IN_URL.finditer(text)):
        return "a URL with user and password"
    if any(match["secret"] != HIDDEN for match in _SIGNED.finditer(text)):
        return "a signed URL"
    for name, value in secrets_in(os.environ if environment is None else environment).items():
        if value.strip() in text:
            return f"the value of the environment variable {name}"
    return None


def _hidden(text: str, secrets: Iterable[str]) -> str:
    spans = [span for secret in secrets for span in _occurrences(text, secret)]
    for pattern in (_USER_IN_URL, _SIGNED):
        spans += [match.span("secret") for match in pattern.finditer(text) if match["secret"] != HIDDEN]
    pieces, end = [], 0
    for start, stop in _joined(spans):
        pieces += [text[end:start], HIDDEN]
        end = stop
    return "".join([*pieces, text[end:]])


def _forms(value: str) -> set[str]:
    """Return a secret as libraries write it: bare, in a URL, in JSON, in a repr, on one line."""
    bare = value.strip()
    written = {
        bare,
        quote(bare),
        quote(bare, safe=""),
        json.dumps(bare)[1:-1],
        repr(bare)[1:-1],
        " ".join(bare.split()),
    }
    return {form for form in written if len(form) >= SHORTEST}


def _occurrences(text: str, secret: str) -> Iterable[tuple[int, int]]:
    at = text.find(secret)
    while at >= 0:
        yield at, at + len(secret)
        at = text.find(secret, at + 1)


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join spans that overlap: cut one after the other, the rest of a secret would stay."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and start < joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined
