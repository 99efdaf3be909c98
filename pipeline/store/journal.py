"""The journal of a store: one line of JSON for each finished attempt, beside the arrays."""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.store.errors import storage_error
from pipeline.store.location import Folder, Place, locate

PENDING, DONE, FAILED = 0, 1, 2
"""States of a unit."""

LOCAL = "journal.jsonl"
SEGMENTS = "journal"
SEGMENT_BYTES = 1_000_000
"""Size at which a new segment begins: the current one is written whole with every flush."""


MOST = 2**31 - 1
"""Units of a group and cells of a unit that a journal can tell of."""


def status_of(entry: dict[str, Any]) -> int | None:
    """Return the state that a line of the journal gives its unit; None if it is about no unit's end, or makes no sense.

    Of what is not None, ``group`` is a text, ``index`` and ``failed`` are whole numbers from 0 on.
    """
    if not isinstance(entry.get("group"), str):
        return None
    if any(type(n) is not int or not 0 <= n <= MOST for n in (entry.get("index"), entry.get("failed", 0))):
        return None
    if entry.get("unset"):
        return PENDING
    return FAILED if entry.get("error") or entry.get("failed") else DONE


class Journal:
    """Append-only lines of JSON.

    In a folder every line is in the file, and safe from the death of the process, when ``append`` returns. A bucket
    cannot append: there lines are gathered in segments, and safe once ``flush`` returns.

    Parameters
    ----------
    place : of the store. generation : of the lease of the driver that writes; readers need none.

    Attributes
    ----------
    skipped : lines that the last reading could not use: torn by a kill, or corrupted.
    """

    def __init__(self, place: Place, generation: int = 0) -> None:
        self.location = locate(place)
        self.generation = generation
        self.skipped = 0
        self._file: int | None = None
        self._torn = False
        self._segment: int | None = None
        self._lines: list[bytes] = []
        self._size = 0
        self._dirty = False

    def append(self, **entry: Any) -> None:
        """Append one entry with the time of writing, on a line of its own even after a torn one.

        Raises
        ------
        StorageFullError, StorageReadOnlyError : the line cannot be written.
        """
        line = _sealed({"time": round(time.time(), 3), **entry})
        if isinstance(self.location, Folder):
            self._append_to_file(line)
            return
        self._lines.append(line)
        self._size += len(line)
        self._dirty = True
        if self._size >= SEGMENT_BYTES:
            self.flush()
            self._lines, self._size = [], 0
            self._segment = self._next_segment() + 1

    def flush(self) -> None:
        """Make every appended line safe; a request for each call in a bucket, so call it every few seconds."""
        if self._dirty:
            key = f"{SEGMENTS}/{self.generation:06d}-{self._next_segment():06d}.jsonl"
            self.location.write(key, b"".join(self._lines))
            self._dirty = False

    def close(self) -> None:
        """Flush, and close the file; another append opens it again."""
        self.flush()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield all entries in order, one at a time; lines that are no JSON object are skipped and counted."""
        self.skipped = 0
        for line in self._read_lines():
            if not line.strip():
                continue
            entry = opened(line.rstrip())
            if entry is None:
                self.skipped += 1
            else:
                yield entry

    def _read_lines(self) -> Iterator[bytes]:
        # A store that was copied between the two kinds of place has both, the foreign kind being the older one.
        if isinstance(self.location, Folder):
            yield from self._segment_lines()
            try:
                with (self.location.path / LOCAL).open("rb") as handle:
                    yield from handle
            except FileNotFoundError:
                return
        else:
            yield from (self.location.read(LOCAL) or b"").splitlines()
            yield from self._segment_lines()

    def _segment_lines(self) -> Iterator[bytes]:
        for key in self._segment_keys():
            yield from (self.location.read(key) or b"").splitlines()

    def _segment_keys(self) -> Iterable[str]:
        return [key for key in self.location.list(SEGMENTS) if key.endswith(".jsonl")]

    def _next_segment(self) -> int:
        """Return the number of the segment being written, after all that an earlier journal of this generation left."""
        if self._segment is None:
            found = [match for key in self._segment_keys() if (match := _SEGMENT.fullmatch(key))]
            numbers = [int(match[2]) for match in found if int(match[1]) == self.generation]
            self._segment = max(numbers, default=0) + 1
        return self._segment

    def _append_to_file(self, line: bytes) -> None:
        assert isinstance(self.location, Folder)
        path = self.location.path / LOCAL
        try:
            if self._file is None:
                self._torn = _ends_torn(path)
                self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            if self._torn:
                line = b"\n" + line
            # One call a line: a kill comes before it or after it. A full disk may still take only a part.
            self._torn = True
            if os.write(self._file, line) < len(line):
                raise OSError(28, "No space left on device")
            self._torn = False
        except OSError as error:
            raise storage_error(error, str(path)) or error from error


def newest_told(place: Place) -> int:
    """Return the largest generation that a segment of the journal is of, 0 without one.

    Of a store that was copied without its lease, the journal alone tells: lines of a later driver must come after.
    """
    keys = locate(place).list(SEGMENTS)
    return max((int(found[1]) for key in keys if (found := _SEGMENT.fullmatch(key))), default=0)


_SEGMENT = re.compile(rf"{SEGMENTS}/(\d{{6,12}})-(\d{{6,12}})\.jsonl")
_SEAL = re.compile(rb', "crc": "([0-9a-f]{8})"}$')


def _sealed(entry: dict[str, Any]) -> bytes:
    """Return the line of an entry, which ends with a checksum of what comes before."""
    text = json.dumps(entry).encode()
    return text[:-1] + f', "crc": "{zlib.crc32(text):08x}"}}\n'.encode()


def opened(line: bytes) -> dict[str, Any] | None:
    """Return the entry of a line without its checksum; None if it is no entry, or not the one that was written."""
    if seal := _SEAL.search(line):
        line = line[: seal.start()] + b"}"
        if f"{zlib.crc32(line):08x}".encode() != seal[1]:
            return None
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _ends_torn(path: os.PathLike[str]) -> bool:
    try:
        with open(path, "rb") as handle:
            if handle.seek(0, os.SEEK_END) == 0:
                return False
            handle.seek(-1, os.SEEK_END)
            return handle.read() != b"\n"
    except FileNotFoundError:
        return False
