"""What can go wrong with a store, as exceptions whose message is the sentence that the user reads."""

from __future__ import annotations

import errno
import re

_FULL = {errno.ENOSPC, errno.EDQUOT}
_NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
_DENIED = {"PermissionDeniedError", "UnauthenticatedError"}
_QUOTA = ("QuotaExceeded", "InsufficientStorage", "507 ")


class StoreError(ValueError):
    """A place that cannot serve as the store of this sweep; the message says why and what to do."""


class StorageFullError(StoreError):
    """Nothing more fits where the store lies; what was finished before is safe."""

    halts_pool = True


class StorageReadOnlyError(StoreError):
    """The place of the store may not be written; what was finished before is safe."""

    halts_pool = True


class LeaseLostError(StoreError):
    """Another process drives the store by now, or may: this one must stop."""


def is_object_store_error(error: BaseException) -> bool:
    """Return whether an exception is one of obstore's own, without importing it."""
    return type(error).__module__.startswith("obstore")


def reason_of(error: BaseException) -> str:
    """Return the reason in an exception of the file system or of an object store, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # obstore appends a dump of its internals, and servers answer in XML.
    line = str(error).split("\n", 1)[0].split("<?xml")[0].strip().rstrip(":.")
    code = re.search(r"<Code>(\w+)</Code>", str(error))
    return f"{line} ({code[1]})" if code else line or type(error).__name__


def storage_error(error: BaseException, what: str) -> StoreError | None:
    """Return the sentence for a failed write of ``what``; None if the error says nothing about the storage."""
    if isinstance(error, StoreError):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno in _FULL:
            return _full(what, error)
        return _read_only(what, error) if error.errno in _NOT_WRITABLE else None
    if is_object_store_error(error):
        if any(word in str(error) for word in _QUOTA):
            return _full(what, error)
        if type(error).__name__ in _DENIED:
            return _read_only(what, error)
        return StoreError(f"cannot write {what}: {reason_of(error)}. Run the same command again once it answers.")
    return None


def _full(what: str, error: BaseException) -> StorageFullError:
    return StorageFullError(
        f"cannot write {what}: {reason_of(error)}. Finished units are safe; free space and run the same command again."
    )


def _read_only(what: str, error: BaseException) -> StorageReadOnlyError:
    return StorageReadOnlyError(
        f"cannot write {what}: {reason_of(error)}. Finished units are safe; make it writable and run the same command "
        "again."
    )
