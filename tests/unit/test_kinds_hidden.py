"""Kinds that edit hidden tokens and frames: the laws of what each does to one row, and what its fields refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from interventions import kinds  # noqa: F401  (registers every kind)
from interventions.base import Intervention, Read, RowContext, RunRef
from interventions.hidden import HiddenIntervention
from interventions.kinds.ablate import Ablate
from interventions.kinds.frame_shuffle import FrameShuffle
from interventions.kinds.hidden_noise import HiddenNoise
from interventions.kinds.latent_noise import LatentNoise
from interventions.kinds.noise import Noise
from interventions.kinds.seed_ensemble import SeedEnsemble
from interventions.kinds.steer import Steer
from interventions.sites import ALL_HEADS, Geometry, LatentsAt, NoSuchSiteError, Site
from pipeline.experiment import parse

GEOMETRY = Geometry(
    steps=4,
    blocks=3,
    frames=5,
    given_frames=1,
    height=2,
    width=3,
    calls=(("cond",), ("uncond",)),
    heads=2,
    head_components=("attn1",),
    text_components=("residual", "update"),
    levels=((0.0, 1.0), (0.3, 0.7), (0.5, 0.5), (0.8, 0.2), (1.0, 0.0)),
)
PAIRED = Geometry(steps=4, blocks=1, frames=4, given_frames=1, height=2, width=2, frame_patch=2, levels=GEOMETRY.levels)
"""Two frames of the latents share one token frame."""
CHANNELS = 8
SITE = Site(1, "cond", 2, "residual")
WHERE: dict[str, Any] = {"step": 1, "layer": 2, "component": "residual"}

HIDDEN: list[HiddenIntervention] = [
    Ablate(value="zero", **WHERE),
    Ablate(value="mean", reference=2, **WHERE),
    Ablate(value="resample", **WHERE),
    Ablate(value="gaussian", **WHERE),
    Steer(strength=0.7, **WHERE),
    Steer(per_token=True, **WHERE),
    SeedEnsemble(seeds=2, **WHERE),
    HiddenNoise(strength=0.5, **WHERE),
]
DRAWING = [k for k in HIDDEN if k.kind == "hidden_noise" or getattr(k, "value", "") == "gaussian"]
LATENT: list[Intervention] = [
    LatentNoise(step=1),
    LatentNoise(step=1, form="additive", strength=0.5),
    FrameShuffle(mode="drop", frame=2, step=1),
    FrameShuffle(mode="permute", step=1, steps=2),
    FrameShuffle(mode="reverse", space="hidden", layer=0, layers=2, step=1, component="attn1", branch="cond"),
]


def name_of(kind: Intervention) -> str:
    return "-".join(str(v) for k, v in kind if k in ("kind", "value", "per_token", "mode", "form"))


every_hidden = pytest.mark.parametrize("kind", HIDDEN, ids=name_of)
every_kind = pytest.mark.parametrize("kind", [*HIDDEN, *LATENT], ids=name_of)


def tokens(seed: int, n: int = GEOMETRY.tokens, channels: int = CHANNELS) -> torch.Tensor:
    """Activations whose channels differ in mean and spread."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(channels, generator=generator) + 0.5
    return torch.randn(n, channels, generator=generator) * scale + torch.randn(channels, generator=generator)


def latents(seed: int = 0, frames: int = GEOMETRY.frames) -> torch.Tensor:
    return torch.randn(3, frames, 4, 6, generator=torch.Generator().manual_seed(seed))


def context(geometry: Geometry = GEOMETRY, seed: tuple[int, ...] = (7, 0), **given: Any) -> RowContext:
    return RowContext(geometry=geometry, levels=geometry.levels, seed=seed, **given)


def with_donors(kind: HiddenIntervention, *donors: torch.Tensor, site: Site = SITE, **given: Any) -> RowContext:
    """A context that holds one donor for each source; missing ones are drawn."""
    sources = kind.sources()
    values = [*donors, *(tokens(90 + i) for i in range(len(donors), len(sources)))]
    return context(donors={Read(site, s): v for s, v in zip(sources, values, strict=True)}, **given)


def changed_rows(before: torch.Tensor, after: torch.Tensor) -> set[int]:
    return set((before != after).any(dim=1).nonzero().flatten().tolist())


def limited(kind: HiddenIntervention, **region: Any) -> HiddenIntervention:
    return type(kind)(**{**kind.model_dump(), **region})


class TestEveryKind:
    @every_kind
    def test_survives_json(self, kind):
        assert type(kind).model_validate_json(kind.model_dump_json()) == kind

    @every_kind
    def test_its_example_is_an_experiment_on_this_geometry(self, kind):
        ((name, raw),) = yaml.safe_load(type(kind).example).items()
        assert parse(name, raw).bind(GEOMETRY).cells > 1

    @every_kind
    def test_says_what_it_is_in_one_line(self, kind):
        assert "<-" in type(kind).formula
        assert "\n" not in type(kind).formula

    @every_kind
    def test_passes_the_check_of_a_geometry_that_has_its_points(self, kind):
        kind.check(GEOMETRY)

    @every_kind
    def test_a_window_beyond_the_last_step_is_refused(self, kind):
        with pytest.raises(NoSuchSiteError, match=r"step"):
            type(kind)(**{**kind.model_dump(), "steps": 4}).check(GEOMETRY)

    @every_hidden
    def test_acts_in_every_block_and_step_of_its_windows(self, kind):
        wide = limited(kind, layer=1, layers=2, steps=2)
        assert {(s.step, s.block) for s in wide.points(GEOMETRY)} == {(s, b) for s in (1, 2) for b in (1, 2)}
        assert {s.branch for s in wide.points(GEOMETRY)} == {"cond", "uncond"}

    @every_hidden
    def test_reads_each_source_at_each_of_its_points(self, kind):
        assert len(kind.reads(GEOMETRY)) == len(kind.sources()) * len(kind.points(GEOMETRY))

    @every_hidden
    def test_changes_something_and_writes_into_nothing(self, kind):
        value, given_ = tokens(1), with_donors(kind)
        donors = {read: donor.clone() for read, donor in given_.donors.items()}
        out = kind.apply(SITE, value, given_)
        assert changed_rows(value, out) == set(range(GEOMETRY.tokens))
        assert torch.equal(value, tokens(1))
        assert all(torch.equal(given_.donors[read], donor) for read, donor in donors.items())

    @every_hidden
    @given(st.sets(st.integers(0, 4), min_size=1), st.integers(0, 1), st.integers(0, 2))
    @settings(max_examples=25)
    def test_a_region_touches_only_its_tokens(self, kind, frames, top, left):
        box = f"{top}:2,{left}:3"
        part = limited(kind, frames=",".join(map(str, sorted(frames))), box=box)
        value = tokens(1)
        out = part.apply(SITE, value, with_donors(part))
        places = [y * 3 + x for y in range(top, 2) for x in range(left, 3)]
        chosen = {f * GEOMETRY.tokens_per_frame + p for f in frames for p in places}
        assert changed_rows(value, out) <= chosen
        if part.kind != "hidden_noise":
            whole = kind.apply(SITE, value, with_donors(kind))
            assert torch.equal(out[sorted(chosen)], whole[sorted(chosen)])

    @every_hidden
    def test_text_tokens_have_no_region(self, kind):
        assert limited(kind, stream="text").points(GEOMETRY)[0].stream == "text"
        with pytest.raises(ValidationError, match="choose video tokens"):
            limited(kind, stream="text", frames="1-2")

    @every_hidden
    def test_text_tokens_change_as_a_sequence_of_their_own_length(self, kind):
        site = Site(1, "cond", 2, "residual", "text")
        text = limited(kind, stream="text")
        donors = [tokens(60 + i, n=7) for i in range(len(text.sources()))]
        value = tokens(2, n=7)
        out = text.apply(site, value, with_donors(text, *donors, site=site))
        assert out.shape == value.shape
        assert changed_rows(value, out) == set(range(7))

    @every_hidden
    def test_one_head_is_changed_like_a_whole(self, kind):
        site = Site(1, "cond", 2, "attn1", head=1)
        part = limited(kind, component="attn1", head=1, frame=3)
        assert part.points(GEOMETRY)[0] == site
        value = tokens(3)
        out = part.apply(site, value, with_donors(part, site=site))
        assert changed_rows(value, out) == set(range(18, 24))


class TestDraws:
    @pytest.mark.parametrize("kind", DRAWING, ids=name_of)
    def test_do_not_depend_on_the_run_the_branch_or_earlier_draws(self, kind):
        """Matched conditions: two runs of a pair, two branches and any batch see the same noise."""
        used = context()
        used.noise_like(torch.zeros(5), "anything", 3)
        expected = kind.apply(SITE, tokens(1), context())
        assert torch.equal(kind.apply(SITE, tokens(1), used), expected)
        assert torch.equal(limited(kind, run="corrupted").apply(SITE, tokens(1), context()), expected)
        assert torch.equal(kind.apply(Site(1, "uncond", 2, "residual"), tokens(1), context()), expected)

    @pytest.mark.parametrize("kind", DRAWING, ids=name_of)
    def test_differ_between_samples_steps_blocks_components_streams_and_heads(self, kind):
        sites = [
            SITE,
            Site(2, "cond", 2, "residual"),
            Site(1, "cond", 1, "residual"),
            Site(1, "cond", 2, "ffn"),
            Site(1, "cond", 2, "attn1", "video", 0),
            Site(1, "cond", 2, "attn1", "video", 1),
            Site(1, "cond", 2, "attn1", "video", ALL_HEADS),
        ]
        outs = [kind.apply(site, tokens(1), context()) for site in sites]
        outs.append(kind.apply(SITE, tokens(1), context(seed=(8, 0))))
        outs.append(limited(kind, stream="text").apply(Site(1, "cond", 2, "residual", "text"), tokens(1), context()))
        assert len({tuple(out.flatten().tolist()) for out in outs}) == len(outs)

    @pytest.mark.parametrize("kind", DRAWING, ids=name_of)
    def test_a_window_draws_at_each_point_what_that_point_alone_draws(self, kind):
        wide = limited(kind, steps=2, layer=1, layers=2)
        assert torch.equal(wide.apply(SITE, tokens(1), context()), kind.apply(SITE, tokens(1), context()))


class TestAblate:
    def test_zero_is_zero(self):
        assert torch.equal(Ablate(value="zero", **WHERE).apply(SITE, tokens(1), context()), torch.zeros(30, CHANNELS))

    @pytest.mark.parametrize("value", ["mean", "resample"])
    def test_mean_and_resample_are_the_donor(self, value):
        kind = Ablate(value=value, **WHERE)
        donor = tokens(5)
        assert torch.equal(kind.apply(SITE, tokens(1), with_donors(kind, donor)), donor)

    @pytest.mark.parametrize("value", ["zero", "mean", "resample"])
    @given(st.integers(0, 1000), st.sampled_from([{}, {"frame": 2}, {"frames": "0,3"}, {"box": "0:1,1:3"}]))
    @settings(max_examples=20)
    def test_twice_is_once(self, value, seed, region):
        kind = Ablate(value=value, **WHERE, **region)
        once = kind.apply(SITE, tokens(seed), with_donors(kind))
        assert torch.equal(kind.apply(SITE, once, with_donors(kind)), once)

    @pytest.mark.parametrize("value", ["mean", "resample"])
    def test_a_donor_equal_to_the_row_changes_nothing(self, value):
        kind = Ablate(value=value, frame=2, **WHERE)
        assert torch.equal(kind.apply(SITE, tokens(1), with_donors(kind, tokens(1))), tokens(1))

    def test_mean_reads_the_first_samples_of_the_asked_run(self):
        (source,) = Ablate(value="mean", reference=3, reference_run="corrupted", **WHERE).sources()
        assert source == tuple(RunRef(run="corrupted", sample=i, fixed=True) for i in range(3))

    @pytest.mark.parametrize("run", ["clean", "corrupted"])
    def test_resample_reads_the_rows_own_run_of_another_sample(self, run):
        kind = Ablate(value="resample", donor_sample=2, run=run, **WHERE)
        assert kind.sources() == ((RunRef(run=run, sample=2),),)
        assert kind.recipient == run

    @pytest.mark.parametrize("value", ["zero", "gaussian"])
    def test_zero_and_gaussian_read_no_run(self, value):
        assert Ablate(value=value, **WHERE).reads(GEOMETRY) == ()

    def test_gaussian_keeps_mean_and_spread_of_each_channel(self):
        value = tokens(1, n=20_000)
        out = Ablate(value="gaussian", **WHERE).change(SITE, value, (), context())
        torch.testing.assert_close(out.mean(0), value.mean(0), rtol=0, atol=0.04)
        torch.testing.assert_close(out.std(0), value.std(0), rtol=0.03, atol=0)

    def test_gaussian_is_the_stated_formula_with_the_population_variance(self):
        kind, value = Ablate(value="gaussian", **WHERE), tokens(1)
        eps = context().noise_like(value, "ablate residual video", 1, 2, ALL_HEADS)
        spread = (value - value.mean(0)).square().mean(0).sqrt()
        torch.testing.assert_close(kind.apply(SITE, value, context()), value.mean(0) + spread * eps)

    def test_gaussian_keeps_nothing_but_the_moments(self):
        kind, value = Ablate(value="gaussian", **WHERE), tokens(1)
        torch.testing.assert_close(
            kind.apply(SITE, value, context()), kind.apply(SITE, value.flip(0), context()), rtol=1e-5, atol=1e-6
        )

    @given(st.floats(0.1, 10), st.floats(-5, 5))
    @settings(max_examples=20)
    def test_gaussian_moves_with_scale_and_offset(self, scale, offset):
        kind, value = Ablate(value="gaussian", **WHERE), tokens(1).double()
        expected = scale * kind.apply(SITE, value, context()) + offset
        torch.testing.assert_close(kind.apply(SITE, scale * value + offset, context()), expected)

    def test_gaussian_of_a_frame_takes_the_moments_of_all_frames(self):
        """A frame's own mean would still say what the frame shows."""
        kind = Ablate(value="gaussian", frame=3, **WHERE)
        value = tokens(1)
        value[18:24] += 100
        out = kind.apply(SITE, value, context())
        assert float((out[18:24].mean() - value.mean()).abs()) < 40 < float(value[18:24].mean() - value.mean())

    def test_a_channel_that_does_not_vary_keeps_its_value(self):
        value = tokens(1)
        value[:, 2] = 3.0
        assert torch.equal(Ablate(value="gaussian", **WHERE).apply(SITE, value, context())[:, 2], value[:, 2])

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"value": "zero", "reference": 4},
                "reference has no meaning with `value: zero`; it belongs to `value: mea",
            ),
            (
                {"value": "resample", "reference_run": "corrupted"},
                "reference_run has no meaning with `value: resample`",
            ),
            (
                {"value": "mean", "donor_sample": 2},
                "donor_sample has no meaning with `value: mean`; .* `value: resample`",
            ),
            ({"value": "gaussian", "donor_sample": 3}, "donor_sample has no meaning with `value: gaussian`"),
            ({"value": "mean", "reference": 0}, "greater than or equal to 1"),
            ({"value": "resample", "donor_sample": 0}, "greater than or equal to 1"),
            ({"value": "median"}, "'zero', 'mean', 'resample' or 'gaussian'"),
        ],
        ids=str,
    )
    def test_fields_without_a_meaning_are_refused(self, fields, message):
        with pytest.raises(ValidationError, match=message):
            Ablate(**WHERE, **fields)


class TestSteer:
    CLEAN, CORRUPTED = tokens(11), tokens(12)

    def steered(self, value: torch.Tensor, **fields: Any) -> torch.Tensor:
        kind = Steer(**WHERE, **fields)
        return kind.apply(SITE, value, with_donors(kind, self.CLEAN, self.CORRUPTED))

    @pytest.mark.parametrize("per_token", [False, True])
    def test_strength_zero_is_an_exact_identity(self, per_token):
        assert torch.equal(self.steered(tokens(1), strength=0.0, per_token=per_token), tokens(1))

    @pytest.mark.parametrize("per_token", [False, True])
    def test_runs_that_agree_give_no_direction(self, per_token):
        kind = Steer(strength=5.0, per_token=per_token, **WHERE)
        assert torch.equal(kind.apply(SITE, tokens(1), with_donors(kind, self.CLEAN, self.CLEAN)), tokens(1))

    def test_token_by_token_strength_one_takes_the_mean_corrupted_to_the_mean_clean(self):
        torch.testing.assert_close(self.steered(self.CORRUPTED, per_token=True), self.CLEAN)

    def test_averaged_every_token_moves_alike_by_the_mean_difference(self):
        moved = self.steered(tokens(1)) - tokens(1)
        expected = self.CLEAN.mean(0) - self.CORRUPTED.mean(0)
        torch.testing.assert_close(moved, expected.expand_as(moved))

    @pytest.mark.parametrize("per_token", [False, True])
    @given(st.floats(-3, 3), st.floats(-3, 3))
    @settings(max_examples=20)
    def test_strengths_add_up(self, per_token, a, b):
        twice = self.steered(self.steered(tokens(1), strength=a, per_token=per_token), strength=b, per_token=per_token)
        torch.testing.assert_close(twice, self.steered(tokens(1), strength=a + b, per_token=per_token))

    def test_direction_reads_both_runs_of_the_reference_samples(self):
        clean, corrupted = Steer(reference=2, **WHERE).sources()
        assert [(r.run, r.sample, r.fixed) for r in clean] == [("clean", 0, True), ("clean", 1, True)]
        assert [(r.run, r.sample, r.fixed) for r in corrupted] == [("corrupted", 0, True), ("corrupted", 1, True)]

    def test_the_direction_is_the_same_whichever_run_is_changed(self):
        assert torch.equal(self.steered(tokens(1), run="clean"), self.steered(tokens(1), run="corrupted"))

    def test_strength_must_be_finite(self):
        with pytest.raises(ValidationError, match="finite"):
            Steer(strength=float("inf"), **WHERE)


class TestSeedEnsemble:
    def test_averages_own_run_and_other_noise(self):
        (source,) = SeedEnsemble(seeds=3, run="corrupted", layer=0).sources()
        assert source == tuple(RunRef(run="corrupted", seed=i) for i in range(3))
        assert [ref.own for ref in source] == [True, False, False]

    def test_defaults_are_three_seeds_of_the_residual_at_the_first_step(self):
        kind = SeedEnsemble(layer=1, layers=2)
        assert kind.seeds == 3
        assert {(s.step, s.component) for s in kind.points(GEOMETRY)} == {(0, "residual")}

    def test_an_ensemble_of_itself_changes_nothing(self):
        kind = SeedEnsemble(seeds=1, **WHERE)
        assert torch.equal(kind.apply(SITE, tokens(1), with_donors(kind, tokens(1))), tokens(1))

    def test_takes_the_mean_whatever_the_row_holds(self):
        kind, mean = SeedEnsemble(**WHERE), tokens(4)
        assert torch.equal(kind.apply(SITE, tokens(1), with_donors(kind, mean)), mean)


class TestHiddenNoise:
    @pytest.mark.parametrize("region", [{}, {"frame": 2}, {"box": "0:1,0:3"}], ids=str)
    def test_strength_zero_is_an_exact_identity(self, region):
        assert torch.equal(HiddenNoise(strength=0, **WHERE, **region).apply(SITE, tokens(1), context()), tokens(1))

    @pytest.mark.parametrize("strength", [0.25, 2.0])
    def test_strength_is_the_ratio_of_noise_to_signal_in_every_channel(self, strength):
        value = tokens(1, n=20_000)
        noise = HiddenNoise(strength=strength, **WHERE).change(SITE, value, (), context()) - value
        torch.testing.assert_close(noise.std(0) / value.std(0), torch.full((CHANNELS,), strength), rtol=0.03, atol=0)

    def test_unit_is_the_spread_over_the_chosen_tokens(self):
        """Scaling the other frames leaves the noise of the chosen one alone."""
        kind, value = HiddenNoise(frame=2, **WHERE), tokens(1)
        louder = value * 10
        louder[12:18] = value[12:18]
        assert torch.equal(kind.apply(SITE, value, context())[12:18], kind.apply(SITE, louder, context())[12:18])
        eps = context().noise_like(value, "hidden_noise residual video", 1, 2, ALL_HEADS)[12:18]
        spread = (value[12:18] - value[12:18].mean(0)).square().mean(0).sqrt()
        torch.testing.assert_close(kind.apply(SITE, value, context())[12:18], value[12:18] + spread * eps)

    def test_a_single_token_is_refused_because_nothing_varies(self):
        with pytest.raises(NoSuchSiteError, match="single token"):
            HiddenNoise(frame=2, box="0:1,0:1", **WHERE).check(GEOMETRY)
        HiddenNoise(frames="2-3", box="0:1,0:1", **WHERE).check(GEOMETRY)

    def test_strength_is_not_negative(self):
        with pytest.raises(ValidationError, match="greater than or equal to 0"):
            HiddenNoise(strength=-1, **WHERE)


class TestLatentNoise:
    def test_strength_zero_is_an_exact_identity(self):
        kind = LatentNoise(step=1, form="additive", strength=0, frames="1-3")
        assert torch.equal(kind.apply(LatentsAt(1), latents(), context()), latents())

    def test_additive_adds_noise_of_the_asked_size(self):
        kind = LatentNoise(step=1, steps=2, form="additive", strength=0.5)
        eps = context().noise_like(latents(), "latent_noise", 2)
        assert torch.equal(kind.apply(LatentsAt(2), latents(), context()), latents() + 0.5 * eps)

    def test_on_path_is_the_rows_own_estimate_at_the_steps_level(self):
        estimate, (alpha, sigma) = latents(9), GEOMETRY.levels[2]
        out = LatentNoise(step=2).apply(LatentsAt(2), latents(), context(x0_hat=estimate))
        eps = context().noise_like(latents(), "latent_noise", 2)
        assert torch.equal(out, alpha * estimate + sigma * eps)

    def test_on_path_reads_nothing_of_the_recorded_run(self):
        given_ = context(x0_hat=latents(9), recorded_x0_hat=[latents(20 + s) for s in range(4)])
        alone = context(x0_hat=latents(9))
        kind = LatentNoise(step=2)
        assert torch.equal(kind.apply(LatentsAt(2), latents(), given_), kind.apply(LatentsAt(2), latents(1), alone))

    def test_before_any_estimate_it_is_new_noise_of_the_level(self):
        loud = Geometry(
            steps=1, blocks=1, frames=5, given_frames=1, height=2, width=3, levels=((1.0, 80.0), (1.0, 0.0))
        )
        out = LatentNoise(step=0).apply(LatentsAt(0), latents(), context(loud))
        assert torch.equal(out, 80.0 * context().noise_like(latents(), "latent_noise", 0))

    @pytest.mark.parametrize("form", ["on_path", "additive"])
    @given(st.sets(st.integers(0, 4), min_size=1), st.integers(0, 1), st.integers(0, 2))
    @settings(max_examples=25)
    def test_a_region_touches_its_latents_with_its_part_of_the_draw(self, form, frames, top, left):
        region = {"frames": ",".join(map(str, sorted(frames))), "box": f"{top}:2,{left}:3"}
        given_ = context(x0_hat=latents(9))
        whole = LatentNoise(step=1, form=form).apply(LatentsAt(1), latents(), given_)
        out = LatentNoise(step=1, form=form, **region).apply(LatentsAt(1), latents(), given_)
        expected = latents()
        # Two latents along each side of a token.
        expected[:, sorted(frames), 2 * top :, 2 * left :] = whole[:, sorted(frames), 2 * top :, 2 * left :]
        assert torch.equal(out, expected)

    def test_latent_frames_that_share_a_token_frame_are_noised_together(self):
        value = latents(frames=8)[..., :4]
        out = LatentNoise(step=1, form="additive", frames="2").apply(LatentsAt(1), value, context(PAIRED))
        touched = (out != value).flatten(2).any(2).any(0)
        assert touched.tolist() == [False] * 4 + [True] * 2 + [False] * 2

    def test_every_step_has_a_draw_of_its_own_and_both_forms_share_it(self):
        zero = torch.zeros(3, 5, 4, 6)
        given_ = context(x0_hat=zero)
        draws = {}
        for form in ("on_path", "additive"):
            kind = LatentNoise(step=0, steps=4, form=form)
            draws[form] = [kind.apply(LatentsAt(s), zero, given_) for s in range(4)]
        assert not torch.equal(draws["additive"][1], draws["additive"][2])
        for on_path, additive, (_, sigma) in zip(draws["on_path"], draws["additive"], GEOMETRY.levels, strict=False):
            torch.testing.assert_close(on_path, sigma * additive)

    def test_points_are_the_window(self):
        assert LatentNoise(step=1, steps=3).points(GEOMETRY) == (LatentsAt(1), LatentsAt(2), LatentsAt(3))

    def test_strength_on_the_path_is_refused(self):
        with pytest.raises(ValidationError, match="strength has no meaning with `form: on_path`"):
            LatentNoise(step=1, strength=0.5)

    def test_regions_that_do_not_exist_are_refused(self):
        with pytest.raises(NoSuchSiteError, match="this run has frames 0 to 4"):
            LatentNoise(step=1, frames="3-5").check(GEOMETRY)


class TestNoise:
    def test_before_any_estimate_on_the_path_is_noise_of_the_level(self):
        loud = Geometry(
            steps=1, blocks=1, frames=5, given_frames=1, height=2, width=3, levels=((1.0, 80.0), (1.0, 0.0))
        )
        out = Noise(at="frame", frame=2).apply(LatentsAt(0), latents(), context(loud))
        assert torch.equal(out[:, 2], 80.0 * context().noise_like(latents(), "noise at frame", 0)[:, 2])

    def test_latent_frames_that_share_a_token_frame_are_noised_together(self):
        value = latents(frames=8)[..., :4]
        out = Noise(at="frame", frame=3).apply(LatentsAt(1), value, context(PAIRED))
        assert (out != value).flatten(2).any(2).any(0).tolist() == [False] * 6 + [True] * 2


class TestFrameShuffle:
    @pytest.mark.parametrize(
        ("frame", "sources"),
        [
            pytest.param(1, [0, 2, 2, 3, 4], id="first-generated-shows-the-next"),
            pytest.param(2, [0, 1, 1, 3, 4], id="shows-the-one-before"),
            pytest.param(4, [0, 1, 2, 3, 3], id="last"),
        ],
    )
    def test_drop_shows_a_neighbour(self, frame, sources):
        assert FrameShuffle(mode="drop", frame=frame, step=0).source_frames(context()) == sources

    @given(st.integers(2, 9), st.integers(0, 2), st.data())
    @settings(max_examples=60)
    def test_drop_and_freeze_lose_frames_and_are_idempotent(self, generated, given_frames, data):
        n = generated + given_frames
        geometry = Geometry(steps=2, blocks=1, frames=n, given_frames=given_frames, height=1, width=1)
        frame = data.draw(st.integers(given_frames, n - 1))
        for mode in ("drop", "freeze"):
            kind = FrameShuffle(mode=mode, frame=frame, step=0)
            kind.check(geometry)
            sources = kind.source_frames(context(geometry))
            assert [sources[s] for s in sources] == sources
            assert sources[:given_frames] == list(range(given_frames))
            assert all(s >= given_frames for s in sources[given_frames:])
            lost = set(range(n)) - set(sources)
            assert lost == ({frame} if mode == "drop" else set(range(frame + 1, n)))

    def test_orders_drawn_for_a_seed_are_known(self):
        """Frozen: another order would change stored results without changing a config."""
        geometry = Geometry(steps=4, blocks=3, frames=9, given_frames=1, height=1, width=1)
        latent = FrameShuffle(mode="permute", step=1).source_frames(context(geometry))
        hidden = FrameShuffle(mode="permute", step=1, space="hidden", layer=2).source_frames(context(geometry))
        assert (latent, hidden) == FROZEN_ORDERS

    def test_a_window_keeps_one_order_that_is_drawn_from_its_start(self):
        alone = FrameShuffle(mode="permute", step=1, space="hidden", layer=0)
        wide = FrameShuffle(
            mode="permute", step=1, steps=3, space="hidden", layer=0, layers=3, component="attn2", branch="uncond"
        )
        expected = alone.apply(Site(1, "cond", 0, "residual"), tokens(1), context())
        for point in wide.points(GEOMETRY):
            assert torch.equal(wide.apply(point, tokens(1), context()), expected)

    def test_points_of_a_window(self):
        wide = FrameShuffle(mode="reverse", step=1, steps=2, space="hidden", layer=0, layers=2, branch="uncond")
        assert set(wide.points(GEOMETRY)) == {Site(s, "uncond", b, "residual") for s in (1, 2) for b in (0, 1)}
        latent = FrameShuffle(mode="reverse", step=1, steps=3)
        assert latent.points(GEOMETRY) == (LatentsAt(1), LatentsAt(2), LatentsAt(3))

    @given(st.sampled_from(["permute", "reverse", "freeze", "drop"]), st.integers(1, 3))
    def test_latent_frames_that_share_a_token_frame_move_together(self, mode, frame):
        kind = FrameShuffle(mode=mode, step=1, frame=frame if mode in ("freeze", "drop") else None)
        value = latents(frames=8)
        out = kind.apply(LatentsAt(1), value, context(PAIRED))
        for f, source in enumerate(kind.source_frames(context(PAIRED))):
            assert torch.equal(out[:, 2 * f : 2 * f + 2], value[:, 2 * source : 2 * source + 2])

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"mode": "drop"}, "frame is needed with `mode: freeze` or `drop`"),
            ({"mode": "reverse", "frame": 1}, "has no meaning with the other modes"),
            ({"mode": "reverse", "layers": 2}, "layers has no meaning with `space: latents`"),
            ({"mode": "reverse", "component": "attn1"}, "component has no meaning with `space: latents`"),
            ({"mode": "reverse", "branch": "cond"}, "branch has no meaning with `space: latents`"),
        ],
        ids=str,
    )
    def test_fields_without_a_meaning_are_refused(self, fields, message):
        with pytest.raises(ValidationError, match=message):
            FrameShuffle(step=0, **fields)

    def test_a_frame_that_is_not_generated_is_refused(self):
        with pytest.raises(NoSuchSiteError, match="this run generates frames 1 to 4"):
            FrameShuffle(mode="drop", frame=5, step=0).check(GEOMETRY)

    def test_the_only_generated_frame_cannot_be_dropped(self):
        geometry = Geometry(steps=2, blocks=1, frames=2, given_frames=1, height=1, width=1)
        with pytest.raises(NoSuchSiteError, match="no neighbour"):
            FrameShuffle(mode="drop", frame=1, step=0).check(geometry)


FROZEN_ORDERS = ([0, 2, 4, 6, 5, 3, 7, 8, 1], [0, 2, 4, 7, 8, 1, 5, 6, 3])
