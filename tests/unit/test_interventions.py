"""Intervention kinds as data, and the laws of what they do to one row."""

from __future__ import annotations

import itertools
import json
from typing import ClassVar

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from interventions import kinds  # noqa: F401  (registers every kind)
from interventions.base import KINDS, Intervention, Read, RowContext, RunRef, Schedule, index_fields, register, window
from interventions.hidden import by_frame
from interventions.kinds.frame_shuffle import FrameShuffle
from interventions.kinds.noise import Noise
from interventions.kinds.patch import Patch
from interventions.kinds.step_skip import StepSkip
from interventions.sites import (
    AttentionAt,
    Geometry,
    LatentsAt,
    NoSuchSiteError,
    PredictionAt,
    Site,
)
from pipeline.experiment import parse

GEOMETRY = Geometry(steps=4, blocks=3, frames=5, given_frames=1, height=2, width=3)
GUIDED = Geometry(steps=4, blocks=3, frames=5, given_frames=1, height=2, width=3, calls=(("cond",), ("uncond",)))
SIGMAS = (1.0, 0.75, 0.5, 0.25, 0.0)
RICH = Geometry(
    steps=4,
    blocks=3,
    frames=5,
    given_frames=1,
    height=2,
    width=3,
    calls=(("cond",), ("uncond",)),
    heads=4,
    head_components=("attn1", "attn2"),
    knockout=("attn1", "attn2"),
)
"""A model that has what every kind's example asks for."""
CHANNELS, TOKENS = 4, GEOMETRY.frames * GEOMETRY.tokens_per_frame


def numbered(*shape: int, offset: float = 0.0) -> torch.Tensor:
    """Distinct values, so that every element shows where it came from."""
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape) + offset


def latents(offset: float = 0.0) -> torch.Tensor:
    return numbered(3, GEOMETRY.frames, 2, 2, offset=offset)


def context(geometry: Geometry = GEOMETRY, seed: tuple[int, ...] = (7, 0), **given: object) -> RowContext:
    return RowContext(geometry=geometry, levels=tuple((1 - s, s) for s in SIGMAS), seed=seed, **given)  # type: ignore[arg-type]


EVERY_KIND: list[Intervention] = [
    Patch(step=1, layer=2),
    Patch(step=1, layer=2, frame=2, component="attn2", direction="noising", branch="cond", alpha=0.5),
    StepSkip(mode="reuse", step=2),
    StepSkip(mode="freeze", step=2),
    StepSkip(mode="drop", step=2),
    StepSkip(mode="repeat", step=2),
    FrameShuffle(mode="permute", step=1),
    FrameShuffle(mode="reverse", step=1, space="hidden", layer=0),
    FrameShuffle(mode="freeze", step=1, frame=2, run="corrupted"),
    Noise(at="step", step=1),
    Noise(at="frame", frame=2, path="off_path"),
]


def from_example(kind: str) -> Intervention:
    """The first cell of a kind's own example."""
    ((name, raw),) = yaml.safe_load(KINDS[kind].example).items()
    return next(parse(name, raw).bind(RICH).interventions())


EVERY_KIND += [from_example(kind) for kind in sorted(set(KINDS) - {i.kind for i in EVERY_KIND})]


def name_of(intervention: Intervention) -> str:
    return "-".join(
        [intervention.kind, *(str(v) for k, v in intervention if k in ("mode", "value", "at", "direction"))]
    )


every_kind = pytest.mark.parametrize("intervention", EVERY_KIND, ids=name_of)


class TestData:
    @pytest.mark.parametrize("kind", sorted(KINDS))
    def test_the_example_is_an_experiment(self, kind):
        assert from_example(kind).kind == kind

    @every_kind
    def test_survives_json(self, intervention):
        text = json.dumps(intervention.model_dump(mode="json"))
        assert type(intervention).model_validate_json(text) == intervention

    @every_kind
    def test_is_hashable_by_value(self, intervention):
        assert len({intervention, intervention.model_copy()}) == 1

    @every_kind
    def test_is_frozen(self, intervention):
        with pytest.raises(ValidationError, match="frozen"):
            intervention.kind = "other"

    @every_kind
    def test_refuses_unknown_fields(self, intervention):
        with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
            type(intervention)(**{**intervention.model_dump(), "strenght": 1})

    @pytest.mark.parametrize("kind", sorted(KINDS))
    def test_says_what_it_is(self, kind):
        cls = KINDS[kind]
        assert cls.__doc__
        assert cls.formula
        assert "\n" not in cls.formula
        assert f"kind: {kind}" in cls.example
        assert cls.model_fields["kind"].default == kind

    def test_a_name_is_given_once(self):
        class Other(Intervention):
            """Another patch."""

        with pytest.raises(ValueError, match=r"intervention kind 'patch' is registered twice"):
            register("patch")(Other)
        assert KINDS["patch"] is Patch

    def test_registering_again_is_harmless(self):
        assert register("patch")(Patch) is Patch

    @pytest.mark.parametrize(
        ("kind", "fields"),
        [
            pytest.param("patch", {"step": "step", "layer": "layer", "frame": "frame", "head": "head"}, id="patch"),
            pytest.param("noise", {"step": "step", "frame": "frame"}, id="noise"),
            pytest.param("frame_shuffle", {"step": "step", "layer": "layer", "frame": "frame"}, id="frame-shuffle"),
            pytest.param("step_skip", {"step": "step", "other": "step"}, id="step-skip"),
        ],
    )
    def test_index_fields_are_found_inside_optional_ones(self, kind, fields):
        assert {name: mark.coordinate for name, mark in index_fields(KINDS[kind]).items()} == fields

    @every_kind
    def test_points_lie_in_the_run(self, intervention):
        for point in intervention.points(RICH):
            RICH.require(point)

    @every_kind
    def test_first_computed_step_is_not_after_the_first_point(self, intervention):
        """Except where the point itself needs no denoiser: the solver's input or the latents after a step."""
        first = intervention.first_computed_step(GUIDED)
        assert 0 <= first <= GUIDED.steps
        sites = [p.step for p in intervention.points(RICH) if isinstance(p, Site)]
        assert all(first <= s for s in sites)

    @every_kind
    def test_reads_lie_in_the_run(self, intervention):
        for read in intervention.reads(RICH):
            RICH.require(read.point)
            assert read.source


class TestGenerators:
    def draw(self, seed: tuple[int, ...], purpose: str, *coordinates: int) -> tuple[float, ...]:
        return tuple(context(seed=seed).noise_like(torch.zeros(4), purpose, *coordinates).tolist())

    def test_same_seed_purpose_and_coordinates_give_the_same_noise(self):
        assert self.draw((7, 0), "noise", 3) == self.draw((7, 0), "noise", 3)

    def test_anything_else_gives_other_noise(self):
        draws = [
            self.draw(seed, purpose, *coordinates)
            for seed in [(7, 0), (7, 1), (8, 0), (0, 7)]
            for purpose in ["noise at step", "noise at frame", "frame_shuffle"]
            for coordinates in [(), (0,), (1,), (0, 1), (1, 0)]
        ]
        assert len(set(draws)) == len(draws)

    def test_the_order_of_draws_does_not_matter(self):
        one = context()
        first, second = one.noise_like(torch.zeros(3), "a"), one.noise_like(torch.zeros(3), "b")
        other = context()
        assert torch.equal(other.noise_like(torch.zeros(3), "b"), second)
        assert torch.equal(other.noise_like(torch.zeros(3), "a"), first)

    def test_the_global_generator_is_neither_read_nor_moved(self):
        torch.manual_seed(1)
        before = torch.random.get_rng_state()
        first = self.draw((7, 0), "noise")
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.manual_seed(2)
        assert self.draw((7, 0), "noise") == first

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_noise_has_the_dtype_of_the_value_and_the_same_draw(self, dtype):
        noise = context().noise_like(torch.zeros(50, dtype=dtype), "noise")
        assert noise.dtype == dtype
        torch.testing.assert_close(noise, context().noise_like(torch.zeros(50), "noise").to(dtype), rtol=0, atol=0)

    def test_noise_is_of_unit_variance(self):
        noise = context().noise_like(torch.zeros(20_000), "noise")
        assert abs(float(noise.mean())) < 0.03
        assert abs(float(noise.std()) - 1) < 0.03

    def test_seed_of_the_generator_is_known(self):
        """Frozen: another value here would change every stored result without changing a config."""
        assert int(context(seed=(1, 2)).generator("noise at step", 3).integers(2**63)) == FROZEN_DRAW


FROZEN_DRAW = 5173860455448284298


class TestPatch:
    SITE = Site(1, "cond", 2, "update")

    def patched(self, patch: Patch, offset: float = 100.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        value, donor = numbered(TOKENS, CHANNELS), numbered(TOKENS, CHANNELS, offset=offset)
        return (
            value,
            donor,
            patch.apply(self.SITE, value, context(donors=dict.fromkeys(patch.reads(GEOMETRY), donor))),
        )

    @pytest.mark.parametrize(
        ("direction", "recipient", "donor"),
        [
            pytest.param("denoising", "corrupted", "clean", id="denoising"),
            pytest.param("noising", "clean", "corrupted", id="noising"),
            pytest.param("self", "clean", "clean", id="self"),
        ],
    )
    def test_direction_names_both_runs(self, direction, recipient, donor):
        patch = Patch(step=0, layer=0, direction=direction)
        assert (patch.recipient, patch.donor) == (recipient, donor)

    def test_all_of_it_is_the_donor(self):
        _, donor, out = self.patched(Patch(step=1, layer=2))
        assert torch.equal(out, donor)

    def test_none_of_it_is_the_recipient(self):
        value, _, out = self.patched(Patch(step=1, layer=2, alpha=0))
        assert torch.equal(out, value)

    def test_half_of_it_is_the_middle(self):
        value, _, out = self.patched(Patch(step=1, layer=2, alpha=0.5))
        assert torch.equal(out, value + 50)

    def test_more_than_all_goes_beyond_the_donor(self):
        value, _, out = self.patched(Patch(step=1, layer=2, alpha=2))
        assert torch.equal(out, value + 200)

    @given(st.integers(1, GEOMETRY.frames - 1), st.sampled_from([0.5, 1.0]))
    def test_frame_limits_it_to_the_frames_tokens(self, frame, alpha):
        value, _, out = self.patched(Patch(step=1, layer=2, frame=frame, alpha=alpha))
        n = GEOMETRY.tokens_per_frame
        changed = (out != value).any(dim=1).nonzero().flatten().tolist()
        assert changed == list(range(frame * n, (frame + 1) * n))
        assert torch.equal(out[changed], value[changed] + alpha * 100)

    def test_value_is_not_written_into(self):
        for frame in (None, 2):
            value, _, _ = self.patched(Patch(step=1, layer=2, frame=frame))
            assert torch.equal(value, numbered(TOKENS, CHANNELS))

    @pytest.mark.parametrize(
        ("branch", "branches"),
        [
            pytest.param("both", ["cond", "uncond"], id="both"),
            pytest.param("cond", ["cond"], id="cond"),
            pytest.param("uncond", ["uncond"], id="uncond"),
        ],
    )
    def test_branch_chooses_the_sites(self, branch, branches):
        patch = Patch(step=1, layer=2, branch=branch, component="ffn")
        assert patch.points(GUIDED) == tuple(Site(1, b, 2, "ffn") for b in branches)
        assert [read.point for read in patch.reads(GUIDED)] == list(patch.points(GUIDED))

    def test_a_donor_of_another_sample_is_the_wrong_pair_control(self):
        (read,) = Patch(step=1, layer=2, donor_sample=3).reads(GEOMETRY)
        assert read == Read(self.SITE, (RunRef("clean", sample=3),))
        assert not read.source[0].own


class TestNoise:
    RECORDED: ClassVar = [latents(1000.0 * s) for s in range(GEOMETRY.steps)]

    @pytest.mark.parametrize(
        "fields",
        [
            {"at": "step"},
            {"at": "frame"},
            {"at": "step", "frame": 1},
            {"at": "frame", "step": 1},
            {"at": "step", "step": 0, "frame": 1},
            {"at": "frame", "step": 0, "frame": 1},
        ],
        ids=str,
    )
    def test_step_and_frame_go_with_at(self, fields):
        with pytest.raises(
            ValidationError, match="give step with `at: step`, frame with `at: frame`, and not the other"
        ):
            Noise(**fields)

    @pytest.mark.parametrize("path", ["off_path", "on_path"])
    def test_at_a_step_it_depends_on_seed_and_coordinates_only(self, path):
        noise = Noise(at="step", step=2, path=path)
        point = LatentsAt(2)
        one = noise.apply(point, latents(), context(recorded_x0_hat=self.RECORDED))
        other = noise.apply(point, latents(5.0), context(recorded_x0_hat=self.RECORDED, x0_hat=latents(9.0)))
        assert torch.equal(one, other)

    def test_off_the_path_is_unit_noise(self):
        out = Noise(at="step", step=2, path="off_path").apply(
            LatentsAt(2), latents(), context(recorded_x0_hat=self.RECORDED)
        )
        assert torch.equal(out, context().noise_like(latents(), "noise at step", 2))

    @pytest.mark.parametrize("step", range(4))
    def test_on_the_path_is_the_recorded_estimate_renoised_to_sigma(self, step):
        given = context(recorded_x0_hat=self.RECORDED)
        out = Noise(at="step", step=step).apply(LatentsAt(step), latents(), given)
        eps = given.noise_like(latents(), "noise at step", step)
        assert torch.equal(out, (1 - SIGMAS[step]) * self.RECORDED[step] + SIGMAS[step] * eps)

    def test_both_paths_share_the_draw(self):
        """Matched pairs: only what the path adds may differ."""
        given = context(recorded_x0_hat=[torch.zeros_like(latents())] * 4)
        off = Noise(at="step", step=2, path="off_path").apply(LatentsAt(2), latents(), given)
        on = Noise(at="step", step=2).apply(LatentsAt(2), latents(), given)
        torch.testing.assert_close(on, SIGMAS[2] * off)

    def test_every_step_has_a_draw_of_its_own(self):
        given = context(x0_hat=latents())
        noise = Noise(at="frame", frame=2, path="off_path")
        draws = [noise.apply(LatentsAt(s), latents(), given)[:, 2] for s in range(4)]
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws, 2))

    @pytest.mark.parametrize("path", ["off_path", "on_path"])
    @pytest.mark.parametrize("frame", range(1, GEOMETRY.frames))
    def test_at_a_frame_the_others_are_untouched(self, path, frame):
        value = latents()
        out = Noise(at="frame", frame=frame, path=path).apply(LatentsAt(1), value, context(x0_hat=latents(50.0)))
        others = [f for f in range(GEOMETRY.frames) if f != frame]
        assert torch.equal(out[:, others], value[:, others])
        assert not torch.equal(out[:, frame], value[:, frame])
        assert torch.equal(value, latents())

    def test_at_a_frame_on_the_path_takes_the_rows_own_estimate(self):
        given = context(x0_hat=latents(50.0))
        out = Noise(at="frame", frame=3).apply(LatentsAt(2), latents(), given)
        eps = given.noise_like(latents(), "noise at frame", 2)
        expected = (1 - SIGMAS[2]) * latents(50.0) + SIGMAS[2] * eps
        assert torch.equal(out[:, 3], expected[:, 3])

    def test_at_a_frame_before_any_estimate_both_paths_are_pure_noise(self):
        off, on = (
            Noise(at="frame", frame=2, path=p).apply(LatentsAt(0), latents(), context())
            for p in ("off_path", "on_path")
        )
        assert torch.equal(off, on)

    def test_points_are_one_step_or_all(self):
        assert Noise(at="step", step=2).points(GEOMETRY) == (LatentsAt(2),)
        assert Noise(at="frame", frame=2).points(GEOMETRY) == tuple(LatentsAt(s) for s in range(4))

    @pytest.mark.parametrize("run", ["clean", "corrupted"])
    def test_recipient_is_the_asked_run_and_there_is_no_donor(self, run):
        noise = Noise(at="step", step=0, run=run)
        assert (noise.recipient, noise.reads(GEOMETRY)) == (run, ())


class TestFrameShuffle:
    @given(st.integers(0, 3), st.integers(3, 12), st.integers(0, 2), st.integers(0, 1000))
    @settings(max_examples=80)
    def test_permute_moves_every_generated_frame_and_no_given_one(self, step, frames, given_frames, seed):
        geometry = Geometry(
            steps=4, blocks=1, frames=frames + given_frames, given_frames=given_frames, height=1, width=1
        )
        sources = FrameShuffle(mode="permute", step=step).source_frames(context(geometry, seed=(seed,)))
        assert sources[:given_frames] == list(range(given_frames))
        assert sorted(sources) == list(range(frames + given_frames))
        assert all(s != f for f, s in enumerate(sources) if f >= given_frames)

    def test_permute_depends_on_seed_step_and_layer_only(self):
        geometry = Geometry(steps=4, blocks=3, frames=9, given_frames=1, height=1, width=1)

        def order(seed: int, step: int, layer: int | None) -> tuple[int, ...]:
            space = "latents" if layer is None else "hidden"
            shuffle = FrameShuffle(mode="permute", step=step, space=space, layer=layer)
            return tuple(shuffle.source_frames(context(geometry, seed=(seed,))))

        cases = [(seed, step, layer) for seed in (0, 1) for step in (0, 1) for layer in (None, 0, 1)]
        orders = [order(*case) for case in cases]
        assert orders == [order(*case) for case in cases]
        assert len(set(orders)) == len(orders)

    def test_permute_is_the_same_for_both_runs_of_a_pair(self):
        one, other = (FrameShuffle(mode="permute", step=1, run=run) for run in ("clean", "corrupted"))
        assert one.source_frames(context()) == other.source_frames(context())

    def test_reverse_turns_the_generated_frames(self):
        assert FrameShuffle(mode="reverse", step=0).source_frames(context()) == [0, 4, 3, 2, 1]

    @pytest.mark.parametrize(
        ("frame", "sources"),
        [
            pytest.param(1, [0, 1, 1, 1, 1], id="first"),
            pytest.param(3, [0, 1, 2, 3, 3], id="later"),
            pytest.param(4, [0, 1, 2, 3, 4], id="last-changes-nothing"),
        ],
    )
    def test_freeze_holds_every_frame_after(self, frame, sources):
        assert FrameShuffle(mode="freeze", step=0, frame=frame).source_frames(context()) == sources

    def test_reversing_twice_is_nothing(self):
        shuffle = FrameShuffle(mode="reverse", step=1)
        once = shuffle.apply(LatentsAt(1), latents(), context())
        assert not torch.equal(once, latents())
        assert torch.equal(shuffle.apply(LatentsAt(1), once, context()), latents())

    @pytest.mark.parametrize("mode", ["permute", "reverse"])
    def test_no_content_is_lost_in_the_latents(self, mode):
        out = FrameShuffle(mode=mode, step=1).apply(LatentsAt(1), latents(), context())
        assert torch.equal(out[:, 0], latents()[:, 0])
        assert sorted(out.flatten().tolist()) == sorted(latents().flatten().tolist())

    def test_hidden_tokens_move_as_whole_frames(self):
        shuffle = FrameShuffle(mode="permute", step=1, space="hidden", layer=2)
        value = numbered(TOKENS, CHANNELS)
        out = shuffle.apply(Site(1, "cond", 2, "residual"), value, context())
        n = GEOMETRY.tokens_per_frame
        for f, source in enumerate(shuffle.source_frames(context())):
            assert torch.equal(out[f * n : (f + 1) * n], value[source * n : (source + 1) * n])

    def test_hidden_acts_in_every_branch(self):
        shuffle = FrameShuffle(mode="reverse", step=1, space="hidden", layer=2)
        assert shuffle.points(GUIDED) == (Site(1, "cond", 2, "residual"), Site(1, "uncond", 2, "residual"))

    @pytest.mark.parametrize(
        "fields",
        [
            pytest.param({"mode": "permute", "space": "hidden"}, id="hidden-without-layer"),
            pytest.param({"mode": "permute", "layer": 1}, id="latents-with-layer"),
            pytest.param({"mode": "freeze"}, id="freeze-without-frame"),
            pytest.param({"mode": "reverse", "frame": 1}, id="reverse-with-frame"),
        ],
    )
    def test_fields_that_have_no_meaning_are_refused(self, fields):
        with pytest.raises(ValidationError, match=r"is needed with .* and has no meaning with"):
            FrameShuffle(step=0, **fields)


class TestStepSkip:
    def test_reuse_gives_the_prediction_of_the_step_before(self):
        given = context(previous_prediction=latents(3.0), latents_before=latents(9.0))
        assert torch.equal(StepSkip(mode="reuse", step=1).apply(PredictionAt(1), latents(), given), latents(3.0))

    def test_freeze_gives_the_latents_before(self):
        given = context(previous_prediction=latents(3.0), latents_before=latents(9.0))
        assert torch.equal(StepSkip(mode="freeze", step=1).apply(LatentsAt(2), latents(), given), latents(9.0))

    def test_reuse_needs_a_step_before(self):
        with pytest.raises(ValidationError, match=r"mode reuse has no earlier prediction at step 0; start at step 1"):
            StepSkip(mode="reuse", step=0)

    @pytest.mark.parametrize(
        ("mode", "points", "schedule"),
        [
            pytest.param("reuse", (PredictionAt(2),), None, id="reuse"),
            pytest.param("freeze", (LatentsAt(3),), None, id="freeze"),
            pytest.param("drop", (), Schedule("drop", 2), id="drop"),
            pytest.param("repeat", (), Schedule("repeat", 2), id="repeat"),
        ],
    )
    def test_mode_acts_on_a_point_or_on_the_schedule(self, mode, points, schedule):
        skip = StepSkip(mode=mode, step=2)
        assert (skip.points(GEOMETRY), skip.schedule) == (points, schedule)
        assert skip.first_computed_step(GEOMETRY) == 3

    def test_freeze_of_the_last_step_acts_on_the_final_latents(self):
        assert StepSkip(mode="freeze", step=3).points(GEOMETRY) == (LatentsAt(GEOMETRY.steps),)


class TestSites:
    def test_indices_of_each_coordinate(self):
        assert GEOMETRY.indices("step") == (0, 1, 2, 3)
        assert GEOMETRY.indices("layer") == (0, 1, 2)
        assert GEOMETRY.indices("frame") == GEOMETRY.generated_frames == (1, 2, 3, 4)

    def test_heads_are_counted_where_there_are_any(self):
        assert GEOMETRY.indices("head") == ()
        assert RICH.indices("head") == (0, 1, 2, 3)

    def test_other_coordinates_are_unknown(self):
        with pytest.raises(KeyError):
            GEOMETRY.indices("token")

    def test_frames_of_a_token_sequence(self):
        value = numbered(TOKENS, CHANNELS)
        frames = by_frame(value, GEOMETRY)
        assert frames.shape == (GEOMETRY.frames, GEOMETRY.tokens_per_frame, CHANNELS)
        assert torch.equal(frames.flatten(0, 1), value)

    @pytest.mark.parametrize(
        ("point", "says"),
        [
            pytest.param(LatentsAt(5), "steps 0 to 3", id="latents-after-the-last"),
            pytest.param(PredictionAt(4), "steps 0 to 3", id="prediction-after-the-last"),
            pytest.param(Site(0, "uncond", 0, "ffn"), "branches cond", id="branch"),
            pytest.param(Site(0, "cond", 3, "ffn"), "blocks 0 to 2", id="block"),
            pytest.param(Site(0, "cond", 0, "ffn", "text"), "text enters it by cross-attention alone", id="text"),
            pytest.param(Site(0, "cond", 0, "attn1", head=0), "This model has no heads", id="no-heads"),
            pytest.param(AttentionAt(0, "cond", 1), "No block of this model has such attention", id="no-softmax"),
        ],
    )
    def test_a_point_that_does_not_exist_is_refused_with_what_does(self, point, says):
        with pytest.raises(NoSuchSiteError, match=says):
            GEOMETRY.require(point)

    @pytest.mark.parametrize(
        ("point", "says"),
        [
            pytest.param(Site(0, "cond", 0, "attn1", head=4), "heads 0 to 3 of attn1, attn2", id="head"),
            pytest.param(Site(0, "cond", 0, "ffn", head=0), "heads 0 to 3 of attn1, attn2", id="head-of-ffn"),
        ],
    )
    def test_a_head_that_does_not_exist_is_refused_with_those_that_do(self, point, says):
        with pytest.raises(NoSuchSiteError, match=says):
            RICH.require(point)

    def test_the_end_of_the_run_has_latents(self):
        GEOMETRY.require(LatentsAt(4))

    @given(st.integers(0, 9), st.integers(1, 9))
    def test_a_window_lies_inside_or_is_refused(self, start, length):
        if start + length > 8:
            with pytest.raises(NoSuchSiteError, match="reach beyond the last, step 7"):
                window(start, length, 8, "step")
        else:
            assert list(window(start, length, 8, "step")) == [start + i for i in range(length)]
