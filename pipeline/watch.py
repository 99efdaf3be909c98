"""The ways to show a status: once, as JSON, or live until the sweep is finished."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.live import Live

from pipeline.dashboard import draw, plain_lines
from pipeline.status import Snapshot, Watch
from pipeline.store import Place

Pause = Callable[[float], None]


def show(
    path: Place,
    *,
    live: bool = False,
    every: float = 2.0,
    as_json: bool = False,
    console: Console | None = None,
    pause: Pause = time.sleep,
) -> Snapshot:
    """Show a store's status on standard output and return the last one shown.

    Parameters
    ----------
    live : again every ``every`` seconds until nothing is pending; on what is no terminal only as JSON.
    as_json : one object, over several lines; or a line each time.

    Raises
    ------
    StoreError : the path is not a store, or it goes away.
    """
    watch = Watch(path)
    console = console or Console()
    if as_json:
        for snapshot in _looks(watch, live, every, pause):
            print(json.dumps(snapshot.as_dict(), indent=None if live else 2), flush=True)
    elif live and console.is_terminal and not console.is_dumb_terminal:
        snapshot = _follow(watch, every, console, pause)
    else:
        snapshot = watch.look()
        for line in plain_lines(snapshot):
            print(line)
    return snapshot


def _follow(watch: Watch, every: float, console: Console, pause: Pause) -> Snapshot:
    snapshot = watch.look()
    try:
        # On a screen of its own the page may shrink and the window change.
        with Live(console=console, screen=True, auto_refresh=False) as shown:
            for snapshot in _looks(watch, True, every, pause):
                shown.update(draw(snapshot, console.height), refresh=True)
    finally:
        # What was seen last stays, after an interrupt as well.
        console.print(draw(snapshot, console.height - 3))
    return snapshot


def _looks(watch: Watch, again: bool, every: float, pause: Pause) -> Iterator[Snapshot]:
    while True:
        snapshot = watch.look()
        yield snapshot
        if not again or snapshot.state == "finished":
            return
        pause(every)
