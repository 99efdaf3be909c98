"""The replica: one model in one process, computing units and writing their regions of the store itself."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from interventions.base import Intervention, RunRef
from interventions.controls import require_controls
from interventions.engine import Engine
from interventions.families.family import family_of
from interventions.kinds.patch import Patch
from interventions.record import Fork, Record
from interventions.screen import screen
from interventions.sites import RUNS, RunName
from pipeline import gpu_memory
from pipeline.batching import indivisible, rows_for
from pipeline.conditioning import Conditioning
from pipeline.config import SweepConfig
from pipeline.experiment import Grid
from pipeline.hardware import hardware_of
from pipeline.metrics.metric import Metric, MetricInput, no_video
from pipeline.metrics.objective import OBJECTIVES
from pipeline.models import load_pipeline
from pipeline.permissions import NOTHING, Permissions
from pipeline.plan import BASELINE, Plan, Unit, make_plan
from pipeline.samples import Sample
from pipeline.screening import ESTIMATE, share_of_step
from pipeline.store import Store, StoreError, count_failed, digest_of

RECORDS_KEPT = 2
"""Recorded samples a replica remembers besides those it reads from; the pool sends a sample's units to one replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What the driver learns of a finished unit: never the data itself.

    Attributes
    ----------
    cells : cells computed. failed : cells with a value that is not finite, stored as NaN.
    bytes : written, uncompressed. row_forwards : denoiser forwards of one row each.
    gpu_bytes : peak GPU memory while the unit ran, 0 without GPU.
    digest : of the values, as they were before they were written; see ``digest_of``.
    rows : the most that could share a forward; 0 of a baseline, for which that means nothing.
    """

    cells: int
    failed: int
    bytes: int
    row_forwards: int
    seconds: float
    gpu_bytes: int = 0
    digest: str = ""
    rows: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)


class Computer:
    """A loaded model with a plan: turns a unit into arrays. Knows nothing of stores."""

    def __init__(self, plan: Plan, pipe: Any) -> None:
        self.plan, self.pipe = plan, pipe
        self.conditioning = Conditioning(pipe)
        plain = plan.config.engine.mode == "naive"
        self.engine = Engine(pipe, family_of(type(pipe).__name__), shares=not plain, replays=not plain)
        self._records: OrderedDict[tuple[int, int], Record] = OrderedDict()
        self._kept = RECORDS_KEPT

    def record(self, sample: int, seed: int = 0) -> Record:
        """Return the recorded clean and corrupted run of a sample, from memory if it is there.

        Parameters
        ----------
        seed : offset of the seed of the initial noise.
        """
        key = (sample, seed)
        if key not in self._records:
            about = self.plan.samples[sample]
            about = replace(about, seed=about.seed + seed)
            self._records[key] = self.engine.record(self.plan.task.inputs(self.pipe, about, self.plan.config.sampler))
            while len(self._records) > self._kept:
                self._records.popitem(last=False)
        self._records.move_to_end(key)
        return self._records[key]

    def others(self, sample: int) -> Callable[[RunRef], Record]:
        """Return the way from a sample to the records that its interventions read from."""
        return lambda ref: self.record(self.plan.problems.referred(ref, sample), ref.seed)

    def fork(self, sample: int, rows: Sequence[Intervention], *, keep_x0_hat: bool = False) -> Fork:
        """Run a batch of intervened rows of a sample."""
        record = self.record(sample)
        reads = [read for row in rows for read in row.reads(record.geometry)]
        # What a batch reads must outlive it: reference sets come back with the next batch.
        self._kept = RECORDS_KEPT + len({(ref.sample, ref.seed, ref.fixed) for read in reads for ref in read.source})
        return self.engine.fork(record, rows, keep_x0_hat=keep_x0_hat, others=self.others(sample))

    def cells(self, unit: Unit, chosen: NDArray[np.bool_]) -> dict[str, NDArray[np.float32]]:
        """Compute every metric of the chosen cells of a unit, shaped as the unit's region; the others stay NaN."""
        rows = self.plan.interventions(unit)
        grid = self.plan.by_name[unit.group]
        kept = np.flatnonzero(chosen)
        fields = {m.name: self.plan.field_shape(m) for m in self.plan.metrics}
        values = {name: np.full((len(rows), *field), np.nan, dtype=np.float32) for name, field in fields.items()}
        for batch in self.plan.batches([rows[i] for i in kept]):
            record = self.record(unit.sample)
            cells = [rows[i] for i in kept[batch]]
            fork = self.fork(unit.sample, cells)
            measured = self.measure(record, fork.final, self.plan.samples[unit.sample], [c.recipient for c in cells])
            for name, value in measured.items():
                values[name][kept[batch]] = value
        shape = (unit.stop - unit.start, *grid.shape[1:]) if grid.shape else ()
        return {name: value.reshape((*shape, *fields[name])) for name, value in values.items()}

    def estimates(self, grid: Grid, sample: int) -> NDArray[np.float32]:
        """Estimate the effect of every cell of a screened grid; see ``_create_screening`` of the store."""
        assert grid.experiment.screen is not None
        record, levels = self.record(sample), self.plan.geometry.levels
        compute = OBJECTIVES[grid.experiment.screen.metric].compute
        ends = [record.final[record.row(run)].float() for run in RUNS]
        cells = [cell for cell in grid.interventions() if isinstance(cell, Patch)]
        found = screen(
            self.engine, record, cells, lambda x0_hat: compute(_with_given_frames(record, x0_hat).float(), *ends)
        )
        shares = [share_of_step(levels, cell.step) for cell in cells]
        values = (np.array(found) * shares).astype(np.float32)
        values[~np.isfinite(values)] = np.nan
        return values.reshape(grid.shape)

    def baseline(self, sample: int) -> dict[str, NDArray[np.float32]]:
        """Compute every metric of the recorded runs, final and, unless a field, at every step's clean estimate."""
        record = self.record(sample)
        about = self.plan.samples[sample]
        values = dict(self.measure(record, record.final, about, RUNS))
        scalars = [metric for metric in self.plan.metrics if not metric.dims]
        by_step = [
            self.measure(record, _with_given_frames(record, x0_hat), about, RUNS, scalars) for x0_hat in record.x0_hat
        ]
        for metric in scalars:
            values[f"{metric.name}_by_step"] = np.stack([step[metric.name] for step in by_step], axis=1)
        return values

    def previews(self, sample: int) -> NDArray[np.uint8]:
        """Decode the clean estimates of the clean, the corrupted and the patched run: (run, step, frame, y, x, rgb)."""
        record = self.record(sample)
        films = [[self._frames(record, x0_hat[[record.row(run)]]) for x0_hat in record.x0_hat] for run in RUNS]
        blank = [np.zeros_like(films[0][0]) for _ in films[0]]
        films.append(self._patched_film(sample, self.plan.patched) if self.plan.patched is not None else blank)
        return np.stack([np.stack(film) for film in films])

    def measure(
        self,
        record: Record,
        latents: Any,
        sample: Sample,
        recipients: Sequence[RunName] = (),
        metrics: Sequence[Metric] | None = None,
    ) -> dict[str, NDArray[np.float32]]:
        """Evaluate metrics on latents (rows, C, F, H, W); a value that is not finite becomes NaN.

        Parameters
        ----------
        recipients : the run that each row changed, for metrics that ask for it. metrics : all of the plan by default.
        """
        metrics = self.plan.metrics if metrics is None else metrics
        reads_video = any(metric.reads_video for metric in metrics)
        both = record.final.float().cpu().numpy()
        given = MetricInput(
            video=self.plan.task.video(self.pipe, latents) if reads_video else no_video(len(latents)),
            latents=latents.float().cpu().numpy(),
            clean=both[record.row("clean")],
            corrupted=both[record.row("corrupted")],
            sample=sample,
            recipients=tuple(recipients),
        )
        return {m.name: _finite(m, given) for m in metrics}

    def _frames(self, record: Record, latents: Any) -> NDArray[np.uint8]:
        given = _with_given_frames(record, latents)
        video = self.plan.task.preview(self.pipe, given, self.plan.geometry.frames)[0]
        return np.nan_to_num(video).clip(0, 255).round().astype(np.uint8)

    def _patched_film(self, sample: int, patched: Intervention) -> list[NDArray[np.uint8]]:
        record, fork = self.record(sample), self.fork(sample, [patched], keep_x0_hat=True)
        blank = np.zeros_like(self._frames(record, record.x0_hat[0][:1]))
        return [
            self._frames(record, fork.x0_hat[s]) if s in fork.x0_hat else blank for s in range(self.plan.geometry.steps)
        ]


class Replica:
    """A worker of the pool: loads the model once, then computes and writes units.

    Parameters
    ----------
    config : the sweep config as JSON-able data. store : address of the store, which every node sees.
    permissions : what the command line allowed.
    """

    def __init__(self, config: Mapping[str, Any], store: str, permissions: Permissions = NOTHING) -> None:
        import torch

        permissions.apply()
        parsed = SweepConfig.model_validate(config)
        torch.set_num_threads(parsed.engine.threads)
        self.plan = make_plan(parsed, checked=True, permissions=permissions)
        self.store = Store(store)
        if parsed.hash() != self.store.config_hash:
            raise StoreError(f"store {store} holds another config than this replica sees: an image of it differs here.")
        self.computer = load_proven(self.plan)
        self.hardware = hardware_of(self.computer.pipe.device)
        self.rows = rows_for(self.plan, self.computer, store, self.hardware)

    def run(self, unit: Unit) -> Receipt:
        """Compute one unit and write its region; the same unit always writes the same bytes."""
        started = time.perf_counter()
        gpu_memory.reset_peak()
        receipt = indivisible(lambda: self._baseline(unit)) if unit.group == BASELINE else self._cells(unit)
        seconds = round(time.perf_counter() - started, 4)
        return replace(receipt, seconds=seconds, gpu_bytes=gpu_memory.peak())

    def _baseline(self, unit: Unit) -> Receipt:
        values = self.computer.baseline(unit.sample)
        failed = count_failed(values, 1)
        regions: list[tuple[str, dict[str, NDArray[Any]], int]] = [(BASELINE, {**values}, unit.sample)]
        for grid in self.plan.screened:
            estimates = self.computer.estimates(grid, unit.sample)
            failed += int(np.isnan(estimates).sum())
            regions.append((grid.experiment.name, {ESTIMATE: estimates}, unit.sample))
        if unit.sample in self.plan.config.previews.samples:
            position = self.plan.config.previews.samples.index(unit.sample)
            regions.append(("previews", {"x0_hat": self.computer.previews(unit.sample)}, position))
        return Receipt(
            cells=2,
            failed=failed,
            digest=digest_of({f"{group}/{n}": value for group, arrays, _ in regions for n, value in arrays.items()}),
            bytes=sum(self.store.write_sample(*region) for region in regions),
            row_forwards=2 * self.plan.geometry.steps * len(self.plan.geometry.branches)
            + self.plan.screening_forwards(),
            seconds=0.0,
        )

    def _cells(self, unit: Unit) -> Receipt:
        count = len(self.plan.interventions(unit))
        chosen = self._chosen(unit)
        chosen = np.ones(count, dtype=np.bool_) if chosen is None else chosen
        (values, forwards), used = self.rows.run(lambda limit: self._compute(unit, chosen, limit))
        digest = digest_of({f"{unit.group}/{name}": value for name, value in values.items()})
        written = self.store.write_cells(unit.group, values, unit.sample, unit.start, unit.stop)
        fields = {metric.name: self.plan.field_shape(metric) for metric in self.plan.metrics}
        return Receipt(
            cells=int(chosen.sum()),
            failed=count_failed(
                {name: value.reshape((count, *fields[name]))[chosen] for name, value in values.items()}, 1
            ),
            bytes=written,
            digest=digest,
            row_forwards=forwards,
            seconds=0.0,
            rows=used,
        )

    def _compute(self, unit: Unit, chosen: NDArray[np.bool_], limit: int) -> tuple[dict[str, NDArray[np.float32]], int]:
        """Return the values of a unit whose forwards have so many rows at most, and its row-forwards."""
        if limit != self.plan.rows:
            self.plan = self.computer.plan = self.plan.with_rows(limit)
        values = self.computer.cells(unit, chosen)
        cells = self.plan.interventions(unit)
        rows = [cells[i] for i in np.flatnonzero(chosen)]
        return values, sum(self.plan.batch_forwards([rows[i] for i in b]) for b in self.plan.batches(rows))

    def _chosen(self, unit: Unit) -> NDArray[np.bool_] | None:
        """Return which cells of a unit are computed; None if all of them are, whatever happens."""
        if self.plan.verifies(unit):
            chosen = self.store.chosen(unit.group, unit.start, unit.stop)
            if chosen is None:
                raise StoreError(f"the cells of {unit.group} to verify are not chosen yet. Screen every sample first.")
            return chosen
        round_ = self.plan.rounds[unit.group].round_of(unit.sample) if unit.group in self.plan.rounds else 0
        if not round_:
            return None
        stopped = self.store.stopped(unit.group, round_ - 1, unit.start, unit.stop)
        if stopped is None:
            raise StoreError(f"round {round_ + 1} of {unit.group} has not begun. Compute the rounds before it first.")
        return ~stopped.ravel()


def load_proven(plan: Plan) -> Computer:
    """Load the model of a plan and prove that it is understood.

    Raises
    ------
    ModelError : it cannot be loaded. ControlError : a control fails.
    """
    model = plan.config.model
    pipe = load_pipeline(plan.model, dtype=model.dtype, device=model.device, device_map=model.device_map)
    computer = Computer(plan, pipe)
    require_controls(computer.engine, plan.task.inputs(pipe, plan.samples[0], plan.config.sampler))
    return computer


def _with_given_frames(record: Record, estimate: Any) -> Any:
    """Put the given frames back into a clean estimate, because the model makes no estimate of them."""
    given = record.geometry.given_frames
    complete = estimate.clone()
    complete[:, :, :given] = record.final[:1, :, :given]
    return complete


def _finite(metric: Metric, given: MetricInput) -> NDArray[np.float32]:
    value = metric.compute(given).astype(np.float32)
    value[~np.isfinite(value)] = np.nan
    return value
