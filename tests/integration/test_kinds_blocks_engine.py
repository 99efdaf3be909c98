"""Kinds on blocks and attention edges, through the engine, against plain hooks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from interventions import kinds  # noqa: F401  (registers every kind)
from interventions.kinds.block_skip import BlockSkip
from interventions.kinds.compose import Compose
from interventions.kinds.knockout import Knockout
from tests.integration.kind_cases import (
    CLEAN,
    STEPS,
    Case,
    assert_moved,
    assert_near,
    now,
)


def plain_blocks(case: Case, cell: BlockSkip) -> torch.Tensor:
    """Run the pipeline with hooks that replace blocks of the clean run."""
    plain: set[int] = set()

    with now(case) as at, ExitStack() as stack:

        def replacing(i: int, blocks: list[Any]) -> Callable[..., Any]:
            def hook(module, args, kwargs, output):
                step, branches = at()
                rows = [case.row(b, CLEAN) for b in branches if cell.branch in (b, "both")]
                if not cell.step <= step < cell.step + cell.steps or not rows:
                    return None
                partner = cell.layer + 1 if cell.other is None else cell.other
                if cell.mode == "swap":
                    if i not in (cell.layer, partner):
                        return None
                    new = blocks[partner if i == cell.layer else cell.layer].forward(*args, **kwargs)
                elif not cell.layer <= i < cell.layer + cell.layers:
                    return None
                else:
                    new = entering(args, kwargs, output)
                    if cell.mode == "repeat":
                        new = again(module, args, kwargs, output)
                plain.add(i)
                return mixed(output, new, rows)

            return hook

        for step in range(cell.step, cell.step + cell.steps):
            blocks = case.blocks(step)
            for i, block in enumerate(blocks):
                if not block._forward_hooks:
                    handle = block.register_forward_hook(replacing(i, blocks), with_kwargs=True)
                    stack.callback(handle.remove)
        final = case.bare()
    assert plain
    return final[CLEAN]


def entering(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    video = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    if not isinstance(output, tuple):
        return video
    text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
    return video, text


def again(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    streams = output if isinstance(output, tuple) else (output,)
    for i, (name, value) in enumerate(zip(("hidden_states", "encoder_hidden_states"), streams, strict=False)):
        if name in kwargs:
            kwargs = {**kwargs, name: value}
        else:
            args = (*args[:i], value, *args[i + 1 :])
    return module.forward(*args, **kwargs)


def mixed(old: Any, new: Any, rows: list[int]) -> Any:
    if isinstance(old, tuple):
        return tuple(mixed(a, b, rows) for a, b in zip(old, new, strict=True))
    out = old.clone()
    out[rows] = new[rows]
    return out


class TestBlockSkip:
    @pytest.mark.parametrize("mode", ["skip", "repeat"])
    def test_every_block_equals_a_plain_hook(self, case, mode):
        for layer in range(case.record.geometry.blocks):
            cell = BlockSkip(mode=mode, step=2, layer=layer)
            found = case.fork(cell)[0]
            assert_near(found, plain_blocks(case, cell))
            assert_moved(found, case.record.final[CLEAN])

    @pytest.mark.parametrize("branch", ["cond", "uncond"])
    @pytest.mark.parametrize("mode", ["skip", "repeat"])
    def test_windows_and_branches_equal_a_plain_hook(self, case, mode, branch):
        cell = BlockSkip(mode=mode, step=1, steps=2, layer=0, layers=case.record.geometry.blocks, branch=branch)
        found = case.fork(cell)[0]
        assert_near(found, plain_blocks(case, cell))
        assert_moved(found, case.record.final[CLEAN])

    def test_swap_of_any_two_blocks_of_a_list_equals_a_plain_hook(self, case):
        geometry = case.record.geometry
        lists = geometry.block_lists or (0,) * geometry.blocks
        pairs = [(a, b) for a in range(geometry.blocks) for b in range(a) if lists[a] == lists[b]]
        assert pairs
        for layer, other in pairs:
            cell = BlockSkip(mode="swap", step=1, layer=layer, other=other)
            found = case.fork(cell)[0]
            assert_near(found, plain_blocks(case, cell))
            assert_moved(found, case.record.final[CLEAN])

    def test_skipping_all_blocks_leaves_a_prompt_nothing_to_say(self, case):
        """In a model that reads text in its blocks alone, both branches then agree with another prompt's."""
        if case.name == "hunyuan_video":
            pytest.skip("its prompt also enters through the pooled embedding")
        both = {"kind": "block_skip", "mode": "skip", "step": 0, "steps": STEPS, "layer": 0}
        both["layers"] = case.record.geometry.blocks
        prompt = {"kind": "prompt_swap", "step": 0, "branch": "both"}
        found = case.fork(BlockSkip(**both), Compose(parts={"a": both, "b": prompt}))
        assert_near(found[0], found[1])


def dense(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, *_: Any, keep: Any, **__: Any) -> Any:
    """Attention written out, with every pair of tokens in a mask; a query without keys gives 0."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0.0) @ v


def kept_pairs(case: Case, cell: Knockout, queries: int, keys: int, read: Callable[[int, int], bool]) -> torch.Tensor:
    """Return (queries, keys) booleans from what one frame may read of another; text sits where the model has it."""
    geometry = case.record.geometry
    n, video = geometry.tokens_per_frame, geometry.tokens
    keep = torch.ones(queries, keys, dtype=torch.bool)
    if queries != keys:
        return keep & (cell.pattern != "text")
    start = keys - video if case.name == "cogvideox" else 0
    if cell.pattern == "text":
        keep[start : start + video] = False
        keep[start : start + video, start : start + video] = True
        return keep
    frames = torch.tensor([[read(q, k) for k in range(geometry.frames)] for q in range(geometry.frames)])
    keep[start : start + video, start : start + video] = frames.repeat_interleave(n, 0).repeat_interleave(n, 1)
    return keep


def plain_knockout(case: Case, cell: Knockout, read: Callable[[int, int], bool], monkeypatch: Any) -> torch.Tensor:
    """Run the pipeline with a dense mask in the attention of the cell's blocks."""
    ordinary = F.scaled_dot_product_attention
    armed: list[list[int]] = []
    served = []
    path = {"hunyuan_video": "attn"}.get(case.name, cell.attention(case.record.geometry))

    def masked(query=None, key=None, value=None, *args, **kwargs):
        out = ordinary(query, key, value, *args, **kwargs)
        if armed:
            served.append(None)
            keep = kept_pairs(case, cell, query.shape[2], key.shape[2], read)
            kwargs.pop("enable_gqa", None)
            cut = dense(query, key, value, *args, keep=keep, **kwargs)
            heads = slice(None) if cell.head is None else cell.head
            out = out.clone()
            out[armed[0], heads] = cut[armed[0], heads]
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", masked)
    with now(case) as at, ExitStack() as stack:

        def arm(module, args):
            step, branches = at()
            rows = [case.row(b, CLEAN) for b in branches if cell.branch in (b, "both")]
            if cell.step <= step < cell.step + cell.steps and rows:
                armed.append(rows)

        for step in range(cell.step, cell.step + cell.steps):
            for block in case.blocks(step)[cell.layer : cell.layer + cell.layers]:
                module = block.get_submodule(path)
                if not module._forward_pre_hooks:
                    stack.callback(module.register_forward_pre_hook(arm).remove)
                    stack.callback(module.register_forward_hook(lambda *_: armed.clear()).remove)
        final = case.bare()
    monkeypatch.undo()
    assert served
    return final[CLEAN]


PATTERNS: dict[str, tuple[dict[str, Any], Callable[[int, int], bool]]] = {
    "causal": ({"pattern": "causal"}, lambda q, k: k <= q),
    "anti_causal": ({"pattern": "anti_causal"}, lambda q, k: k >= q),
    "local_1": ({"pattern": "local", "reach": 1}, lambda q, k: abs(q - k) <= 1),
    "local_0": ({"pattern": "local", "reach": 0, "steps": 2}, lambda q, k: q == k),
    "from_frames": ({"pattern": "from_frames", "frames": "0,2"}, lambda q, k: q == k or k not in (0, 2)),
    "from_frame": ({"pattern": "from_frames", "frame": 1}, lambda q, k: q == k or k != 1),
    "to_frames": ({"pattern": "to_frames", "frames": "2-3"}, lambda q, k: q == k or q not in (2, 3)),
    "between": (
        {"pattern": "between", "frames": "0-1", "queries": "1,4"},
        lambda q, k: not (k in (0, 1) and q in (1, 4)),
    ),
    "text": ({"pattern": "text"}, lambda q, k: True),
    "one_head": ({"pattern": "causal", "head": 1}, lambda q, k: k <= q),
    "text_one_head": ({"pattern": "text", "head": 0, "branch": "cond"}, lambda q, k: True),
    "branch": ({"pattern": "to_frames", "frames": "0", "branch": "uncond"}, lambda q, k: q == k or q != 0),
}


class TestKnockout:
    @pytest.mark.parametrize("name", PATTERNS)
    def test_equals_a_dense_mask(self, case, name, monkeypatch):
        fields, read = PATTERNS[name]
        cell = Knockout(step=1, layer=0, layers=case.record.geometry.blocks, **fields)
        cell.check(case.record.geometry)
        found = case.fork(cell)[0]
        assert_near(found, plain_knockout(case, cell, read, monkeypatch))
        assert_moved(found, case.record.final[CLEAN], 1e-4)

    def test_text_cut_everywhere_leaves_a_prompt_nothing_to_say(self, case):
        if case.name in ("cogvideox", "hunyuan_video"):
            pytest.skip("text tokens or pooled embeddings also reach the video on other ways")
        cut = {"kind": "knockout", "pattern": "text", "step": 0, "steps": STEPS, "layer": 0}
        cut["layers"] = case.record.geometry.blocks
        prompt = {"kind": "prompt_swap", "step": 0, "branch": "both"}
        found = case.fork(Knockout(**cut), Compose(parts={"a": cut, "b": prompt}))
        assert_near(found[0], found[1])
        assert_moved(found[0], case.record.final[CLEAN])
