"""The entry point of the command line: arguments in, an exit code out, errors of the user as one message."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

from cyclopts import CycloptsError

import pipeline.commands  # noqa: F401  (registers every command)
from pipeline.commands.options import BAD_INPUT, FAILED, INTERRUPTED, OK, UsageError, app, say

__all__ = ["BAD_INPUT", "FAILED", "INTERRUPTED", "OK", "app", "console", "main"]


def _bad_input() -> tuple[type[Exception], ...]:
    from cluster import PoolError
    from cluster.jobs import JobError
    from interventions.controls import ControlError
    from pipeline.config import ConfigError
    from pipeline.foreign import ForeignStoreError
    from pipeline.models import ModelError
    from pipeline.permissions import PermissionsError
    from pipeline.store import StoreError

    of_sweeps = ConfigError, ControlError, ForeignStoreError, ModelError, PermissionsError, StoreError
    return *of_sweeps, JobError, PoolError, UsageError


_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_A_PATH = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; errors of the user are one message, never a traceback."""
    try:
        command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        say(f"stepscope: {' '.join(str(error).split())}")
        return BAD_INPUT
    call: Callable[..., Any] = command
    try:
        code = call(*bound.args, **bound.kwargs)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough; Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        say("Interrupted.")
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, _bad_input()):
            say(f"stepscope: {error}")
            return BAD_INPUT
        if isinstance(error, OSError) and error.errno in _OF_A_PATH:
            say(f"stepscope: {error.filename or 'a file'}: {error.strerror}. Choose a path that can be written.")
            return BAD_INPUT
        if isinstance(error, OSError) and error.errno in _FULL:
            say("stepscope: the disk is full. Finished units are safe; free space and run the same command again.")
            return BAD_INPUT
        raise
    return code if isinstance(code, int) else OK


def console() -> None:
    """Entry point of the ``stepscope`` script."""
    sys.exit(main())


if __name__ == "__main__":
    console()
