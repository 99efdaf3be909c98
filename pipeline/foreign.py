"""A store that may come from a stranger: what it must be before anything is read from it or written to it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.wording import plain, shortened

_OURS = ("pipeline", "cluster", "interventions")
_NOT_OF_THE_STORE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EPIPE)


class ForeignStoreError(ValueError):
    """A store that is damaged or was never written by this package."""


@contextmanager
def reading(place: object) -> Iterator[None]:
    """Turn whatever goes wrong while a store is read into one sentence: its every byte may be anything.

    Raises
    ------
    ForeignStoreError : with the kind of error and the place of ours where it showed.
    """
    try:
        yield
    except Exception as error:
        if _is_no_fault_of(str(place), error):
            raise
        said = " ".join(str(error).split()) or "no reason given"
        raise ForeignStoreError(
            f"store {place} is damaged or not of stepscope's making: {type(error).__name__}: "
            f"{shortened(plain(said), 300)}{_place(error)}. Use a copy that is whole, or another --store."
        ) from error


def _is_no_fault_of(place: str, error: Exception) -> bool:
    if type(error).__module__.split(".")[0] in _OURS:
        return True
    if not isinstance(error, OSError):
        return False
    elsewhere = error.filename is not None and not str(error.filename).startswith((place, os.path.abspath(place)))
    return error.errno in _NOT_OF_THE_STORE or elsewhere


def _place(error: BaseException) -> str:
    found, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        parts = Path(code.co_filename).parts
        if package := next((p for p in _OURS if p in parts[:-1]), None):
            found = f" (at {'/'.join(parts[parts.index(package) :])}:{trace.tb_lineno})"
        trace = trace.tb_next
    return found


def require_plain(place: object, *, chunks: bool = True) -> None:
    """Refuse a store in a folder that holds links or devices: reading may never end, writing would be somewhere else.

    Parameters
    ----------
    chunks : look at the chunks too, of which there may be a million; without, only at those of ``status``.

    Raises
    ------
    ForeignStoreError : naming the first.
    """
    folder = str(place)
    folders = [folder] if "://" not in folder and os.path.lexists(os.path.join(folder, "zarr.json")) else []
    while folders:
        folder = folders.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if chunks or entry.name != "c" or os.path.basename(folder) == "status":
                        folders.append(entry.path)
                elif not entry.is_file(follow_symlinks=False):
                    what = "a link" if entry.is_symlink() else "a pipe or device"
                    raise ForeignStoreError(
                        f"store {place} holds {what}, where only files and folders may be: {plain(entry.path)}. "
                        "Remove it, or put there what it stands for."
                    )
