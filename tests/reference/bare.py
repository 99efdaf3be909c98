"""A pipeline run bare, one row at a time, with plain PyTorch hooks where something is read or changed.

No trace, no replay, no batch of rows, and no code of the engine: the pipeline's own ``__call__`` runs from the first
step to the last on one run's inputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.reference.clock import Clock, Edit, Level, clean, ticking
from tests.reference.layouts import Blocks, Layout, Spot
from tests.reference.masks import Keep, Masks, masked

Address = tuple[int, str, int, str, str, int]
"""Step, branch, block, component ("update", "residual", "attn1", ..), stream, head (-1 for all)."""
Place = tuple[int, str, int]
"""Step, branch, block."""


@dataclass(frozen=True)
class Extent:
    """How large a run is, in tokens; ``blocks`` holds each block's list and its path in the denoiser."""

    steps: int
    frames: int
    height: int
    width: int
    given: int
    branches: tuple[str, ...]
    blocks: tuple[tuple[Blocks, str], ...]
    heads: int

    @property
    def tokens(self) -> int:
        """Video tokens."""
        return self.frames * self.height * self.width


@dataclass
class Moment:
    """What is known while a run is under way.

    Attributes
    ----------
    levels : (alpha, sigma) of every level. entering : latents that entered the current step.
    x0_hat, prediction : of the latest step that was predicted, None before the first. outputs : denoiser output of
        the latest call of each branch.
    """

    levels: list[Level] = field(default_factory=list)
    entering: torch.Tensor | None = None
    x0_hat: torch.Tensor | None = None
    prediction: torch.Tensor | None = None
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)


Change = Callable[[torch.Tensor, Moment], torch.Tensor]


def _lists() -> Any:
    return defaultdict(list)


@dataclass
class Plan:
    """What is changed in one run; changes of one thing are made in the order of their list.

    Attributes
    ----------
    latents, predictions : by step, (C, F, H, W). outputs : a row of the denoiser's output by (step, branch).
    prompts : new arguments of the denoiser by (step, branch). sites : (tokens, channels) by address.
    programs : blocks that run in a block's place. cuts : by place and component, of a row's attention, the keys
        (bool, queries x keys) that a head may still read, from (head, queries, keys).
    """

    run: str = "clean"
    latents: dict[int, list[Change]] = field(default_factory=_lists)
    predictions: dict[int, list[Change]] = field(default_factory=_lists)
    outputs: dict[tuple[int, str], list[Change]] = field(default_factory=_lists)
    prompts: dict[tuple[int, str], list[Mapping[str, torch.Tensor]]] = field(default_factory=_lists)
    sites: dict[Address, list[Change]] = field(default_factory=_lists)
    programs: dict[Place, tuple[int, ...]] = field(default_factory=dict)
    cuts: dict[tuple[int, str, int, str], Keep] = field(default_factory=_lists)
    edit: Edit | None = None


@dataclass
class Trace:
    """What a run left: results and, if it was read, everything inside; one row each."""

    final: torch.Tensor
    latents: dict[int, torch.Tensor]
    x0_hat: dict[int, torch.Tensor]
    prompts: dict[str, dict[str, torch.Tensor]]
    sites: dict[Address, torch.Tensor]


def extent_of(pipe: Any, layout: Layout, shared: Mapping[str, Any], latents: torch.Tensor) -> Extent:
    """Count a run's coordinates off its inputs and the denoiser's modules."""
    _, _, *size = layout.rows(latents, shared).shape
    frames, height, width = (n // p for n, p in zip(size, layout.patch(pipe.transformer.config), strict=True))
    lists = [[(b, f"{b.path}.{i}") for i in range(len(pipe.transformer.get_submodule(b.path)))] for b in layout.blocks]
    blocks = (
        [b for turn in zip(*lists, strict=True) for b in turn] if layout.turns else [b for one in lists for b in one]
    )
    video = pipe.transformer.get_submodule(blocks[-1][1])
    first = next(m for m in video.modules() if hasattr(m, "heads") or hasattr(m, "num_heads"))
    branches = tuple(sorted(b for call in layout.calls for b in call))
    return Extent(
        steps=shared["num_inference_steps"],
        frames=frames,
        height=height,
        width=width,
        given=layout.given,
        branches=branches,
        blocks=tuple(blocks),
        heads=getattr(first, "heads", None) or first.num_heads,
    )


def run(
    pipe: Any,
    layout: Layout,
    shared: Mapping[str, Any],
    row: Mapping[str, torch.Tensor],
    plan: Plan,
    *,
    read: bool = False,
) -> Trace:
    """Run a pipeline on one row of inputs, with the changes of a plan; ``read`` keeps every activation."""
    return _Run(pipe, layout, shared, row, plan, read).go()


class _Run:
    def __init__(self, pipe: Any, layout: Layout, shared: Any, row: Any, plan: Plan, read: bool) -> None:
        self.pipe, self.layout, self.shared, self.plan, self.read = pipe, layout, shared, plan, read
        self.row = {name: value.clone() for name, value in row.items()}
        self.extent = extent_of(pipe, layout, shared, row["latents"])
        self.moment = Moment()
        self.trace = Trace(torch.empty(0), {}, {}, {}, {})
        self.order = plan.edit.order(self.extent.steps) if plan.edit else list(range(self.extent.steps))
        self.calls = -1

    @property
    def step(self) -> int:
        return self.order[self.calls // len(self.layout.calls)]

    @property
    def branches(self) -> tuple[str, ...]:
        """Branches of the denoiser call under way, in the order of its rows."""
        return self.layout.calls[self.calls % len(self.layout.calls)]

    @torch.no_grad()
    def go(self) -> Trace:
        layout = self.layout
        if changes := self.plan.latents.get(0):
            scale = layout.entry(self.pipe.scheduler)
            entering = layout.rows(self.row["latents"], self.shared)[0] * scale
            for change in changes:
                entering = change(entering, self._with_levels())
            self.row["latents"] = layout.packed((entering / scale)[None]).contiguous()
        with ExitStack() as stack:
            stack.enter_context(ticking(self.pipe.scheduler, self.plan.edit, self._before, self._after))
            for name in layout.denoisers:
                denoiser = getattr(self.pipe, name)
                stack.callback(denoiser.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                stack.callback(denoiser.register_forward_hook(self._leave).remove)
                for block in range(len(self.extent.blocks)):
                    self._dress(stack, denoiser, block)
            final = self.pipe(**self.shared, **self.row, output_type="latent", return_dict=False)[0]
        self.trace.final = layout.rows(final, self.shared, layout.returned)[0].clone()
        return self.trace

    def _with_levels(self) -> Moment:
        """Return the moment before the first step; the pipeline has not set its timesteps yet, so a dry run does."""
        if not self.moment.levels:
            dry = _Run(self.pipe, self.layout, self.shared, self.row, Plan(), False)
            dry.go()
            self.moment.levels = dry.moment.levels
        return self.moment

    # The loop: scheduler and denoiser.

    def _before(self, clock: Clock, prediction: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        assert clock.step == self.step
        moment, rows = self.moment, self.layout.rows
        moment.levels = clock.levels
        new = rows(prediction, self.shared)[0]
        for change in self.plan.predictions.get(clock.step, ()):
            new = change(new, moment)
        moment.prediction, moment.entering = new.clone(), rows(sample, self.shared)[0].clone()
        moment.x0_hat = clean(self.pipe.scheduler, moment.entering, new, clock.levels[clock.step])
        self.trace.latents[clock.step], self.trace.x0_hat[clock.step] = moment.entering, moment.x0_hat
        return self.layout.packed(new[None])

    def _after(self, clock: Clock, result: torch.Tensor) -> torch.Tensor:
        changes = self.plan.latents.get(clock.following, ())
        new = self.layout.rows(result, self.shared)[0]
        for change in changes:
            new = change(new, self.moment)
        self.trace.latents[clock.following] = new.clone()
        return self.layout.packed(new[None]) if changes else result

    def _enter(self, denoiser: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self.calls += 1
        for r, branch in enumerate(self.branches):
            names = [name for name in self.layout.prompt if kwargs.get(name) is not None]
            if self.step == 0:
                self.trace.prompts.setdefault(branch, {n: kwargs[n][r].clone() for n in names})
            for new in self.plan.prompts.get((self.step, branch), ()):
                kwargs = {**kwargs, **{n: _with_row(kwargs[n], r, new[n]) for n in names}}
        return args, kwargs

    def _leave(self, denoiser: Any, args: Any, output: Any) -> Any:
        main = output.sample if hasattr(output, "sample") else output[0]
        for r, branch in enumerate(self.branches):
            for change in self.plan.outputs.get((self.step, branch), ()):
                main = _with_row(main, r, change(main[r], self.moment))
            self.moment.outputs[branch] = main[r].clone()
        return type(output)(main) if hasattr(output, "sample") else (main, *output[1:])

    # The blocks.

    def _dress(self, stack: ExitStack, denoiser: Any, block: int) -> None:
        """Put on one block the hooks that this run needs, in the order in which values must be changed."""
        blocks, path = self.extent.blocks[block]
        module = denoiser.get_submodule(path)
        if any(b == block for _, _, b in self.plan.programs):
            stack.enter_context(self._program(denoiser, module, block))
        entering: dict[str, Any] = {}
        stack.callback(module.register_forward_pre_hook(_keep(entering, blocks), with_kwargs=True).remove)
        touched = {self._key(a[3], a[4], a[5]) for a in self.plan.sites if a[2] == block}
        for key, spot in blocks.spots.items():
            if not self.read and key not in touched:
                continue
            try:
                part = module.get_submodule(spot.path)
            except AttributeError:  # the last block of some families lacks its text half
                continue
            if not isinstance(part, torch.nn.Module):
                continue
            hook = self._hook(block, key, spot, entering)
            if spot.entering:
                handle = part.register_forward_pre_hook(lambda m, args, hook=hook: (hook(args[0]), *args[1:]))
            else:
                handle = part.register_forward_hook(lambda m, args, output, hook=hook: hook(output))
            stack.callback(handle.remove)
        for component in {c for _, _, b, c in self.plan.cuts if b == block}:
            path, kind = blocks.attention[component]
            stack.enter_context(masked(module.get_submodule(path), self._masks(block, component, kind)))

    @staticmethod
    def _key(component: str, stream: str, head: int) -> str:
        name = "block" if component in ("update", "residual") else component
        return name + (".heads" if head >= 0 else "") + (".text" if stream == "text" else "")

    def _components(self, key: str) -> list[tuple[str, str, int]]:
        """Return what one tensor holds: components with stream and head, in the order in which they are changed."""
        name, _, detail = key.partition(".")
        if detail == "heads":
            return [(name, "video", h) for h in range(self.extent.heads)]
        stream = detail or "video"
        return [(c, stream, -1) for c in (("update", "residual") if name == "block" else (name,))]

    def _hook(self, block: int, key: str, spot: Spot, entering: dict[str, Any]) -> Callable[[Any], Any]:
        fold, stream = self.extent.blocks[block][0].fold, "text" if key.endswith(".text") else "video"

        def changed(raw: Any) -> Any:
            value = raw if spot.index is None else raw[spot.index]
            tokens = self._unfolded(value.flatten(1, 3) if spot.grid else value, fold).clone()
            part = self._part(tokens, spot, stream)
            for r, branch in enumerate(self.branches):
                for component, _, head in self._components(key):
                    at = (self.step, branch, block, component, stream, head)
                    view = part[r].unflatten(-1, (self.extent.heads, -1))[:, head] if head >= 0 else part[r]
                    base = self._unfolded(entering[stream], fold)[r] if component == "update" else 0.0
                    if self.read:
                        self.trace.sites[at] = (view - base).clone()
                    for change in self.plan.sites.get(at, ()):
                        view.copy_(change((view - base).clone(), self.moment) + base)
            new = self._folded(tokens, fold).reshape(value.shape)
            if spot.index is None:
                return new
            return tuple(new if i == spot.index else other for i, other in enumerate(raw))

        return changed

    def _part(self, tokens: torch.Tensor, spot: Spot, stream: str) -> torch.Tensor:
        """Return a view of a stream's tokens and of a component's channels, (rows, tokens, channels)."""
        video = self.extent.tokens
        if spot.joint == "video":
            tokens = tokens[:, :video] if stream == "video" else tokens[:, video:]
        elif spot.joint == "text":
            tokens = tokens[:, -video:] if stream == "video" else tokens[:, :-video]
        if spot.half:
            config = self.pipe.transformer.config
            width = config.num_attention_heads * config.attention_head_dim
            tokens = tokens[..., :width] if spot.half == "a" else tokens[..., width:]
        return tokens

    def _unfolded(self, value: torch.Tensor, fold: str) -> torch.Tensor:
        """View a block's tensor as (rows, tokens, channels)."""
        e = self.extent
        if fold == "frames":
            return value.reshape(-1, e.tokens, value.shape[-1])
        if fold == "places":
            places = e.height * e.width
            return (
                value.reshape(-1, places, e.frames, value.shape[-1])
                .transpose(1, 2)
                .reshape(-1, e.tokens, value.shape[-1])
            )
        return value

    def _folded(self, tokens: torch.Tensor, fold: str) -> torch.Tensor:
        e = self.extent
        if fold == "places":
            return tokens.reshape(len(tokens), e.frames, -1, tokens.shape[-1]).transpose(1, 2).flatten(0, 1)
        return tokens.reshape(len(tokens) * e.frames, -1, tokens.shape[-1]) if fold == "frames" else tokens

    def _masks(self, block: int, component: str, kind: str) -> Masks:
        """Return what a block's attention may read, row by row of the call under way."""
        e, plan = self.extent, self.plan
        fold = {"": 1, "frames": e.frames, "places": e.height * e.width}[e.blocks[block][0].fold]

        def rows() -> list[Keep]:
            return [plan.cuts.get((self.step, branch, block, component), []) for branch in self.branches]

        return Masks(rows, fold, self.layout.cross_keys if kind == "cross" else None)

    def _one_row(self, value: torch.Tensor, other: torch.Tensor, r: int, fold: str) -> torch.Tensor:
        """Return a block's tensor with one row taken from another."""
        return self._folded(_with_row(self._unfolded(value, fold), r, self._unfolded(other, fold)[r]), fold)

    @contextmanager
    def _program(self, denoiser: Any, module: Any, block: int) -> Iterator[None]:
        """Compute a block by other blocks in the rows of some branches."""
        blocks, _ = self.extent.blocks[block]
        plain = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = plain(*args, **kwargs)
            for r, branch in enumerate(self.branches):
                program = self.plan.programs.get((self.step, branch, block))
                if program is None:
                    continue
                found = [_argument(args, kwargs, where) for where in blocks.takes.values()]
                for other in program:
                    given, named = list(args), dict(kwargs)
                    for where, value in zip(blocks.takes.values(), found, strict=True):
                        _give(given, named, where, value)
                    by = denoiser.get_submodule(self.extent.blocks[other][1])
                    result = type(by).forward(by, *given, **named)
                    found = list(result) if isinstance(result, tuple) else [result]
                own = list(output) if isinstance(output, tuple) else [output]
                mixed = [self._one_row(a, b, r, blocks.fold) for a, b in zip(own, found, strict=True)]
                output = tuple(mixed) if isinstance(output, tuple) else mixed[0]
            return output

        module.forward = forward
        try:
            yield
        finally:
            del module.forward


def _keep(entering: dict[str, Any], blocks: Blocks) -> Callable[..., None]:
    def hook(module: Any, args: Any, kwargs: Any) -> None:
        for stream, where in blocks.takes.items():
            entering[stream] = _argument(args, kwargs, where)

    return hook


def _argument(args: Any, kwargs: Mapping[str, Any], where: tuple[int, str]) -> Any:
    position, name = where
    return args[position] if len(args) > position else kwargs.get(name)


def _give(args: list[Any], kwargs: dict[str, Any], where: tuple[int, str], value: Any) -> None:
    position, name = where
    if len(args) > position:
        args[position] = value
    else:
        kwargs[name] = value


def _with_row(value: torch.Tensor, r: int, new: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value[r] = new
    return value
