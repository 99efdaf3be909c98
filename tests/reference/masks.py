"""Attention with edges removed, by its formula: a dense mask and a softmax over what it leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

Keep = list[Callable[[int, int, int], torch.Tensor]]
"""Each gives the keys that a head may still read, bool (queries, keys), from head and the numbers of both."""


@dataclass(frozen=True)
class Masks:
    """What one attention may read.

    Attributes
    ----------
    rows : of the call under way, what each row may read. fold : batch entries of one row.
    keys : number of keys of the calls that are meant; None for every call.
    """

    rows: Callable[[], list[Keep]]
    fold: int
    keys: int | None


@contextmanager
def masked(attention: Any, masks: Masks) -> Iterator[None]:
    """Mask what a module's attention reads while the module runs, in calls for all rows or for one row each."""
    plain = F.scaled_dot_product_attention
    calls: list[None] = []

    def cut(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = plain(query, key, value, attn_mask, *args, **kwargs)
        if masks.keys not in (None, key.shape[2]):
            return out
        rows, fold = masks.rows(), masks.fold
        single = len(query) == 1 and len(rows) > 1
        calls.append(None)
        for r, allowed in enumerate(rows):
            if not allowed or (single and r != len(calls) - 1):
                continue
            at = slice(0, 1) if single else slice(r * fold, (r + 1) * fold)
            own = attn_mask if attn_mask is None or len(attn_mask) == 1 else attn_mask[at]
            for head in range(query.shape[1]):
                keep = torch.stack([a(head, query.shape[2], key.shape[2]) for a in allowed]).all(0)
                bias = None if own is None else own[:, min(head, own.shape[1] - 1)]
                if not keep.all():
                    out[at, head] = _softmax(query[at, head], key[at, head], value[at, head], keep, bias)
        return out

    def begin(module: Any, args: Any) -> None:
        calls.clear()
        F.scaled_dot_product_attention = cut

    def end(module: Any, args: Any, output: Any) -> None:
        F.scaled_dot_product_attention = plain

    handles = attention.register_forward_pre_hook(begin), attention.register_forward_hook(end)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain
        for handle in handles:
            handle.remove()


def _softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor, bias: Any) -> torch.Tensor:
    """Return attention, 0 where no key is left; q, k and v are (entries, tokens, channels) of one head."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
    return scores.masked_fill(~keep, -math.inf).softmax(-1).nan_to_num(0.0) @ v
