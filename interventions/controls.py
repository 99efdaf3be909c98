"""The load-time proof that engine and family understand a pipeline: controls whose outcome is known beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from interventions.attention import Edges
from interventions.base import Intervention, Read, RowContext
from interventions.engine import Engine
from interventions.kinds.patch import Patch
from interventions.record import Record, RunInputs
from interventions.sites import AttentionAt, Component, Geometry, Point, Site, Stream
from interventions.streams import argument, to_rows

STEPS = 2
"""Solver steps of the runs that the controls make."""
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
"""Largest difference, relative to the latents' scale, where a control is exact up to rounding; else 0.05."""
STEP_CACHES = ("cache", "fbc", "broadcast", "taylorseer", "layer_skip")
"""Parts of the names under which diffusers registers hooks that skip computation."""


class ControlError(ValueError):
    """A pipeline on which a control fails: effects measured on it would be wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """One control and its outcome.

    Attributes
    ----------
    name : what must hold. difference : largest absolute difference from that, relative to the latents' scale, or a
        count of tokens. limit : largest difference that passes; 0 where the control is exact by construction.
    """

    name: str
    difference: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within its limit."""
        return self.difference <= self.limit


def run_controls(engine: Engine, inputs: RunInputs) -> list[Control]:
    """Run the controls on short runs of one sample's inputs.

    An empty plan equals the bare pipeline. The blocks run in the declared order and there are no others. One latent
    frame is exactly its slice of tokens. A self-patch is an identity, for every component, a head and the text.
    Whatever was done to earlier blocks, a restored last residual restores the run: nothing goes round it. Nothing
    changes before the intervened step. All heads together are their attention. Cutting no edge changes nothing.

    Raises
    ------
    ControlError : a step cache is active.
    """
    refuse_step_caches(engine)
    inputs = replace(inputs, shared={**inputs.shared, "num_inference_steps": STEPS})
    record = engine.record(inputs)
    rounding = TOLERANCE.get(engine.denoiser.dtype, 0.05)
    finite = record.final[torch.isfinite(record.final)].abs()
    scale = (float(finite.max()) if finite.numel() else 0.0) or 1.0
    seen = _first_call(engine, inputs, record.geometry)
    found = [
        ("an empty plan equals the bare pipeline", _gap(record.final, seen.final) / scale, 0.0),
        ("blocks run in the declared order", float(seen.misplaced), 0.0),
        ("one latent frame is its slice of tokens", float(_wrong_tokens(engine, inputs, record.geometry, seen)), 0.0),
    ]
    # A wrong address or grid makes the rest fail with errors of their own, which would hide the cause.
    if not any(difference for _, difference, _ in found[1:]):
        found += [(name, gap / scale, limit) for name, gap, limit in _forks(engine, record, rounding)]
    return [Control(name=name, difference=difference, limit=limit) for name, difference, limit in found]


def require_controls(engine: Engine, inputs: RunInputs) -> None:
    """Run the controls and refuse the pipeline if one fails.

    Raises
    ------
    ControlError : naming every failing control with its figures.
    """
    failed = [c for c in run_controls(engine, inputs) if not c.passed]
    if failed:
        figures = "; ".join(f"{c.name}: off by {c.difference:.3g}, allowed {c.limit:.3g}" for c in failed)
        raise ControlError(
            f"controls fail on this {type(engine.pipe).__name__} as family {engine.family.name}: {figures}. "
            "Its effects cannot be trusted; check that the family fits and that no step cache is active."
        )


def refuse_step_caches(engine: Engine) -> None:
    """Refuse a pipeline whose denoiser skips computation between steps, so that sites would not be reached.

    Raises
    ------
    ControlError : naming the cache.
    """
    for name in engine.family.denoisers:
        denoiser = getattr(engine.pipe, name, None)
        for module in denoiser.modules() if denoiser is not None else ():
            hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
            active = [hook for hook in hooks if any(part in hook for part in STEP_CACHES)]
            if active:
                raise ControlError(
                    f"step cache {active[0]!r} is active on {name}: it skips blocks, so their sites would not be "
                    f"reached. Call pipe.{name}.disable_cache() before measuring."
                )


def _forks(engine: Engine, record: Record, rounding: float) -> Iterator[tuple[str, float, float]]:
    """Yield the controls that fork a record: name, difference, limit."""
    geometry = record.geometry
    last, clean = geometry.blocks - 1, record.final[record.row("clean")]

    def gap(*rows: Intervention) -> float:
        # No more at once than the runs of a record: a model that fills its device must be provable.
        size = len(record.inputs.names)
        parts = [engine.fork(record, rows[k : k + size]).final for k in range(0, len(rows), size)]
        return max(_gap(row, clean) for part in parts for row in part)

    yield "a self-patch is an identity", gap(*_self_patches(geometry)), rounding
    yield "a restored last residual restores the run", gap(_Drowned(step=1, layer=last, direction="self")), rounding
    late = engine.fork(record, [Patch(step=1, layer=last, component="residual")], keep_x0_hat=True)
    before = _gap(late.x0_hat[0][0], record.x0_hat[0][record.row("corrupted")])
    # Replayed steps are copies; computed again in a batch of another size they are equal to rounding.
    yield "nothing changes before the intervened step", before, 0.0 if engine.replays else rounding
    for component in geometry.head_components:
        block = next(b for b in range(geometry.blocks) if component in geometry.components_of(b))
        whole = engine.fork(record, [Patch(step=1, layer=block, component=component)]).final
        heads = engine.fork(record, [_EveryHead(step=1, layer=block, component=component)]).final
        yield f"all heads of {component} are {component}", _gap(whole, heads), rounding
    for component in geometry.knockout:
        block = next(b for b in range(geometry.blocks) if component in geometry.knockout_of(b))
        yield f"cutting no edge of {component} changes nothing", gap(_NoCut(layer=block, component=component)), rounding


def _self_patches(geometry: Geometry) -> list[Patch]:
    """Return a self-patch for every component that any block has, in the middlemost block that has it."""
    patches = []
    streams: dict[Stream, tuple[Component, ...]] = {"video": geometry.components, "text": geometry.text_components}
    for stream, components in streams.items():
        for component in components:
            blocks = [b for b in range(geometry.blocks) if component in geometry.components_of(b, stream)]
            middle = blocks[len(blocks) // 2]
            at: dict[str, Any] = {"direction": "self", "step": 1, "layer": middle, "component": component}
            patches.append(Patch(**at, stream=stream))
            if stream == "video" and component in geometry.head_components:
                patches.append(Patch(**at, head=geometry.heads - 1))
    return patches


class _Drowned(Patch):
    """The first video residual drowned in noise, and the last one written from the undisturbed run."""

    def points(self, geometry: Geometry) -> tuple[Site, ...]:
        """Return both residuals in every branch."""
        blocks = dict.fromkeys((next(b for b in range(geometry.blocks) if geometry.components_of(b)), self.layer))
        return tuple(Site(self.step, b, block, "residual") for b in geometry.branches for block in blocks)

    def apply(self, point: Point, value: torch.Tensor, context: RowContext) -> torch.Tensor:
        """Add noise of the residual's own scale, or return the donor."""
        if isinstance(point, Site) and point.block == self.layer:
            return context.donors[Read(point, self.sources()[0])].to(value)
        return value + value.std() * context.noise_like(value, "control", 0)


class _EveryHead(Patch):
    """Every head of an attention patched one by one."""

    def points(self, geometry: Geometry) -> tuple[Site, ...]:
        """Return every head in every branch."""
        return tuple(
            Site(self.step, b, self.layer, self.component, head=h)
            for b in geometry.branches
            for h in range(geometry.heads)
        )


class _NoCut(Intervention):
    """A knock-out that keeps every edge: it must be served and change nothing."""

    kind: str = "no_cut"
    layer: int
    component: Component

    def points(self, geometry: Geometry) -> tuple[Point, ...]:
        """Return the attention in every branch of the last step."""
        return tuple(AttentionAt(STEPS - 1, b, self.layer, self.component) for b in geometry.branches)

    def cut(self, point: AttentionAt, geometry: Geometry) -> tuple[Edges, ...]:
        """Return a window as wide as the video."""
        return (Edges(pattern="local", window=geometry.frames),)


@dataclass(frozen=True, slots=True)
class _FirstCall:
    """What a bare run shows at its first denoiser call.

    Attributes
    ----------
    final : result of the run. video : what enters the first block, (batch, tokens, channels).
    misplaced : blocks that ran at another place than declared, ran undeclared, or did not run.
    """

    final: torch.Tensor
    video: torch.Tensor
    misplaced: int


def _first_call(engine: Engine, inputs: RunInputs, geometry: Geometry) -> _FirstCall:
    """Run the bare pipeline with plain hooks on every module of the blocks' classes."""
    denoiser = getattr(engine.pipe, geometry.denoiser(0))
    addresses = engine.family.addresses(denoiser.config)
    blocks = [denoiser.get_submodule(address.path) for address in addresses]
    # Blocks of text alone may come first.
    start = next(i for i, address in enumerate(addresses) if address.blocks.components)
    ran: list[Any] = []
    videos: list[torch.Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        ran.append(module)
        if module is blocks[start] and not videos:
            video = argument(args, kwargs, addresses[start].blocks.video_input)
            videos.append(to_rows(video, addresses[start].blocks.layout, geometry).detach().clone())

    classes = tuple({type(block) for block in blocks})
    modules = [module for module in denoiser.modules() if isinstance(module, classes)]
    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        final = engine.bare(inputs)
    finally:
        for handle in handles:
            handle.remove()
    first = ran[: len(modules)]
    misplaced = abs(len(first) - len(blocks)) + sum(a is not b for a, b in zip(first, blocks, strict=False))
    return _FirstCall(final=final, video=videos[0], misplaced=misplaced)


def _wrong_tokens(engine: Engine, inputs: RunInputs, geometry: Geometry, before: _FirstCall) -> int:
    """Count tokens that one perturbed latent frame changes though they are not its own, or leaves though they are."""
    frame = geometry.generated_frames[:2][-1]
    latents = engine.perturbed(inputs.per_run["latents"], frame, geometry)
    per_run = {**inputs.per_run, "latents": latents}
    after = _first_call(engine, replace(inputs, per_run=per_run), geometry).video
    # NaN equals NaN: a broken model is not a broken engine.
    changed = ((before.video != after) & ~(before.video.isnan() & after.isnan())).any(-1).any(0)
    n = geometry.tokens_per_frame
    own = torch.zeros_like(changed)
    own[frame * n : (frame + 1) * n] = True
    return int((changed != own).sum())


def _gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute difference; NaN equals NaN, because a broken model is not a broken engine."""
    gap = (found.float() - expected.float()).abs()
    both = found.isnan() & expected.isnan()
    return float(gap.masked_fill(both, 0.0).nan_to_num(nan=float("inf")).max())
