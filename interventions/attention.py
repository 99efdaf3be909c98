"""Attention knock-out: remove edges between frames, or from video to text, without a mask of every token pair.

Attention with removed edges is ordinary attention over fewer keys. Query frames that may read the same keys form a
group, and each group calls ``scaled_dot_product_attention`` on its own keys alone: the softmax runs over exactly the
keys a boolean mask would leave. Keys that lie in one piece are views, so a causal or local knock-out copies none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from interventions.edges import Edges, Layout, Reads, Span, union

__all__ = ["AttentionTap", "Edges", "KnockoutError", "Layout", "Reads", "knocked_out", "union"]


class KnockoutError(RuntimeError):
    """A planned knock-out did not take place, so the run's result is not what was asked for."""


def _cut(value: torch.Tensor, dim: int, spans: Sequence[Span]) -> torch.Tensor:
    """Take spans along a dimension, as a view where they are one piece; a broadcast dimension stays as it is."""
    if value.size(dim) == 1:
        return value
    pieces = [value.narrow(dim, start, stop - start) for start, stop in spans]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _index(heads: tuple[int, ...]) -> slice | list[int]:
    """Index that takes heads, as a view where they are one piece."""
    in_one_piece = heads == tuple(range(heads[0], heads[-1] + 1))
    return slice(heads[0], heads[-1] + 1) if in_one_piece else list(heads)


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one ``scaled_dot_product_attention`` call, with the cuts that a knock-out makes."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    options: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> _Call:
        """Sort arguments given as the original function takes them."""
        if attn_mask is not None:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
            for dim in range(3):  # an expanded mask would be written out in full by the first cut that copies
                if attn_mask.stride(dim) == 0:
                    attn_mask = attn_mask.narrow(dim, 0, 1)
        return cls(query, key, value, attn_mask, {"dropout_p": dropout_p, "is_causal": is_causal, **options})

    def rows(self, start: int, stop: int) -> _Call:
        """Keep some batch entries."""
        q, k, v = (x[start:stop] for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, mask=None if self.mask is None else _cut(self.mask, 0, [(start, stop)]))

    def only(self, heads: tuple[int, ...]) -> _Call:
        """Keep some query heads, each with the key head it reads."""
        count, shared = self.q.size(1), self.q.size(1) // self.k.size(1)
        if len(heads) == count:
            return self
        index = _index(heads)
        keys = index if shared == 1 else [h // shared for h in heads]
        mask = self.mask if self.mask is None or self.mask.size(1) == 1 else self.mask[:, index]
        return _Call(self.q[:, index], self.k[:, keys], self.v[:, keys], mask, self.options)

    def mask_at(self, queries: Span, keys: Sequence[Span]) -> torch.Tensor | None:
        """Return the incoming mask of a query span on key spans."""
        if self.mask is None:
            return None
        mask = _cut(_cut(self.mask, 2, [queries]), 3, keys)
        # CUDA kernels take an added mask as it lies in memory, and want it aligned; a boolean one they convert.
        return mask.clone() if mask.is_floating_point() else mask

    def write(self, out: torch.Tensor, edges: Sequence[Edges], layout: Layout, *, changed_only: bool) -> None:
        """Write the result into ``out`` (B, H, L, D); ``changed_only`` leaves what loses no edge as it is there."""
        if self.options["is_causal"]:
            raise ValueError("is_causal=True orders single tokens: pass that order as attn_mask to knock edges out")
        keys = self.k.size(2)
        for reads in union(edges, layout.frames, self.q.size(1)):
            part, index = self.only(reads.heads), _index(reads.heads)
            for queries, kept in layout.blocks(reads, keys):
                if changed_only and kept == [(0, keys)]:
                    continue
                k, v = (_cut(x, 2, kept) if kept else x for x in (part.k, part.v))
                for start, stop in queries:
                    result: Any = 0.0  # of a query that has no key left
                    if kept:
                        q, mask = part.q[:, :, start:stop], part.mask_at((start, stop), kept)
                        result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **part.options)
                    out[:, :, start:stop][:, index] = result


def knocked_out(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    edges: Edges | Sequence[Edges],
    layout: Layout,
    *,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Return softmax attention without the removed edges: (B, H, L, D) from q, k, v of that form.

    Equal to ``scaled_dot_product_attention`` under the boolean mask of all token pairs, which is never built, and the
    very same call if no edge is removed. ``attn_mask`` (B|1, H|1, Lq|1, Lk), boolean or added, holds as well. A query
    that has no key left gives 0.

    Raises
    ------
    ValueError
        If q and k do not fit the layout, an index is out of range, or edges are removed under ``is_causal``.
    """
    edges = (edges,) if isinstance(edges, Edges) else edges
    if not layout.fits(q.size(2), k.size(2)):
        raise ValueError(f"{q.size(2)} queries and {k.size(2)} keys do not fit {layout}")
    everything = [(0, k.size(2))]
    blocks = (b for reads in union(edges, layout.frames, q.size(1)) for b in layout.blocks(reads, k.size(2)))
    given: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    if all(kept == everything for _, kept in blocks):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **given)
    out = q.new_empty(*q.shape[:3], v.size(3))
    _Call.of(q, k, v, attn_mask, **given).write(out, edges, layout, changed_only=False)
    return out


@dataclass(slots=True)
class _Armed:
    """A plan that waits for its attention call, and what has come by."""

    plan: Mapping[int, Sequence[Edges]]
    rows: int
    layout: Layout
    served: set[int] = field(default_factory=set)
    singles: int = 0
    unfit: list[str] = field(default_factory=list)

    def serve(self, ordinary: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the ordinary result with the planned rows overwritten; a call that does not fit passes unchanged."""
        call = _Call.of(*args, **kwargs)
        batch, queries, keys, fold = call.q.size(0), call.q.size(2), call.k.size(2), self.layout.rows_fold
        if batch not in (self.rows * fold, fold) or not self.layout.fits(queries, keys):
            self.unfit.append(f"{batch} x ({queries} queries, {keys} keys)")
            return ordinary
        rows = range(self.rows) if batch == self.rows * fold else self._next_row()
        # Autograd needs the ordinary result as it was.
        out = ordinary.clone() if ordinary.requires_grad else ordinary
        for at, row in enumerate(rows):
            if row in self.plan:
                part = call.rows(at * fold, (at + 1) * fold)
                part.write(out[at * fold : (at + 1) * fold], self.plan[row], self.layout, changed_only=True)
                self.served.add(row)
        return out

    def _next_row(self) -> range:
        """Return the row of a call that brings one row, as processors that loop over the batch make them."""
        row = self.singles
        if row >= self.rows:
            raise KnockoutError(f"attention was called for row {row}, but it was armed for {self.rows}: arm one module")
        self.singles += 1
        return range(row, row + 1)

    def check(self) -> int:
        """Return how many planned rows were served; raise KnockoutError if one was not."""
        missing = sorted(set(self.plan) - self.served)
        if missing:
            others = f"calls that did not fit: {', '.join(self.unfit)}" if self.unfit else "no call came by"
            raise KnockoutError(
                f"the attention knock-out of rows {missing} did not take place: this attention does not go through "
                f"scaled_dot_product_attention (linear attention, or another attention backend), or not with "
                f"{self.rows} rows of {self.layout} ({others}). Use the native backend, or leave this site out"
            )
        return len(self.served)


class AttentionTap(TorchFunctionMode):
    """Removes edges from the attention calls made while it is armed; enter it once around everything.

    ``arm`` right before the attention module runs and ``disarm`` right after it. Rows and heads without edges keep the
    ordinary result of the whole batch bit for bit. A processor that loops over the batch is followed call by call: the
    k-th call with one row serves row k. Modes belong to the thread, so greenlets of one thread share the tap.

    Raises
    ------
    KnockoutError
        From ``disarm``, and on leaving the context armed, if a planned row was never served.
    """

    def __init__(self) -> None:
        super().__init__()
        self._armed: _Armed | None = None

    def arm(self, plan: Mapping[int, Sequence[Edges]], rows: int, layout: Layout) -> None:
        """Plan the next attention: for batch rows (0 to ``rows`` - 1) the edges to remove, all that any of them names.

        Raises
        ------
        ValueError
            If the tap is armed already, or a row or frame is out of range.
        """
        if self._armed is not None:
            raise ValueError("the attention tap is armed already: disarm it after every attention module")
        if any(not 0 <= row < rows for row in plan):
            raise ValueError(f"rows {sorted(plan)} of the plan: the batch has rows 0 to {rows - 1}")
        for edge in {edge for edges in plan.values() for edge in edges}:
            edge.allowed(layout.frames)
        self._armed = _Armed({row: tuple(edges) for row, edges in plan.items() if edges}, rows, layout)

    def disarm(self) -> int:
        """Drop the plan and return the number of rows that were served."""
        armed, self._armed = self._armed, None
        return 0 if armed is None else armed.check()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._armed is None or func is not F.scaled_dot_product_attention:
            return result
        return self._armed.serve(result, *args, **(kwargs or {}))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        armed, self._armed = self._armed, None
        if armed is not None and kind is None:
            armed.check()
