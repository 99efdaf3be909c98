"""What a user wrote, as part of a message: short, on one line, nothing that a terminal would act on."""

from __future__ import annotations

import unicodedata

LONGEST = 160
"""Characters of one value or name in a message."""
_ACTS = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of control and format characters, lone surrogates, line and paragraph separators."""


def shown(value: object) -> str:
    """Return a value as Python would write it, its middle left out if it is long."""
    try:
        text = repr(value)
    except RecursionError:
        text = "something nested too deeply"
    return shortened(plain(text))


def named(*parts: object) -> str:
    """Return a key path with dots between its parts."""
    return shortened(plain(".".join(map(str, parts))))


def shortened(text: str, most: int = LONGEST) -> str:
    """Leave out the middle of a long text."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}...{text[-(most // 2 - 3) :]}"


def plain(text: str, *, lines: bool = False) -> str:
    """Escape whatever a terminal would act on or cannot show.

    Parameters
    ----------
    lines : keep line breaks.
    """
    return "".join(
        ch.encode("unicode_escape").decode() if unicodedata.category(ch) in _ACTS and not (lines and ch == "\n") else ch
        for ch in text
    )
