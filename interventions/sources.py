"""Donor values: what interventions read from recorded runs, captured step by step and averaged over each source."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from interventions.base import Intervention, Read, RowContext, RunRef
from interventions.record import Record
from interventions.sites import LatentsAt, PromptAt, Site

Capture = Callable[[Record, int, Sequence[Site], Sequence[int]], dict[Site, torch.Tensor]]
"""Activations of recorded runs at sites of one step: ``Engine.capture``."""
Others = Callable[[RunRef], Record]
"""The record that holds a run of another sample or of another seed."""


def contexts_of(
    capture: Capture, record: Record, rows: Sequence[Intervention], others: Others | None
) -> list[RowContext]:
    """Return what each row may read, every donor value computed.

    Raises
    ------
    ValueError : a row reads another sample or seed and no way to find its record was given.
    """
    reads = {read for row in rows for read in row.reads(record.geometry)}
    values = donor_values(capture, record, reads, others)
    contexts = []
    for row in rows:
        r = record.row(row.recipient)
        contexts.append(
            RowContext(
                geometry=record.geometry,
                levels=record.levels,
                seed=record.inputs.seed,
                donors={read: values[read] for read in row.reads(record.geometry)},
                recorded_x0_hat=[x[r] for x in record.x0_hat],
            )
        )
    return contexts


def donor_values(capture: Capture, record: Record, reads: set[Read], others: Others | None) -> dict[Read, Any]:
    """Return the mean over its source for every read; a source of one run is that run's value, bit for bit."""
    captured = _captured(capture, record, reads, others)

    def value(read: Read, ref: RunRef) -> Any:
        found = _record_of(record, ref, others)
        row = found.row(ref.run)
        if isinstance(read.point, LatentsAt):
            return found.latents[read.point.step][row]
        if isinstance(read.point, PromptAt):
            return {name: tensor[row] for name, tensor in found.conditioning[read.point.branch].items()}
        assert isinstance(read.point, Site)
        return captured[ref][read.point][row]

    result: dict[Read, Any] = {}
    for read in reads:
        if isinstance(read.point, PromptAt) and len(read.source) > 1:
            raise ValueError(f"prompts cannot be averaged: {read}")
        first, *rest = (value(read, ref) for ref in read.source)
        if rest:
            # In float32: a sum of many half-precision values would lose the differences that a mean is for.
            total = first.float()
            for other in rest:
                total = total + other
            first = (total / len(read.source)).to(first.dtype)
        result[read] = first
    return result


def _captured(
    capture: Capture, record: Record, reads: set[Read], others: Others | None
) -> dict[RunRef, dict[Site, torch.Tensor]]:
    """Capture each record once a step: all its runs, so that the batch is the one it was recorded in."""
    wanted: dict[tuple[int, int], set[Site]] = defaultdict(set)
    records: dict[int, Record] = {}
    refs: dict[int, set[RunRef]] = defaultdict(set)
    for read in reads:
        for ref in read.source:
            if isinstance(read.point, Site):
                found = _record_of(record, ref, others)
                records[id(found)] = found
                refs[id(found)].add(ref)
                wanted[id(found), read.point.step].add(read.point)
    captured: dict[RunRef, dict[Site, torch.Tensor]] = defaultdict(dict)
    for (key, step), sites in sorted(wanted.items(), key=lambda item: item[0][1]):
        found = records[key]
        values = capture(found, step, sorted(sites), range(len(found.inputs.names)))
        for ref in refs[key]:
            captured[ref].update(values)
    return captured


def _record_of(record: Record, ref: RunRef, others: Others | None) -> Record:
    if ref.own:
        return record
    if others is None:
        raise ValueError(f"a run of another sample or seed is read, but none can be found here: {ref}")
    return others(ref)
