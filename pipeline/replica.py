"""The replica: one model in one process, computing units and writing their regions of the store itself."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interventions.base import Intervention
from interventions.controls import require_controls
from interventions.engine import Engine
from interventions.record import Record
from interventions.families.family import family_of
from interventions.sites import RUNS
from pipeline.config import SweepConfig
from pipeline.metrics.metric import Metric, MetricInput
from pipeline.models import load_pipeline
from pipeline.plan import BASELINE, Plan, Unit, make_plan
from pipeline.samples import Sample
from pipeline.store import Store

RECORDS_KEPT = 2
"""Recorded samples a replica remembers; the pool sends all units of a sample to one replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What the driver learns of a finished unit: never the data itself.

    Attributes
    ----------
    cells : cells computed. failed : cells with a value that is not finite, stored as NaN.
    bytes : written, uncompressed. row_forwards : denoiser forwards of one row each.
    """

    cells: int
    failed: int
    bytes: int
    row_forwards: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)


class Computer:
    """A loaded model with a plan: turns a unit into arrays. Knows nothing of stores."""

    def __init__(self, plan: Plan, pipe: Any) -> None:
        self.plan, self.pipe = plan, pipe
        self.engine = Engine(pipe, family_of(type(pipe).__name__))
        self._records: OrderedDict[int, Record] = OrderedDict()

    def record(self, sample: int) -> Record:
        """Return the recorded clean and corrupted run of a sample, from memory if it was the last."""
        if sample not in self._records:
            inputs = self.plan.task.inputs(self.pipe, self.plan.samples[sample], self.plan.config.sampler)
            self._records[sample] = self.engine.record(inputs)
            while len(self._records) > RECORDS_KEPT:
                self._records.popitem(last=False)
        self._records.move_to_end(sample)
        return self._records[sample]

    def cells(self, unit: Unit) -> dict[str, NDArray[np.float32]]:
        """Compute every metric of a unit's cells, shaped as the unit's region."""
        rows = self.plan.interventions(unit)
        grid = self.plan.by_name[unit.group]
        record = self.record(unit.sample)
        values = {m.name: np.full(len(rows), np.nan, dtype=np.float32) for m in self.plan.metrics}
        for batch in self.plan.batches(rows):
            fork = self.engine.fork(record, [rows[i] for i in batch])
            measured = self.measure(record, fork.final, self.plan.samples[unit.sample])
            for name, value in measured.items():
                values[name][batch] = value
        shape = (unit.stop - unit.start, *grid.shape[1:]) if grid.shape else ()
        return {name: value.reshape(shape) for name, value in values.items()}

    def baseline(self, sample: int) -> dict[str, NDArray[np.float32]]:
        """Compute every metric of the recorded runs, final and at every step's clean estimate."""
        record = self.record(sample)
        about = self.plan.samples[sample]
        values = dict(self.measure(record, record.final, about))
        by_step = [self.measure(record, _with_given_frames(record, x0_hat), about) for x0_hat in record.x0_hat]
        for name in list(values):
            values[f"{name}_by_step"] = np.stack([step[name] for step in by_step], axis=1)
        return values

    def previews(self, sample: int) -> NDArray[np.uint8]:
        """Decode the clean estimates of the clean, the corrupted and the patched run: (run, step, frame, y, x, rgb)."""
        record = self.record(sample)
        films = [[self._frames(record, x0_hat[[record.row(run)]]) for x0_hat in record.x0_hat] for run in RUNS]
        blank = [np.zeros_like(films[0][0]) for _ in films[0]]
        films.append(self._patched_film(record, self.plan.patched) if self.plan.patched is not None else blank)
        return np.stack([np.stack(film) for film in films])

    def measure(self, record: Record, latents: Any, sample: Sample) -> dict[str, NDArray[np.float32]]:
        """Evaluate every metric on latents (rows, C, F, H, W); a value that is not finite becomes NaN."""
        both = record.final.float().cpu().numpy()
        given = MetricInput(
            video=self.plan.task.decode(self.pipe, latents),
            latents=latents.float().cpu().numpy(),
            clean=both[record.row("clean")],
            corrupted=both[record.row("corrupted")],
            sample=sample,
        )
        return {m.name: _finite(m, given) for m in self.plan.metrics}

    def _frames(self, record: Record, latents: Any) -> NDArray[np.uint8]:
        video = self.plan.task.decode(self.pipe, _with_given_frames(record, latents))[0]
        return np.nan_to_num(video).clip(0, 255).round().astype(np.uint8)

    def _patched_film(self, record: Record, patched: Intervention) -> list[NDArray[np.uint8]]:
        fork = self.engine.fork(record, [patched], keep_x0_hat=True)
        blank = np.zeros_like(self._frames(record, record.x0_hat[0][:1]))
        return [
            self._frames(record, fork.x0_hat[s]) if s in fork.x0_hat else blank for s in range(self.plan.geometry.steps)
        ]


class Replica:
    """A worker of the pool: loads the model once, then computes and writes units.

    Parameters
    ----------
    config : the sweep config as JSON-able data. store : path that every node sees.
    """

    def __init__(self, config: Mapping[str, Any], store: str) -> None:
        import torch

        parsed = SweepConfig.model_validate(config)
        torch.set_num_threads(parsed.engine.threads)
        self.plan = make_plan(parsed)
        self.store = Store(Path(store))
        pipe = load_pipeline(self.plan.model, dtype=parsed.model.dtype, device=parsed.model.device)
        self.computer = Computer(self.plan, pipe)
        require_controls(
            self.computer.engine, self.plan.task.inputs(pipe, self.plan.samples[0], self.plan.config.sampler)
        )

    def run(self, unit: Unit) -> Receipt:
        """Compute one unit and write its region; the same unit always writes the same bytes."""
        started = time.perf_counter()
        if unit.group == BASELINE:
            values = self.computer.baseline(unit.sample)
            written = self.store.write_sample(BASELINE, values, unit.sample)
            cells, forwards = 2, 2 * self.plan.geometry.steps * len(self.plan.geometry.branches)
            if unit.sample in self.plan.config.previews.samples:
                position = self.plan.config.previews.samples.index(unit.sample)
                written += self.store.write_sample(
                    "previews", {"x0_hat": self.computer.previews(unit.sample)}, position
                )
        else:
            rows = self.plan.interventions(unit)
            values = self.computer.cells(unit)
            written = self.store.write_cells(unit.group, values, unit.sample, unit.start, unit.stop)
            cells = len(rows)
            forwards = sum(self.plan.batch_forwards([rows[i] for i in b]) for b in self.plan.batches(rows))
        return Receipt(
            cells=cells,
            failed=count_failed(values),
            bytes=written,
            row_forwards=forwards,
            seconds=round(time.perf_counter() - started, 4),
        )


def _with_given_frames(record: Record, estimate: Any) -> Any:
    """Put the given frames back into a clean estimate, because the model makes no estimate of them."""
    given = record.geometry.given_frames
    complete = estimate.clone()
    complete[:, :, :given] = record.final[:1, :, :given]
    return complete


def count_failed(values: Mapping[str, NDArray[np.float32]]) -> int:
    """Count cells in which any metric is NaN; per-step arrays of the baseline are not cells."""
    per_cell: Sequence[NDArray[np.bool_]] = [np.isnan(v) for k, v in values.items() if not k.endswith("_by_step")]
    return int(np.logical_or.reduce(per_cell).sum()) if per_cell else 0


def _finite(metric: Metric, given: MetricInput) -> NDArray[np.float32]:
    value = metric.compute(given).astype(np.float32)
    value[~np.isfinite(value)] = np.nan
    return value
