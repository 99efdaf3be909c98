"""The engine: the only traces. Record runs whole, then fork batches of intervened rows off them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import nnsight
import torch
from torch import nn

from interventions.attention import AttentionTap
from interventions.base import Intervention, RunRef
from interventions.families.family import Family
from interventions.joining import joining
from interventions.record import Fork, Record, RunInputs
from interventions.run import BlockWork, Gradient, Run, capturing, forking, recording, tap_of
from interventions.sites import Geometry, LatentsAt, OutputAt, PredictionAt, PromptAt, Site
from interventions.solver import SolverTap
from interventions.solvers import clean_estimate
from interventions.sources import contexts_of
from interventions.streams import from_canonical, gather, main_tensor, to_canonical, with_main_tensor
from interventions.visit import BlockVisitor


class EngineError(RuntimeError):
    """A run did not do what its plan says; its results must not be used."""


class _TracedPipeline(nn.Module):
    """The pipeline as one module: its denoisers, and identity taps where the loop meets the solver."""

    def __init__(self, pipe: Any, denoisers: Sequence[str]) -> None:
        super().__init__()
        for name in denoisers:
            if getattr(pipe, name, None) is not None:
                setattr(self, name, getattr(pipe, name))
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


class Engine:
    """Host one pipeline; record its runs and fork intervened ones. One engine a process: it is not thread-safe.

    Parameters
    ----------
    pipe : a diffusers pipeline of the family. It stays usable; ``release`` undoes the scheduler wrap.
    family : the adapter that says where things are.
    shares : whether what rows of a forward have in common is computed once. It changes no more than rounding; without
        it every row is computed as if it were alone.
    replays : whether the steps before the first change are replayed; without it they are computed for every row.

    Raises
    ------
    UnsupportedSolverError : the pipeline's scheduler is not understood.
    """

    def __init__(self, pipe: Any, family: Family, *, shares: bool = True, replays: bool = True) -> None:
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.family = pipe, family
        self.shares, self.replays = shares, replays
        self._root = _TracedPipeline(pipe, family.denoisers)
        self.solver = SolverTap(pipe.scheduler, self._root.prediction, self._root.stepped)
        self._model = nnsight.NNsight(self._root)
        self._attention = AttentionTap()
        self._latent_shape = (0, 0, 0)

    def release(self) -> None:
        """Take the wrap off the pipeline's scheduler."""
        self.solver.release()

    def bare(self, inputs: RunInputs) -> torch.Tensor:
        """Run the pipeline with nothing of ours in its loop and return the final latents, one row a run."""
        self.solver.release()
        try:
            kwargs = self._arguments(inputs, range(len(inputs.names)))
            final: torch.Tensor = self.pipe(**kwargs, output_type="latent", return_dict=False)[0]
        finally:
            self.solver.attach()
        return self._final(final, inputs)

    def perturbed(self, latents: torch.Tensor, frame: int, geometry: Geometry) -> torch.Tensor:
        """Return given latents with the latent frames of one token frame changed, in the pipeline's own layout."""
        seen = self._canonical(latents).clone()
        frames = slice(frame * geometry.frame_patch, (frame + 1) * geometry.frame_patch)
        seen[:, :, frames] += 1.0
        return from_canonical(seen, self.family.latent_layout)

    def geometry(self, inputs: RunInputs) -> Geometry:
        """Return the extent of a run on these inputs."""
        family, pipeline_config = self.family, {**self.pipe.config, "_class_name": type(self.pipe).__name__}
        return family.geometry(
            pipeline_config,
            self.denoiser.config,
            scheduler=self._bare_scheduler(),
            steps=int(inputs.shared["num_inference_steps"]),
            guidance=family.guider(self.pipe) if family.guider else family.guidance(inputs.shared),
            latent_shape=self._extent(inputs),
        )

    def record(self, inputs: RunInputs) -> Record:
        """Run all runs of a sample as one batch without intervention and keep what forks need."""
        run = recording(self.geometry(inputs), len(inputs.names))
        kwargs = self._arguments(inputs, range(run.rows))
        final = self._trace(run, inputs, kwargs)
        return Record(
            inputs=inputs,
            geometry=run.geometry,
            levels=run.levels,
            outputs=run.outputs,
            latents=run.latents,
            x0_hat=[run.x0_hat[s] for s in range(run.geometry.steps)],
            conditioning=run.conditioning,
            final=final,
            entry_scale=self._entry_scale(inputs, run.latents[0]),
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
        run = capturing(record, step, sites, rows, replays=self.replays)
        self._trace(run, record.inputs, self._arguments(record.inputs, rows))
        assert run.captured is not None
        if missing := set(sites) - set(run.captured):
            raise EngineError(f"donor activations were not reached at {sorted(missing)}")
        return run.captured

    def gradients(self, record: Record, step: int, sites: Sequence[Site], objective: Callable[..., Any]) -> Gradient:
        """Return activations at sites of one step and the gradient of an objective of that step's clean estimate.

        One forward of the recorded runs as a batch and one backward through it.

        Parameters
        ----------
        objective : from the clean estimates (runs, C, F, H, W) to a scalar tensor.
        """
        run = capturing(record, step, sites, range(len(record.inputs.names)))
        run.captured, run.gradient = None, Gradient()
        with torch.enable_grad(), self._frozen():
            self._trace(run, record.inputs, self._arguments(record.inputs, range(run.rows)))
            found = run.gradient
            if missing := set(sites) - set(found.values):
                raise EngineError(f"activations were not reached at {sorted(missing)}")
            assert found.x0_hat is not None
            slopes = torch.autograd.grad(
                objective(found.x0_hat), list(found.leaves.values()), allow_unused=True, materialize_grads=True
            )
        by_tap = dict(zip(found.leaves, slopes, strict=True))
        for site in found.values:
            key = record.geometry.call_of(site.branch), site.block, tap_of(site)
            found.slopes[site] = run.at(site, by_tap[key])
        found.leaves.clear()
        found.x0_hat = found.x0_hat.detach()
        return found

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Keep the weights out of a backward, which would keep every layer's input for their gradients."""
        learning = [p for p in self._root.parameters() if p.requires_grad]
        try:
            for p in learning:
                p.requires_grad_(False)
            yield
        finally:
            for p in learning:
                p.requires_grad_(True)

    def fork(
        self,
        record: Record,
        rows: Sequence[Intervention],
        *,
        keep_x0_hat: bool = False,
        others: Callable[[RunRef], Record] | None = None,
    ) -> Fork:
        """Run a batch of rows, each with its own intervention, from the first step that any of them changes.

        Steps before that replay the recorded denoiser outputs, which is exact because the solver still runs.

        Parameters
        ----------
        others : the record that holds a run of another sample or seed, for interventions that read such runs.

        Raises
        ------
        ValueError : rows whose schedule edits differ, which one forward cannot carry.
        EngineError : an edit that was planned did not happen.
        """
        schedules = {row.schedule for row in rows}
        if len(schedules) != 1:
            raise ValueError(f"rows of one fork must share their schedule edit, got {sorted(map(str, schedules))}")
        run = forking(record, rows, next(iter(schedules)), replays=self.replays)
        run.contexts = contexts_of(self.capture, record, rows, others)
        run.keep_x0_hat = keep_x0_hat
        kwargs = self._arguments(record.inputs, [record.row(row.recipient) for row in rows])
        if run.edits.get(LatentsAt(0)):
            kwargs["latents"] = self._edited_entry(run, record, kwargs["latents"])
        final = self._trace(run, record.inputs, kwargs)
        if run.fired != run.planned:
            raise EngineError(f"{run.planned} edits were planned, {run.fired} happened (steps {record.geometry.steps})")
        return Fork(final=final, x0_hat=run.x0_hat, fired=run.fired)

    def _trace(self, run: Run, inputs: RunInputs, kwargs: dict[str, Any]) -> torch.Tensor:
        self.solver.start(run.schedule)
        self._latent_shape = self._extent(inputs)
        result = torch.empty(0)
        try:
            with ExitStack() as stack:
                # nnsight only warns when requests outrun the model, and then silently skips what follows them.
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("error", message=".*was never reached.*")
                if any(block.cuts for blocks in run.work.values() for block in blocks.values()):
                    stack.enter_context(self._attention)
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
        return result if run.stop_after_loop is not None else self._final(result, inputs)

    def _follow(self, run: Run, tracer: Any) -> None:
        """Walk through a run inside the trace, requesting values strictly in the order the model reaches them."""
        _ = self._model.clock.output
        run.addresses = {
            name: self.family.addresses(getattr(self.pipe, name).config) for name in run.geometry.denoisers
        }
        for loop, step in enumerate(run.order):
            denoiser = getattr(self._model, run.geometry.denoiser(step))
            for call in range(len(run.geometry.calls)):
                self._denoiser_call(run, denoiser, loop, step, call)
                if run.stop_after_loop == loop and run.gradient is None and (step, call) == max(run.work):
                    # Nothing that is captured lies beyond: not the rest of this call, nor another branch's.
                    self._end(run, loop, tracer)
            if run.stop_after_loop == loop:
                assert run.gradient is not None
                prediction, latents = self._model.prediction.output
                run.gradient.x0_hat = self._estimate(run, step, latents, prediction)
                self._end(run, loop, tracer)
            self._solver_step(run, loop, step)
        run.finished = True

    def _end(self, run: Run, loop: int, tracer: Any) -> None:
        self._check_in_step(loop)
        run.finished = True
        tracer.stop()

    def _denoiser_call(self, run: Run, denoiser: Any, loop: int, step: int, call: int) -> None:
        # Parks until this very call begins: without it, a second request for the location served last would be
        # answered by the call before.
        args, kwargs = denoiser.inputs
        if loop < run.replayed_loops:
            recorded, rows = run.replay[loop * len(run.geometry.calls) + call]
            denoiser.skip(self._edited_output(run, step, call, gather(recorded, rows)))
            return
        if run.record and loop == 0:
            self._keep_conditioning(run, call, kwargs)
        if self.shares and not run.record and (once := self._given_once(kwargs)):
            # Not in recordings, which are the bare pipeline's runs to the last bit.
            kwargs = {**kwargs, **once}
            denoiser.inputs = (args, kwargs)
        for branch in run.geometry.calls[call]:
            if rows := run.edits.get(PromptAt(step, branch)):
                kwargs = self._edited_prompt(run, PromptAt(step, branch), rows, kwargs)
                denoiser.inputs = (args, kwargs)
        if work := run.work.get((step, call)):
            if run.gradient is not None:
                # The pipeline runs under no_grad, which its own decorator restores at its end.
                torch.set_grad_enabled(True)
            prompt = kwargs.get(self.family.conditioning[0])
            length = None if prompt is None else int(prompt.shape[-2])
            addresses = run.addresses[run.geometry.denoiser(step)]
            joins = joining(run, loop, step, call, addresses) if self.shares else None
            visitor = BlockVisitor(denoiser, addresses, run, step, call, self._attention, length, joins)
            for block in sorted({*work, *range(len(joins.active) if joins else 0)}):
                visitor.visit(block, work.get(block, BlockWork()))
            if run.captured is not None and (step, call) == max(run.work):
                return
        # Always asked for: where nothing in a call is, the next call's inputs would be answered by this one's.
        output = denoiser.output
        if run.record:
            run.outputs.append(output)
        new = self._edited_output(run, step, call, output)
        if any(OutputAt(step, branch) in run.edits for branch in run.geometry.calls[call]):
            denoiser.output = new

    def _given_once(self, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return one row of the arguments that are the same in every row, seen by how they were expanded.

        Only of those with a value for every token: of a single number a row there is nothing to spare, and a product
        of one row is rounded otherwise than one of many.
        """
        found = {name: kwargs[name] for name in self.family.once if isinstance(kwargs.get(name), torch.Tensor)}
        return {name: v[:1] for name, v in found.items() if v.ndim > 1 and len(v) > 1 and v.stride(0) == 0}

    def _edited_output(self, run: Run, step: int, call: int, output: Any) -> Any:
        """Return a denoiser's output after the edits of its branches, and remember it as the latest of each row."""
        tensor = main_tensor(output) if run.contexts else None
        if tensor is None:
            return output
        for branch in run.geometry.calls[call]:
            for i in run.edits.get(OutputAt(step, branch), ()):
                tensor = tensor.clone()
                at = run.row_of(branch, i)
                tensor[at] = run.edit(OutputAt(step, branch), i, tensor[at])
            for i, context in enumerate(run.contexts):
                context.previous_outputs[branch] = tensor[run.row_of(branch, i)]
        return with_main_tensor(output, tensor)

    def _keep_conditioning(self, run: Run, call: int, kwargs: dict[str, Any]) -> None:
        for k, branch in enumerate(run.geometry.calls[call]):
            rows = slice(k * run.rows, (k + 1) * run.rows)
            run.conditioning[branch] = {
                name: kwargs[name][rows] for name in self.family.conditioning if kwargs.get(name) is not None
            }

    def _edited_prompt(self, run: Run, point: PromptAt, rows: list[int], kwargs: dict[str, Any]) -> dict[str, Any]:
        names = [name for name in self.family.conditioning if kwargs.get(name) is not None]
        changed = {name: kwargs[name].clone() for name in names}
        for i in rows:
            at = run.row_of(point.branch, i)
            for name, value in run.edit(point, i, {name: changed[name][at] for name in names}).items():
                changed[name][at] = value
        return {**kwargs, **changed}

    def _solver_step(self, run: Run, loop: int, step: int) -> None:
        prediction, latents = self._model.prediction.output
        self._check_in_step(loop)
        if run.record and loop == 0:
            self._check_levels(run)
        if rows := run.edits.get(PredictionAt(step)):
            seen = self._canonical(prediction).clone()
            for i in rows:
                seen[i] = run.edit(PredictionAt(step), i, seen[i])
            prediction = from_canonical(seen, self.family.latent_layout)
            self._model.prediction.output = (prediction, latents)
        estimate = self._estimate(run, step, latents, prediction)
        entering, given = self._canonical(latents), self._canonical(prediction)
        for i, context in enumerate(run.contexts):
            context.x0_hat, context.latents_before, context.previous_prediction = estimate[i], entering[i], given[i]
        if run.keep_x0_hat:
            run.x0_hat[step] = estimate
        following = run.order[loop + 1] if loop + 1 < len(run.order) else run.geometry.steps
        stepped = self._model.stepped.output
        if rows := run.edits.get(LatentsAt(following)):
            seen = self._canonical(stepped).clone()
            for i in rows:
                seen[i] = run.edit(LatentsAt(following), i, seen[i])
            edited = from_canonical(seen, self.family.latent_layout)
            self.solver.carry(edited - stepped)
            self._model.stepped.output = edited
        if run.record:
            # Kandinsky writes each step's result into the latents that entered it.
            run.latents.append(entering.clone())
            if following == run.geometry.steps:
                run.latents.append(self._canonical(stepped))

    def _estimate(self, run: Run, step: int, latents: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        alpha, sigma = run.levels[step]
        return self._canonical(clean_estimate(self.solver.kind, latents, prediction, alpha, sigma))

    def _check_in_step(self, loop: int) -> None:
        """Refuse to go on if a request made out of the model's order was answered by a later step."""
        if self.solver.loops != loop:
            raise EngineError(
                f"the trace is at iteration {self.solver.loops} of the loop, its plan at {loop}: "
                f"the pipeline does not call its denoiser as family {self.family.name} declares"
            )

    def _check_levels(self, run: Run) -> None:
        """Refuse noise levels that differ from those the plan computed: every sigma of the results would be wrong."""
        found = self.solver.levels
        if len(found) != len(run.levels) or any(
            abs(a - b) > 1e-4
            for one, other in zip(found, run.levels, strict=True)
            for a, b in zip(one, other, strict=True)
        ):
            raise EngineError(
                f"the run's noise levels are {[round(s, 4) for _, s in found]}, planned were "
                f"{[round(s, 4) for _, s in run.levels]}: family {self.family.name} sets other steps than the pipeline"
            )

    def _edited_entry(self, run: Run, record: Record, latents: torch.Tensor) -> torch.Tensor:
        scale = record.entry_scale
        if scale is None:
            raise EngineError(
                "this pipeline changes the latents it is given, so those entering step 0 cannot be edited"
            )
        seen = self._canonical(latents).clone()
        # Kandinsky is given channels of conditioning behind those it denoises.
        channels = record.latents[0].shape[1]
        for i in run.edits[LatentsAt(0)]:
            entering = seen[i, :channels] if scale == 1.0 else seen[i, :channels] * scale
            edited = run.edit(LatentsAt(0), i, entering)
            seen[i, :channels] = edited if scale == 1.0 else edited / scale
        return from_canonical(seen, self.family.latent_layout)

    def _entry_scale(self, inputs: RunInputs, entering: torch.Tensor) -> float | None:
        given = self._canonical(inputs.per_run["latents"]).to(entering)[:, : entering.shape[1]]
        scheduler = self.pipe.scheduler
        scales = getattr(scheduler, "init_noise_sigma", None), scheduler.config.get("sigma_max")
        for factor in (1.0, *(float(scale) for scale in scales if scale is not None)):
            if torch.allclose(given * factor, entering, rtol=1e-5, atol=1e-6):
                return factor
        return None

    def _arguments(self, inputs: RunInputs, rows: Sequence[int]) -> dict[str, Any]:
        """Return the pipeline's arguments for some rows; a solver that draws noise draws the same for each of them."""
        kwargs = {**inputs.shared, **inputs.rows(rows)}
        if self.solver.kind.stochastic:
            seed = sum(part << (16 * i) for i, part in enumerate(inputs.seed)) % 2**63
            kwargs["generator"] = [torch.Generator().manual_seed(seed) for _ in rows]
        return kwargs

    def _canonical(self, latents: torch.Tensor) -> torch.Tensor:
        return to_canonical(latents, self.family.latent_layout, self._latent_shape)

    def _final(self, result: torch.Tensor, inputs: RunInputs) -> torch.Tensor:
        return to_canonical(result, self.family.final_layout or self.family.latent_layout, self._extent(inputs))

    def _extent(self, inputs: RunInputs) -> tuple[int, int, int]:
        latents = inputs.per_run["latents"]
        if self.family.extent is not None:
            return self.family.extent(self.pipe, inputs.shared, latents)
        axes = {"CFHW": (2, 3, 4), "FCHW": (1, 3, 4), "FHWC": (1, 2, 3)}[self.family.latent_layout]
        frames, height, width = (latents.shape[a] for a in axes)
        return frames, height, width

    @property
    def denoiser(self) -> Any:
        """Return the first denoiser that the pipeline has; two-expert pipelines may have only one of theirs."""
        return next(d for name in self.family.denoisers if (d := getattr(self.pipe, name, None)) is not None)

    def _bare_scheduler(self) -> Any:
        """Return a scheduler of the pipeline's class and settings that carries none of our wrap."""
        return type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
