"""The engine: the only traces. Record runs whole, then fork batches of intervened rows off them."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import nnsight
import torch
from torch import nn

from interventions.base import Intervention, RowContext, Schedule
from interventions.families.family import Family
from interventions.sites import Geometry, LatentsAt, PredictionAt, RunName, Site, in_forward_order
from interventions.solver import SolverTap, clean_estimate


class EngineError(RuntimeError):
    """A run did not do what its plan says; its results must not be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInputs:
    """The inputs of the runs of one sample.

    Attributes
    ----------
    shared : keyword arguments of the pipeline call that are equal for all runs (image, size, steps, guidance).
    per_run : tensors with one row a run, in the order of ``names`` (``latents`` and ``prompt_embeds`` at least).
    names : the runs, usually ("clean", "corrupted").
    seed : integers that identify the sample, for every draw an intervention makes.
    """

    shared: Mapping[str, Any]
    per_run: Mapping[str, torch.Tensor]
    names: tuple[RunName, ...]
    seed: tuple[int, ...]

    def rows(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Gather one row of every per-run tensor for each index."""
        return {name: value[list(indices)] for name, value in self.per_run.items()}


@dataclass(slots=True, kw_only=True)
class Record:
    """What a recorded batch of runs leaves behind: latent-sized tensors only.

    Attributes
    ----------
    outputs : denoiser output of every call, (runs, C, F, H, W) each.
    x0_hat : clean estimate at each step; steps tensors.
    sigmas : noise level entering each step, then the final 0; steps + 1 values.
    final : what the pipeline returned, (runs, C, F, H, W).
    """

    inputs: RunInputs
    geometry: Geometry
    sigmas: tuple[float, ...]
    outputs: list[torch.Tensor]
    x0_hat: list[torch.Tensor]
    final: torch.Tensor

    def row(self, run: RunName) -> int:
        """Return the batch row of a run."""
        return self.inputs.names.index(run)


@dataclass(slots=True, kw_only=True)
class Fork:
    """Results of a batch of intervened rows.

    Attributes
    ----------
    final : what the pipeline returned, (rows, C, F, H, W).
    x0_hat : clean estimate of every loop iteration by its step, if asked for.
    fired : edits made, always equal to the number planned.
    """

    final: torch.Tensor
    x0_hat: dict[int, torch.Tensor]
    fired: int


class _TracedPipeline(nn.Module):
    """The pipeline as one module: its denoiser, and identity taps where the loop meets the solver."""

    def __init__(self, pipe: Any, denoiser: str) -> None:
        super().__init__()
        self.denoiser = getattr(pipe, denoiser)
        self.clock, self.prediction, self.stepped = nn.Identity(), nn.Identity(), nn.Identity()
        # Not registered: nnsight would wrap every encoder and codec that the loop never touches.
        object.__setattr__(self, "pipe", pipe)

    def forward(self, **kwargs: Any) -> torch.Tensor:
        """Call the pipeline's own ``__call__`` and return its latents."""
        # Two ticks: after a hit on the second, nnsight lets requests follow the model instead of counting
        # calls, which would go wrong wherever a denoiser call is skipped.
        self.clock(None)
        self.clock(None)
        pipe: Any = self.pipe
        return pipe(**kwargs, output_type="latent", return_dict=False)[0]


@dataclass(slots=True, kw_only=True)
class _Run:
    """One traced run as data: what to replay, what to edit, what to keep."""

    geometry: Geometry
    order: list[int]
    sigmas: tuple[float, ...]
    replayed_loops: int = 0
    replay: list[torch.Tensor] = field(default_factory=list)
    sites: dict[int, list[Site]] = field(default_factory=dict)
    latents_at: dict[int, list[int]] = field(default_factory=dict)
    prediction_at: dict[int, list[int]] = field(default_factory=dict)
    rows_at: dict[Site, list[int]] = field(default_factory=dict)
    rows: list[Intervention] = field(default_factory=list)
    contexts: list[RowContext] = field(default_factory=list)
    captured: dict[Site, torch.Tensor] | None = None
    stop_after_loop: int | None = None
    keep_x0_hat: bool = False
    record: bool = False
    outputs: list[torch.Tensor] = field(default_factory=list)
    x0_hat: dict[int, torch.Tensor] = field(default_factory=dict)
    fired: int = 0
    finished: bool = False


class Engine:
    """Host one pipeline; record its runs and fork intervened ones. One engine a process: it is not thread-safe.

    Parameters
    ----------
    pipe : a diffusers pipeline of the family. It stays usable; ``release`` undoes the scheduler wrap.
    family : the adapter that says where things are.
    """

    def __init__(self, pipe: Any, family: Family) -> None:
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.family = pipe, family
        self._root = _TracedPipeline(pipe, family.denoiser)
        self.solver = SolverTap(pipe.scheduler, self._root.prediction, self._root.stepped)
        self._model = nnsight.NNsight(self._root)

    def release(self) -> None:
        """Take the wrap off the pipeline's scheduler."""
        self.solver.release()

    def bare(self, inputs: RunInputs) -> torch.Tensor:
        """Run the pipeline with nothing of ours in its loop and return the final latents, one row a run."""
        self.solver.release()
        try:
            kwargs = {**inputs.shared, **inputs.rows(range(len(inputs.names)))}
            final: torch.Tensor = self.pipe(**kwargs, output_type="latent", return_dict=False)[0]
        finally:
            self.solver.attach()
        return final

    def geometry(self, inputs: RunInputs) -> Geometry:
        """Return the extent of a run on these inputs."""
        latents = inputs.per_run["latents"]
        pipeline_config = {**self.pipe.config, "_class_name": type(self.pipe).__name__}
        return self.family.geometry(
            pipeline_config,
            getattr(self.pipe, self.family.denoiser).config,
            steps=int(inputs.shared["num_inference_steps"]),
            guidance_scale=float(inputs.shared.get("guidance_scale", 1.0)),
            latent_shape=(latents.shape[2], latents.shape[3], latents.shape[4]),
        )

    def record(self, inputs: RunInputs) -> Record:
        """Run all runs of a sample as one batch without intervention and keep what forks need."""
        geometry = self.geometry(inputs)
        run = _Run(geometry=geometry, order=list(range(geometry.steps)), sigmas=(), record=True, keep_x0_hat=True)
        everyone = range(len(inputs.names))
        final = self._trace(run, {**inputs.shared, **inputs.rows(everyone)})
        return Record(
            inputs=inputs,
            geometry=geometry,
            sigmas=run.sigmas,
            outputs=run.outputs,
            x0_hat=[run.x0_hat[s] for s in range(geometry.steps)],
            final=final,
        )

    def capture(
        self, record: Record, step: int, sites: Sequence[Site], rows: Sequence[int]
    ) -> dict[Site, torch.Tensor]:
        """Compute activations of recorded runs at one step: prefix replayed, the step computed, the rest dropped.

        Parameters
        ----------
        sites : sites of ``step`` only.
        rows : recorded runs to capture, as rows of the record; row i of a result is run ``rows[i]``.
        """
        geometry = record.geometry
        for site in sites:
            geometry.require(site)
        run = _Run(
            geometry=geometry,
            order=list(range(geometry.steps)),
            sigmas=record.sigmas,
            replayed_loops=step,
            replay=[out[list(rows)] for out in record.outputs[: step * len(geometry.branches)]],
            sites={step: in_forward_order(set(sites), geometry.branches)},
            captured={},
            stop_after_loop=step,
        )
        self._trace(run, {**record.inputs.shared, **record.inputs.rows(rows)})
        assert run.captured is not None
        if missing := set(sites) - set(run.captured):
            raise EngineError(f"donor activations were not reached at {sorted(missing)}")
        return run.captured

    def fork(self, record: Record, rows: Sequence[Intervention], *, keep_x0_hat: bool = False) -> Fork:
        """Run a batch of rows, each with its own intervention, from the first step that any of them changes.

        Steps before that replay the recorded denoiser outputs, which is exact because the solver still runs.

        Raises
        ------
        ValueError : rows whose schedule edits differ, which one forward cannot carry.
        EngineError : an edit that was planned did not happen.
        """
        schedules = {row.schedule for row in rows}
        if len(schedules) != 1:
            raise ValueError(f"rows of one fork must share their schedule edit, got {sorted(map(str, schedules))}")
        schedule = next(iter(schedules))
        geometry = record.geometry
        run = self._plan_fork(record, list(rows), schedule)
        run.keep_x0_hat = keep_x0_hat
        planned = sum(len(r) for at in (run.rows_at, run.latents_at, run.prediction_at) for r in at.values())
        recipients = [record.row(row.recipient) for row in rows]
        kwargs = {**record.inputs.shared, **record.inputs.rows(recipients)}
        kwargs["latents"] = self._edit_latents(run, 0, kwargs["latents"])
        final = self._trace(run, kwargs, schedule)
        if run.fired != planned:
            raise EngineError(f"{planned} edits were planned, {run.fired} happened (steps {geometry.steps})")
        return Fork(final=final, x0_hat=run.x0_hat, fired=run.fired)

    def _plan_fork(self, record: Record, rows: list[Intervention], schedule: Schedule | None) -> _Run:
        geometry = record.geometry
        first = min(geometry.steps, *(row.first_computed_step(geometry) for row in rows))
        order = list(range(geometry.steps))
        replayed = first
        if schedule is not None and schedule.edit == "drop":
            order.remove(schedule.step)
            replayed = schedule.step
        elif schedule is not None:
            order = order[: schedule.step + 1] + order[schedule.step :]
        recipients = [record.row(row.recipient) for row in rows]
        run = _Run(
            geometry=geometry,
            order=order,
            sigmas=record.sigmas,
            replayed_loops=replayed,
            replay=[out[recipients] for out in record.outputs[: replayed * len(geometry.branches)]],
            rows=rows,
        )
        for i, row in enumerate(rows):
            for point in row.points(geometry):
                if isinstance(point, LatentsAt):
                    run.latents_at.setdefault(point.step, []).append(i)
                elif isinstance(point, PredictionAt):
                    run.prediction_at.setdefault(point.step, []).append(i)
                else:
                    run.rows_at.setdefault(point, []).append(i)
        for site in in_forward_order(run.rows_at, geometry.branches):
            geometry.require(site)
            run.sites.setdefault(site.step, []).append(site)
        run.contexts = self._contexts(record, rows)
        return run

    def _contexts(self, record: Record, rows: list[Intervention]) -> list[RowContext]:
        wanted: dict[int, set[Site]] = defaultdict(set)
        for row in rows:
            for site in row.donor_sites(record.geometry):
                wanted[site.step].add(site)
        everyone = range(len(record.inputs.names))
        captured: dict[Site, torch.Tensor] = {}
        for step, sites in sorted(wanted.items()):
            captured |= self.capture(record, step, sorted(sites), everyone)
        contexts = []
        for row in rows:
            r = record.row(row.recipient)
            donors = {}
            if row.donor is not None:
                d = record.row(row.donor)
                donors = {site: captured[site][d] for site in row.donor_sites(record.geometry)}
            contexts.append(
                RowContext(
                    geometry=record.geometry,
                    sigmas=record.sigmas,
                    seed=record.inputs.seed,
                    donors=donors,
                    recorded_x0_hat=[x[r] for x in record.x0_hat],
                )
            )
        return contexts

    def _trace(self, run: _Run, kwargs: dict[str, Any], schedule: Schedule | None = None) -> torch.Tensor:
        self.solver.start(schedule)
        result = torch.empty(0)
        try:
            with warnings.catch_warnings():
                # nnsight only warns when requests outrun the model, and then silently skips what follows them.
                warnings.filterwarnings("error", message=".*was never reached.*")
                with self._model.trace(**kwargs) as tracer:
                    for _ in tracer.iter[[1]]:
                        self._follow(run, tracer)
                    result = tracer.result.save()
            if run.stop_after_loop is None and self.solver.loops != len(run.order):
                raise EngineError(f"the loop took {self.solver.loops} solver steps, the plan has {len(run.order)}")
        finally:
            self.solver.start(None)
        if not run.finished:
            raise EngineError("the trace ended before its plan did")
        return result

    def _follow(self, run: _Run, tracer: Any) -> None:
        """Walk through a run inside the trace, requesting values strictly in the order the model reaches them."""
        _ = self._model.clock.output
        for loop, step in enumerate(run.order):
            for branch in run.geometry.branches:
                # Parks until this very call begins: without it, a second request for the location served last
                # would be answered by the call before.
                _ = self._model.denoiser.inputs
                if loop < run.replayed_loops:
                    call = loop * len(run.geometry.branches) + run.geometry.branches.index(branch)
                    self._model.denoiser.skip((run.replay[call],))
                else:
                    self._denoiser_call(run, step, branch)
            if run.stop_after_loop == loop:
                self._check_in_step(loop)
                run.finished = True
                tracer.stop()
            self._solver_step(run, loop, step)
        run.finished = True

    def _denoiser_call(self, run: _Run, step: int, branch: str) -> None:
        entering: dict[int, torch.Tensor] = {}
        sites = [site for site in run.sites.get(step, ()) if site.branch == branch]
        updated = {site.block for site in sites if site.component == "update"}
        for site in sites:
            block = self._model.get(f"denoiser.{self.family.blocks}.{site.block}")
            if site.block in updated and site.block not in entering:
                entering[site.block] = block.input
            if site.component in self.family.submodules:
                self._at_site(run, site, block.get(self.family.submodules[site.component]), None)
            else:
                self._at_site(run, site, block, entering[site.block] if site.component == "update" else None)
        if run.record:
            run.outputs.append(self._model.denoiser.output[0])

    def _at_site(self, run: _Run, site: Site, envoy: Any, entering: torch.Tensor | None) -> None:
        """Read or edit one component; ``entering`` is the block's input where the component is its update."""
        value = envoy.output
        if run.captured is not None:
            run.captured[site] = (value if entering is None else value - entering).clone()
            return
        new = value.clone()
        for row in run.rows_at[site]:
            old = value[row] if entering is None else value[row] - entering[row]
            changed = run.rows[row].apply(site, old, run.contexts[row])
            # The difference form keeps an unchanged update an exact identity.
            new[row] = changed if entering is None else value[row] + (changed - old)
            run.fired += 1
        envoy.output = new

    def _solver_step(self, run: _Run, loop: int, step: int) -> None:
        prediction, latents = self._model.prediction.output
        self._check_in_step(loop)
        for i in run.prediction_at.get(step, ()):
            prediction = prediction.clone()
            prediction[i] = run.rows[i].apply(PredictionAt(step), prediction[i], run.contexts[i])
            self._model.prediction.output = (prediction, latents)
            run.fired += 1
        sigma = run.sigmas[step] if run.sigmas else self.solver.sigmas[step]
        estimate = clean_estimate(latents, prediction, sigma)
        for i, context in enumerate(run.contexts):
            context.x0_hat, context.latents_before = estimate[i], latents[i]
            context.previous_prediction = prediction[i]
        if run.keep_x0_hat:
            run.x0_hat[step] = estimate
        following = run.order[loop + 1] if loop + 1 < len(run.order) else run.geometry.steps
        stepped = self._model.stepped.output
        if run.latents_at.get(following):
            self._model.stepped.output = self._edit_latents(run, following, stepped)
        if run.record and following == run.geometry.steps:
            run.sigmas = self.solver.sigmas

    def _check_in_step(self, loop: int) -> None:
        """Refuse to go on if a request made out of the model's order was answered by a later step."""
        if self.solver.loops != loop:
            raise EngineError(f"the trace is at iteration {self.solver.loops} of the loop, its plan at {loop}")

    def _edit_latents(self, run: _Run, step: int, latents: torch.Tensor) -> torch.Tensor:
        if not run.latents_at.get(step):
            return latents
        edited = latents.clone()
        for i in run.latents_at[step]:
            edited[i] = run.rows[i].apply(LatentsAt(step), latents[i], run.contexts[i])
            run.fired += 1
        return edited
