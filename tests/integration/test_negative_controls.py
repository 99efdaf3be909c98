"""Negative controls are exactly zero in every family: what must change nothing changes no bit.

The rows lie as the recorded runs did, so that the same kernels run on the same batch; in another one rounding differs.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from interventions.engine import Engine
from interventions.families.family import family_of
from interventions.kinds.hidden_noise import HiddenNoise
from interventions.kinds.knockout import Knockout
from interventions.kinds.latent_swap import LatentSwap
from interventions.kinds.patch import Patch
from interventions.record import Record, RunInputs
from tests.integration.test_matrix import NAMES


@pytest.fixture(scope="module", params=NAMES)
def hosted(request) -> tuple[Engine, Record]:
    torch.set_num_threads(1)
    family = importlib.import_module(f"tests.families.{request.param}")
    pipe = family.build()
    shared, per_run = family.arguments(pipe, steps=4, guidance=True)
    engine = Engine(pipe, family_of(type(pipe).__name__))
    return engine, engine.record(RunInputs(shared=shared, per_run=per_run, names=("clean", "corrupted"), seed=(0,)))


def test_a_run_patched_with_itself_keeps_every_bit(hosted):
    engine, record = hosted
    for stream in ("video", "text"):
        for block in range(record.geometry.blocks):
            for component in record.geometry.components_of(block, stream):
                at = {"step": 1, "layer": block, "component": component, "stream": stream}
                rows = [Patch(direction="self", **at), Patch(direction="denoising", alpha=0, **at)]
                assert torch.equal(engine.fork(record, rows).final, record.final), at


def test_every_head_patched_with_itself_keeps_every_bit(hosted):
    engine, record = hosted
    for component in record.geometry.head_components:
        block = next(b for b in range(record.geometry.blocks) if component in record.geometry.components_of(b))
        for head in range(record.geometry.heads):
            at = {"step": 2, "layer": block, "component": component, "head": head}
            rows = [Patch(direction="self", **at), Patch(direction="denoising", alpha=0, **at)]
            assert torch.equal(engine.fork(record, rows).final, record.final), at


def test_noise_of_no_strength_and_swaps_of_no_share_keep_every_bit(hosted):
    engine, record = hosted
    block = next(b for b in range(record.geometry.blocks) if record.geometry.components_of(b))
    noise = [HiddenNoise(step=1, layer=block, component="residual", strength=0, run=r) for r in ("clean", "corrupted")]
    swap = [LatentSwap(step=2, donor="pair", alpha=0, run=r) for r in ("clean", "corrupted")]
    for rows in (noise, swap):
        assert torch.equal(engine.fork(record, rows).final, record.final)


def test_a_window_as_wide_as_the_video_cuts_nothing(hosted):
    engine, record = hosted
    blocks = [b for b in range(record.geometry.blocks) if "attn1" in record.geometry.knockout_of(b)]
    if not blocks:
        pytest.skip("no softmax attention between frames")
    for block in blocks:
        cell = Knockout(pattern="local", reach=record.geometry.frames, step=1, layer=block)
        rows = [cell, cell.model_copy(update={"run": "corrupted"})]
        assert torch.equal(engine.fork(record, rows).final, record.final), block
