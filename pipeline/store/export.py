"""Export: a store as one zip file that opens with xarray, for publishing."""

from __future__ import annotations

import os
import zipfile
from contextlib import suppress
from pathlib import Path

from pipeline.store.errors import StoreError, reading, reason_of
from pipeline.store.journal import PENDING
from pipeline.store.lease import FOLDER, STOP
from pipeline.store.location import PARTIAL, Place
from pipeline.store.opening import CREATING, open_store
from pipeline.store.states import states_of

_LEFT_OUT = (STOP, CREATING)
_LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""Of every entry, so that two exports of one store are the same file."""


def export_store(place: Place, out: Path, *, force: bool = False, partial: bool = False) -> int:
    """Copy a store into a zip file, uncompressed as its chunks are compressed already; return the bytes of the file.

    The journal goes along; lease and requests to the driver do not. The file appears whole or not at all.

    Parameters
    ----------
    force : replace a file that exists. partial : also if units are pending.

    Raises
    ------
    StoreError : the place is no store, has pending units or cannot be read, or the file exists or cannot be written.
    """
    store = open_store(place)
    pending = sum(int((states == PENDING).sum()) for states in states_of(store).values())
    if pending and not partial:
        raise StoreError(f"store {store.location} has {pending} pending units. Finish it, or export it with --partial.")
    if os.path.lexists(out) and not force:
        raise StoreError(f"{out} exists. Choose another name, or replace it with --force.")
    with reading(store.location, "its list of files"):
        keys = [key for key in store.location.list() if key not in _LEFT_OUT and not key.startswith(f"{FOLDER}/")]
    unfinished = out.with_name(f"{out.name}.{os.getpid()}{PARTIAL}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED) as archive:
            for key in keys:
                with reading(store.location, key):
                    content = store.location.read(key)
                if content is not None:
                    entry = zipfile.ZipInfo(key, date_time=_LONG_AGO)
                    entry.external_attr = 0o644 << 16
                    archive.writestr(entry, content)
        size = unfinished.stat().st_size
        os.replace(unfinished, out)
    except OSError as error:
        raise StoreError(f"cannot write {out}: {reason_of(error)}. Choose a place that can be written.") from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return size
