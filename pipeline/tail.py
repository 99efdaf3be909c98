"""Following a growing journal: only what was appended since the last look is read, a bounded block at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.store.journal import opened

BLOCK = 2**20
"""Bytes read at once; a longer line is no entry of ours and is skipped."""
JOURNAL = "journal"
_SUFFIXES = (".json", ".jsonl")


@dataclass(frozen=True, slots=True)
class Offset:
    """A position in a journal: a segment and a byte in it; everything before it has been read."""

    segment: str = ""
    byte: int = 0


class Files(Protocol):
    """The files beside the arrays of a store, wherever it is.

    Attributes
    ----------
    appends : whether a journal is one file that grows, or segments; a store that was copied may have the other, older.
    """

    appends: bool

    def names(self, folder: str) -> list[str]:
        """List the JSON files of a folder below the store, sorted."""

    def size(self, name: str) -> int:
        """Return the bytes of a file; 0 if there is none."""

    def read(self, name: str, start: int, count: int) -> bytes:
        """Return up to ``count`` bytes from ``start``; nothing beyond the end or if there is no such file."""


class LocalFiles:
    """Files of a store in a folder."""

    appends = True

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self, folder: str) -> list[str]:
        """List the JSON files of a folder below the store, sorted."""
        return sorted(f"{folder}/{p.name}" for p in (self.root / folder).glob("*") if p.suffix in _SUFFIXES)

    def size(self, name: str) -> int:
        """Return the bytes of a file; 0 if there is none."""
        try:
            return os.stat(self.root / name).st_size
        except OSError:
            return 0

    def read(self, name: str, start: int, count: int) -> bytes:
        """Return up to ``count`` bytes from ``start``; nothing beyond the end or if there is no such file."""
        try:
            with (self.root / name).open("rb") as handle:
                handle.seek(start)
                return handle.read(count)
        except OSError:
            return b""


class ZarrFiles:
    """Files of a store behind a Zarr storage backend, such as a bucket.

    Parameters
    ----------
    store : ``zarr.abc.store.Store``. prefix : where in it the sweep lies.
    """

    appends = False

    def __init__(self, store: Any, prefix: str = "") -> None:
        self.store, self.prefix = store, f"{prefix.strip('/')}/" if prefix.strip("/") else ""

    def names(self, folder: str) -> list[str]:
        """List the JSON files of a folder below the store, sorted."""
        from zarr.core.sync import sync

        async def collect() -> list[str]:
            return [key async for key in self.store.list_prefix(f"{self.prefix}{folder}/")]

        return sorted(key.removeprefix(self.prefix) for key in sync(collect()) if key.endswith(_SUFFIXES))

    def size(self, name: str) -> int:
        """Return the bytes of a file; 0 if there is none."""
        from zarr.core.sync import sync

        try:
            return int(sync(self.store.getsize(self.prefix + name)))
        except FileNotFoundError:
            return 0

    def read(self, name: str, start: int, count: int) -> bytes:
        """Return up to ``count`` bytes from ``start``; nothing beyond the end or if there is no such file."""
        from zarr.abc.store import RangeByteRequest
        from zarr.core.buffer import default_buffer_prototype
        from zarr.core.sync import sync

        # Backends differ in what a range beyond the end is: none of them is asked for one.
        stop = min(start + count, self.size(name))
        if stop <= start:
            return b""
        wanted = self.store.get(self.prefix + name, default_buffer_prototype(), RangeByteRequest(start, stop))
        found = sync(wanted)
        return b"" if found is None else bytes(found.to_bytes())


class JournalReader:
    """Reads a journal from an offset: ``journal.jsonl`` and the segments of ``journal/``, in order of their names.

    Only the last of them still grows.
    """

    def __init__(self, files: Files) -> None:
        self.files = files

    def read(self, offset: Offset) -> tuple[list[dict[str, Any]], Offset]:
        """Return the entries of one block after an offset, and the offset after them; the same one at the end.

        A line that is still being written is left for the next look; a torn one is skipped.
        """
        # Listed before reading: what has a later segment is complete.
        segments = self._segments()
        begun = segments.index(offset.segment) if offset.segment in segments else 0
        for segment in segments[begun:]:
            start = offset.byte if segment == offset.segment else 0
            block = self.files.read(segment, start, BLOCK)
            used = _used(block)
            if used:
                return _entries(block[:used]), Offset(segment, start + used)
        return [], offset

    def new(self, offset: Offset) -> Iterator[tuple[list[dict[str, Any]], Offset]]:
        """Yield blocks until there is nothing new."""
        while True:
            entries, after = self.read(offset)
            if after == offset:
                return
            offset = after
            yield entries, offset

    def shrunk(self, offset: Offset) -> bool:
        """Whether the journal is another one than the one that was read up to an offset."""
        return bool(offset.segment) and self.files.size(offset.segment) < offset.byte

    def _segments(self) -> list[str]:
        segments = self.files.names(JOURNAL)
        return [*segments, f"{JOURNAL}.jsonl"] if self.files.appends else [f"{JOURNAL}.jsonl", *segments]


def _used(block: bytes) -> int:
    """Return how much of a block holds whole lines."""
    end = block.rfind(b"\n") + 1
    rest = block[end:]
    # Only a whole object ends in its brace; its line end is written with the next entry then.
    if rest and ((len(block) == BLOCK and not end) or _entries(rest)):
        return len(block)
    return end


def _entries(text: bytes) -> list[dict[str, Any]]:
    # As whoever resumes reads them: what it does not believe is not shown either.
    return [entry for line in text.split(b"\n") if (entry := opened(line.rstrip())) is not None]
