"""Runs as plans: what is replayed, in which order steps are taken, what is to be done in which block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interventions.base import RunRef, Schedule
from interventions.kinds.block_skip import BlockSkip
from interventions.kinds.knockout import Knockout
from interventions.kinds.noise import Noise
from interventions.kinds.patch import Patch
from interventions.kinds.step_skip import StepSkip
from interventions.record import Record, RunInputs
from interventions.run import capturing, forking, loop_order, replayed_loops, tap_of
from interventions.sites import AttentionAt, BlockAt, Geometry, LatentsAt, NoSuchSiteError, Site
from interventions.sources import contexts_of, donor_values

CONCATENATED = Geometry(
    steps=4,
    blocks=3,
    frames=2,
    given_frames=0,
    height=1,
    width=2,
    calls=(("uncond", "cond"),),
    heads=2,
    head_components=("attn1",),
    knockout=("attn1",),
    levels=tuple((1 - s, s) for s in (1.0, 0.75, 0.5, 0.25, 0.0)),
)
TWO_CALLS = replace(CONCATENATED, calls=(("cond",), ("uncond",)))
RUNS = 2


def record(geometry: Geometry = CONCATENATED, offset: float = 0.0) -> Record:
    latents = [torch.full((RUNS, 1, 2, 1, 2), 10.0 * s) + offset for s in range(geometry.steps + 1)]
    for step in latents:
        step[1] += 1
    return Record(
        inputs=RunInputs(shared={}, per_run={"latents": latents[0]}, names=("clean", "corrupted"), seed=(1,)),
        geometry=geometry,
        levels=geometry.levels,
        outputs=[f"call {i}" for i in range(geometry.steps * len(geometry.calls))],
        latents=latents,
        x0_hat=latents[:-1],
        conditioning={b: {"text": torch.full((RUNS, 3), offset)} for b in geometry.branches},
        final=latents[-1],
    )


class TestOrder:
    @pytest.mark.parametrize(
        ("schedule", "order"),
        [
            pytest.param(None, [0, 1, 2, 3], id="none"),
            pytest.param(Schedule("drop", 1), [0, 2, 3], id="drop"),
            pytest.param(Schedule("repeat", 1), [0, 1, 1, 2, 3], id="repeat"),
            pytest.param(Schedule("swap", 1, 3), [0, 3, 2, 1], id="swap"),
        ],
    )
    def test_steps_in_the_order_they_are_taken(self, schedule, order):
        assert loop_order(schedule, 4) == order

    @given(st.sampled_from(["drop", "repeat"]), st.integers(0, 3))
    def test_what_is_replayed_is_what_the_record_took(self, edit, step):
        """Up to the replayed iteration, the edited order is the recorded one: only then may outputs be replayed."""
        row = StepSkip(mode=edit, step=step)
        loops = replayed_loops([row], row.schedule, CONCATENATED)
        assert loop_order(row.schedule, 4)[:loops] == list(range(loops))

    @given(st.integers(0, 2))
    def test_a_swap_is_computed_from_its_earlier_step(self, step):
        row = StepSkip(mode="swap", step=step)
        assert replayed_loops([row], row.schedule, CONCATENATED) == step

    def test_the_earliest_row_decides(self):
        rows = [Patch(step=3, layer=0), Patch(step=1, layer=0)]
        assert replayed_loops(rows, None, CONCATENATED) == 1


class TestRows:
    @pytest.mark.parametrize(
        ("geometry", "branch", "rows"),
        [
            pytest.param(CONCATENATED, "uncond", [0, 1, 2], id="uncond-first"),
            pytest.param(CONCATENATED, "cond", [3, 4, 5], id="cond-behind"),
            pytest.param(TWO_CALLS, "cond", [0, 1, 2], id="own-call"),
            pytest.param(TWO_CALLS, "uncond", [0, 1, 2], id="other-call"),
        ],
    )
    def test_a_branch_lies_where_its_call_holds_it(self, geometry, branch, rows):
        run = forking(record(geometry), [Patch(step=0, layer=0)] * 3, None)
        assert [run.row_of(branch, i) for i in range(3)] == rows

    def test_recorded_outputs_are_gathered_branch_by_branch(self):
        run = forking(record(), [Patch(step=2, layer=0, direction=d) for d in ("denoising", "noising")], None)
        # Recipients are corrupted (1) and clean (0): uncond rows 1 and 0, then cond rows 3 and 2.
        assert run.replay == [("call 0", [1, 0, 3, 2]), ("call 1", [1, 0, 3, 2])]

    def test_two_calls_are_replayed_one_after_the_other(self):
        run = forking(record(TWO_CALLS), [Patch(step=1, layer=0)], None)
        assert run.replay == [("call 0", [1]), ("call 1", [1])]


class TestWork:
    def test_every_point_is_planned_in_its_call_and_block(self):
        rows: list[Any] = [
            Patch(step=1, layer=2, component="update"),
            Patch(step=1, layer=2, component="residual"),
            Patch(step=1, layer=2, component="attn1", head=1, branch="cond"),
            Knockout(pattern="causal", step=1, layer=0),
            BlockSkip(mode="skip", step=3, layer=1, branch="uncond"),
            Noise(at="step", step=2),
        ]
        run = forking(record(TWO_CALLS), rows, None)
        assert set(run.work) == {(1, 0), (1, 1), (3, 1)}
        work = run.work[1, 0]
        assert [s.component for s in work[2].sites["residual"]] == ["update", "residual"]
        assert work[2].sites["attn1.heads"] == [Site(1, "cond", 2, "attn1", head=1)]
        assert "attn1.heads" not in run.work[1, 1][2].sites
        assert work[0].cuts == {"attn1": [AttentionAt(1, "cond", 0)]}
        assert run.work[3, 1][1].programs == [BlockAt(3, "uncond", 1)]
        assert run.edits[LatentsAt(2)] == [5]
        assert run.planned == 2 + 2 + 1 + 2 + 1 + 1

    def test_only_updates_and_programs_need_what_enters_a_block(self):
        run = forking(record(), [Patch(step=0, layer=0, component="attn1")], None)
        assert not run.work[0, 0][0].needs_inputs
        run = forking(record(), [Patch(step=0, layer=0, component="update")], None)
        assert run.work[0, 0][0].needs_inputs

    @pytest.mark.parametrize(
        ("site", "tap"),
        [
            (Site(0, "cond", 0, "update"), "residual"),
            (Site(0, "cond", 0, "residual", "text"), "residual.text"),
            (Site(0, "cond", 0, "attn1", head=0), "attn1.heads"),
            (Site(0, "cond", 0, "ffn"), "ffn"),
        ],
    )
    def test_tap_of_a_site(self, site, tap):
        assert tap_of(site) == tap

    def test_a_site_that_is_not_there_is_refused(self):
        with pytest.raises(NoSuchSiteError, match=r"no heads|heads 0 to 1"):
            forking(record(), [Patch(step=0, layer=0, component="attn1", head=2)], None)
        with pytest.raises(NoSuchSiteError, match="blocks 0 to 2"):
            capturing(record(), 0, [Site(0, "cond", 7, "ffn")], [0])

    def test_capturing_ends_after_its_step(self):
        run = capturing(record(), 2, [Site(2, "cond", 1, "ffn")], [0, 1])
        assert (run.replayed_loops, run.stop_after_loop, run.captured) == (2, 2, {})


class TestSources:
    @staticmethod
    def capture(found: Record, step: int, sites: Any, rows: Any) -> dict[Site, torch.Tensor]:
        """Every activation is the sum of its coordinates and of what tells records and runs apart."""
        base = float(found.latents[0][0, 0, 0, 0, 0])
        return {s: torch.stack([torch.full((2, 2), base + 100 * s.block + row) for row in rows]) for s in sites}

    def test_a_donor_of_the_own_pair(self):
        (context,) = contexts_of(self.capture, record(), [Patch(step=1, layer=2)], None)
        assert len(context.donors) == 2
        assert all(torch.equal(v, torch.full((2, 2), 200.0)) for v in context.donors.values())

    def test_the_mean_over_a_source(self):
        patch = Patch(step=1, layer=0, branch="cond")
        (read,) = patch.reads(CONCATENATED)
        source = tuple(RunRef("clean", sample=i, fixed=True) for i in range(4))
        read = replace(read, source=source)
        asked: list[RunRef] = []

        def others(ref: RunRef) -> Record:
            asked.append(ref)
            return record(offset=float(ref.sample))

        values = donor_values(self.capture, record(), {read}, others)
        assert torch.equal(values[read], torch.full((2, 2), 1.5))
        assert set(asked) == set(source)

    def test_the_own_record_is_not_asked_for(self):
        def others(ref: RunRef) -> Record:
            raise AssertionError(ref)

        contexts_of(self.capture, record(), [Patch(step=0, layer=0)], others)

    def test_another_sample_without_a_way_to_it_is_an_error(self):
        with pytest.raises(ValueError, match="another sample or seed is read"):
            contexts_of(self.capture, record(), [Patch(step=0, layer=0, donor_sample=1)], None)

    def test_each_record_is_captured_once_a_step(self):
        calls = []

        def capture(found: Record, step: int, sites: Any, rows: Any) -> dict[Site, torch.Tensor]:
            calls.append((step, len(sites), tuple(rows)))
            return self.capture(found, step, sites, rows)

        rows = [Patch(step=s, layer=b, component=c) for s in (0, 2) for b in range(3) for c in ("attn1", "ffn")]
        contexts_of(capture, record(), rows, None)
        assert calls == [(0, 12, (0, 1)), (2, 12, (0, 1))]
