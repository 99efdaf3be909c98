"""Models in which content of one frame reaches others by the self-attention of one block, through all or some heads.

The prompt puts the content there: the cross-attention of block 0 writes its code at tokens of the source frame, gated
by a tag in the latents, into channels that only the planted self-attention reads. Both runs thus have the same
latents, tags included, and a truth table of two hops. All other self-attention has values of exactly 0 and an output
of exactly 0, so nothing at all crosses frames by it; all other cross-attention is random and reads what is equal in
both prompts.
"""

from __future__ import annotations

from typing import Any

from pipeline.embedded.planted import wiring
from pipeline.embedded.planted.base import Hop, Planted, register


def _relay(transformer: Any, planted: Planted) -> None:
    wiring.read_tags(transformer)
    enter, cross = planted.hops
    for index, block in enumerate(transformer.blocks):
        if index in enter.blocks:
            wiring.plant_prompt(block.attn2, into=wiring.RELAY, gate=wiring.FROM)
        else:
            wiring.ignore_code(block.attn2)
        if index in cross.blocks:
            wiring.plant_transport(block.attn1, cross.heads)
        else:
            wiring.silence(block.attn1.to_v)
            block.attn1.to_out[0].bias.data.zero_()


FRAME_PATH = register(
    Planted(
        name="frame_path",
        mechanism="the first frame reaches frames 2 and 4 by the self-attention of block 2, at every step",
        hops=(
            Hop(component="attn2", blocks=(0,), frames=(0,)),
            Hop(component="attn1", blocks=(2,), frames=(2, 4)),
        ),
        source_frame=0,
        wire=_relay,
    )
)

HEAD_PATH = register(
    Planted(
        name="head_path",
        mechanism="frame 1 reaches frame 3 by head 2 of the self-attention of block 3; the other heads are cut",
        hops=(
            Hop(component="attn2", blocks=(0,), frames=(1,)),
            Hop(component="attn1", blocks=(3,), frames=(3,), heads=(2,)),
        ),
        source_frame=1,
        wire=_relay,
    )
)
