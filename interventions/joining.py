"""Block-prefix reuse within the intervened step: rows that no block has touched yet are one computation.

All rows of a fork enter its first computed step with the latents of their recipient's recorded run, so before the first
block that an intervention touches they are copies of each other. One of them is computed in their place, and a row
joins the batch where its own computation begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from interventions.families.family import BlockAddress
from interventions.run import Run
from interventions.sites import AttentionAt, BlockAt, OutputAt, PredictionAt, PromptAt, Site
from interventions.streams import argument, with_argument


@dataclass(frozen=True, slots=True)
class Joining:
    """Which rows each block of one denoiser call computes.

    Attributes
    ----------
    active : by block, the rows of the run that it computes, ascending; the last entry has all of them.
    sources : by block, for each of its active rows the place of its value among the rows of the block before.
    branches : guidance branches in the call, which lie one after the other in its batch.
    rows : rows of the run.
    """

    active: tuple[tuple[int, ...], ...]
    sources: tuple[tuple[int, ...], ...]
    branches: int
    rows: int

    def enter(self, block: int, address: BlockAddress, inputs: Any) -> Any:
        """Return a block's arguments for its active rows alone.

        Parameters
        ----------
        inputs : positional and keyword arguments, hidden states as the block before left them.
        """
        args, kwargs = inputs
        before = self.rows if block == 0 else len(self.active[block - 1])
        hidden = argument(args, kwargs, address.blocks.video_input)
        new = hidden[self._batch(self.sources[block], before)]
        args, kwargs = with_argument(args, kwargs, address.blocks.video_input, new)
        for where in address.blocks.along or ():
            value = argument(args, kwargs, where)
            # One row for all where the denoiser was given one; it is broadcast.
            if isinstance(value, torch.Tensor) and len(value) == self.rows * self.branches:
                new = value[self._batch(self.active[block], self.rows)]
                args, kwargs = with_argument(args, kwargs, where, new)
        return args, kwargs

    def place(self, block: int, branch: int, row: int) -> int:
        """Return where a row's branch lies in the batch of a block."""
        if block >= len(self.active):
            return branch * self.rows + row
        return branch * len(self.active[block]) + self.active[block].index(row)

    def _batch(self, places: Sequence[int], rows: int) -> list[int]:
        return [k * rows + i for k in range(self.branches) for i in places]


def joining(run: Run, loop: int, step: int, call: int, addresses: Sequence[BlockAddress]) -> Joining | None:
    """Plan which rows a denoiser call computes in which block, or None where every row must be computed throughout.

    That is so in every step but the first computed one, under a schedule edit, where attention is cut or blocks are
    exchanged, and in families whose blocks do not declare which of their arguments have a row an entry.
    """
    if loop != run.replayed_loops or run.schedule is not None or not run.interventions or run.gradient is not None:
        return None
    if any(a.blocks.along is None or a.blocks.layout != "rows" for a in addresses):
        return None
    first = _first_touched(run, step, call, len(addresses))
    if first is None:
        return None
    recipients = [intervention.recipient for intervention in run.interventions]
    active: list[tuple[int, ...]] = []
    sources: list[tuple[int, ...]] = []
    # Entering the first block, every row is there and holds the value that stands for it.
    standing, before = list(range(run.rows)), tuple(range(run.rows))
    for block in range(len(addresses)):
        last = block == len(addresses) - 1
        standing_now = _standing(first, recipients, block) if not last else list(range(run.rows))
        here = tuple(sorted(set(standing_now)))
        sources.append(tuple(before.index(standing[row]) for row in here))
        active.append(here)
        standing, before = standing_now, here
        if len(here) == run.rows:
            break
    if len(active) == 1:
        return None
    return Joining(tuple(active), tuple(sources), len(run.geometry.calls[call]), run.rows)


def _standing(first: Sequence[int], recipients: Sequence[str], block: int) -> list[int]:
    """Return for each row the one that is computed for it in a block: itself from its first touched block on."""
    stands: dict[str, int] = {}
    found = []
    for row, touched in enumerate(first):
        found.append(row if touched <= block else stands.setdefault(recipients[row], row))
    return found


def _first_touched(run: Run, step: int, call: int, blocks: int) -> list[int] | None:
    """Return the first block that each row's intervention touches in a call, ``blocks`` where there is none."""
    first = [blocks] * run.rows
    for point, rows in run.edits.items():
        if point.step < step or (point.step == step and isinstance(point, AttentionAt | BlockAt)):
            return None
        if point.step > step or isinstance(point, OutputAt | PredictionAt):
            continue
        if isinstance(point, Site | PromptAt) and point.branch not in run.geometry.calls[call]:
            continue
        for row in rows:
            first[row] = min(first[row], point.block if isinstance(point, Site) else 0)
    return first
