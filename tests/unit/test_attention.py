"""Knocked-out attention against the dense boolean mask it stands for, and the tap that puts it into a running model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import greenlet
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_processor import MochiAttention, MochiAttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from interventions.attention import AttentionTap, Edges, KnockoutError, Layout, knocked_out, union

FRAMES, TOKENS, TEXT, HEADS, DIM = 5, 3, 4, 3, 8
PATTERNS = (
    Edges("causal"),
    Edges("anti_causal"),
    Edges("local", window=1),
    Edges("from_frames", frames=(1, 4)),
    Edges("to_frames", frames=(0, 2)),
    Edges("between", frames=(0, 1), queries=(1, 3)),
    Edges("between", frames=(0, 1, 2, 3, 4), queries=(2,)),
    Edges("text"),
)
ORDERS = ("video", "video_text", "text_video", "cross")
CAUSAL = Edges("causal")


def reads(edge: Edges, query: int, key: int) -> bool:
    """The definition of every pattern, edge by edge."""
    named = key in edge.frames
    return {
        "causal": key <= query,
        "anti_causal": key >= query,
        "local": abs(query - key) <= edge.window,
        "from_frames": not named or query == key,
        "to_frames": query not in edge.frames or query == key,
        "between": not (query in edge.queries and named),
        "text": True,
    }[edge.pattern]


def frame_of(token: int, tokens: int, layout: Layout) -> int | None:
    """The frame of a token of a self-attention sequence, None for text."""
    at = token - (tokens - layout.frames * layout.tokens_per_frame if layout.order == "text_video" else 0)
    frame = at // layout.tokens_per_frame
    return frame if 0 <= frame < layout.frames else None


def dense_mask(edges: list[Edges], layout: Layout, queries: int, keys: int, heads: int = HEADS) -> torch.Tensor:
    """True where a query token may read a key token: (1, heads, queries, keys), written from the definitions."""
    mask = torch.ones(1, heads, queries, keys, dtype=torch.bool)
    for head, i, j in itertools.product(range(heads), range(queries), range(keys)):
        query = frame_of(i, queries, layout)
        key = None if layout.order == "cross" else frame_of(j, keys, layout)
        for edge in edges:
            if query is None or (edge.heads is not None and head not in edge.heads):
                continue
            mask[0, head, i, j] &= edge.pattern != "text" if key is None else reads(edge, query, key)
    return mask


def call(order: str, batch: int = 2, frames: int = FRAMES, tokens: int = TOKENS, text: int = TEXT) -> Any:
    """Random q, k, v of one attention call and its layout."""
    video = frames * tokens
    queries = video + (text if order in ("video_text", "text_video") else 0)
    keys = text if order == "cross" else queries
    made = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(batch, n, HEADS, DIM, generator=made).transpose(1, 2) for n in (queries, keys, keys))
    return q, k, v, Layout(frames, tokens, order)  # type: ignore[arg-type]


def incoming(kind: str, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """A mask of the kinds diffusers passes: none, padding, expanded padding, a bias of every pair."""
    made = torch.Generator().manual_seed(8)
    if kind == "none":
        return None
    if kind == "bias":
        return torch.randn(1, HEADS, q.size(2), k.size(2), generator=made)
    padding = torch.rand(q.size(0), 1, 1, k.size(2), generator=made) > 0.3
    return padding if kind == "padding" else padding.expand(-1, 1, q.size(2), -1)


def under(mask: torch.Tensor, attn_mask: torch.Tensor | None) -> torch.Tensor:
    """Both masks as one."""
    if attn_mask is None:
        return mask
    if attn_mask.dtype == torch.bool:
        return mask & attn_mask
    return attn_mask.masked_fill(~mask, -torch.inf)


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mask", ["none", "padding", "expanded", "bias"])
@pytest.mark.parametrize("heads", [None, (1,), (0, 2)], ids=["all", "one", "apart"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda e: e.pattern)
def test_equals_the_dense_mask(pattern: Edges, order: str, heads: tuple[int, ...] | None, mask: str) -> None:
    edge = Edges(pattern.pattern, pattern.window, pattern.frames, pattern.queries, heads)
    q, k, v, layout = call(order)
    attn_mask = incoming(mask, q, k)
    dense = under(dense_mask([edge], layout, q.size(2), k.size(2)), attn_mask)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, scale=0.4)
    assert_same(knocked_out(q, k, v, edge, layout, attn_mask=attn_mask, scale=0.4), wanted)


def edge_of(frames: int) -> st.SearchStrategy[Edges]:
    some = st.lists(st.integers(0, frames - 1), min_size=1, max_size=frames, unique=True).map(tuple)
    heads = st.none() | st.lists(st.integers(0, HEADS - 1), min_size=1, unique=True).map(lambda h: tuple(sorted(h)))
    return st.one_of(
        st.builds(Edges, st.sampled_from(["causal", "anti_causal", "text"]), heads=heads),
        st.builds(Edges, st.just("local"), window=st.integers(0, frames), heads=heads),
        st.builds(Edges, st.sampled_from(["from_frames", "to_frames"]), frames=some, heads=heads),
        st.builds(Edges, st.just("between"), frames=some, queries=some, heads=heads),
    )


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_any_union_equals_the_dense_mask(data: st.DataObject) -> None:
    frames, tokens, text = (data.draw(st.integers(1, n)) for n in (7, 3, 3))
    edges = data.draw(st.lists(edge_of(frames), max_size=3))
    q, k, v, layout = call(data.draw(st.sampled_from(ORDERS)), 1, frames, tokens, text)
    dense = dense_mask(edges, layout, q.size(2), k.size(2))
    assert_same(knocked_out(q, k, v, edges, layout), F.scaled_dot_product_attention(q, k, v, attn_mask=dense))


def test_union_groups_heads_and_query_frames() -> None:
    edges = [Edges("from_frames", frames=(1,)), Edges("text", heads=(0,))]
    found = union(edges, frames=3, heads=3)
    assert [(r.heads, r.text) for r in found] == [((0,), False), ((1, 2), True)]
    assert found[1].groups() == [((0, 2), (0, 2)), ((1,), (0, 1, 2))]


@pytest.mark.parametrize("order", ORDERS)
def test_removing_nothing_is_the_very_same_call(order: str) -> None:
    q, k, v, layout = call(order)
    nothing = [Edges("local", window=FRAMES)] + ([Edges("text")] if order == "video" else [])
    assert torch.equal(knocked_out(q, k, v, nothing, layout), F.scaled_dot_product_attention(q, k, v))
    assert torch.equal(
        knocked_out(q, k, v, [], layout, is_causal=order == "video"),
        F.scaled_dot_product_attention(q, k, v, is_causal=order == "video"),
    )


def test_query_without_a_key_gives_zero() -> None:
    q, k, v, layout = call("cross")
    assert not knocked_out(q, k, v, Edges("text"), layout).any()


def test_text_queries_keep_everything() -> None:
    q, k, v, layout = call("video_text")
    found = knocked_out(q, k, v, [Edges("text"), Edges("local", window=0)], layout)
    text = slice(FRAMES * TOKENS, None)
    assert_same(found[:, :, text], F.scaled_dot_product_attention(q, k, v)[:, :, text])


@pytest.mark.parametrize("heads", [None, (0, 3)])
def test_grouped_key_heads(heads: tuple[int, ...] | None) -> None:
    made = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, n, FRAMES * TOKENS, DIM, generator=made) for n in (4, 2, 2))
    layout, edge = Layout(FRAMES, TOKENS), Edges("causal", heads=heads)
    dense = dense_mask([edge], layout, q.size(2), k.size(2), heads=4)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True)
    assert_same(knocked_out(q, k, v, edge, layout, enable_gqa=True), wanted)


def test_gradients_equal_those_of_the_dense_mask() -> None:
    q, k, v, layout = call("video_text")
    dense = dense_mask([CAUSAL], layout, q.size(2), k.size(2))
    found = [x.clone().requires_grad_() for x in (q, k, v)]
    wanted = [x.clone().requires_grad_() for x in (q, k, v)]
    with AttentionTap() as tap:
        tap.arm({0: [CAUSAL], 1: [CAUSAL]}, 2, layout)
        F.scaled_dot_product_attention(*found).square().sum().backward()
        tap.disarm()
    F.scaled_dot_product_attention(*wanted, attn_mask=dense).square().sum().backward()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=0)


class LargestStorage(TorchDispatchMode):
    """Bytes of the largest storage behind a tensor that any operation returned."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return result


def largest(work: Callable[[], Any]) -> int:
    with torch.no_grad(), LargestStorage() as seen:
        work()
    return seen.bytes


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda e: e.pattern)
def test_never_holds_a_tensor_of_all_token_pairs(pattern: Edges) -> None:
    tokens = 600
    q = torch.randn(1, 1, FRAMES * tokens, 8)
    layout, pairs = Layout(FRAMES, tokens), q.size(2) ** 2  # bytes of a boolean mask
    padding = torch.ones(1, 1, 1, q.size(2), dtype=torch.bool).expand(1, 1, q.size(2), q.size(2))
    assert largest(lambda: knocked_out(q, q, q, pattern, layout)) <= q.nbytes

    def through_the_tap() -> None:
        with AttentionTap() as tap:
            tap.arm({0: [pattern]}, 1, layout)
            F.scaled_dot_product_attention(q, q, q)
            tap.disarm()

    assert largest(through_the_tap) <= q.nbytes
    if pattern.pattern != "text":  # without text it is the ordinary call, which writes expanded masks out
        assert largest(lambda: knocked_out(q, q, q, pattern, layout, attn_mask=padding)) <= q.nbytes
    # The measure itself sees a mask where there is one.
    assert largest(lambda: torch.ones(q.size(2), q.size(2), dtype=torch.bool)) >= pairs


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pattern": "diagonal"}, "unknown pattern 'diagonal'"),
        ({"pattern": "local", "window": -1}, "window=-1"),
        ({"pattern": "from_frames"}, "'from_frames' needs frames"),
        ({"pattern": "between", "frames": (1,)}, "'between' needs queries"),
        ({"pattern": "causal", "frames": (1,)}, r"'causal' does not use frames, which is \(1,\)"),
        ({"pattern": "to_frames", "frames": (-1,)}, r"frames=\(-1,\) has a negative index"),
        ({"pattern": "causal", "heads": ()}, r"heads=\(\) would remove no edge"),
    ],
)
def test_unclear_edges_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Edges(**given)


def test_indices_outside_the_call_are_refused() -> None:
    q, k, v, layout = call("video")
    with pytest.raises(ValueError, match=r"frames=\(5,\) of 'to_frames': there are 5 latent frames"):
        knocked_out(q, k, v, Edges("to_frames", frames=(5,)), layout)
    with pytest.raises(ValueError, match=r"heads=\(3,\) of 'causal': this attention has 3 heads"):
        knocked_out(q, k, v, Edges("causal", heads=(3,)), layout)
    with pytest.raises(ValueError, match="15 queries and 15 keys do not fit"):
        knocked_out(q, k, v, CAUSAL, Layout(FRAMES, TOKENS + 1))
    with pytest.raises(ValueError, match="is_causal=True orders single tokens"):
        knocked_out(q, k, v, CAUSAL, layout, is_causal=True)
    with pytest.raises(ValueError, match="unknown order 'text'"):
        Layout(1, 1, "text")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be at least 1"):
        Layout(0, 1)


@pytest.mark.parametrize("order", ORDERS)
def test_rows_and_heads_do_not_leak(order: str) -> None:
    q, k, v, layout = call(order, batch=4)
    ordinary = F.scaled_dot_product_attention(q, k, v)
    plan = {1: [Edges("text"), CAUSAL], 3: [Edges("local", window=0, heads=(0, 2)), Edges("text", heads=(2,))]}
    with AttentionTap() as tap:
        tap.arm(plan, rows=4, layout=layout)
        found = F.scaled_dot_product_attention(query=q, key=k, value=v)
        assert tap.disarm() == 2
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), ordinary)
    assert torch.equal(found[[0, 2]], ordinary[[0, 2]])
    assert torch.equal(found[3, 1], ordinary[3, 1])
    for row, edges in plan.items():
        dense = dense_mask(edges, layout, q.size(2), k.size(2))
        assert_same(found[row], F.scaled_dot_product_attention(q, k, v, attn_mask=dense)[row])


def test_tap_respects_the_mask_of_each_row() -> None:
    q, k, v, layout = call("video_text", batch=2)
    padding = torch.ones(2, 1, 1, k.size(2), dtype=torch.bool)
    padding[1, ..., -2:] = False
    with AttentionTap() as tap:
        tap.arm({0: [CAUSAL], 1: [CAUSAL]}, 2, layout)
        found = F.scaled_dot_product_attention(q, k, v, padding)
        tap.disarm()
    dense = dense_mask([CAUSAL], layout, q.size(2), k.size(2)) & padding
    assert_same(found, F.scaled_dot_product_attention(q, k, v, attn_mask=dense))


def test_rows_that_fold_space_into_the_batch() -> None:
    """Latte's temporal blocks: batch of rows * height * width, one token per frame."""
    fold = 6
    q, k, v, _ = call("video", batch=2 * fold, tokens=1)
    layout = Layout(FRAMES, 1, rows_fold=fold)
    ordinary = F.scaled_dot_product_attention(q, k, v)
    with AttentionTap() as tap:
        tap.arm({1: [CAUSAL]}, 2, layout)
        found = F.scaled_dot_product_attention(q, k, v)
        assert tap.disarm() == 1
    assert torch.equal(found[:fold], ordinary[:fold])
    assert_same(found[fold:], F.scaled_dot_product_attention(q, k, v, is_causal=True)[fold:])


def test_calls_that_do_not_fit_pass() -> None:
    """Image keys next to text keys (Wan image-to-video): only the call with the text's length is text."""
    q, k, v, _ = call("cross")
    image = torch.randn(2, HEADS, 2, DIM)
    ordinary = F.scaled_dot_product_attention(q, image, image)
    layout = Layout(FRAMES, TOKENS, "cross", text_tokens=TEXT)
    with AttentionTap() as tap:
        tap.arm({0: [Edges("text")], 1: [Edges("text")]}, 2, layout)
        assert torch.equal(F.scaled_dot_product_attention(q, image, image), ordinary)
        assert not F.scaled_dot_product_attention(q, k, v).any()
        assert tap.disarm() == 2


def test_unserved_row_is_an_error() -> None:
    q, k, v, layout = call("video")
    with AttentionTap() as tap:
        tap.arm({0: [CAUSAL]}, 2, layout)
        F.softplus(q)
        with pytest.raises(
            KnockoutError, match=r"rows \[0\] .* does not go through scaled_dot_product_attention .*no call"
        ):
            tap.disarm()
        tap.arm({0: [CAUSAL], 1: [CAUSAL]}, 2, layout)
        F.scaled_dot_product_attention(q[:1], k[:1], v[:1])
        with pytest.raises(KnockoutError, match=r"rows \[1\]"):
            tap.disarm()
        tap.arm({0: [CAUSAL]}, 2, Layout(FRAMES, TOKENS + 1))
        F.scaled_dot_product_attention(q, k, v)
        with pytest.raises(KnockoutError, match=r"did not fit: 2 x \(15 queries, 15 keys\)"):
            tap.disarm()
        assert tap.disarm() == 0


def test_leaving_the_tap_armed_is_an_error() -> None:
    layout = Layout(FRAMES, TOKENS)
    with pytest.raises(KnockoutError, match="did not take place"), AttentionTap() as tap:
        tap.arm({0: [CAUSAL]}, 1, layout)

    def failing_model() -> None:
        with tap:
            tap.arm({0: [CAUSAL]}, 1, layout)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing_model()
    assert tap.disarm() == 0


def test_arming_checks_the_plan() -> None:
    layout = Layout(FRAMES, TOKENS)
    tap = AttentionTap()
    with pytest.raises(ValueError, match=r"rows \[2\] of the plan: the batch has rows 0 to 1"):
        tap.arm({2: [CAUSAL]}, 2, layout)
    with pytest.raises(ValueError, match="there are 5 latent frames"):
        tap.arm({0: [Edges("to_frames", frames=(7,))]}, 2, layout)
    tap.arm({0: []}, 2, layout)
    with pytest.raises(ValueError, match="armed already"):
        tap.arm({}, 2, layout)
    assert tap.disarm() == 0


def test_greenlets_share_the_tap() -> None:
    """nnsight runs the model in one greenlet, and arms and disarms from another."""
    q, k, v, layout = call("video", batch=1)
    dense = dense_mask([CAUSAL], layout, q.size(2), k.size(2))
    results = []

    def model() -> None:
        for _ in range(2):
            director.switch()
            results.append(F.scaled_dot_product_attention(q, k, v))
            director.switch()

    director = greenlet.getcurrent()
    with AttentionTap() as tap:
        worker = greenlet.greenlet(model)
        worker.switch()
        tap.arm({0: [CAUSAL]}, 1, layout)
        worker.switch()
        assert tap.disarm() == 1
        worker.switch()
        worker.switch()
    assert_same(results[0], F.scaled_dot_product_attention(q, k, v, attn_mask=dense))
    assert torch.equal(results[1], F.scaled_dot_product_attention(q, k, v))


def test_wan_self_attention_under_the_tap_equals_an_explicit_mask() -> None:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8,
        ffn_dim=16, num_layers=2, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    given = {
        "hidden_states": torch.randn(2, 4, FRAMES, 4, 6),
        "timestep": torch.tensor([500, 500]),
        "encoder_hidden_states": torch.randn(2, TEXT, 8),
        "return_dict": False,
    }
    layout = Layout(FRAMES, 6)
    length, site = FRAMES * 6, model.blocks[1].attn1
    edges = [CAUSAL, Edges("from_frames", frames=(1,), heads=(0,))]
    dense = dense_mask(edges, layout, length, length, heads=2).expand(2, -1, -1, -1).clone()
    dense[0] = True
    with torch.no_grad():
        ordinary = model(**given)[0]
        masked = site.register_forward_pre_hook(lambda _, args: (*args[:2], dense, *args[3:]))
        wanted = model(**given)[0]
        masked.remove()
        with AttentionTap() as tap:
            site.register_forward_pre_hook(lambda *_: tap.arm({1: edges}, 2, layout))
            site.register_forward_hook(lambda *_: served.append(tap.disarm()))
            served: list[int] = []
            found = model(**given)[0]
    assert served == [1]
    assert torch.equal(found[0], ordinary[0])
    assert (found[1] - ordinary[1]).abs().max() > 1e-4
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=0)


def test_mochi_serves_row_by_row() -> None:
    """Its processor calls attention once per row, each with its own number of text tokens."""
    torch.manual_seed(0)
    attention = MochiAttention(
        query_dim=16, added_kv_proj_dim=8, processor=MochiAttnProcessor2_0(), heads=HEADS, dim_head=4
    ).eval()
    video, text = torch.randn(3, FRAMES * TOKENS, 16), torch.randn(3, TEXT, 8)
    valid = torch.arange(TEXT)[None] < torch.tensor([[4], [2], [3]])
    layout = Layout(FRAMES, TOKENS, "video_text")

    def run(rows: slice, plan: dict[int, list[Edges]]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad(), AttentionTap() as tap:
            tap.arm(plan, valid[rows].size(0), layout)
            found = attention(video[rows], text[rows], valid[rows])
            assert tap.disarm() == len(plan)
        return found

    ordinary, edited = run(slice(None), {}), run(slice(None), {1: [CAUSAL]})
    alone = run(slice(1, 2), {0: [CAUSAL]})
    for all_rows, before, one in zip(edited, ordinary, alone, strict=True):
        assert torch.equal(all_rows[[0, 2]], before[[0, 2]])
        assert_same(all_rows[1], one[0])
    # The last frame reads every frame, so only it keeps its result.
    moved = (edited[0][1] - ordinary[0][1]).abs().amax(-1).unflatten(0, (FRAMES, TOKENS)).amax(-1)
    assert (moved[:-1] > 1e-4).all()
    assert moved[-1] == 0


def test_more_single_rows_than_armed_is_an_error() -> None:
    q, k, v, layout = call("video", batch=1)
    with AttentionTap() as tap:
        tap.arm({0: [CAUSAL], 1: [CAUSAL]}, 2, layout)
        for _ in range(2):
            F.scaled_dot_product_attention(q, k, v)
        with pytest.raises(KnockoutError, match="called for row 2, but it was armed for 2"):
            F.scaled_dot_product_attention(q, k, v)
        assert tap.disarm() == 2
