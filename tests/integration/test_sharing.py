"""What rows of a forward share is computed once, and every row is what it would be alone."""

from __future__ import annotations

import importlib
from collections import defaultdict
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from interventions import kinds  # noqa: F401  (registers every kind)
from interventions.base import KINDS, Intervention
from interventions.engine import Engine
from interventions.families.family import family_of
from interventions.record import Record, RunInputs
from interventions.sites import Site
from tests.integration.test_engine import inputs_of, loud_pipeline

P, F, N = (KINDS[k] for k in ("patch", "frame_shuffle", "noise"))
BLOCKS = 4


@pytest.fixture(scope="module")
def pipe():
    return loud_pipeline(11, BLOCKS)


@pytest.fixture(scope="module")
def engine(pipe):
    return Engine(pipe, family_of("WanImageToVideoPipeline"))


@pytest.fixture(scope="module", params=[1.0, 3.0], ids=["no_guidance", "guidance"])
def record(request, pipe, engine) -> Record:
    return engine.record(inputs_of(pipe, request.param))


@contextmanager
def rows_seen(pipe: Any):
    """Yield the batch sizes with which each block, and the embedding of timesteps, was called."""
    seen: dict[Any, list[int]] = defaultdict(list)
    modules = {i: block.attn1.to_q for i, block in enumerate(pipe.transformer.blocks)}
    modules["timesteps"] = pipe.transformer.condition_embedder.time_proj
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(len(args[0])))
        for name, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


BATCHES: dict[str, list[Intervention]] = {
    "every-layer": [P(step=2, layer=b, component=c) for b in range(BLOCKS) for c in ("attn1", "attn2", "ffn")],
    "layers-in-any-order": [P(step=2, layer=b, component="ffn") for b in (3, 0, 2, 0, 1)],
    "late-layers-alone": [P(step=1, layer=b, component="attn1") for b in (2, 3)],
    "both-recipients": [
        P(step=2, layer=b, component="attn2", direction=d) for b in (1, 3) for d in ("denoising", "noising")
    ],
    "updates-and-residuals": [P(step=3, layer=b, component=c) for b in (1, 2) for c in ("update", "residual")],
    "heads": [P(step=2, layer=b, component="attn1", head=h) for b in (1, 2) for h in (0, 1)],
    "frames": [P(step=2, layer=2, component="attn1", frame=f) for f in (1, 3, 5)],
    "every-head-of-layers": [P(step=2, layer=b, component="attn2", head=1) for b in (3, 1)],
    "first-step": [P(step=0, layer=b, component="attn1") for b in (1, 2, 3)],
    "last-step": [P(step=4, layer=b, component="attn1") for b in (1, 2, 3)],
    "later-steps-beside": [P(step=2, layer=3, component="ffn"), P(step=4, layer=0, component="ffn")],
    "latents-beside": [N(at="step", path="on_path", step=2), P(step=2, layer=3, component="ffn")],
    "hidden-frames-beside": [F(mode="reverse", space="hidden", layer=2, step=2), P(step=2, layer=3, component="ffn")],
}


@pytest.mark.parametrize("name", BATCHES)
def test_rows_are_what_they_are_without_sharing(name, engine, record):
    """To 1e-5 of the latents' scale; here to the last bit, as no kernel of these sizes depends on the batch."""
    rows = BATCHES[name]
    shared = engine.fork(record, rows)
    engine.shares = False
    try:
        alone = engine.fork(record, rows)
    finally:
        engine.shares = True
    assert shared.fired == alone.fired > 0
    assert (shared.final - alone.final).abs().max() / alone.final.abs().max() < 1e-5


def test_blocks_compute_only_rows_that_have_begun(pipe, engine, record):
    calls = len(record.geometry.calls)
    with rows_seen(pipe) as seen:
        engine.fork(record, [P(step=4, layer=b, component="ffn", direction="self") for b in (1, 2, 2, 3)])
    # First the capture of the donors, which has both runs, then the fork's one computed step.
    assert {block: seen[block] for block in range(BLOCKS)} == {
        block: [2] * calls + [rows] * calls for block, rows in enumerate((1, 2, 4, 4))
    }


def test_timesteps_are_embedded_once_a_call(pipe, engine, record):
    with rows_seen(pipe) as seen:
        engine.fork(record, [P(step=3, layer=0, component="ffn") for _ in range(3)])
        assert set(seen["timesteps"]) == {1}
        seen.clear()
        engine.record(record.inputs)
        assert set(seen["timesteps"]) == {2}


def test_a_capture_ends_with_its_last_site(pipe, engine, record):
    with rows_seen(pipe) as seen:
        found = engine.capture(record, 2, [Site(2, "cond", 1, "attn1")], [0, 1])
    assert set(found) == {Site(2, "cond", 1, "attn1")}
    assert {name for name in seen if name != "timesteps"} == {0, 1}
    assert len(seen[1]) == 1


def test_a_capture_is_the_recorded_run(pipe, engine, record):
    """Ended early, it holds what one gives that goes on to the last block."""
    early = engine.capture(record, 2, [Site(2, "cond", 1, "ffn")], [0, 1])
    late = engine.capture(record, 2, [Site(2, "cond", 1, "ffn"), Site(2, "cond", BLOCKS - 1, "ffn")], [0, 1])
    assert torch.equal(early[Site(2, "cond", 1, "ffn")], late[Site(2, "cond", 1, "ffn")])


FAMILIES = ("wan", "wan22_a14b", "wan22_ti2v", "wan_i2v21", "skyreels_v2")


@pytest.mark.parametrize("guidance", [False, True], ids=["no_guidance", "guidance"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_that_share(name, guidance):
    module = importlib.import_module(f"tests.families.{name}")
    pipe = module.build()
    shared, per_run = module.arguments(pipe, steps=4, guidance=guidance)
    engine = Engine(pipe, family_of(type(pipe).__name__))
    found = engine.record(RunInputs(shared=shared, per_run=per_run, names=("clean", "corrupted"), seed=(0,)))
    last = found.geometry.blocks - 1
    rows = [P(step=s, layer=b, component=c) for s in (1, 3) for b in (last, 0, last) for c in ("attn1", "ffn")]
    together = [engine.fork(found, [r for r in rows if r.step == s]).final for s in (1, 3)]
    engine.shares = False
    alone = [engine.fork(found, [r for r in rows if r.step == s]).final for s in (1, 3)]
    scale = found.final.abs().max()
    assert all((a - b).abs().max() / scale < 1e-5 for a, b in zip(together, alone, strict=True))
