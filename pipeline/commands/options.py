"""What the commands share: the application, exit codes, common arguments and the errors of the user."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter, Token

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

app = App(
    name="stepscope",
    help="""Find out where in a video diffusion model's computation the reasoning happens.

    Example: ``stepscope run configs/maze_demo.yaml``
    """,
    version_flags=[],
)

Config = Annotated[Path, Parameter(help="YAML file that describes the sweep.")]
StorePath = Annotated[str, Parameter(help="Zarr store of a sweep: a folder, s3://BUCKET/NAME or gs://BUCKET/NAME.")]
Set = Annotated[
    list[str] | None,
    Parameter(name="--set", negative="", help="Override a setting, as key.path=value; may be repeated."),
]


class UsageError(ValueError):
    """A command that cannot run as given."""


def whole_number(type_: Any, tokens: Sequence[Token]) -> int:
    """Convert an option to a whole number; cyclopts alone would round 1.7 without a word."""
    return int(tokens[0].value)


def say(text: str) -> None:
    """Tell the user something that is no result."""
    print(text, file=sys.stderr)


def print_lines(lines: Iterable[str]) -> int:
    """Print lines and return the exit code of success."""
    for line in lines:
        print(line)
    return OK
