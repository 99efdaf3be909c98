"""Short bare runs of an unknown pipeline, watched with plain hooks: the loop, its denoiser calls, inputs of modules."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from interventions.solver import SolverTap

NEEDED = ("latents", "num_inference_steps", "output_type", "return_dict")
"""Arguments of a pipeline's call that the engine uses."""


class InferenceError(ValueError):
    """A pipeline whose adapter cannot be inferred; the message says what was seen and what to do."""


class _SeenEnough(BaseException):
    """Ends a run as soon as what is looked for has been seen; no pipeline may catch it."""


@dataclass(slots=True)
class Attended:
    """One attention call: where, what it read, and what it gave, (batch, heads, tokens, channels)."""

    path: str
    query: torch.Tensor
    key: torch.Tensor
    result: torch.Tensor


class Attentions(TorchFunctionMode):
    """Watch every ``scaled_dot_product_attention``.

    Parameters
    ----------
    local : give each query itself back instead of what it attends to, so that no token depends on another.
    """

    def __init__(self, local: bool) -> None:
        super().__init__()
        self.local = local
        self.seen: list[Attended] = []
        self.inside: list[str] = [""]
        """Modules that are running, outermost first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function; attention is noted, or replaced."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        query, key, width = given["query"], given["key"], given["value"].shape[-1]
        if not self.local:
            result = func(*args, **kwargs)
        else:
            result = query.clone() if query.shape[-1] == width else query.new_zeros(*query.shape[:-1], width)
        self.seen.append(Attended(self.inside[-1], query.clone(), key.clone(), result.clone()))
        return result


@dataclass(slots=True)
class Call:
    """One denoiser call: attribute of the pipeline, arguments, and the solver steps taken before it."""

    denoiser: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    step: int


@dataclass(slots=True)
class Loop:
    """What a run shows of its loop.

    Attributes
    ----------
    calls : denoiser calls in order. settings : arguments of ``set_timesteps``. timesteps : those of each step.
    stepped : what the last solver step gave. final : what the pipeline returned, None if it was stopped.
    """

    calls: list[Call] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    timesteps: list[float] = field(default_factory=list)
    stepped: torch.Tensor | None = None
    final: torch.Tensor | None = None

    def of_step(self, step: int) -> list[Call]:
        """Return the calls of one step."""
        return [call for call in self.calls if call.step == step]


class Probe:
    """A pipeline and arguments of a run of it, two rows.

    Raises
    ------
    InferenceError : the pipeline lacks an argument that the engine uses, or the rows are not two.
    UnsupportedSolverError : its scheduler is not understood.
    """

    def __init__(self, pipe: Any, shared: Mapping[str, Any], per_run: Mapping[str, torch.Tensor]) -> None:
        self.pipe, self.shared, self.per_run = pipe, dict(shared), dict(per_run)
        self.signature = inspect.signature(type(pipe).__call__).parameters
        name = type(pipe).__name__
        if missing := [n for n in NEEDED if n not in self.signature]:
            raise InferenceError(
                f"{name}.__call__ takes no {', '.join(missing)}, which the engine uses: add them to it"
            )
        rows = {key: len(value) for key, value in self.per_run.items()}
        if "latents" not in rows or set(rows.values()) != {2}:
            raise InferenceError(f"per-run tensors have {rows} rows: give latents and prompts with 2 rows each")

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Modules that the pipeline holds, by attribute."""
        return {name: value for name, value in vars(self.pipe).items() if isinstance(value, nn.Module)}

    def loop(
        self,
        *,
        steps: int = 2,
        changed: Mapping[str, torch.Tensor] | None = None,
        shared: Mapping[str, Any] | None = None,
        first_step_only: bool = False,
    ) -> Loop:
        """Run the pipeline and watch its loop; ``changed`` and ``shared`` replace arguments."""
        loop, taken = Loop(), 0

        def called(name: str) -> Any:
            def note(module: nn.Module, args: Any, kwargs: Any) -> None:
                if loop.settings:
                    loop.calls.append(Call(name, copied(args), copied(kwargs), taken))

            return note

        def predicting(given: Any) -> Any:
            if first_step_only:
                raise _SeenEnough
            return given

        def stepped(latents: torch.Tensor) -> torch.Tensor:
            nonlocal taken
            taken += 1
            loop.stepped = latents.clone()
            return latents

        hooks = [m.register_forward_pre_hook(called(n), with_kwargs=True) for n, m in self.modules.items()]
        with _solver_watched(self.pipe.scheduler, loop.settings, predicting, stepped), removed(hooks):
            loop.final = self._run(steps, changed or {}, shared or {})
        loop.timesteps = [float(t) for t in self.pipe.scheduler.timesteps]
        return loop

    def entering(
        self, modules: Sequence[nn.Module], changed: Mapping[str, torch.Tensor] | None = None, *, local: bool = False
    ) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Return the arguments of each module at its first call; the run ends there.

        ``local`` takes every exchange between tokens out of the attentions, so that a token only depends on itself.
        """
        found: dict[int, Any] = {}

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            found.setdefault(id(module), (copied(args), copied(kwargs)))
            if len(found) == len(modules):
                raise _SeenEnough

        hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in modules]
        with removed(hooks), Attentions(local=True) if local else nullmode():
            self._run(2, changed or {}, {})
        return [found[id(m)] for m in modules]

    def _run(self, steps: int, changed: Mapping[str, Any], shared: Mapping[str, Any]) -> torch.Tensor | None:
        # Kandinsky writes into the latents that it is given.
        tensors = {name: value.clone() for name, value in {**self.per_run, **changed}.items()}
        given = {**self.shared, **shared, "num_inference_steps": steps, "output_type": "latent", "return_dict": False}
        self.pipe.set_progress_bar_config(disable=True)
        # Two runs may differ in nothing but what is changed on purpose.
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            try:
                final: torch.Tensor = self.pipe(**given, **tensors)[0]
            except _SeenEnough:
                return None
        return final


@contextmanager
def nullmode() -> Iterator[None]:
    """Change nothing."""
    yield


@contextmanager
def removed(hooks: Iterable[Any]) -> Iterator[None]:
    """Take hooks off at the end."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _solver_watched(scheduler: Any, settings: dict[str, Any], predicting: Any, stepped: Any) -> Iterator[None]:
    """Watch the steps of a scheduler, and keep the arguments that its ``set_timesteps`` is given."""
    original = type(scheduler).set_timesteps
    signature = inspect.signature(original)

    def note(owner: Any, *args: Any, **kwargs: Any) -> None:
        if owner is scheduler:
            settings.update(signature.bind(owner, *args, **kwargs).arguments)
            settings.pop("self")
        original(owner, *args, **kwargs)

    note.__signature__ = signature  # type: ignore[attr-defined]
    scheduler.set_timesteps = MethodType(note, scheduler)
    tap = None
    try:
        tap = SolverTap(scheduler, predicting, stepped)
        yield
    finally:
        if tap is not None:
            tap.release()
        else:
            del scheduler.set_timesteps


def copied(value: Any) -> Any:
    """Copy every tensor in nested arguments."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: copied(part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(copied(part) for part in value)
    return value


def noise_like(value: torch.Tensor, seed: int = 7) -> torch.Tensor:
    """Draw noise that no normalisation takes away."""
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(value)


def named(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[tuple[int, str], Any]:
    """Return the arguments of a call by (position, name), the position -1 where it was given by name."""
    names = list(inspect.signature(module.forward).parameters)
    found = {(i, names[i]): value for i, value in enumerate(args) if i < len(names)}
    return found | {(names.index(name) if name in names else -1, name): value for name, value in kwargs.items()}
