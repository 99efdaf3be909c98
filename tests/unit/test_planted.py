"""Planted models: their truth tables, by patching and knocking out with plain hooks, which share no code with ours."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch

from pipeline.embedded.planted import PLANTED, SIGMA_WINDOW, Planted
from pipeline.embedded.planted.base import BLOCKS, FRAMES, SIDE, schedule
from pipeline.embedded.planted.wiring import HEAD_DIM, HEADS, READOUT

STEPS = 7
TOKENS = SIDE * SIDE
NOTHING = 1e-6
"""Bound on the effect of a site of the planted component that is not planted, as part of the smallest that is."""
ROUNDING = 1e-5
"""The same for other components: layer norms of both runs are equal up to the rounding of their sums."""
COMPONENTS = ("attn1", "attn2", "ffn", "update", "residual")
every_model = pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
frame_models = pytest.mark.parametrize(
    "planted", [p for p in PLANTED.values() if p.source_frame is not None], ids=lambda p: p.name
)
Place = tuple[int, int, str, int]
"""Step, guidance branch (0 is the prompt's), component, block."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a map: where one row of a batch is edited, in every branch unless one is given."""

    component: str
    step: int | None
    block: int
    frame: int | None = None
    head: int | None = None
    branch: int | None = None
    source: int | None = None

    def at(self, place: Place) -> bool:
        step, branch, component, block = place
        return (
            (component, block) == (self.component, self.block)
            and self.step in (None, step)
            and self.branch in (None, branch)
        )

    @property
    def tokens(self) -> slice:
        return slice(None) if self.frame is None else slice(self.frame * TOKENS, (self.frame + 1) * TOKENS)

    @property
    def channels(self) -> slice:
        return slice(None) if self.head is None else slice(self.head * HEAD_DIM, (self.head + 1) * HEAD_DIM)


Edit = Callable[[Place, torch.Tensor], torch.Tensor]


class Subject:
    """A built model with its two runs."""

    def __init__(self, planted: Planted, seed: int = 0, guidance: float | None = None, null: bool = False) -> None:
        self.planted = planted
        self.guidance = (3.0 if planted.branch else 1.0) if guidance is None else guidance
        self.pipe = planted.build(seed, null=null)
        self.pipe.set_progress_bar_config(disable=True)
        self.shared, self.per_run = planted.arguments(self.pipe, STEPS, self.guidance, seed=seed)

    def run(self, row: int, rows: int = 1, edit: Edit | None = None, masks: Callable | None = None) -> torch.Tensor:
        """Final latents of a batch of rows that all are run ``row``, with every activation passed by ``edit``."""
        inputs = {name: value[[row] * rows] for name, value in self.per_run.items()}
        with hooks(self.pipe, 2 if self.guidance > 1 else 1, edit or (lambda place, value: value), masks):
            return self.pipe(**self.shared, **inputs, output_type="latent", return_dict=False)[0]

    def record(self, row: int, rows: int, component: str) -> dict[Place, torch.Tensor]:
        kept: dict[Place, torch.Tensor] = {}

        def keep(place: Place, value: torch.Tensor) -> torch.Tensor:
            if place[2] == component:
                kept[place] = value.clone()
            return value

        self.run(row, rows, keep)
        return kept

    def distances(self, row: int, rows: int, edit: Edit | None = None, masks: Callable | None = None) -> list[float]:
        change = self.run(row, rows, edit, masks) - self.run(row, rows)
        return torch.linalg.vector_norm(change, dim=(1, 2, 3, 4)).tolist()

    def patched(self, cells: list[Cell], recipient: int = 1) -> dict[Cell, float]:
        """Change of the final latents by writing the other run's activation at each cell, each in its own row."""
        (component,) = {cell.component for cell in cells}
        donor = self.record(1 - recipient, len(cells), component)

        def patch(place: Place, value: torch.Tensor) -> torch.Tensor:
            for i, cell in enumerate(cells):
                if cell.at(place):
                    value = value.clone()
                    value[i, cell.tokens, cell.channels] = donor[place][i, cell.tokens, cell.channels]
            return value

        return dict(zip(cells, self.distances(recipient, len(cells), patch), strict=True))

    def zeroed(self, cells: list[Cell], row: int = 0) -> dict[Cell, float]:
        """Change of the final latents by zeroing the activation at each cell, each in its own row."""

        def zero(place: Place, value: torch.Tensor) -> torch.Tensor:
            for i, cell in enumerate(cells):
                if cell.at(place):
                    value = value.clone()
                    value[i, cell.tokens, cell.channels] = 0
            return value

        return dict(zip(cells, self.distances(row, len(cells), zero), strict=True))

    def cut(self, cells: list[Cell], row: int = 0) -> dict[Cell, float]:
        """Change by hiding the tokens of ``source`` from those of ``frame`` in a block's self-attention, all steps."""

        def masks(block: int) -> torch.Tensor:
            mask = torch.ones(len(cells), 1, FRAMES * TOKENS, FRAMES * TOKENS, dtype=torch.bool)
            for i, cell in enumerate(cells):
                if cell.block == block and cell.frame is not None and cell.source is not None:
                    mask[i, :, cell.tokens, cell.source * TOKENS : (cell.source + 1) * TOKENS] = False
            return mask

        uncut = torch.ones(len(cells), 1, FRAMES * TOKENS, FRAMES * TOKENS, dtype=torch.bool)
        change = self.run(row, len(cells), masks=masks) - self.run(row, len(cells), masks=lambda block: uncut)
        return dict(zip(cells, torch.linalg.vector_norm(change, dim=(1, 2, 3, 4)).tolist(), strict=True))


@contextmanager
def hooks(pipe: Any, branches: int, edit: Edit, masks: Callable | None) -> Iterator[None]:
    """Plain hooks on every component of every block of every expert; calls of the denoiser tell step and branch."""
    calls, handles = [-1], []

    def place(component: str, block: int) -> Place:
        return (*divmod(calls[0], branches), component, block)

    def watch(module: Any, component: str, block: int) -> None:
        handles.append(module.register_forward_hook(lambda m, args, out: edit(place(component, block), out)))

    def count(module: Any, args: Any, kwargs: Any) -> None:
        calls[0] += 1

    for expert in (pipe.transformer, pipe.transformer_2):
        if expert is None:
            continue
        handles.append(expert.register_forward_pre_hook(count, with_kwargs=True))
        for index, block in enumerate(expert.blocks):
            for component in ("attn1", "attn2", "ffn"):
                watch(getattr(block, component), component, index)
            for component in ("attn1", "attn2"):

                def heads(module, args, name=f"{component}.heads", index=index):
                    return (edit(place(name, index), args[0]),)

                handles.append(getattr(block, component).to_out[0].register_forward_pre_hook(heads))

            def block_hook(module, args, out, index=index):
                update = out - args[0]
                out = out + (edit(place("update", index), update) - update)
                return edit(place("residual", index), out)

            handles.append(block.register_forward_hook(block_hook))
            if masks is not None:

                def mask_hook(module, args, index=index):
                    return (*args[:2], masks(index), *args[3:])

                handles.append(block.attn1.register_forward_pre_hook(mask_hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@lru_cache
def subject(planted_name: str, seed: int = 0, guidance: float | None = None) -> Subject:
    return Subject(PLANTED[planted_name], seed, guidance)


def every_cell(component: str, steps: Iterable[int] = range(STEPS), **more: Iterable[int]) -> list[Cell]:
    """Cells of a step by block map, or of one with more coordinates."""
    return [
        Cell(component, step, block, **dict(zip(more, values, strict=True)))
        for step, block, *values in itertools.product(steps, range(BLOCKS), *more.values())
    ]


@lru_cache
def smallest_effect(planted_name: str) -> float:
    """The smallest effect of a patch at a site of the last hop."""
    planted = PLANTED[planted_name]
    cells = every_cell(planted.component)
    effects = subject(planted_name).patched(cells)
    return min(effects[cell] for cell in sites_in(planted, cells, planted.component))


def roc_auc(effects: dict[Cell, float], sites: set[Cell]) -> float:
    """Chance that a site has a larger effect than a place that is none; ties count half."""
    ranks = [
        (effects[site] > effects[other]) + 0.5 * (effects[site] == effects[other])
        for site in sites
        for other in effects.keys() - sites
    ]
    return sum(ranks) / len(ranks)


def sites_in(planted: Planted, cells: list[Cell], component: str) -> set[Cell]:
    truth = planted.truth(component, STEPS)
    return {cell for cell in cells if (cell.step, cell.block) in truth}


def assert_found(effects: dict[Cell, float], sites: set[Cell], nothing: float = NOTHING) -> None:
    assert sites
    assert effects.keys() - sites
    assert roc_auc(effects, sites) == 1.0
    smallest = min(effects[site] for site in sites)
    assert smallest > 1e-2
    assert max(effects[cell] for cell in effects.keys() - sites) <= nothing * smallest


class TestPatching:
    @every_model
    @pytest.mark.parametrize(("recipient", "seed"), [(1, 0), (0, 0), (1, 1)], ids=["denoising", "noising", "seed"])
    def test_finds_the_planted_component(self, planted, recipient, seed):
        cells = every_cell(planted.component)
        effects = subject(planted.name, seed).patched(cells, recipient)
        assert_found(effects, sites_in(planted, cells, planted.component))

    @every_model
    @pytest.mark.parametrize("component", COMPONENTS)
    def test_every_component_is_as_the_truth_table_says(self, planted, component):
        cells = every_cell(component)
        effects, sites = subject(planted.name).patched(cells), sites_in(planted, cells, component)
        for cell, effect in effects.items():
            assert effect > 1e-2 if cell in sites else effect <= ROUNDING * smallest_effect(planted.name), cell

    @pytest.mark.parametrize("planted", [p for p in PLANTED.values() if p.branch is None], ids=lambda p: p.name)
    def test_guidance_moves_no_site(self, planted):
        cells = every_cell(planted.component)
        effects = subject(planted.name, guidance=4.0).patched(cells)
        assert_found(effects, sites_in(planted, cells, planted.component))

    @every_model
    def test_frames_are_those_that_the_hop_reaches(self, planted):
        for hop in planted.hops:
            step, block = planted.steps(STEPS)[0], hop.blocks[0]
            reached = range(FRAMES) if hop.frames is None else hop.frames
            cells = [Cell(hop.component, step, block, frame=f) for f in range(FRAMES)]
            effects = subject(planted.name).patched(cells)
            assert {cell.frame for cell, effect in effects.items() if effect > 1e-2} == set(reached)
            assert all(effects[cell] == 0 for cell in cells if cell.frame not in reached)

    @every_model
    def test_heads_are_those_that_are_planted(self, planted):
        cells = every_cell(f"{planted.component}.heads", (0, 3), head=range(HEADS))
        sites = {c for c in sites_in(planted, cells, planted.component) if c.head in planted.heads}
        assert_found(subject(planted.name).patched(cells), sites)

    def test_the_heads_that_are_cut_do_carry_the_difference(self):
        """They are decoys: what they hold differs between the runs, and what they pass on does not."""
        planted = PLANTED["head_path"]
        (block,) = planted.blocks
        one, other = (subject("head_path").record(row, 1, "attn1.heads")[0, 0, "attn1.heads", block] for row in (0, 1))
        assert ((one - other).unflatten(-1, (HEADS, HEAD_DIM)).abs().amax(dim=(0, 1, 3)) > 0.1).all()

    def test_branch_is_the_planted_one(self):
        planted = PLANTED["branch_only"]
        cells = every_cell("attn2", branch=(0, 1))
        sites = {cell for cell in sites_in(planted, cells, "attn2") if cell.branch == 0}
        assert_found(subject("branch_only").patched(cells), sites)
        embeds = subject("branch_only").per_run["negative_prompt_embeds"]
        assert not torch.equal(embeds[0], embeds[1])

    @every_model
    def test_all_planted_sites_together_are_the_whole_difference(self, planted):
        model = subject(planted.name)
        donor = model.record(0, 1, planted.component)
        truth = planted.truth(planted.component, STEPS)

        def patch(place: Place, value: torch.Tensor) -> torch.Tensor:
            step, _, component, block = place
            return donor[place] if component == planted.component and (step, block) in truth else value

        clean, corrupted, patched = model.run(0), model.run(1), model.run(1, edit=patch)
        assert (patched - clean).norm() <= NOTHING * (corrupted - clean).norm()


class TestZeroing:
    @every_model
    def test_finds_the_planted_component_exactly(self, planted):
        cells = every_cell(planted.component)
        assert_found(subject(planted.name).zeroed(cells), sites_in(planted, cells, planted.component), nothing=0)

    @every_model
    def test_finds_the_planted_heads_exactly(self, planted):
        cells = every_cell(f"{planted.component}.heads", (0, 3), head=range(HEADS))
        sites = {c for c in sites_in(planted, cells, planted.component) if c.head in planted.heads}
        assert_found(subject(planted.name).zeroed(cells), sites, nothing=0)

    def test_a_silent_cross_attention_has_live_heads(self):
        """Decoys again: zeroing what is not passed on changes nothing."""
        heads = subject("prompt_block").record(0, 1, "attn2.heads")
        assert all(value.any() for value in heads.values())

    @every_model
    def test_without_the_last_hop_both_runs_are_one(self, planted):
        model = subject(planted.name)

        def zero(place: Place, value: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(value) if place[2] == planted.component and place[3] in planted.blocks else value

        whole = (model.run(0) - model.run(1)).norm()
        assert (model.run(0, edit=zero) - model.run(1, edit=zero)).norm() <= NOTHING * whole

    @every_model
    @pytest.mark.parametrize("component", ["attn1", "attn2", "ffn"])
    def test_the_rest_of_the_model_computes_too(self, planted, component):
        """Zeroing what is not planted, for all steps of a block, changes the video."""
        if component == planted.component:
            component = "update"
        effects = subject(planted.name).zeroed([Cell(component, None, b) for b in range(BLOCKS)])
        assert min(effects.values()) > 1e-2


class TestFrames:
    @frame_models
    def test_cutting_one_frame_from_another_finds_the_path(self, planted):
        cells = [
            Cell("attn1", None, block, frame=to, source=source)
            for block, to, source in itertools.product(range(BLOCKS), range(FRAMES), range(FRAMES))
        ]
        sites = {
            c
            for c in cells
            if c.block in planted.blocks and c.frame in planted.frames and c.source == planted.source_frame
        }
        assert len(sites) == len(planted.frames)
        assert_found(subject(planted.name).cut(cells), sites, nothing=0)

    @frame_models
    def test_attention_to_the_source_is_all_or_nothing_and_not_uniform(self, planted):
        """Targets see the source with weights that differ by token, so patterns are worth reading."""
        model = subject(planted.name)
        heads = model.record(0, 1, "attn1.heads")[0, 0, "attn1.heads", planted.blocks[0]][0]
        frames = heads.unflatten(0, (FRAMES, TOKENS))
        for frame in range(FRAMES):
            assert bool(frames[frame].any()) == (frame in planted.frames)
        assert frames[planted.frames[0]].std(dim=0).max() > 1e-3


class TestRuns:
    @every_model
    def test_runs_differ_where_the_mechanism_reaches(self, planted):
        model = subject(planted.name)
        clean, corrupted = model.run(0)[0], model.run(1)[0]
        change = torch.linalg.vector_norm(clean - corrupted, dim=(2, 3))
        for frame in range(FRAMES):
            assert (change[READOUT, frame] > 1.0) == (frame in planted.frames)
        change[READOUT, list(planted.frames)] = 0
        assert change.max() < 1e-5
        assert clean.isfinite().all()
        assert clean.abs().max() < 1000

    @every_model
    @pytest.mark.parametrize("guidance", [None, 3.0])
    def test_null_runs_are_the_same_bits(self, planted, guidance):
        model = Subject(planted, guidance=guidance, null=True)
        embeds = model.per_run["prompt_embeds"]
        assert not torch.equal(embeds[0], embeds[1])
        assert torch.equal(model.run(0), model.run(1))

    @every_model
    def test_null_only_lacks_the_mechanism(self, planted):
        null, whole = (getattr(Subject(planted, null=n).pipe, planted.expert).state_dict() for n in (True, False))
        changed = {name for name in whole if not torch.equal(whole[name], null[name])}
        assert changed == {f"blocks.{b}.{hop.component}.to_out.0.weight" for hop in planted.hops for b in hop.blocks}

    @every_model
    def test_both_runs_have_the_same_latents(self, planted):
        latents = subject(planted.name).per_run["latents"]
        assert latents.shape == (2, 3, FRAMES, 2 * SIDE, 2 * SIDE)
        assert torch.equal(latents[0], latents[1])


class TestBuilding:
    @every_model
    def test_is_a_function_of_the_seed_and_leaves_the_generator_alone(self, planted):
        before = torch.random.get_rng_state()
        one, again, other = (planted.build(seed).transformer.state_dict() for seed in (3, 3, 4))
        assert torch.equal(torch.random.get_rng_state(), before)
        assert all(torch.equal(one[name], again[name]) for name in one)
        assert not torch.equal(one["blocks.0.ffn.net.2.weight"], other["blocks.0.ffn.net.2.weight"])

    def test_a_saved_one_is_the_same(self, tmp_path):
        from diffusers import WanTransformer3DModel

        model = subject("sigma_window")
        before = model.run(0)
        model.pipe.transformer.save_pretrained(tmp_path)
        other = Subject(SIGMA_WINDOW)
        other.pipe.transformer = WanTransformer3DModel.from_pretrained(tmp_path)
        assert torch.equal(other.run(0), before)

    @pytest.mark.parametrize(("count", "inside"), [(6, (2,)), (7, (2, 3)), (8, (2, 3)), (10, (3, 4))])
    def test_window_steps_are_those_of_its_noise_levels(self, count, inside):
        low, high = SIGMA_WINDOW.window
        assert SIGMA_WINDOW.steps(count) == inside
        assert inside == tuple(i for i, sigma in enumerate(schedule(count)) if low < sigma < high)

    def test_a_step_at_the_edge_of_the_window_is_refused(self):
        with pytest.raises(ValueError, match=r"sigma_window: with 20 steps, sigma 0\.526 is too near an edge"):
            SIGMA_WINDOW.arguments(subject("sigma_window").pipe, 20)

    def test_one_branch_needs_guidance(self):
        with pytest.raises(ValueError, match=r"branch_only: .* give guidance above 1, not 1\.0"):
            PLANTED["branch_only"].arguments(subject("branch_only").pipe, STEPS)

    def test_experts_meet_at_the_boundary(self):
        planted = PLANTED["expert_only"]
        assert planted.steps(STEPS) == tuple(i for i, s in enumerate(schedule(STEPS)) if s < planted.boundary_ratio)
        assert 0 < len(planted.steps(STEPS)) < STEPS

    @every_model
    def test_names_are_keys_and_mechanisms_are_one_line(self, planted):
        assert PLANTED[planted.name] is planted
        assert "\n" not in planted.mechanism
        assert len(planted.mechanism) <= 120
