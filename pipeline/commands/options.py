"""What the commands share: the application, exit codes, common arguments and the errors of the user."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter, Token

from pipeline.permissions import Permissions
from pipeline.redaction import redact
from pipeline.wording import plain

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
AllowMetric = Annotated[
    list[str] | None,
    Parameter(
        name="--allow-metric",
        negative="",
        help="Let the config use a function of yours as a metric, as package.module:function; may be repeated.",
    ),
]
AllowPickledWeights = Annotated[
    bool,
    Parameter(
        name="--allow-pickled-weights",
        negative="",
        help="Load weights that are not safetensors. Such files can run code: only from who you trust.",
    ),
]


class UsageError(ValueError):
    """A command that cannot run as given."""


def whole_number(type_: Any, tokens: Sequence[Token]) -> int:
    """Convert an option to a whole number; cyclopts alone would round 1.7 without a word."""
    return int(tokens[0].value)


MetricsPort = Annotated[
    int | None, Parameter(converter=whole_number, help="Serve Prometheus metrics at this port; 0 for a free one.")
]
MetricsHost = Annotated[str, Parameter(help="Address that the metrics are served at.")]
METRICS_HOST = "127.0.0.1"


def allowed(metrics: Sequence[str] | None = None, pickled_weights: bool = False) -> Permissions:
    """Return what the options of a command allow, in force in this process.

    Raises
    ------
    PermissionsError : a function that is not there, or cannot be a metric.
    """
    permissions = Permissions(
        metrics=tuple(dict.fromkeys(metrics or ())), pickled_weights=pickled_weights, folder=os.getcwd()
    )
    permissions.apply()
    return permissions


def say(text: str) -> None:
    """Tell the user something that is no result; without secrets, and without what a terminal would act on."""
    print(plain(redact(text), lines=True), file=sys.stderr)


def print_lines(lines: Iterable[str]) -> int:
    """Print lines and return the exit code of success."""
    for line in lines:
        print(line)
    return OK
