"""Damage to the files of a store at rest, as disks, file systems and people do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

WAYS = ("flip", "truncate", "delete", "zeros", "swap")
"""A flipped bit; a file cut short; a file that is gone; zeros instead of content; another valid chunk's content."""
TARGETS = ("data", "status", "coordinates", "selection", "metadata", "journal")
JOURNAL_WAYS = ("flip", "tear", "garble", "delete")
JOURNAL = "journal.jsonl"


@dataclass(frozen=True, slots=True)
class Damage:
    """One act of damage, as it is drawn: where it falls depends on what is there then.

    Attributes
    ----------
    seed : draws the file and the place in it.
    """

    target: str
    way: str
    seed: int

    def __str__(self) -> str:
        return f"{self.way} {self.target}"


def draw(rng: Random, *, swaps: bool) -> Damage:
    """Draw one act of damage.

    Parameters
    ----------
    swaps : whether valid content may take the place of other content, which only the journal's digests can tell; then
        the journal is left alone.
    """
    weights = {"data": 10, "status": 2, "coordinates": 2, "selection": 2, "metadata": 1, "journal": 0 if swaps else 4}
    target = rng.choices(TARGETS, [weights[name] for name in TARGETS])[0]
    ways = JOURNAL_WAYS if target == "journal" else WAYS if target == "data" and swaps else WAYS[:-1]
    return Damage(target, rng.choice(ways), rng.randrange(2**32))


def apply(damage: Damage, store: Path) -> Path | None:
    """Do the damage; returns the file that changed, None if there was nothing that it could change."""
    rng = Random(damage.seed)
    files = [path for path in targets(store, damage.target) if path.stat().st_size]
    if not files:
        return None
    path = rng.choice(files)
    before = path.read_bytes()
    match damage.way:
        case "delete":
            path.unlink()
        case "swap":
            others = [other for other in _siblings(path, files) if other.read_bytes() != before]
            if not others:
                return None
            path.write_bytes(rng.choice(others).read_bytes())
        case way:
            path.write_bytes(_CHANGES[way](before, rng))
    return path if not path.exists() or path.read_bytes() != before else None


def targets(store: Path, target: str) -> list[Path]:
    """Return the files of a kind, in a fixed order."""
    files = sorted(path for path in store.rglob("*") if path.is_file() and not path.name.endswith(".partial"))
    return [path for path in files if kind_of(path.relative_to(store)) == target]


def kind_of(key: Path) -> str | None:
    """Return what a file of a store holds; None for what no damage is done to."""
    parts = key.parts
    if parts == (JOURNAL,):
        return "journal"
    if parts[0] == "lease" or len(parts) == 1:
        # The root says what the store is; without it there is none, which is another test's matter.
        return None
    if parts[-1] == "zarr.json":
        return "metadata"
    group, name = parts[0], parts[1]
    if name in ("exact", "drawn"):
        return "selection"
    if name == "status":
        return name
    one_chunk = parts[2:] in (("c",), ("c", "0"))
    return "coordinates" if group == "samples" or (one_chunk and not _has_values(group, name)) else "data"


def _has_values(group: str, name: str) -> bool:
    return name in ("goal_evidence", "latent_distance", "estimate", "x0_hat") or name.endswith("_by_step")


def _siblings(path: Path, files: list[Path]) -> list[Path]:
    """Return the other chunks of the same array, whose content fits."""
    array = next(parent for parent in path.parents if (parent / "zarr.json").exists())
    return [other for other in files if other != path and array in other.parents]


def _flip(content: bytes, rng: Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncate(content: bytes, rng: Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _zeros(content: bytes, rng: Random) -> bytes:
    return bytes(len(content))


def _tear(content: bytes, rng: Random) -> bytes:
    """Cut the last line short, as a kill in the middle of a write would."""
    start = content.rstrip(b"\n").rfind(b"\n") + 1
    return content[: rng.randrange(start, len(content))]


def _garble(content: bytes, rng: Random) -> bytes:
    """Put bytes that are no line of ours between two lines."""
    lines = content.splitlines(keepends=True)
    at = rng.randrange(len(lines) + 1)
    return b"".join([*lines[:at], rng.randbytes(rng.randrange(1, 200)).replace(b"\n", b"") + b"\n", *lines[at:]])


_CHANGES: dict[str, Callable[[bytes, Random], bytes]] = {
    "flip": _flip,
    "truncate": _truncate,
    "zeros": _zeros,
    "tear": _tear,
    "garble": _garble,
}
