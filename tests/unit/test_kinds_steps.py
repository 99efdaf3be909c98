"""Kinds on steps, prompts, latents, blocks and attention edges, and their composition: what they are as data."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from interventions import kinds  # noqa: F401  (registers every kind)
from interventions.base import KINDS, Intervention, Read, RowContext, RunRef, Schedule
from interventions.edges import Edges
from interventions.kinds.block_skip import BlockSkip
from interventions.kinds.compose import Compose
from interventions.kinds.frame_shuffle import FrameShuffle
from interventions.kinds.knockout import Knockout
from interventions.kinds.latent_swap import LatentSwap
from interventions.kinds.prompt_swap import PromptSwap
from interventions.kinds.step_skip import StepSkip
from interventions.run import replayed_loops
from interventions.sites import AttentionAt, BlockAt, Geometry, LatentsAt, NoSuchSiteError, OutputAt, PromptAt, Site
from pipeline.experiment import ExperimentError, parse

CROSS = Geometry(
    steps=4,
    blocks=3,
    frames=5,
    given_frames=1,
    height=2,
    width=3,
    calls=(("cond",), ("uncond",)),
    heads=2,
    head_components=("attn1", "attn2"),
    knockout=("attn1", "attn2"),
)
JOINT = Geometry(
    steps=4,
    blocks=4,
    frames=5,
    given_frames=0,
    height=2,
    width=3,
    components=("attn1", "ffn", "update", "residual"),
    text_components=("attn1", "residual"),
    knockout=("attn1",),
    block_lists=(0, 0, 1, 1),
    edits=("drop",),
)
POINT = {"step": 1, "layer": 2}
REVERSE = {"kind": "frame_shuffle", "mode": "reverse"}


def latents(offset: float = 0.0) -> torch.Tensor:
    shape = (3, CROSS.frames, 2 * CROSS.height, 2 * CROSS.width)
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape) + offset


def context(**given: object) -> RowContext:
    return RowContext(geometry=CROSS, levels=((0.0, 1.0),) * 5, seed=(7,), **given)  # type: ignore[arg-type]


EVERY: list[Intervention] = [
    LatentSwap(step=2, steps=2),
    LatentSwap(step=1, donor="seed", offset=3, box="0:1,1:3", alpha=0.5),
    PromptSwap(step=1, donor="sample", branch="both"),
    StepSkip(mode="reuse_branch", branch="uncond", step=2),
    StepSkip(mode="swap", step=1),
    BlockSkip(mode="repeat", **POINT),
    Knockout(pattern="between", frames="0", queries="2-3", head=1, **POINT),
    Compose(step=2, parts={"a": REVERSE, "b": {"kind": "block_skip", "mode": "skip", "layer": 1}}),
]
each = pytest.mark.parametrize("intervention", EVERY, ids=lambda i: i.kind)


class TestData:
    @each
    def test_survives_json_and_is_hashable(self, intervention):
        text = json.dumps(intervention.model_dump(mode="json"))
        again = type(intervention).model_validate_json(text)
        assert again == intervention
        assert len({again, intervention, type(intervention)(**intervention.model_dump())}) == 1
        assert again.points(CROSS) == intervention.points(CROSS)

    @each
    def test_points_and_reads_exist_and_are_listed_once(self, intervention):
        intervention.check(CROSS)
        for found in (intervention.points(CROSS), intervention.reads(CROSS)):
            assert len(set(found)) == len(found)

    @pytest.mark.parametrize("kind", sorted({i.kind for i in EVERY}))
    def test_example_is_an_experiment(self, kind):
        ((name, raw),) = yaml.safe_load(KINDS[kind].example).items()
        grid = parse(name, raw).bind(CROSS)
        assert grid.cells >= 3
        assert len(set(grid.interventions())) == grid.cells
        assert json.loads(json.dumps(dict(grid.experiment.fixed))) is not None


class TestLatentSwap:
    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            pytest.param({}, RunRef("corrupted"), id="pair"),
            pytest.param({"run": "corrupted"}, RunRef("clean"), id="pair-of-corrupted"),
            pytest.param({"donor": "seed"}, RunRef("clean", seed=1), id="seed"),
            pytest.param({"donor": "seed", "offset": 4, "run": "corrupted"}, RunRef("corrupted", seed=4), id="offset"),
            pytest.param({"donor": "sample", "offset": 2}, RunRef("clean", sample=2), id="sample"),
        ],
    )
    def test_reads_the_donors_latents_of_the_same_steps(self, fields, expected):
        swap = LatentSwap(step=1, steps=2, **fields)
        assert swap.points(CROSS) == (LatentsAt(1), LatentsAt(2))
        assert swap.reads(CROSS) == (Read(LatentsAt(1), (expected,)), Read(LatentsAt(2), (expected,)))
        assert swap.first_computed_step(CROSS) == 1

    def test_final_latents_are_the_last_window(self):
        assert LatentSwap(step=4).points(CROSS) == (LatentsAt(4),)
        with pytest.raises(NoSuchSiteError, match=r"2 steps from step 4 reach beyond the last, step 4"):
            LatentSwap(step=4, steps=2).check(CROSS)

    @given(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.sampled_from([{}, {"frame": 2}, {"frames": "0,3-4"}]))
    def test_changes_the_region_by_alpha_and_nothing_else(self, alpha, region):
        swap = LatentSwap(step=1, alpha=alpha, **region)
        value, (read,) = latents(), swap.reads(CROSS)
        out = swap.apply(LatentsAt(1), value, context(donors={read: latents(100.0)}))
        frames = {"frame": [2], "frames": [0, 3, 4]}.get(next(iter(region), ""), list(range(5)))
        expected = latents()
        expected[:, frames] += alpha * 100
        assert torch.equal(out, expected)
        assert torch.equal(value, latents())

    def test_box_is_in_tokens(self):
        swap = LatentSwap(step=1, box="1:2,0:2")
        out = swap.apply(LatentsAt(1), latents(), context(donors={swap.reads(CROSS)[0]: latents(1.0)}))
        changed = (out != latents()).nonzero()
        assert set(changed[:, 2].tolist()) == {2, 3}
        assert set(changed[:, 3].tolist()) == {0, 1, 2, 3}

    def test_offset_has_no_meaning_for_a_pair(self):
        with pytest.raises(ValidationError, match="offset counts seeds or samples"):
            LatentSwap(step=1, offset=1)


class TestPromptSwap:
    @pytest.mark.parametrize(
        ("fields", "steps"),
        [
            pytest.param({}, [1, 2, 3], id="to-the-end"),
            pytest.param({"steps": 2}, [1, 2], id="window"),
        ],
    )
    def test_lasts_for_the_window(self, fields, steps):
        assert PromptSwap(step=1, **fields).points(CROSS) == tuple(PromptAt(s, "cond") for s in steps)

    def test_one_read_a_branch_of_the_donor(self):
        swap = PromptSwap(step=2, branch="both", donor="sample", run="corrupted")
        ref = RunRef("corrupted", sample=1)
        assert swap.reads(CROSS) == (Read(PromptAt(2, "cond"), (ref,)), Read(PromptAt(2, "uncond"), (ref,)))
        assert PromptSwap(step=2).reads(CROSS)[0].source == (RunRef("corrupted"),)

    def test_value_is_the_donors_under_the_same_names(self):
        swap = PromptSwap(step=1)
        own = {"embeds": torch.zeros(4, 2), "mask": torch.ones(4, dtype=torch.bool)}
        donor = {"embeds": torch.ones(4, 2), "mask": torch.zeros(4, dtype=torch.bool), "more": torch.ones(1)}
        out = swap.apply(PromptAt(3, "cond"), own, context(donors={swap.reads(CROSS)[0]: donor}))
        assert out.keys() == own.keys()
        assert all(torch.equal(out[name], donor[name]) for name in own)

    @pytest.mark.parametrize(
        ("donor", "found"),
        [({"embeds": torch.ones(5, 2)}, r"is \(5, 2\), of this run \(4, 2\)"), ({}, "is missing")],
        ids=["longer", "missing"],
    )
    def test_prompts_of_other_shape_are_refused(self, donor, found):
        swap = PromptSwap(step=1)
        with pytest.raises(ValueError, match=found):
            swap.apply(
                PromptAt(1, "cond"), {"embeds": torch.zeros(4, 2)}, context(donors={swap.reads(CROSS)[0]: donor})
            )

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            pytest.param({"step": 4}, "reach beyond the last, step 3", id="step"),
            pytest.param({"step": 1, "steps": 4}, "4 steps from step 1", id="window"),
        ],
    )
    def test_steps_beyond_the_run_are_refused(self, fields, message):
        with pytest.raises(NoSuchSiteError, match=message):
            PromptSwap(**fields).check(CROSS)

    def test_branch_without_guidance_is_refused(self):
        with pytest.raises(NoSuchSiteError, match="branches cond and"):
            PromptSwap(step=1, branch="uncond").check(JOINT)


class TestStepSkip:
    def test_reuse_of_a_branch_takes_its_earlier_output(self):
        skip = StepSkip(mode="reuse_branch", branch="uncond", step=2)
        assert skip.points(CROSS) == (OutputAt(2, "uncond"),)
        before = {"cond": torch.zeros(2), "uncond": torch.ones(2)}
        assert (
            skip.apply(OutputAt(2, "uncond"), torch.full((2,), 9.0), context(previous_outputs=before))
            is before["uncond"]
        )

    def test_a_branch_that_is_not_computed_is_refused(self):
        with pytest.raises(NoSuchSiteError, match="branches cond and"):
            StepSkip(mode="reuse_branch", branch="uncond", step=2).check(JOINT)

    @pytest.mark.parametrize(
        ("step", "other", "expected"), [(1, None, (1, 2)), (1, 3, (1, 3)), (3, 1, (1, 3)), (2, 0, (0, 2))]
    )
    def test_swap_is_one_schedule_however_it_is_named(self, step, other, expected):
        skip = StepSkip(mode="swap", step=step, other=other)
        assert skip.schedule == Schedule("swap", *expected)
        assert skip.points(CROSS) == ()
        assert replayed_loops([skip], skip.schedule, CROSS) == expected[0] == skip.first_computed_step(CROSS)

    @pytest.mark.parametrize(
        ("fields", "replayed"),
        [
            ({"mode": "reuse"}, 3),
            ({"mode": "reuse_branch", "branch": "cond"}, 3),
            ({"mode": "freeze"}, 3),
            ({"mode": "drop"}, 2),
            ({"mode": "repeat"}, 3),
            ({"mode": "swap"}, 2),
        ],
        ids=lambda v: str(v.get("mode")) if isinstance(v, dict) else str(v),
    )
    def test_replays_every_loop_that_needs_no_denoiser(self, fields, replayed):
        skip = StepSkip(step=2, **fields)
        assert replayed_loops([skip], skip.schedule, CROSS) == replayed

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"mode": "reuse", "step": 0}, "mode reuse has no earlier prediction at step 0; start at step 1"),
            ({"mode": "reuse_branch", "step": 0, "branch": "cond"}, "mode reuse_branch has no earlier prediction"),
            ({"mode": "reuse_branch", "step": 1}, "branch is needed with `mode: reuse_branch`"),
            ({"mode": "reuse", "step": 1, "branch": "cond"}, "branch is needed with `mode: reuse_branch`"),
            ({"mode": "drop", "step": 1, "other": 2}, "other names the second step of `mode: swap`"),
            ({"mode": "swap", "step": 1, "other": 1}, "other is step 1 itself"),
        ],
        ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else "",
    )
    def test_fields_fit_the_mode(self, fields, message):
        with pytest.raises(ValidationError, match=message):
            StepSkip(**fields)

    @pytest.mark.parametrize(("step", "other"), [(3, None), (0, 7), (7, 0)])
    def test_swap_with_a_step_that_does_not_exist_is_refused(self, step, other):
        with pytest.raises(NoSuchSiteError, match=r"mode swap: there is no step \d, the last one is 3"):
            StepSkip(mode="swap", step=step, other=other).check(CROSS)

    @pytest.mark.parametrize("mode", ["repeat", "swap"])
    def test_edits_that_the_solver_does_not_allow_are_refused(self, mode):
        with pytest.raises(NoSuchSiteError, match=rf"does not allow the schedule edit '{mode}'.*It allows drop"):
            StepSkip(mode=mode, step=1).check(JOINT)


class TestBlockSkip:
    @pytest.mark.parametrize(("mode", "programs"), [("skip", [(), ()]), ("repeat", [(1, 1), (2, 2)])])
    def test_window_of_blocks_one_by_one(self, mode, programs):
        skip = BlockSkip(mode=mode, step=1, steps=2, layer=1, layers=2, branch="cond")
        points = [BlockAt(s, "cond", b) for s in (1, 2) for b in (1, 2)]
        assert list(skip.points(CROSS)) == points
        assert [skip.program(p) for p in points] == programs * 2

    @pytest.mark.parametrize("fields", [{"layer": 1}, {"layer": 2, "other": 1}], ids=["next", "other"])
    def test_swap_exchanges_two_blocks(self, fields):
        skip = BlockSkip(mode="swap", step=1, **fields)
        assert [skip.program(p) for p in skip.points(CROSS)] == [(2,), (1,)] * 2

    @pytest.mark.parametrize("mode", ["skip", "repeat", "swap"])
    @pytest.mark.parametrize("point", [BlockAt(0, "cond", 1), BlockAt(1, "uncond", 1), BlockAt(1, "cond", 0)], ids=str)
    def test_every_other_block_runs_as_it_is(self, mode, point):
        assert BlockSkip(mode=mode, step=1, layer=1, branch="cond").program(point) == (point.block,)

    @pytest.mark.parametrize("other", [None, 2, 3])
    def test_blocks_of_two_lists_cannot_change_places(self, other):
        with pytest.raises(
            NoSuchSiteError, match=r"of two kinds and cannot change places; block 1 can with blocks \[0\]"
        ):
            BlockSkip(mode="swap", step=1, layer=1, other=other).check(JOINT)
        BlockSkip(mode="swap", step=1, layer=2).check(JOINT)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"mode": "skip", "other": 0}, "other names the second block of `mode: swap`"),
            ({"mode": "swap", "layers": 2}, "layers is a window for skip and repeat"),
            ({"mode": "swap", "other": 2}, "other is block 2 itself"),
        ],
        ids=["other", "layers", "itself"],
    )
    def test_fields_fit_the_mode(self, fields, message):
        with pytest.raises(ValidationError, match=message):
            BlockSkip(**POINT, **fields)

    @pytest.mark.parametrize("fields", [{"mode": "swap"}, {"mode": "skip", "layers": 2}], ids=["swap", "skip"])
    def test_blocks_beyond_the_last_are_refused(self, fields):
        with pytest.raises(NoSuchSiteError, match=r"block=3|reach beyond the last, layer 2"):
            BlockSkip(**POINT, **fields).check(CROSS)


class TestKnockout:
    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({"pattern": "causal"}, Edges("causal")),
            ({"pattern": "anti_causal", "head": 1}, Edges("anti_causal", heads=(1,))),
            ({"pattern": "local", "reach": 0}, Edges("local", window=0)),
            ({"pattern": "from_frames", "frame": 3}, Edges("from_frames", frames=(3,))),
            ({"pattern": "to_frames", "frames": "0,2-3"}, Edges("to_frames", frames=(0, 2, 3))),
            ({"pattern": "between", "frames": "0", "queries": "3-4"}, Edges("between", frames=(0,), queries=(3, 4))),
            ({"pattern": "text"}, Edges("text")),
        ],
        ids=lambda v: v["pattern"] if isinstance(v, dict) else "",
    )
    def test_cuts_the_edges_of_its_pattern(self, fields, expected):
        knockout = Knockout(**POINT, **fields)
        component = "attn2" if fields["pattern"] == "text" else "attn1"
        points = tuple(AttentionAt(1, branch, 2, component) for branch in ("cond", "uncond"))
        assert knockout.points(CROSS) == points
        assert [knockout.cut(p, CROSS) for p in points] == [(expected,)] * 2

    def test_text_is_cut_where_the_model_reads_it(self):
        text = Knockout(pattern="text", **POINT)
        assert (text.attention(CROSS), text.attention(JOINT)) == ("attn2", "attn1")
        text.check(JOINT)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"pattern": "local"}, "reach is needed with `pattern: local`"),
            ({"pattern": "causal", "reach": 1}, "reach is needed with `pattern: local`"),
            ({"pattern": "from_frames"}, "need either frame"),
            ({"pattern": "to_frames", "frame": 1, "frames": "2"}, "need either frame"),
            ({"pattern": "text", "frames": "2"}, "the other patterns take neither"),
            ({"pattern": "between", "frames": "2"}, "queries is needed with `pattern: between`"),
            ({"pattern": "to_frames", "frames": "2", "queries": "1"}, "queries is needed with `pattern: between`"),
            ({"pattern": "causal", "component": "attn2"}, "attn2 reads text, so it has no edges between frames"),
            ({"pattern": "from_frames", "frames": "2-"}, "not a set of frames"),
        ],
        ids=lambda v: "-".join(map(str, v)) if isinstance(v, dict) else "",
    )
    def test_fields_fit_the_pattern(self, fields, message):
        with pytest.raises(ValidationError, match=message):
            Knockout(**POINT, **fields)

    @pytest.mark.parametrize(
        ("geometry", "fields", "message"),
        [
            (CROSS, {"pattern": "from_frames", "frames": "1,5"}, "no frame 5, frames are 0 to 4"),
            (CROSS, {"pattern": "between", "frames": "1", "queries": "6"}, "no frame 6"),
            (CROSS, {"pattern": "causal", "head": 2}, "no head 2: this model has heads 0 to 1"),
            (JOINT, {"pattern": "causal", "head": 0}, "no heads that can be addressed"),
            (CROSS, {"pattern": "text", "component": "attn1"}, "attn1 of this model reads no text"),
            (JOINT, {"pattern": "text", "component": "attn2"}, "block 2 has no softmax attention attn2"),
            (CROSS, {"pattern": "causal", "layers": 2}, "reach beyond the last, layer 2"),
        ],
        ids=["frame", "query", "head", "no-heads", "no-text", "no-attention", "layer"],
    )
    def test_what_the_model_lacks_is_refused(self, geometry, fields, message):
        with pytest.raises(NoSuchSiteError, match=message):
            Knockout(**POINT, **fields).check(geometry)


def composed(**parts: dict[str, object]) -> Compose:
    return Compose(parts=parts)


class TestCompose:
    SWAP: dict[str, object] = {"kind": "latent_swap", "step": 1, "frames": "1-2"}  # noqa: RUF012
    TURN: dict[str, object] = {**REVERSE, "step": 1}  # noqa: RUF012

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["turn-swap", "swap-turn"])
    def test_parts_act_one_after_the_other(self, order):
        fields = [self.TURN, self.SWAP]
        both = composed(a=fields[order[0]], b=fields[order[1]])
        turn, swap = FrameShuffle(mode="reverse", step=1), LatentSwap(step=1, frames="1-2")
        given = context(donors={swap.reads(CROSS)[0]: latents(1000.0)})
        expected = latents()
        for i in order:
            expected = (turn, swap)[i].apply(LatentsAt(1), expected, given)
        assert both.points(CROSS) == (LatentsAt(1),)
        assert torch.equal(both.apply(LatentsAt(1), latents(), given), expected)

    def test_order_matters_where_parts_share_a_point(self):
        one, other = composed(a=self.TURN, b=self.SWAP), composed(a=self.SWAP, b=self.TURN)
        given = context(donors={one.reads(CROSS)[0]: latents(1000.0)})
        first, second = (c.apply(LatentsAt(1), latents(), given) for c in (one, other))
        assert not torch.equal(first, second)
        assert one != other

    def test_a_part_acts_at_its_own_points_only(self):
        both = composed(a=self.TURN, b={**REVERSE, "step": 2})
        assert both.points(CROSS) == (LatentsAt(1), LatentsAt(2))
        assert torch.equal(
            both.apply(LatentsAt(2), latents(), context()),
            FrameShuffle(mode="reverse", step=2).apply(LatentsAt(2), latents(), context()),
        )

    def test_points_reads_cuts_and_first_step_are_the_parts_together(self):
        cut = {"kind": "knockout", "pattern": "causal", **POINT}
        both = composed(
            a=cut,
            b={**cut, "pattern": "from_frames", "frames": "0"},
            c={"kind": "prompt_swap", "step": 2},
            d={**cut, "pattern": "anti_causal", "layer": 0},
        )
        point = AttentionAt(1, "cond", 2)
        assert both.cut(point, CROSS) == (Edges("causal"), Edges("from_frames", frames=(0,)))
        assert both.cut(AttentionAt(1, "cond", 0), CROSS) == (Edges("anti_causal"),)
        assert both.reads(CROSS) == PromptSwap(step=2).reads(CROSS)
        assert both.first_computed_step(CROSS) == 1
        assert len(both.points(CROSS)) == 6
        both.check(CROSS)

    def test_program_is_that_of_the_part_that_replaces_the_block(self):
        block = {"kind": "block_skip", "mode": "skip", "step": 1}
        both = composed(a={**block, "layer": 0}, b={**block, "layer": 2, "mode": "repeat"}, c=self.TURN)
        both.check(CROSS)
        assert [both.program(BlockAt(1, "cond", b)) for b in range(3)] == [(), (1,), (2, 2)]

    def test_schedule_is_that_of_the_one_part(self):
        both = composed(a={"kind": "step_skip", "mode": "repeat", "step": 3}, b=self.TURN)
        assert both.schedule == Schedule("repeat", 3)
        assert replayed_loops([both], both.schedule, CROSS) == 1
        both.check(CROSS)

    def test_recipient_is_the_parts(self):
        assert composed(a={"kind": "patch", **POINT}).recipient == "corrupted"
        assert composed(a=self.TURN).recipient == "clean"

    def test_a_copy_with_another_step_has_other_parts(self):
        both = Compose(step=2, parts={"a": REVERSE})
        assert both.model_copy(update={"step": 3}).points(CROSS) == (LatentsAt(3),)
        assert pickle.loads(pickle.dumps(both)).points(CROSS) == (LatentsAt(2),)

    def test_an_index_beside_the_parts_is_taken_by_those_that_lack_it(self):
        both = Compose(
            step=2,
            frame=3,
            parts={
                "a": REVERSE,
                "b": {"kind": "latent_swap", "step": 1, "frame": "shared"},
                "c": {"kind": "noise", "at": "step", "step": "shared"},
            },
        )
        alone = (FrameShuffle(mode="reverse", step=2), LatentSwap(step=1, frame=3))
        assert both.points(CROSS) == (LatentsAt(2), LatentsAt(1))
        assert both.reads(CROSS) == alone[1].reads(CROSS)
        donors = {read: latents(1000.0) for read in both.reads(CROSS)}
        assert torch.equal(
            both.apply(LatentsAt(1), latents(), context(donors=donors)),
            alone[1].apply(LatentsAt(1), latents(), context(donors=donors)),
        )

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"parts": {"a": REVERSE}}, "part a needs step: give it to the part, or beside parts to sweep it"),
            ({"parts": {"a": TURN}, "step": 1}, "no part takes step from the compose"),
            ({"parts": {"a": {"kind": "turn"}}}, "part a: kind 'turn' cannot be a part; allowed: .*frame_shuffle"),
            ({"parts": {"a": {"kind": "compose", "parts": {}}}}, "kind 'compose' cannot be a part"),
            ({"parts": {"a": {**TURN, "mood": 1}}}, "part a: unknown key 'mood'; allowed: .*mode"),
            ({"parts": {"a": {**TURN, "mode": "turn"}}}, "part a: mode: Input should be 'permute'"),
            ({"parts": {"a": {**TURN, "step": "1"}}}, "part a: step: Input should be a valid integer"),
            ({"parts": {"a": {**TURN, "step": "all"}}}, "step is 'all', but a field of a part has one value"),
            ({"parts": {"a": {**TURN, "step": "0:2"}}}, "step is '0:2', but a field of a part has one value"),
            ({"parts": {"a": {**TURN, "mode": ["reverse"]}}}, r"mode is \['reverse'\], but a field of a part has"),
            ({"parts": {"b": TURN, "a": SWAP}}, "parts act in the order of their names"),
            ({"parts": {"a": 3}}, "part a: expected the fields of an intervention, 3 is not a mapping"),
            ({"parts": 3}, "expected a mapping from a name to the fields"),
            ({"parts": {}}, "at least 1 item"),
            (
                {"parts": {c: {"kind": "step_skip", "mode": "drop", "step": i} for i, c in enumerate("ab")}},
                "one run has one schedule, but parts a and b change it",
            ),
            (
                {"parts": {"a": TURN, "b": {"kind": "patch", **POINT}}},
                "parts must change the same run, but a the clean one, b the corrupted one",
            ),
        ],
        ids=[
            "no-step",
            "unused-step",
            "kind",
            "nested",
            "key",
            "value",
            "text-for-number",
            "all",
            "slice",
            "list",
            "order",
            "no-fields",
            "no-mapping",
            "empty",
            "two-schedules",
            "two-runs",
        ],
    )
    def test_parts_that_do_not_fit_are_refused(self, fields, message):
        with pytest.raises(ValidationError, match=message):
            Compose(**fields)

    @pytest.mark.parametrize(
        ("parts", "message"),
        [
            ([{"kind": "patch", "direction": "noising", "step": 1, "layer": 7}], "part a: .*reach beyond the last"),
            ([{**SWAP, "frames": "1-9"}], "part a: frames 1-9: this run has frames 0 to 4"),
            ([{"kind": "noise", "at": "frame", "frame": 5}], "part a: no frame 5, frames are 0 to 4"),
            (
                [{"kind": "block_skip", "mode": m, **POINT} for m in ("skip", "repeat")],
                "parts a and b both replace block 2, step 1",
            ),
            (
                [
                    {"kind": "block_skip", "mode": "swap", "step": 1, "layer": 1},
                    {"kind": "patch", "direction": "noising", "component": "ffn", **POINT},
                ],
                "part b acts inside block 2 at step 1, which part a replaces",
            ),
            (
                [
                    {"kind": "block_skip", "mode": "repeat", **POINT},
                    {"kind": "knockout", "pattern": "causal", **POINT},
                ],
                "part b acts inside block 2 at step 1, which part a replaces",
            ),
            ([{"kind": "step_skip", "mode": "drop", "step": 1}, TURN], "part b acts at a step that drop of step 1"),
            ([{"kind": "step_skip", "mode": "repeat", "step": 1}, TURN], "part b acts at a step that repeat of step 1"),
            ([{"kind": "step_skip", "mode": "swap", "step": 0}, TURN], "part b acts at a step that swap of step 0"),
            ([{"kind": "step_skip", "mode": "drop", "step": 0}, TURN], "part b acts at a step that drop of step 0"),
            (
                [{"kind": "step_skip", "mode": m, "step": 2} for m in ("drop", "freeze")],
                "part b acts at a step that drop",
            ),
        ],
        ids=[
            "layer",
            "frames",
            "frame",
            "two-programs",
            "inside-swapped",
            "cut-inside",
            "dropped",
            "repeated",
            "swapped",
            "entry",
            "frozen-and-dropped",
        ],
    )
    def test_parts_that_make_each_other_void_are_refused(self, parts, message):
        both = Compose(parts=dict(zip("abc", parts, strict=False)))
        with pytest.raises(NoSuchSiteError, match=message):
            both.check(CROSS)

    def test_whole_block_and_its_replacement_can_go_together(self):
        """What leaves a block exists whatever computed it."""
        update = {"kind": "patch", "direction": "noising", "component": "residual", **POINT}
        composed(a={"kind": "block_skip", "mode": "skip", **POINT}, b=update).check(CROSS)

    def test_a_sweep_of_steps_moves_the_parts_that_follow(self):
        raw = {
            "kind": "compose",
            "step": "1:",
            "layer": [0, 2],
            "parts": {"1": self.TURN, "2": {"kind": "patch", "direction": "noising"}},
        }
        grid = parse("both", raw).bind(CROSS)
        assert grid.dims == ("step", "layer")
        sites = [[p for p in cell.points(CROSS) if isinstance(p, Site)] for cell in grid.interventions()]
        assert [(s[0].step, s[0].block) for s in sites] == [(s, layer) for s in (1, 2, 3) for layer in (0, 2)]

    def test_a_refused_part_is_a_problem_of_the_experiment(self):
        raw = {"kind": "compose", "step": "all", "parts": {"a": {"kind": "patch", "layer": 3}}}
        with pytest.raises(ExperimentError, match=r"experiments\.both: part a: .*reach beyond the last, layer 2"):
            parse("both", raw).bind(CROSS)
        with pytest.raises(ExperimentError, match=r"experiments\.both\.parts: part a: unknown key 'leyer'"):
            parse("both", {"kind": "compose", "parts": {"a": {"kind": "patch", "leyer": 3}}})
