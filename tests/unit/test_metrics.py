"""Metrics: known values on known videos, floors below them, and NaN wherever a row is not finite."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics import latent as _latent  # noqa: F401  (the registry is filled by importing the package)
from pipeline.metrics.metric import METRICS, Metric, MetricInput, projection, register_metric
from pipeline.samples import Sample
from pipeline.tasks import maze_score
from pipeline.tasks import maze_world as world

MAZE_METRICS = ("goal_evidence", "solved", "solved_any", "trajectory", "reached_clean")
LATENT_METRICS = ("clean_projection", "latent_distance")
SHAPE = (3, world.FRAMES, 4, 4)


def make_sample(clean="red", corrupted="blue", maze=5, balanced="either"):
    return Sample(index=0, prompt=f"maze-{maze:05d}", seed=0, pair=f"{clean}/{corrupted}", clean_prompt=clean,
                  corrupted_prompt=corrupted, parameters={"maze": maze, "balanced": balanced})  # fmt: skip


def given_videos(*classes, sample=None, latents=None, clean=None, corrupted=None):
    video = world.PALETTE[np.stack(classes)].astype(np.float32)
    rng = np.random.default_rng(0)
    drawn = [rng.standard_normal(SHAPE).astype(np.float32) for _ in range(2)]
    return MetricInput(
        video=video,
        latents=np.zeros((len(video), *SHAPE), np.float32) if latents is None else latents,
        clean=drawn[0] if clean is None else clean,
        corrupted=drawn[1] if corrupted is None else corrupted,
        sample=sample or make_sample(),
    )


def truths(sample):
    maze = maze_score.maze_of(sample)
    return world.solution(maze, "red"), world.solution(maze, "blue")


def still(sample):
    return np.repeat(world.first_frame(maze_score.maze_of(sample))[None], world.FRAMES, axis=0)


def test_the_package_registers_every_metric():
    assert set(METRICS) >= {*MAZE_METRICS, *LATENT_METRICS}


@pytest.mark.parametrize("name", [*MAZE_METRICS, *LATENT_METRICS])
def test_a_metric_says_what_it_is(name):
    metric = METRICS[name]
    assert metric.name == name
    assert metric.long_name
    assert metric.description.endswith(".")
    assert metric.defined_for("maze")
    assert metric.defined_for("another task") == (name in LATENT_METRICS)


EXPECTED = {
    "goal_evidence": (1.0, 0.0),
    "solved": (1.0, 0.0),
    "solved_any": (1.0, 1.0),
    "trajectory": (1.0, 1.0),
    "reached_clean": (1.0, 0.0),
}


@pytest.mark.parametrize("name", MAZE_METRICS)
@pytest.mark.parametrize("balanced", ["yes", "no", "either"])
@pytest.mark.parametrize("corrupted", ["other", "any"])
@pytest.mark.parametrize("clean", ["red", "blue"])
def test_true_videos_to_either_goal_have_the_defined_values(name, balanced, corrupted, clean):
    other = "blue" if clean == "red" else "red"
    sample = make_sample(clean, other if corrupted == "other" else "any", balanced=balanced)
    red, blue = truths(sample)
    videos = (red, blue) if clean == "red" else (blue, red)
    assert METRICS[name].compute(given_videos(*videos, sample=sample)).tolist() == pytest.approx(EXPECTED[name])


@pytest.mark.parametrize("name", MAZE_METRICS)
@pytest.mark.parametrize("maze", range(6))
def test_the_floor_is_the_value_of_a_static_first_frame_and_below_the_solution(name, maze):
    sample = make_sample(maze=maze)
    metric = METRICS[name]
    assert metric.floor is not None
    (static,) = metric.compute(given_videos(still(sample), sample=sample))
    assert static == pytest.approx(metric.floor(sample))
    assert metric.floor(sample) < 1.0


@pytest.mark.parametrize("name", LATENT_METRICS)
def test_latent_metrics_have_no_floor(name):
    assert METRICS[name].floor is None


def test_goal_evidence_moves_with_a_blend_and_does_not_read_the_given_frame():
    sample = make_sample()
    red, blue = truths(sample)
    given = given_videos(red, blue, sample=sample)
    blend = 0.3 * given.video[:1] + 0.7 * given.video[1:]
    blend[:, 0] = 0
    shown = MetricInput(
        video=blend, latents=given.latents[:1], clean=given.clean, corrupted=given.corrupted, sample=sample
    )
    assert METRICS["goal_evidence"].compute(shown) == pytest.approx(0.3)


def test_a_blend_that_only_leans_to_the_clean_goal_is_not_solved():
    sample = make_sample()
    red, blue = truths(sample)
    given = given_videos(red, blue, sample=sample)
    blends = np.concatenate([w * given.video[:1] + (1 - w) * given.video[1:] for w in (0.55, 0.9)])
    shown = MetricInput(
        video=blends, latents=given.latents, clean=given.clean, corrupted=given.corrupted, sample=sample
    )
    assert METRICS["solved"].compute(shown).tolist() == [0.0, 1.0]


def test_a_cut_to_the_end_is_solved_but_not_a_walk():
    sample = make_sample()
    red, _ = truths(sample)
    given = given_videos(red[[0, 5, 5, 5, 5, 5]], red[[0, 4, 3, 2, 1, 5]], sample=sample)
    assert METRICS["solved"].compute(given).tolist() == [1.0, 1.0]
    assert (METRICS["trajectory"].compute(given) <= 0.4).all()


def test_reaching_the_goal_by_an_illegal_trail_is_reached_but_not_solved():
    sample = make_sample()
    red, _ = truths(sample)
    red[-1][maze_score.maze_of(sample).start] = world.FLOOR
    given = given_videos(red, sample=sample)
    assert METRICS["reached_clean"].compute(given).tolist() == [1.0]
    assert METRICS["solved"].compute(given).tolist() == [0.0]


@pytest.mark.parametrize("name", ["goal_evidence", "solved", "reached_clean"])
def test_a_clean_prompt_without_a_goal_is_refused(name):
    sample = make_sample("any", "red")
    with pytest.raises(ValueError, match="names no goal: 'any'"):
        METRICS[name].compute(given_videos(still(sample), sample=sample))


def test_clean_projection_is_one_at_the_clean_run_and_zero_at_the_corrupted_one():
    given = given_videos(*truths(make_sample()))
    ends = np.stack([given.clean, given.corrupted])
    shown = given_videos(*truths(make_sample()), latents=ends)
    assert METRICS["clean_projection"].compute(shown) == pytest.approx([1.0, 0.0])


def test_clean_projection_of_equal_runs_is_nan():
    same = np.ones(SHAPE, np.float32)
    shown = given_videos(*truths(make_sample()), clean=same, corrupted=same)
    assert np.isnan(METRICS["clean_projection"].compute(shown)).all()


def test_latent_distance_is_the_root_mean_square_to_the_clean_run():
    clean = np.zeros(SHAPE, np.float32)
    latents = np.stack([clean, clean + 2])
    latents[1, 0] = -2
    shown = given_videos(*truths(make_sample()), latents=latents, clean=clean)
    assert METRICS["latent_distance"].compute(shown) == pytest.approx([0.0, 2.0])


@pytest.mark.parametrize("where", ["video", "latents"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [*MAZE_METRICS, *LATENT_METRICS])
def test_a_row_with_a_non_finite_number_is_nan_and_the_others_are_not(name, value, where):
    red, blue = truths(make_sample())
    given = given_videos(red, blue, red)
    reference = METRICS[name].compute(given)
    getattr(given, where)[1, 0, 2, 1, 1] = value
    values = METRICS[name].compute(given)
    assert np.isnan(values[1])
    assert values[[0, 2]] == pytest.approx(reference[[0, 2]])


@pytest.mark.parametrize("name", [*MAZE_METRICS, *LATENT_METRICS])
def test_all_rows_non_finite_gives_all_nan(name):
    given = given_videos(*truths(make_sample()))
    given.video[:] = np.nan
    assert np.isnan(METRICS[name].compute(given)).all()


@pytest.mark.parametrize("name", [*MAZE_METRICS, *LATENT_METRICS])
def test_rows_are_measured_one_by_one(name):
    red, blue = truths(make_sample())
    latents = np.random.default_rng(1).standard_normal((3, *SHAPE)).astype(np.float32)
    together = METRICS[name].compute(given_videos(red, blue, still(make_sample()), latents=latents))
    alone = [
        METRICS[name].compute(given_videos(video, latents=latents[i : i + 1]))[0]
        for i, video in enumerate((red, blue, still(make_sample())))
    ]
    assert together.dtype == np.float64
    assert together == pytest.approx(alone)


@settings(max_examples=40, deadline=None)
@given(weight=st.floats(-2, 3), seed=st.integers(0, 100))
def test_projection_finds_the_weight_of_a_blend_and_ignores_what_is_orthogonal(weight, seed):
    rng = np.random.default_rng(seed)
    zero, one, aside = rng.standard_normal((3, 4, 5))
    direction = one - zero
    aside -= (aside * direction).sum() / (direction**2).sum() * direction
    assert projection((zero + weight * direction + aside)[None], zero, one)[0] == pytest.approx(weight, abs=1e-9)


def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="metric 'solved' is registered twice"):
        register_metric(METRICS["solved"])


def test_a_metric_must_return_one_value_a_row(monkeypatch):
    monkeypatch.delitem(METRICS, "broken", raising=False)
    broken = register_metric(
        Metric(name="broken", long_name="b", description="b.", tasks=(), compute=lambda given: np.zeros(1))
    )
    monkeypatch.delitem(METRICS, "broken")
    with pytest.raises(ValueError, match=r"metric 'broken' returned shape \(1,\) for 2 rows"):
        broken.compute(given_videos(*truths(make_sample())))
