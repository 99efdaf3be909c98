"""One forward of a block computed alone: what enters and leaves each of its modules, and every attention call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from interventions.probing.run import Attended, Attentions, copied, noise_like, removed

Where = tuple[int, str]
"""An argument by position and name."""


@dataclass(slots=True)
class Visit:
    """One module's forward: what entered and left it, and when."""

    entered: torch.Tensor | None
    began: int
    left: Any = None
    ended: int = 0
    times: int = 1


@dataclass(slots=True)
class Forward:
    """One forward of a block: its modules by path, and its attention calls."""

    visits: dict[str, Visit]
    attended: list[Attended]


@dataclass(slots=True)
class Moved:
    """Token positions that one moved token moves: everywhere in a block, as functions of two forwards."""

    token: int
    before: Forward
    after: Forward

    def at(self, offset: int) -> frozenset[int]:
        """Return the place of the moved token alone, behind some others."""
        return frozenset({self.token + offset})

    def entering(self, path: str) -> frozenset[int] | None:
        """Return what moves in a module's first input."""
        return moved(self.before.visits[path].entered, self.after.visits[path].entered)

    def leaving(self, path: str, index: int | None) -> frozenset[int] | None:
        """Return what moves in a module's output."""
        a, b = (f.visits[path].left for f in (self.before, self.after))
        return moved(a, b) if index is None else moved(a[index], b[index])

    def attention(self, call: int, what: Literal["query", "key"]) -> frozenset[int]:
        """Return what moves in the queries or keys of an attention call."""
        a, b = (getattr(f.attended[call], what) for f in (self.before, self.after))
        return frozenset((a != b).any(-1).any(1).any(0).nonzero().flatten().tolist())


def moved(a: Any, b: Any) -> frozenset[int] | None:
    """Return the tokens in which two tensors (batch, tokens, channels) differ; None if they hold no tokens."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.ndim < 3 or a.shape != b.shape:
        return None
    return frozenset((a != b).flatten(1, -2).any(-1).any(0).nonzero().flatten().tolist())


def forward(
    block: nn.Module,
    given: tuple[Sequence[Any], Mapping[str, Any]],
    *,
    local: bool,
    moving: tuple[Where, int] | None = None,
    silent: Collection[str] = (),
) -> Forward:
    """Compute a block on its arguments, watched.

    Parameters
    ----------
    local : take the exchange between tokens out of its attentions. silent : modules whose outputs are then zeroed.
    moving : an argument, and the token of it that is moved by noise.
    """
    args, kwargs = copied(given[0]), copied(given[1])
    if moving is not None:
        (position, name), token = moving
        value = kwargs[name] if name in kwargs else args[position]
        value[:, token] += noise_like(value[:, token])
    visits: dict[str, Visit] = {}
    clock = iter(range(10**9))
    attentions = Attentions(local)

    def entering(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            first = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
            again = visits[path].times + 1 if path in visits else 1
            visits[path] = Visit(copied(first), next(clock), times=again)
            attentions.inside.append(path)

        return note

    def leaving(path: str) -> Callable[..., Any]:
        def note(module: nn.Module, args: Any, output: Any) -> Any:
            attentions.inside.pop()
            visits[path].left, visits[path].ended = copied(output), next(clock)
            return _silenced(output) if local and path in silent else None

        return note

    modules = list(block.named_modules())
    hooks = [m.register_forward_pre_hook(entering(p), with_kwargs=True) for p, m in modules]
    hooks += [m.register_forward_hook(leaving(p)) for p, m in modules]
    with removed(hooks), attentions, torch.no_grad():
        block(*args, **kwargs)
    return Forward(visits, attentions.seen)


def _silenced(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return torch.zeros_like(output)
    return type(output)(_silenced(part) for part in output) if isinstance(output, (tuple, list)) else output
