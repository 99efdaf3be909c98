"""The probe: batches of 1, 2, 4, ... rows timed and weighed on the loaded model, until more no longer pays."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from interventions.base import Intervention
from pipeline.memory_errors import is_out_of_memory, release
from pipeline.peak_memory import capacity, on_gpu, peak_of
from pipeline.rows import CLOSE, MEMORY_RATIO, MOST_ROWS, Group, Measured, Table, sampled_groups

if TYPE_CHECKING:
    from pipeline.replica import Computer

BARE_STEPS = 2
"""Solver steps of the bare run, as its peak is the same at every step."""
_SHORT_S = 0.5
"""Batches that take less are timed twice, and the least counts."""
_SLOW_S = 2.0
"""Where one row takes longer, those cells are timed that compute the fewest steps."""
_IN_VAIN = 2
"""Doublings in a row without a gain that end the probe."""


def probe(computer: Computer, sample: int = 0) -> Table:
    """Measure a model on this machine.

    The bare peak is that of the diffusers pipeline with nothing of ours in its loop, on the pair of runs of one sample
    as a batch of two, decoded. The batches are cells of the plan, forked off that sample's record and measured by the
    plan's metrics, as they are in a sweep.
    """
    gpu = on_gpu(computer.pipe)
    bare = peak_of(lambda: bare_run(computer, sample), gpu=gpu)
    record, about = computer.record(sample), computer.plan.samples[sample]

    def run(rows: Sequence[Intervention]) -> float:
        began = time.perf_counter()
        # The metrics read the latents on the host, so nothing is still computing when they are back.
        computer.measure(record, computer.fork(sample, rows).final, about)
        return time.perf_counter() - began

    every = list(sampled_groups(computer.plan))
    groups = [group for group in every if group.loops] or every
    group = _group_to_time(groups, computer.plan.geometry.steps, run)
    largest = max(len(each.rows) for each in groups)
    return measure(lambda rows: _batch(group, rows, run, gpu=gpu), bare, largest, lambda: capacity(gpu=gpu))


def measure(
    batch: Callable[[int], Measured], bare_peak: int, largest: int, capacity: Callable[[], int | None]
) -> Table:
    """Measure batches of 1, 2, 4, ... rows.

    Ends where memory runs out or would with the next batch, where a replica would need more than its share, after two
    doublings in vain, or at the largest batch that is of use.

    Parameters
    ----------
    batch : runs one. largest : rows that could share a forward. capacity : bytes that the process can hold.
    """
    found: list[Measured] = []
    for rows in _doublings(min(largest, MOST_ROWS)):
        try:
            found.append(batch(rows))
            spent = _is_enough(found, bare_peak, capacity())
        except Exception as error:
            if not found or not is_out_of_memory(error):
                raise
            spent = True
        if spent:
            release()
            return Table(bare_peak=bare_peak, batches=tuple(found), whole=True)
    return Table(bare_peak=bare_peak, batches=tuple(found), whole=False)


def bare_run(computer: Computer, sample: int) -> None:
    """Run the pipeline as diffusers does on the pair of runs of a sample, and decode both."""
    plan = computer.plan
    inputs = plan.task.inputs(computer.pipe, plan.samples[sample], plan.config.sampler)
    steps = min(BARE_STEPS, plan.config.sampler.steps)
    final = computer.engine.bare(replace(inputs, shared={**inputs.shared, "num_inference_steps": steps}))
    if any(metric.reads_video for metric in plan.metrics):
        plan.task.video(computer.pipe, final)


def _doublings(most: int) -> Iterator[int]:
    rows = 1
    while rows < most:
        yield rows
        rows *= 2
    yield most


def _group_to_time(groups: Sequence[Group], steps: int, run: Callable[[Sequence[Intervention]], float]) -> Group:
    """Return cells that compute a quarter of the steps, or the fewest if those take long; warms up as well."""
    target = max(1, steps // 4)
    group = min(groups, key=lambda each: (abs(each.loops - target), -len(each.rows)))
    if run(group.rows[:1]) > _SLOW_S:
        group = min(groups, key=lambda each: (each.loops, -len(each.rows)))
    return group


def _batch(group: Group, rows: int, run: Callable[[Sequence[Intervention]], float], *, gpu: bool) -> Measured:
    taken = [group.rows[i % len(group.rows)] for i in range(rows)]
    seconds: list[float] = []
    peak = peak_of(lambda: seconds.append(run(taken)), gpu=gpu)
    if seconds[0] < _SHORT_S:
        seconds.append(run(taken))
    return Measured(rows=rows, seconds=min(seconds) / max(1, group.loops), peak=peak)


def _is_enough(found: Sequence[Measured], bare_peak: int, capacity: int | None) -> bool:
    """Whether twice the rows would be too much, or would not pay."""
    latest = found[-1]
    if bare_peak and latest.peak > MEMORY_RATIO * bare_peak:
        return True
    before = found[-2].peak if len(found) > 1 else bare_peak
    if capacity is not None and latest.peak + 2 * max(0, latest.peak - before) > capacity:
        return True
    best = min(each.seconds / each.rows for each in found[:-_IN_VAIN] or found)
    recent = [each.seconds / each.rows for each in found[-_IN_VAIN:]]
    return len(found) > _IN_VAIN and min(recent) > (1 - CLOSE) * best
