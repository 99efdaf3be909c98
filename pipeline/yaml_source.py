"""YAML read strictly, with the line of every key: duplicate keys refused, booleans and numbers as in YAML 1.2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.wording import named, plain, shortened, shown

Loc = tuple[str | int, ...]

MOST_BYTES = 2 * 2**20
MOST_VALUES = 20_000
"""Largest config that is read: values are counted as written out, so that aliases of aliases cannot fill memory."""
_MOST_DIGITS = 100


class _StrictLoader(yaml.SafeLoader):
    """PyYAML with YAML 1.2 scalars (``1e-3`` is a number, ``off`` a string) and no silent duplicate keys."""


_StrictLoader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.rsplit(":", 1)[-1] not in ("bool", "float", "timestamp", "int")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|nan))$"),
    list("-+0123456789."),
)


def _whole_number(loader: Any, node: Any) -> int:
    if len(node.value) > _MOST_DIGITS:
        # Python refuses to print such numbers, with a hint that is for programmers.
        raise yaml.constructor.ConstructorError(
            None, None, f"a number of {len(node.value)} digits; at most {_MOST_DIGITS} are read", node.start_mark
        )
    # PyYAML reads a leading zero as octal; in YAML 1.2 it means nothing.
    return int(str(node.value))


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _whole_number)

_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{t}" for t in ("map", "seq", "str", "int", "float", "bool", "null", "merge")
)


class SourceError(ValueError):
    """Text that is not one YAML mapping; the message names file and line."""


def read(text: str, name: str) -> tuple[dict[str, Any], dict[Loc, int]]:
    """Parse YAML text to a mapping of plain JSON values and the line number of each key path.

    Raises
    ------
    SourceError : syntax error, duplicate key, or a document that is not a mapping.
    """
    data, lines = _parse(text, name)
    if data is None:
        raise SourceError(f"{name}:1: no settings in it; expected a mapping of settings at the top")
    if not isinstance(data, dict):
        raise SourceError(f"{name}:1: expected a mapping of settings at the top, got {shown(data)}")
    return data, lines


def _parse(text: str, name: str) -> tuple[Any, dict[Loc, int]]:
    lines: dict[Loc, int] = {}
    if len(text) > MOST_BYTES:
        raise SourceError(f"{name}: longer than {MOST_BYTES:,} characters; a config is shorter")
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _walk(node, (), lines, name)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = shortened(plain(str(error.problem)))
        raise SourceError(f"{name}:{mark.line + 1 if mark else '?'}: not valid YAML: {problem}") from error
    except RecursionError as error:
        raise SourceError(f"{name}: not valid YAML: nested too deeply, or an alias inside of what it names") from error
    except (yaml.YAMLError, ValueError, LookupError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{name}: not valid YAML: {shortened(plain(' '.join(str(error).split())))}") from error


def read_file(path: Path) -> tuple[dict[str, Any], dict[Loc, int]]:
    """Parse a YAML file.

    Raises
    ------
    SourceError : the file cannot be read, or see ``read``.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SourceError(f"cannot read config {path}: {reason}") from error
    return read(text, str(path))


def read_value(text: str) -> Any:
    """Parse the right-hand side of a ``--set`` override.

    Raises
    ------
    SourceError : syntax error or duplicate key.
    """
    return _parse(text, "value")[0]


def line_of(loc: Loc, lines: dict[Loc, int]) -> int | None:
    """Return the line of a key path, or of its closest parent in the file."""
    while loc:
        if loc in lines:
            return lines[loc]
        loc = loc[:-1]
    return None


def _walk(node: yaml.Node, loc: Loc, lines: dict[Loc, int], name: str) -> None:
    if node.tag not in _PLAIN_TAGS:
        tag = shortened(plain(node.tag.replace("tag:yaml.org,2002:", "!!")))
        raise SourceError(f"{name}:{node.start_mark.line + 1}: not valid YAML here: tag {tag}; give a plain value")
    if len(lines) > MOST_VALUES:
        raise SourceError(f"{name}: more than {MOST_VALUES:,} values, those of aliases included; a config has fewer")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                key.tag = "tag:yaml.org,2002:str"  # keys are words as written, `3` and `1e3` too
            here = (*loc, str(key.value))
            if here in lines:
                raise SourceError(
                    f"{name}:{key.start_mark.line + 1}: key {named(*here)} is given twice (first on line {lines[here]})"
                )
            lines[here] = key.start_mark.line + 1
            _walk(value, here, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*loc, i)] = value.start_mark.line + 1
            _walk(value, (*loc, i), lines, name)
