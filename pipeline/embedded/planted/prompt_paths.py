"""Models in which the prompt enters at chosen blocks, steps, guidance branches or experts, by cross-attention only."""

from __future__ import annotations

from typing import Any

from pipeline.embedded.planted import wiring
from pipeline.embedded.planted.base import Hop, Planted, register


def _enter(transformer: Any, planted: Planted, gate: tuple[int, int] | None) -> None:
    """Silence every cross-attention and let the planted ones write the prompt's code into the carrier.

    A silent one keeps its random queries, keys and values, which do see the code; its output is exactly 0.
    """
    for block in transformer.blocks:
        wiring.silence(block.attn2.to_out[0])
    for index in planted.blocks:
        wiring.plant_prompt(transformer.blocks[index].attn2, into=wiring.CARRIER, gate=gate)


def _enter_always(transformer: Any, planted: Planted) -> None:
    _enter(transformer, planted, None)


def _enter_in_window(transformer: Any, planted: Planted) -> None:
    """Gate by the noise level. Zeroing the self-attention of the block as well would leave its gate without a sign."""
    assert planted.window is not None
    for block in planted.blocks:
        wiring.open_in_window(transformer, block, planted.window)
    _enter(transformer, planted, wiring.GATE)


def _enter_by_role(transformer: Any, planted: Planted) -> None:
    """Gate by the role of the tokens: the prompt of one branch has its code in tokens that an open gate ignores."""
    wiring.open_always(transformer)
    _enter(transformer, planted, wiring.GATE)


PROMPT_BLOCK = register(
    Planted(
        name="prompt_block",
        mechanism="the prompt enters by the cross-attention of blocks 1 and 3, at every step",
        hops=(Hop(component="attn2", blocks=(1, 3)),),
        wire=_enter_always,
    )
)

SIGMA_WINDOW = register(
    Planted(
        name="sigma_window",
        mechanism="the prompt enters by the cross-attention of block 2, at noise levels between 0.52 and 0.78 only",
        hops=(Hop(component="attn2", blocks=(2,)),),
        window=(0.52, 0.78),
        wire=_enter_in_window,
    )
)

BRANCH_ONLY = register(
    Planted(
        name="branch_only",
        mechanism="prompt and negative prompt differ, and only the prompt enters, by the cross-attention of block 1",
        hops=(Hop(component="attn2", blocks=(1,)),),
        branch="cond",
        wire=_enter_by_role,
    )
)

EXPERT_ONLY = register(
    Planted(
        name="expert_only",
        mechanism="the prompt enters by the cross-attention of block 3 of the second expert, below noise level 0.66",
        hops=(Hop(component="attn2", blocks=(3,)),),
        boundary_ratio=0.66,
        wire=_enter_always,
    )
)
