"""Seeded damage to sweep configs: what a tired hand, a broken editor, a bad transfer or a stranger makes of a YAML."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
SHIPPED = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "kinds").glob("*.yaml")])


def deep(depth: int) -> list[Any]:
    """Return lists in lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


# fmt: off
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 999, 10**6, 10**9, 2**31, 2**63, 10**18, -(10**9), 10**400,
    0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"), -0.0,
    "", " ", "\t", "\n", "all", "none", "true", "no", "null", "~", "1", "1.0", "1e3", "0x10", "12:30:00", "2020-01-01",
    ":", "::", "::0", "5:2", "-1:", "1:1:1:1", "99999999999999999999:", "::99999999999999999999", "-:", "a:b",
    "é", "日本語", "\u202eabc", "\u0000x", "\x1b[2J", "a\nb", "a\r\nb", "\ud800", "\U0001f600", "a" * 20_000, "%s {0}",
    "../../x", "/", "~", "~nobody/x", "file:///etc/passwd", "http://a/b", "os:system", "a.b:c", "embedded:", "a/b",
    "__import__('os')", "${HOME}", "$(touch x)", "[red]", "<script>", "red/blue", "patch", "maze", "prompts", "a/b/c",
    [], {}, [[]], [None], [1, 1], [0, "a"], [{}], {"": 1}, {"a": {"b": {"c": []}}}, {"kind": "patch"}, {"name": "maze"},
    list(range(300)), ["all"], deep(40), deep(150), {str(i): i for i in range(200)}, {"kind": "compose", "parts": {}},
]
# fmt: on
"""Stand-ins for a setting."""


def nested_aliases(first: str, following: str, times: int) -> str:
    """Return lines each of which repeats the one before: few characters, and more values than any memory holds."""
    more = (f"n{i}: &n{i} " + following.format(", ".join([f"*n{i - 1}"] * times)) for i in range(1, 12))
    return "\n".join([f"n0: &n0 {first}", *more])


LAUGHS = nested_aliases("[a, a]", "[{}]", 10)
MERGED = nested_aliases("{k: 0}", "{{<<: [{}], l: 1}}", 9)
# fmt: off
LINES = [
    "\t", "\tname: x", "- a", "? b", ": c", "---", "...", "%YAML 1.1", "%TAG ! tag:x,2000:", "'", '"', "|", ">-", "{",
    "}", "[", "]", "&a", "*a", "*nowhere", "<<: {name: x}", "<<: 1", "<<: [1]", "<<: *nowhere", "name: name: x", "é: 1",
    "!!python/object/apply:os.system ['x']", "name: !!python/name:os.system", "x: !!binary aGk=", "x: !!set {a, b}",
    "x: !local 1", "? [a, b]\n: 1", "self: &self [*self]", "self: &map {a: *map}", "a: &a 1\nb: *a", "1: 2", "1.5: 2",
    "null: 1", "true: 1", "~: 1", "'': 1", "[" * 3000, "{a: " * 1500, "- " * 900 + "x", "x: " + "9" * 6000,
    "x" * 30_000, "# " + "x" * 30_000, LAUGHS, MERGED,
]
# fmt: on
"""Lines that do not belong there."""


def spots(data: Any) -> list[tuple[Any, Any]]:
    """Return every container of a tree with every key or position in it."""
    found: list[tuple[Any, Any]] = []
    queue = [data]
    while queue:
        node = queue.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            queue.append(node[key])
    return found


def _misspell(rng: random.Random, key: str) -> str:
    at = rng.randrange(len(key) + 1)
    return rng.choice(
        [key[:at] + key[at + 1 :], key[:at] + "x" + key[at:], key.upper(), key + " ", f"{key}\n", key[::-1]]
    )


def _value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(VALUES))


def replace(rng: random.Random, node: Any, key: Any) -> None:
    node[key] = _value(rng)


def delete(rng: random.Random, node: Any, key: Any) -> None:
    del node[key]


def rename(rng: random.Random, node: Any, key: Any) -> None:
    if isinstance(node, dict):
        node[_misspell(rng, str(key))] = node.pop(key)


NAMES = ["extra", "name", "kind", "step", "layer", "screen", "seed", "parts", "", "a.b", "\x1b[31m"]


def add(rng: random.Random, node: Any, key: Any) -> None:
    if isinstance(node, dict):
        node[rng.choice(NAMES)] = _value(rng)
    else:
        node.append(_value(rng))


def repeat(rng: random.Random, node: Any, key: Any) -> None:
    if isinstance(node, list):
        node += [copy.deepcopy(node[key])] * rng.choice([1, 1, 50])
    else:
        node[f"{key}_{rng.randrange(9)}"] = copy.deepcopy(node[key])


def wrap(rng: random.Random, node: Any, key: Any) -> None:
    node[key] = rng.choice([[node[key]], {"a": node[key]}, [node[key], node[key]], {str(key): node[key]}])


def scale(rng: random.Random, node: Any, key: Any) -> None:
    value = node[key]
    if isinstance(value, int) and not isinstance(value, bool):
        node[key] = value * rng.choice([-1, 0, 10, 1000, 10**7]) + rng.choice([0, 1, -1])
    elif isinstance(value, float):
        node[key] = value * rng.choice([-1, 0.5, 1e7])
    else:
        node[key] = str(value)


STRUCTURAL: list[Callable[[random.Random, Any, Any], None]] = [
    replace, replace, replace, delete, delete, rename, add, add, repeat, wrap, scale
]  # fmt: skip


def damage_structure(rng: random.Random, text: str) -> bytes:
    """Change settings here and there, and write the result as YAML."""
    data = yaml.safe_load(text)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        places = spots(data)
        if not places:
            break
        rng.choice(STRUCTURAL)(rng, *rng.choice(places))
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def truncate(rng: random.Random, raw: bytes) -> bytes:
    return raw[: rng.randrange(len(raw))]


def flip(rng: random.Random, raw: bytes) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.choice([1, 3, 20])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


JUNK = [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", b"\t", b"\r", b"\x85", b"\xe2\x80\xa8"]


def insert_bytes(rng: random.Random, raw: bytes) -> bytes:
    at = rng.randrange(len(raw))
    return raw[:at] + rng.choice([*JUNK, rng.randbytes(8)]) + raw[at:]


def insert_line(rng: random.Random, raw: bytes) -> bytes:
    lines = raw.split(b"\n")
    at = rng.randrange(len(lines) + 1)
    indent = b" " * rng.choice([0, 0, 2, 4])
    return b"\n".join([*lines[:at], indent + rng.choice(LINES).encode(), *lines[at:]])


def shuffle_lines(rng: random.Random, raw: bytes) -> bytes:
    lines = raw.split(b"\n")
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.choice(["swap", "double", "delete", "indent", "tab"])
    if kind == "swap":
        lines[a], lines[b] = lines[b], lines[a]
    elif kind == "double":
        lines.insert(b, lines[a])
    elif kind == "delete":
        del lines[a]
    else:
        lines[a] = (b"\t" if kind == "tab" else b"  ") + lines[a]
    return b"\n".join(lines)


def alias(rng: random.Random, raw: bytes) -> bytes:
    """Name one mapping or value with an anchor and put it, or merge it, in other places."""
    lines = raw.split(b"\n")
    keyed = [i for i, line in enumerate(lines) if b": " in line or line.rstrip().endswith(b":")]
    a, b = rng.choice(keyed), rng.choice(keyed)
    head, _, tail = lines[a].partition(b":")
    lines[a] = head + b": &here" + tail
    head, _, _ = lines[b].partition(b":")
    lines[b] = rng.choice([head + b": *here", b"  <<: *here", head + b": [*here, *here]", head + b": {<<: *here}"])
    return b"\n".join(lines)


def encode_otherwise(rng: random.Random, raw: bytes) -> bytes:
    text = raw.decode()
    otherwise = [text.encode("utf-16"), text.encode("utf-32"), text.replace(" ", "\u00a0").encode()]
    instead = [b"", b"\n", b"null", b"[]", b"1", b"- a", rng.randbytes(400)]
    repeated = [raw + raw, raw + b"\n---\n" + raw, raw * 40, raw.replace(b"\n", b"\r\n")]
    return rng.choice([*otherwise, *instead, *repeated])


TEXTUAL: list[Callable[[random.Random, bytes], bytes]] = [
    *(truncate, flip, insert_bytes, alias, encode_otherwise),
    *(insert_line, insert_line, insert_line, shuffle_lines, shuffle_lines),
]


def mutant(seed: int) -> bytes:
    """Return the mutated config of a seed."""
    rng = random.Random(seed)
    text = rng.choice(SHIPPED).read_text(encoding="utf-8")
    if rng.random() < 0.65:
        return damage_structure(rng, text)
    return rng.choice(TEXTUAL)(rng, text.encode())
