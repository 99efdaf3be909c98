"""Adapters as Python source."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from interventions.families.family import Family

_DECLARATIONS = {"Attention", "Blocks", "Family", "Tap"}


def source_of(family: Family, doubts: Sequence[str]) -> str:
    """Return a file that declares a family made of data alone, with sentences of doubt as comments above it."""
    names = _names(family)
    facts = ", ".join(sorted(names - _DECLARATIONS))
    declared = ", ".join([*sorted(names & _DECLARATIONS), "register_family"])
    comments = [f"Not verified: {doubt}" for doubt in doubts]
    return "\n".join(
        [
            f'"""{family.title}."""',
            "",
            "from __future__ import annotations",
            "",
            *([f"from interventions.families.facts import {facts}"] if facts else []),
            f"from interventions.families.family import {declared}",
            "",
            *(f"# {line}" for comment in comments for line in textwrap.wrap(comment, 116)),
            f"{family.name.upper()} = register_family(",
            f"    {_code(family, 1)}",
            ")",
            "",
        ]
    )


def default_of(owner: type, name: str) -> Any:
    """Return the default of a declaration's field."""
    f = next(f for f in fields(owner) if f.name == name)
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _said(value: Any) -> dict[str, Any]:
    """Return the fields of a declaration that say more than their default."""
    given = {f.name: getattr(value, f.name) for f in fields(value)}
    return {name: v for name, v in given.items() if v != default_of(type(value), name)}


def _code(value: Any, depth: int) -> str:
    """Return a declaration as Python source, on one line where it fits."""
    if is_dataclass(value) and not isinstance(value, type):
        opening, closing = f"{type(value).__name__}(", ")"
        parts = [f"{name}={_code(v, depth + 1)}" for name, v in _said(value).items()]
    elif isinstance(value, dict):
        opening, closing = "{", "}"
        parts = [f"{_code(key, 0)}: {_code(v, depth + 1)}" for key, v in value.items()]
    elif isinstance(value, tuple):
        opening, closing = "(", ",)" if len(value) == 1 else ")"
        parts = [_code(v, depth + 1) for v in value]
    elif isinstance(value, slice):
        return f"slice({value.start}, {value.stop})"
    elif isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    else:
        return repr(value)
    line = f"{opening}{', '.join(parts)}{closing}"
    if len(line) + 4 * depth < 100 and "\n" not in line:
        return line
    inner = "    " * (depth + 1)
    return f"{opening}\n" + "".join(f"{inner}{part},\n" for part in parts) + "    " * depth + closing.lstrip(",")


def _names(value: Any) -> set[str]:
    """Return the classes that the source of a declaration needs."""
    if is_dataclass(value) and not isinstance(value, type):
        return {type(value).__name__}.union(*(_names(v) for v in _said(value).values()))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return set().union(*(_names(v) for v in parts))
