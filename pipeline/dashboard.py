"""What a store's status looks like: plain lines for a log, or a page for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pipeline.causes import Cause
from pipeline.status import GroupStatus, Snapshot
from pipeline.tally import ReplicaTally

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_COLOUR = {"running": "green", "finished": "green", "silent": "yellow", "stopped": "yellow"}
_MOST_CAUSES = 8
_MOST_REPLICAS = 12


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: "1 h 12 min", "43 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole < 600 and whole % 60 else "")
    if whole < 172800:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def size(count: int) -> str:
    """Return a number of bytes with a decimal prefix."""
    value, power = float(count), 0
    while value >= 999.5 and power < len(_UNITS) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {_UNITS[power]}"


def rate(per_second: float, what: str) -> str:
    """Return a rate in whichever unit of time makes it a number that one can read."""
    times = ((1, "s"), (60, "min"), (3600, "h"))
    seconds, name = next((t for t in times if per_second * t[0] >= 1), times[-1])
    value = per_second * seconds
    return f"{value:,.0f} {what}/{name}" if value >= 99.5 else f"{value:.2g} {what}/{name}"


def state_text(snapshot: Snapshot) -> str:
    """Say in one sentence whether the sweep runs."""
    heard = duration(snapshot.heard_s)
    if snapshot.state == "finished":
        failed = snapshot.total("failed")
        how = f"finished, {failed:,} failed" if failed else "finished"
        return f"{how}; last heard of {heard} ago"
    if snapshot.state == "running":
        return f"running; last heard of {heard} ago"
    if snapshot.state == "stopped":
        return f"stopped {heard} ago with {snapshot.total('pending'):,} units pending"
    return f"nothing heard for {heard}: it has died, or its units take long"


def facts(snapshot: Snapshot) -> list[tuple[str, str]]:
    """Return the single facts below the groups, as name and text."""
    found = []
    if (speed := snapshot.speed) is not None:
        pace = f"{rate(speed.units_per_s, 'units')}, {rate(speed.cells_per_s, 'cells')}"
        found.append(("speed", f"{pace}, {speed.busy:.2g} replicas busy in the last {_rounded(speed.span_s)}"))
    if snapshot.state != "finished":
        found.append(("time left", _left(snapshot)))
    done = f"{size(snapshot.bytes)} written, {snapshot.row_forwards:,} row forwards"
    found.append(("work", done + (f", GPU peak {size(snapshot.gpu_bytes)}" if snapshot.gpu_bytes else "")))
    lately = f"{len(snapshot.replicas):,} of {snapshot.replicas_seen:,} heard of lately"
    found.append(("replicas", f"{lately}; {snapshot.losses:,} losses, {snapshot.retries:,} retries of units"))
    if snapshot.driver is not None:
        beat = duration(max(0.0, snapshot.now - snapshot.driver.heartbeat))
        ended = "gave the store back" if snapshot.driver.released else "heart beat"
        found.append(("driver", f"{snapshot.driver.holder}, {ended} {beat} ago"))
    return found


def _rounded(seconds: float) -> str:
    return duration(seconds if seconds < 90 else 60 * round(seconds / 60))


def _left(snapshot: Snapshot) -> str:
    if snapshot.left_s is None:
        return "unknown before the first unit"
    about = f"about {duration(snapshot.left_s)}"
    return about if snapshot.state == "running" else f"{about}, at the last speed, once it runs again"


def plain_lines(snapshot: Snapshot) -> Iterator[str]:
    """Yield the lines of a status without terminal."""
    yield f"{'group':>20} {'units':>7} {'done':>7} {'pending':>8} {'failed':>7}"
    for g in snapshot.groups:
        yield f"{g.group:>20} {g.units:>7} {g.done:>7} {g.pending:>8} {g.failed:>7}"
    yield ""
    yield f"{snapshot.store}: {state_text(snapshot)}"
    for name, text in facts(snapshot):
        yield f"{name:>10}  {text}"
    if snapshot.causes:
        yield "failures by cause:"
    for cause in snapshot.causes[:_MOST_CAUSES]:
        yield f"  {', '.join(_counts(cause))}: {cause.cause}"
        if example := _example(cause):
            yield f"      {example}"
    yield from _others(snapshot.causes)


def _others(causes: Sequence[Cause]) -> Iterator[str]:
    if len(causes) > _MOST_CAUSES:
        yield f"  and {len(causes) - _MOST_CAUSES} more causes"


def _counts(cause: Cause) -> list[str]:
    counts = ((cause.units, "unit", "units"), (cause.retries, "retry", "retries"), (cause.losses, "loss", "losses"))
    return [f"{count:,} {one if count == 1 else more}" for count, one, more in counts if count]


def _example(cause: Cause) -> str:
    parts = (cause.where, cause.example if cause.example != cause.cause else "")
    return ": ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Bar:
    """Shares of done, failed and pending units as one line as wide as there is room."""

    group: GroupStatus

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render over the whole width; what is not nothing has at least one character."""
        done, failed, pending = cut(options.max_width, (self.group.done, self.group.failed, self.group.pending))
        bar = "█", "█", "░"
        styles = "green", "red", "bright_black"
        if console.no_color or not console.is_terminal:
            bar = "█", "x", "░"
        text = Text()
        for count, sign, style in zip((done, failed, pending), bar, styles, strict=True):
            text.append(sign * count, style)
        yield text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Take any room from ten characters on."""
        return Measurement(min(10, options.max_width), options.max_width)


def cut(width: int, counts: Sequence[int]) -> list[int]:
    """Cut a width into parts by counts: they add up to it, and no count above zero vanishes while there is room."""
    total = sum(counts)
    if not total or width <= 0:
        return [0 for _ in counts]
    parts = [max(1, width * count // total) if count else 0 for count in counts]
    while (rest := width - sum(parts)) != 0:
        # The largest part gives and takes, where one character shows least.
        largest = max(range(len(parts)), key=lambda i: (parts[i], counts[i]))
        parts[largest] += rest if rest > 0 else -1
    return parts


def draw(snapshot: Snapshot, height: int = 40) -> RenderableType:
    """Return the page for a terminal of some height."""
    about = Table.grid(padding=(0, 2))
    for name, text in facts(snapshot):
        about.add_row(Text(name, style="bright_black"), Text(text))
    parts: list[RenderableType] = [_title(snapshot), "", _groups(snapshot.groups), "", about]
    if snapshot.causes:
        parts += ["", _causes(snapshot.causes)]
    # Blank lines and headers, and below the table of replicas the line on those that it leaves out.
    used = 7 + len(snapshot.groups) + len(facts(snapshot))
    if shown := snapshot.causes[:_MOST_CAUSES]:
        used += 3 + sum(max(2, len(_counts(cause))) for cause in shown)
    room = min(_MOST_REPLICAS, height - used)
    if snapshot.replicas and room > 0:
        parts += ["", _replicas(snapshot, room)]
    return Padding(Group(*parts), (0, 1))


def _title(snapshot: Snapshot) -> Text:
    colour = "red" if snapshot.state == "finished" and snapshot.total("failed") else _COLOUR[snapshot.state]
    return Text.assemble((snapshot.store, "bold"), "  ", (state_text(snapshot), colour))


def _table(*columns: tuple[str, bool]) -> Table:
    table = Table(box=None, pad_edge=False, expand=True, header_style="bright_black")
    for name, flexible in columns:
        table.add_column(
            name,
            justify="left" if flexible else "right",
            ratio=1 if flexible else None,
            no_wrap=True,
            overflow="ellipsis",
        )
    table.columns[0].justify = "left"
    return table


def _groups(groups: Sequence[GroupStatus]) -> Table:
    table = _table(("group", False), ("", True), ("units done", False), ("failed", False), ("cells done", False))
    for g in groups:
        table.add_row(
            Text(g.group),
            Bar(g),
            Text(f"{g.done:,}/{g.units:,}"),
            Text(f"{g.failed:,}", style="red" if g.failed else "bright_black"),
            Text(f"{g.cells_done:,}/{g.cells:,}"),
        )
    return table


def _causes(causes: Sequence[Cause]) -> RenderableType:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for cause in causes[:_MOST_CAUSES]:
        text = Text(cause.cause)
        if example := _example(cause):
            text.append(f"\n{example}", "bright_black")
        table.add_row(Text("\n".join(_counts(cause)), style="red" if cause.units else "yellow"), text)
    more = [Text(line, style="bright_black") for line in _others(causes)]
    return Group(Text("failures by cause", style="bright_black"), table, *more)


def _replicas(snapshot: Snapshot, room: int) -> RenderableType:
    shown: Sequence[ReplicaTally] = snapshot.replicas
    note: list[RenderableType] = []
    if len(shown) > room:
        # Where not all fit, the ones that are silent for longest are where trouble is.
        shown = sorted(shown, key=lambda r: r.heard)[:room]
        rest = f"  and {len(snapshot.replicas) - room} more, all heard of later"
        note = [Text(rest, style="bright_black")]
    table = _table(("replica", False), ("last unit", True), ("units", False), ("cells/s", False), ("GPU peak", False),
                   ("losses", False), ("heard of", False))  # fmt: skip
    for r in shown:
        table.add_row(
            Text(str(r.replica)),
            Text(r.last),
            Text(f"{r.units:,}"),
            Text(f"{r.cells_per_s:.3g}"),
            Text(size(r.gpu_bytes) if r.gpu_bytes else "-"),
            Text(f"{r.losses:,}", style="red" if r.losses else "bright_black"),
            Text(f"{duration(max(0.0, snapshot.now - r.heard))} ago"),
        )
    return Group(table, *note)
