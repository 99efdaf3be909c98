"""Rows that share a computation: whatever blocks do, every row ends with what it would have been given alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interventions.base import RowContext
from interventions.families.family import BlockAddress, Blocks, Tap
from interventions.joining import Joining, joining
from interventions.kinds.block_skip import BlockSkip
from interventions.kinds.knockout import Knockout
from interventions.kinds.latent_noise import LatentNoise
from interventions.kinds.patch import Patch
from interventions.kinds.step_skip import StepSkip
from interventions.run import Run, capturing, forking
from interventions.sites import Geometry, Site
from tests.unit.test_run import CONCATENATED, TWO_CALLS, record

BLOCKS = Blocks(path="blocks", taps={"attn1": Tap(path="attn1")}, along=((1, "text"), (2, "time")))
STEP = 1


def addresses(count: int = 3, **changes) -> list[BlockAddress]:
    return [BlockAddress(blocks=replace(BLOCKS, **changes), path=f"blocks.{i}") for i in range(count)]


def run_of(rows, geometry: Geometry = TWO_CALLS, schedule=None) -> Run:
    run = forking(record(geometry), rows, schedule)
    run.contexts = [RowContext(geometry=geometry, levels=geometry.levels, seed=(1,)) for _ in rows]
    return run


def patches(*layers: int, run: str = "corrupted", **fields) -> list[Patch]:
    direction = {"corrupted": "denoising", "clean": "noising"}[run]
    return [Patch(step=STEP, layer=layer, component="attn1", direction=direction, **fields) for layer in layers]


def plan(rows, geometry: Geometry = TWO_CALLS, call: int = 0, **changes) -> Joining | None:
    run = run_of(rows, geometry)
    return joining(run, run.replayed_loops, run.order[run.replayed_loops], call, addresses(geometry.blocks, **changes))


def walk(rows, geometry: Geometry, call: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Run blocks that scramble their input with text, time and their own number, and edit rows at their layers.

    Returns the outputs with every row computed throughout, those of rows that join, and the rows of each block.
    """
    run = run_of(rows, geometry)
    branches, n, blocks = len(geometry.calls[call]), len(rows), geometry.blocks
    recipients = torch.tensor([[run.interventions[i].recipient == "clean" for i in range(n)]] * branches).flatten()
    # Before the first touched block, rows of one recipient and branch hold the same, prompt included.
    start = recipients.double()[:, None] + torch.arange(branches).repeat_interleave(n)[:, None] * 3.0
    text, time = start * 7.0 + 1.0, torch.ones(1, 1, dtype=torch.double)

    def block(index, hidden, text, time):
        return torch.sin(hidden * 3.7 + text + time * (index + 1))

    def touched(index):
        return [
            (geometry.calls[call].index(branch), i)
            for i, row in enumerate(run.interventions)
            for branch in geometry.calls[call]
            if any(isinstance(p, Site) and p.block == index and p.branch == branch for p in row.points(geometry))
        ]

    whole = start
    for index in range(blocks):
        whole = block(index, whole, text, time)
        for branch, i in touched(index):
            whole[branch * n + i] += 1.0 + i
    found = joining(run, run.replayed_loops, STEP, call, addresses(blocks))
    joined, sizes = start, []
    for index in range(blocks):
        arguments = (joined, text, time), {}
        if found is not None and index < len(found.active):
            arguments = found.enter(index, addresses(blocks)[index], arguments)
        joined = block(index, *arguments[0])
        sizes.append(len(joined) // branches)
        for branch, i in touched(index):
            at = found.place(index, branch, i) if found is not None else branch * n + i
            joined[at] += 1.0 + i
    return whole, joined, sizes


class TestLaws:
    @given(
        cells=st.lists(
            st.tuples(st.integers(0, 5), st.sampled_from(["clean", "corrupted"]), st.sampled_from(["both", "cond"])),
            min_size=1,
            max_size=8,
        ),
        concatenated=st.booleans(),
        call=st.integers(0, 1),
    )
    def test_every_row_ends_with_its_own_value(self, cells, concatenated, call):
        geometry = replace(CONCATENATED if concatenated else TWO_CALLS, blocks=6)
        rows = [cell for layer, run, branch in cells for cell in patches(layer, run=run, branch=branch)]
        whole, joined, sizes = walk(rows, geometry, 0 if concatenated else call)
        assert torch.equal(whole, joined)
        assert sizes == sorted(sizes)
        assert sizes[-1] == len(rows)


class TestPlan:
    def test_one_row_a_recipient_until_it_is_touched(self):
        found = plan([*patches(1, 2, 2), *patches(2, 1, run="clean")])
        assert found is not None
        # Block 0: one corrupted and one clean row; block 1: those it touches, and one in place of the others.
        assert found.active == ((0, 3), (0, 1, 3, 4), (0, 1, 2, 3, 4))
        assert found.sources == ((0, 3), (0, 0, 1, 1), (0, 1, 1, 2, 3))

    def test_rows_untouched_in_a_call_are_there_in_its_last_block(self):
        found = plan(patches(0, 0, branch="cond"), call=1)
        assert found is not None
        assert found.active == ((0,), (0,), (0, 1))

    def test_places_with_branches_one_after_the_other(self):
        found = plan(patches(0, 2, 2), CONCATENATED)
        assert found is not None
        assert found.active == ((0, 1), (0, 1), (0, 1, 2))
        assert [found.place(1, branch, 0) for branch in (0, 1)] == [0, 2]
        assert [found.place(2, branch, 2) for branch in (0, 1)] == [2, 5]

    def test_an_argument_of_one_row_stays_one(self):
        found = plan(patches(2, 2))
        assert found is not None
        hidden, text, time = torch.zeros(2, 4), torch.arange(2.0)[:, None], torch.ones(1, 4)
        (new, near, same), _ = found.enter(0, addresses()[0], ((hidden, text, time), {}))
        assert (len(new), len(near), same is time) == (1, 1, True)

    def test_arguments_by_name(self):
        found = plan(patches(2, 2))
        assert found is not None
        hidden, text = torch.zeros(2, 4), torch.arange(2.0)[:, None]
        _, kwargs = found.enter(
            0, addresses()[0], ((), {"hidden_states": hidden, "text": text, "time": None, "other": 5})
        )
        assert len(kwargs["hidden_states"]) == len(kwargs["text"]) == 1
        assert (kwargs["time"], kwargs["other"]) == (None, 5)

    @pytest.mark.parametrize(
        "rows",
        [
            patches(0, 0),
            [Knockout(layer=1, step=STEP, pattern="causal"), *patches(2)],
            [BlockSkip(step=STEP, layer=1, mode="skip"), *patches(2)],
            [StepSkip(mode="freeze", step=0), *patches(2)],
        ],
        ids=["all-touched-at-once", "attention-cut", "block-skipped", "edited-before"],
    )
    def test_nothing_is_shared(self, rows):
        run = run_of(rows)
        assert joining(run, STEP, STEP, 0, addresses()) is None

    def test_a_row_with_latents_of_its_own_is_there_from_the_start(self):
        found = plan([LatentNoise(step=STEP), *patches(2, 2)])
        assert found is not None
        assert found.active[0] == (0, 1)

    def test_only_the_first_computed_step_is_shared(self):
        run = run_of(patches(2, 2))
        assert joining(run, STEP, STEP, 0, addresses()) is not None
        assert joining(run, STEP + 1, STEP + 1, 0, addresses()) is None

    def test_captures_are_not_shared(self):
        run = capturing(record(TWO_CALLS), STEP, [Site(STEP, "cond", 2, "attn1")], [0, 1])
        assert joining(run, STEP, STEP, 0, addresses()) is None

    def test_schedule_edits_are_not_shared(self):
        rows = [StepSkip(mode="drop", step=STEP), StepSkip(mode="drop", step=STEP)]
        run = run_of(rows, schedule=rows[0].schedule)
        assert joining(run, run.replayed_loops, run.order[run.replayed_loops], 0, addresses()) is None

    @pytest.mark.parametrize("change", [{"along": None}, {"layout": "frames"}], ids=["undeclared", "folded-rows"])
    def test_families_that_do_not_declare_it(self, change):
        assert plan(patches(2, 2), **change) is None
