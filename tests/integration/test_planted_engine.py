"""Planted mechanisms found by the engine: every way of looking lights up exactly the planted sites."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping
from typing import ClassVar

import pytest
import torch

from interventions.base import Intervention
from interventions.engine import Engine
from interventions.families.family import family_of
from interventions.kinds.ablate import Ablate
from interventions.kinds.block_skip import BlockSkip
from interventions.kinds.knockout import Knockout
from interventions.kinds.patch import Patch
from interventions.kinds.prompt_swap import PromptSwap
from interventions.kinds.step_skip import StepSkip
from interventions.record import Record, RunInputs
from interventions.sites import RUNS
from pipeline.embedded.planted import PLANTED
from pipeline.embedded.planted.base import BLOCKS, FRAMES, Planted
from pipeline.embedded.planted.wiring import HEADS

STEPS = 6
FLOOR = 1e-4
"""Largest effect off the planted sites, as a share of the smallest on them: the rounding of layer norms."""
SKIPPED = 0.5
"""The same for skipped blocks: they change all else too, and with it the scale that the last norm gives the signal."""


class Subject:
    """A planted model under the engine, with its two runs recorded."""

    def __init__(self, planted: Planted, *, null: bool = False) -> None:
        torch.set_num_threads(1)
        self.planted, self.pipe = planted, planted.build(0, null=null)
        guidance = 3.0 if planted.branch is not None else 1.0
        shared, per_run = planted.arguments(self.pipe, STEPS, guidance)
        inputs = RunInputs(shared=shared, per_run=per_run, names=("clean", "corrupted"), seed=(0,))
        self.engine = Engine(self.pipe, family_of(type(self.pipe).__name__))
        self.record: Record = self.engine.record(inputs)

    def finals(self, rows: Iterable[Intervention]) -> torch.Tensor:
        return self.engine.fork(self.record, list(rows)).final.double()

    def patched(self, cells: Mapping[Hashable, Patch]) -> dict[Hashable, float]:
        """Distance of the final latents from those of a self-patch in the same batch."""
        itself = Patch(direction="self", step=0, layer=0)
        final = self.finals([itself, *cells.values()])
        return {key: float((row - final[0]).norm()) for key, row in zip(cells, final[1:], strict=True)}

    def contrast(self, cells: Mapping[Hashable, Intervention]) -> dict[Hashable, float]:
        """Change of the difference between the two runs when both get the intervention."""
        neutral = [
            Patch(direction="noising", step=0, layer=0, alpha=0),
            Patch(direction="denoising", step=0, layer=0, alpha=0),
        ]
        both = [cell.model_copy(update={"run": run}) for cell in cells.values() for run in ("clean", "corrupted")]
        final = self.finals([*neutral, *both])
        difference = final[0::2] - final[1::2]
        return {key: float((d - difference[0]).norm()) for key, d in zip(cells, difference[1:], strict=True)}


def auc(effects: Mapping[Hashable, float], truth: Iterable[Hashable]) -> float:
    """Area under the ROC curve of the effects against the planted sites: the share of pairs in the right order."""
    planted = set(truth)
    inside = [effects[key] for key in effects if key in planted]
    outside = [effects[key] for key in effects if key not in planted]
    assert inside
    assert outside
    return sum((a > b) + 0.5 * (a == b) for a in inside for b in outside) / (len(inside) * len(outside))


def assert_found(effects: Mapping[Hashable, float], truth: Iterable[Hashable], share: float = FLOOR) -> None:
    """Exactly the planted sites have an effect, and it is far above everything else."""
    planted = set(truth)
    assert auc(effects, planted) == 1.0
    worst = max(value for key, value in effects.items() if key not in planted)
    assert worst <= share * min(effects[key] for key in planted)


@pytest.fixture(scope="module", params=sorted(PLANTED))
def subject(request) -> Subject:
    return Subject(PLANTED[request.param])


def sites() -> Iterable[tuple[int, int]]:
    return itertools.product(range(STEPS), range(BLOCKS))


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_patching_finds_the_step_and_the_block(subject, direction):
    component = subject.planted.component
    cells = {(s, b): Patch(direction="noising", step=s, layer=b, component=component) for s, b in sites()}
    if direction == "denoising":
        cells = {key: cell.model_copy(update={"direction": "denoising"}) for key, cell in cells.items()}
        neutral = Patch(direction="denoising", step=0, layer=0, alpha=0)
        final = subject.finals([neutral, *cells.values()])
        effects = {key: float((row - final[0]).norm()) for key, row in zip(cells, final[1:], strict=True)}
    else:
        effects = subject.patched(cells)
    assert_found(effects, subject.planted.truth(component, STEPS))


@pytest.mark.parametrize("component", ["attn1", "attn2", "ffn", "update"])
def test_every_component_has_its_own_truth(subject, component):
    truth = subject.planted.truth(component, STEPS)
    effects = subject.patched(
        {(s, b): Patch(direction="noising", step=s, layer=b, component=component) for s, b in sites()}
    )
    if truth:
        assert_found(effects, truth)
    else:
        hop = subject.planted.component
        planted = subject.patched({0: Patch(direction="noising", step=subject.planted.steps(STEPS)[0],
                                            layer=subject.planted.blocks[0], component=hop)})  # fmt: skip
        assert max(effects.values()) <= FLOOR * planted[0]


def test_patching_finds_the_heads(subject):
    planted = subject.planted
    step = planted.steps(STEPS)[0]
    cells = {
        (b, h): Patch(direction="noising", step=step, layer=b, component=planted.component, head=h)
        for b in range(BLOCKS)
        for h in range(HEADS)
    }
    first_hop = {b for hop in planted.hops[:-1] if hop.component == planted.component for b in hop.blocks}
    truth = {(b, h) for b in planted.blocks for h in planted.heads} | {(b, h) for b in first_hop for h in range(HEADS)}
    effects = subject.patched(cells)
    if planted.name == "head_path":
        # The cut heads hold the signal too: at their own output it differs, and the projection lets none of it on.
        assert truth == {(3, 2)}
    assert_found(effects, truth)


def test_patching_finds_the_frames(subject):
    planted = subject.planted
    step = planted.steps(STEPS)[0]
    cells = {
        (b, f): Patch(direction="noising", step=step, layer=b, component=planted.component, frame=f)
        for b in range(BLOCKS)
        for f in range(FRAMES)
    }
    assert_found(subject.patched(cells), {(b, f) for b in planted.blocks for f in planted.frames})


def test_zero_ablation_finds_the_step_and_the_block(subject):
    component = subject.planted.component
    cells = {(s, b): Ablate(value="zero", step=s, layer=b, component=component) for s, b in sites()}
    assert_found(subject.contrast(cells), subject.planted.truth(component, STEPS))


def test_zero_ablation_finds_the_heads(subject):
    planted = subject.planted
    if planted.name != "head_path":
        pytest.skip("all heads of the other models carry alike")
    cells = {
        (b, h): Ablate(value="zero", step=1, layer=b, component="attn1", head=h)
        for b in range(BLOCKS)
        for h in range(HEADS)
    }
    assert_found(subject.contrast(cells), {(3, 2)})


def test_knock_out_finds_the_edge(subject):
    """Cut the edge that carries: from the source frame to the target frames, or from the text."""
    planted = subject.planted
    if planted.source_frame is None:
        cells = {(s, b): Knockout(pattern="text", step=s, layer=b, component="attn2") for s, b in sites()}
        assert_found(subject.contrast(cells), planted.truth("attn2", STEPS))
        return
    step, (block,) = planted.steps(STEPS)[0], planted.blocks
    targets = ",".join(map(str, planted.frames))
    cells = {
        (s, b): Knockout(pattern="between", step=s, layer=b, queries=targets, frames=str(planted.source_frame))
        for s, b in sites()
    }
    assert_found(subject.contrast(cells), planted.truth("attn1", STEPS))
    edges = {
        (q, k): Knockout(pattern="between", step=step, layer=block, queries=str(q), frames=str(k))
        for q in range(FRAMES)
        for k in range(FRAMES)
        if q != k
    }
    assert_found(subject.contrast(edges), {(f, planted.source_frame) for f in planted.frames})


def test_knock_out_finds_the_head(subject):
    planted = subject.planted
    if planted.name != "head_path":
        pytest.skip("all heads of the other models carry alike")
    cells = {
        (b, h): Knockout(pattern="between", step=1, layer=b, queries="3", frames="1", head=h)
        for b in range(BLOCKS)
        for h in range(HEADS)
    }
    assert_found(subject.contrast(cells), {(3, 2)})


class SeenSkip(StepSkip):
    """A frozen step that keeps the latents with which the run goes on."""

    seen: ClassVar[dict[str, torch.Tensor]] = {}

    def apply(self, point, value, context):
        self.seen[self.run] = super().apply(point, value, context).double()
        return self.seen[self.run]


def test_skipping_a_step_finds_the_steps(subject):
    """Seen right after the skip, before later steps answer to it: what the step would have added is missing.

    The steps of a model that acts at all steps all matter; of the others, those of the window or the expert.
    """
    effects: dict[Hashable, float] = {}
    for step in range(STEPS):
        subject.engine.fork(subject.record, [SeenSkip(mode="freeze", step=step, run=run) for run in RUNS])
        clean, corrupted = subject.record.latents[step + 1].double()
        skipped = SeenSkip.seen["clean"] - SeenSkip.seen["corrupted"]
        effects[step] = float(((clean - corrupted) - skipped).norm())
    truth = subject.planted.steps(STEPS)
    if len(truth) < STEPS:
        assert_found(effects, truth)
    else:
        assert min(effects.values()) > 0.01 * max(effects.values())


def test_skipping_a_block_finds_the_block(subject):
    step = subject.planted.steps(STEPS)[0]
    effects = subject.contrast({b: BlockSkip(mode="skip", step=step, layer=b) for b in range(BLOCKS)})
    assert_found(effects, {b for s, b in subject.planted.truth("update", STEPS) if s == step}, SKIPPED)


def test_swapping_the_prompt_of_one_step_finds_the_steps(subject):
    branch = subject.planted.branch or "both"
    cells = {s: PromptSwap(step=s, steps=1, branch=branch) for s in range(STEPS)}
    effects = subject.contrast(cells)
    truth = subject.planted.steps(STEPS)
    if len(truth) < STEPS:
        assert_found(effects, truth)
    else:
        assert min(effects.values()) > 0.01 * max(effects.values())


def test_the_branch_that_matters_is_found():
    subject = Subject(PLANTED["branch_only"])
    cells = {
        (branch, b): Patch(direction="noising", step=1, layer=b, component="attn2", branch=branch)
        for branch in ("cond", "uncond")
        for b in range(BLOCKS)
    }
    assert_found(subject.patched(cells), {("cond", 1)})


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_without_the_mechanism_nothing_is_found(name):
    subject = Subject(PLANTED[name], null=True)
    component = PLANTED[name].component
    effects = subject.patched(
        {(s, b): Patch(direction="noising", step=s, layer=b, component=component) for s, b in sites()}
    )
    assert max(effects.values()) <= 1e-5 * float(subject.record.final.norm())
