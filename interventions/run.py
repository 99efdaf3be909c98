"""One traced run as data: what is replayed, what is edited where, what is kept; planned before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from interventions.base import Intervention, RowContext, Schedule
from interventions.families.family import BlockAddress
from interventions.record import Record
from interventions.sites import (
    ALL_HEADS,
    AttentionAt,
    BlockAt,
    Branch,
    Component,
    Geometry,
    Point,
    Site,
)


@dataclass(slots=True)
class BlockWork:
    """What happens in one block during one denoiser call.

    Attributes
    ----------
    sites : activations to read or edit, by tap ("attn1", "attn1.heads", "attn1.text", ...).
    cuts : attention edges to cut, by component. programs : replacements of the block's computation.
    """

    sites: dict[str, list[Site]] = field(default_factory=dict)
    cuts: dict[Component, list[AttentionAt]] = field(default_factory=dict)
    programs: list[BlockAt] = field(default_factory=list)

    @property
    def needs_inputs(self) -> bool:
        """Whether what enters the block must be seen."""
        return bool(self.programs) or any(s.component == "update" for sites in self.sites.values() for s in sites)


Work = dict[tuple[int, int], dict[int, BlockWork]]
"""By (step, call of the step), then by block in forward order."""


@dataclass(slots=True, kw_only=True)
class Gradient:
    """A request for gradients at one step, and what it gives.

    Attributes
    ----------
    leaves : zero tensors added to the activations, by (call, block, tap). x0_hat : clean estimate of every run.
    values : activations by site, one entry a run. slopes : gradient of the objective there, of the same shape.
    """

    leaves: dict[tuple[int, int, str], torch.Tensor] = field(default_factory=dict)
    x0_hat: torch.Tensor | None = None
    values: dict[Site, torch.Tensor] = field(default_factory=dict)
    slopes: dict[Site, torch.Tensor] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Run:
    """One traced run.

    Attributes
    ----------
    order : step of each loop iteration. rows : rows of the run.
    replayed_loops : iterations whose denoiser output is replayed. replay : those outputs, call by call.
    work : what happens inside the denoiser. edits : rows to edit at each point.
    captured : activations by site, if the run is made to capture them. stop_after_loop : where it then ends.
    gradient : what is asked and found, if the run is made for gradients.
    record : whether to keep what forks need: outputs, latents, conditioning.
    addresses : blocks of each denoiser, filled when the run begins.
    fired : edits made. finished : whether the plan was followed to its end.
    """

    geometry: Geometry
    order: list[int]
    rows: int
    levels: tuple[tuple[float, float], ...] = ()
    schedule: Schedule | None = None
    replayed_loops: int = 0
    replay: list[Any] = field(default_factory=list)
    work: Work = field(default_factory=dict)
    edits: dict[Point, list[int]] = field(default_factory=dict)
    interventions: list[Intervention] = field(default_factory=list)
    contexts: list[RowContext] = field(default_factory=list)
    captured: dict[Site, torch.Tensor] | None = None
    gradient: Gradient | None = None
    stop_after_loop: int | None = None
    keep_x0_hat: bool = False
    record: bool = False
    outputs: list[Any] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)
    conditioning: dict[Branch, dict[str, torch.Tensor]] = field(default_factory=dict)
    x0_hat: dict[int, torch.Tensor] = field(default_factory=dict)
    addresses: dict[str, list[BlockAddress]] = field(default_factory=dict)
    fired: int = 0
    finished: bool = False

    def row_of(self, branch: Branch, row: int) -> int:
        """Return where a row's branch lies in the batch of its denoiser call."""
        return self.geometry.calls[self.geometry.call_of(branch)].index(branch) * self.rows + row

    def at(self, site: Site, value: torch.Tensor) -> torch.Tensor:
        """Return a site's part of what its tap holds in a denoiser call, one entry a row of the run."""
        start = self.row_of(site.branch, 0)
        here = value[start : start + self.rows]
        return here if site.head == ALL_HEADS else here.unflatten(-1, (self.geometry.heads, -1))[:, :, site.head]

    def edit(self, point: Point, row: int, value: Any) -> Any:
        """Let a row's intervention change a value, and count it."""
        self.fired += 1
        return self.interventions[row].apply(point, value, self.contexts[row])

    @property
    def planned(self) -> int:
        """Edits that must have been made when the run ends."""
        return sum(len(rows) for rows in self.edits.values())


def recording(geometry: Geometry, rows: int) -> Run:
    """Plan a run without intervention that keeps what forks need."""
    return Run(
        geometry=geometry,
        order=list(range(geometry.steps)),
        rows=rows,
        levels=geometry.levels,
        record=True,
        keep_x0_hat=True,
    )


def capturing(record: Record, step: int, sites: Iterable[Site], runs: Sequence[int], *, replays: bool = True) -> Run:
    """Plan a run that replays (or computes) up to ``step``, computes it, captures ``sites`` and ends."""
    run = _replaying(record, list(range(record.geometry.steps)), step if replays else 0, runs)
    for site in set(sites):
        record.geometry.require(site)
        _add(run, site)
    run.captured, run.stop_after_loop = {}, step
    return run


def forking(record: Record, rows: Sequence[Intervention], schedule: Schedule | None, *, replays: bool = True) -> Run:
    """Plan a batch of intervened rows: replay (or compute) up to the first step that any of them changes, then edit."""
    geometry = record.geometry
    order = loop_order(schedule, geometry.steps)
    loops = replayed_loops(rows, schedule, geometry) if replays else 0
    run = _replaying(record, order, loops, [record.row(row.recipient) for row in rows])
    run.schedule, run.interventions = schedule, list(rows)
    for i, row in enumerate(rows):
        for point in row.points(geometry):
            geometry.require(point)
            run.edits.setdefault(point, []).append(i)
    for point in run.edits:
        _add(run, point)
    return run


def loop_order(schedule: Schedule | None, steps: int) -> list[int]:
    """Return the step that each loop iteration takes under a schedule edit."""
    order = list(range(steps))
    if schedule is None:
        return order
    if schedule.edit == "drop":
        order.remove(schedule.step)
    elif schedule.edit == "repeat":
        order.insert(schedule.step, schedule.step)
    else:
        assert schedule.other is not None
        order[schedule.step], order[schedule.other] = order[schedule.other], order[schedule.step]
    return order


def replayed_loops(rows: Sequence[Intervention], schedule: Schedule | None, geometry: Geometry) -> int:
    """Return how many loop iterations of a fork repeat the recorded ones and need no denoiser."""
    first = min(geometry.steps, *(row.first_computed_step(geometry) for row in rows))
    if schedule is None:
        return first
    # The first visit of a repeated step is the recorded one.
    return min(first, schedule.step + (schedule.edit == "repeat"))


def tap_of(site: Site) -> str:
    """Return the key of a site's tap in a family's declaration."""
    name: str = "residual" if site.component == "update" else site.component
    if site.head != ALL_HEADS:
        name += ".heads"
    return name + (".text" if site.stream == "text" else "")


def _replaying(record: Record, order: list[int], loops: int, runs: Sequence[int]) -> Run:
    calls = record.geometry.calls
    return Run(
        geometry=record.geometry,
        order=order,
        rows=len(runs),
        levels=record.levels,
        replayed_loops=loops,
        # Every output whole; its rows are gathered when its turn comes, so a prefix costs no second copy.
        replay=[
            (record.outputs[loop * len(calls) + k], record.call_rows(call, runs))
            for loop in range(loops)
            for k, call in enumerate(calls)
        ],
    )


def _add(run: Run, point: Point) -> None:
    if not isinstance(point, (Site, AttentionAt, BlockAt)):
        return
    work = run.work.setdefault((point.step, run.geometry.call_of(point.branch)), {})
    block = work.setdefault(point.block, BlockWork())
    if isinstance(point, Site):
        block.sites.setdefault(tap_of(point), []).append(point)
        # An update is measured from what the block gave, so it is edited before the residual as a whole.
        block.sites[tap_of(point)].sort(key=lambda s: (s.component != "update", s))
    elif isinstance(point, AttentionAt):
        block.cuts.setdefault(point.component, []).append(point)
    else:
        block.programs.append(point)
