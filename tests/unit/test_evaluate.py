"""The evaluation of the embedded model: what it measures, what a check catches, and the page it writes."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch

from pipeline import models
from pipeline.embedded import build, evaluate
from pipeline.samples import Sample
from pipeline.tasks import maze_score
from pipeline.tasks import maze_world as world
from pipeline.tasks.maze import MazeTask
from pipeline.tasks.task import Sampler

TINY = evaluate.Settings(mazes=2, balanced_mazes=1, seeds=3, steps=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with random weights: one block."""
    path = tmp_path_factory.mktemp("model") / "maze"
    build.save_pipeline(build.build_pipeline(3, num_layers=1), path)
    (path / "training.json").write_text('{"seed": 3, "steps": 0, "wall_seconds": 1}')
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    torch.set_num_threads(1)
    return models.load_pipeline(models.describe(str(folder)), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def card(folder):
    return evaluate.evaluate(folder, TINY, command="python -m pipeline.embedded.evaluate")


class Solver:
    """Stands in for the pipeline call: shows true solutions, "any" going to red on even noise seeds."""

    def __init__(self, early=0.5):
        self.early = early

    def __call__(self, pipe, task, maze, rows, steps):
        problem = maze_score.held_out_maze(maze, task.balanced)
        truth = {goal: world.PALETTE[world.solution(problem, goal)].astype(np.float32) for goal in ("red", "blue")}
        goals = [p if p != "any" else ("red", "blue")[seed % 2] for p, seed in rows]
        final = np.stack([truth[goal] for goal in goals])
        blend = self.early * truth["red"] + (1 - self.early) * truth["blue"]
        start = np.stack([blend if p == "any" else truth[goal] for (p, _), goal in zip(rows, goals, strict=True)])
        estimates = np.stack([start] + [final] * (steps - 1))[:, :, -1]
        return evaluate.Rollout(
            final=maze_score.classify(final),
            x0_hat=maze_score.classify(estimates),
            lean=maze_score.lean(estimates),
            sigmas=tuple(np.linspace(1, 0.1, steps)),
        )


@pytest.fixture
def perfect(monkeypatch):
    monkeypatch.setattr(evaluate, "rollout", Solver(early=0.45))
    return evaluate.measure(None, evaluate.Settings(mazes=6, balanced_mazes=4, seeds=4, steps=3))


def call(pipe, maze=0):
    task = MazeTask()
    sample = Sample(index=0, prompt="m", seed=0, pair="red/blue", clean_prompt="red", corrupted_prompt="blue",
                    parameters={"maze": maze, "balanced": "either"})  # fmt: skip
    inputs = task.inputs(pipe, sample, Sampler(steps=3))
    return pipe(**inputs.shared, **inputs.per_run, output_type="latent", return_dict=False)[0]


def test_watching_the_steps_changes_nothing_and_leaves_nothing_behind(pipe):
    bare, step = call(pipe), pipe.scheduler.step
    with evaluate.watched_steps(pipe) as estimates:
        watched = call(pipe)
    assert torch.equal(bare, watched)
    assert pipe.scheduler.step == step
    assert len(estimates) == 3


def test_the_last_clean_estimate_is_the_result(pipe):
    with evaluate.watched_steps(pipe) as estimates:
        final = call(pipe)
    torch.testing.assert_close(estimates[-1][:, :, 1:], final[:, :, 1:])
    assert not torch.allclose(estimates[0][:, :, 1:], final[:, :, 1:])


def test_the_watch_is_taken_off_when_a_run_fails(pipe):
    step = pipe.scheduler.step
    with pytest.raises(RuntimeError, match="broke"), evaluate.watched_steps(pipe):
        raise RuntimeError("broke")
    assert pipe.scheduler.step == step


def test_a_rollout_runs_the_problem_that_sweeps_record(pipe):
    shown = evaluate.rollout(pipe, MazeTask(), 4, [("red", 0), ("blue", 0)], steps=3)
    expected = maze_score.classify(MazeTask().video(pipe, call(pipe, maze=4)))
    assert np.array_equal(shown.final, expected)
    assert shown.x0_hat.shape == (3, 2, world.SIZE, world.SIZE)
    assert shown.lean.shape == shown.x0_hat.shape
    assert shown.sigmas[0] == pytest.approx(1.0)
    assert np.array_equal(shown.x0_hat[-1], shown.final[:, -1])


def test_rows_of_different_seeds_start_from_different_noise(pipe):
    estimates = evaluate.rollout(pipe, MazeTask(), 4, [("any", 0), ("any", 1), ("any", 0)], steps=2).x0_hat
    assert np.array_equal(estimates[:, 0], estimates[:, 2])
    assert not np.array_equal(estimates[:, 0], estimates[:, 1])


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [
        (0, 0, 0.0, 1.0),
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (970, 1000, 0.9575, 0.9789),
    ],
)
def test_wilson_intervals(count, of, low, high):
    assert evaluate.interval(count, of) == pytest.approx((low, high), abs=1e-4)


def test_a_solver_of_every_maze_is_seen_as_one(perfect):
    held_out = perfect["held_out"]
    for prompt in build.PROMPTS:
        assert held_out[prompt]["solved"]["percent"] == 100.0
        assert held_out[prompt]["trajectory"] == {"mean": 1.0, "floor": 0.0}
        assert held_out[prompt]["every_frame_legal"]["count"] == 6
    assert held_out["red"]["ends_at_red"]["count"] == 6
    assert held_out["blue"]["ends_at_red"]["count"] == 0


def test_the_share_of_goals_is_counted_among_solved_runs_and_by_maze(perfect):
    balanced = perfect["balanced"]
    assert balanced["solved"]["count"] == 16
    assert balanced["red"]["percent"] == balanced["blue"]["percent"] == 50.0
    assert balanced["mazes_with_both_goals"]["percent"] == 100.0
    assert balanced["mazes_by_share_of_red"]["50 to 75 %"] == 4


def test_an_estimate_that_blends_leans_to_an_answer_and_is_not_solved(perfect):
    curve = perfect["x0_hat"]["any"]
    assert curve["solved_by_lean"] == [6, 6, 6]
    assert curve["solved"] == [0, 6, 6]
    # Leans to blue, while seed 0 ends at red.
    assert curve["agrees_with_end"] == [0, 6, 6]
    assert perfect["x0_hat"]["red"]["solved"] == [6, 6, 6]


def test_a_maze_with_no_solved_run_is_its_own_class():
    figures = evaluate._balanced_figures([[None, None], ["red", None], ["blue", "blue"], ["red", "blue"]])
    bins = figures["mazes_by_share_of_red"]
    assert {name: n for name, n in bins.items() if n} == {"0 %": 1, "50 to 75 %": 1, "100 %": 1, "none solved": 1}
    assert figures["red"] == evaluate.proportion(2, 5)


def test_requirements_are_judged_one_by_one(perfect):
    judged = {r["what"]: r["met"] for r in evaluate.requirements(perfect)}
    assert all(judged.values())
    assert len(judged) == 5
    perfect["x0_hat"]["any"]["solved"][0] = 2
    judged = {r["what"]: r["met"] for r in evaluate.requirements(perfect)}
    assert judged.pop("x0_hat of any solved at step 0") is False
    assert all(judged.values())


@pytest.mark.parametrize(("red", "met"), [(29.9, False), (30.0, True), (70.0, True), (70.1, False), (None, False)])
def test_the_share_of_red_has_two_bounds(perfect, red, met):
    perfect["balanced"]["red"]["percent"] = red
    (share,) = [r for r in evaluate.requirements(perfect) if r["what"].startswith("red among")]
    assert share["met"] is met


def test_a_card_is_plain_json_and_names_its_weights(card, folder):
    assert json.loads(json.dumps(card)) == card
    assert card["model"]["fingerprint"] == models.describe(str(folder)).fingerprint
    assert card["model"]["training"]["seed"] == 3
    assert card["model"]["parameters"] > 10_000
    assert "transformer/diffusion_pytorch_model.safetensors" in card["model"]["weight_bytes"]
    assert card["settings"] == {"mazes": 2, "balanced_mazes": 1, "seeds": 3, "steps": 3, "first_seed": 0}
    assert card["distinct_mazes"] == 2
    assert set(card["libraries"]) == {"torch", "diffusers", "transformers", "numpy"}


def test_the_same_weights_and_settings_give_the_same_card(card, folder):
    again = evaluate.evaluate(folder, TINY, command="python -m pipeline.embedded.evaluate")
    assert again == card


def test_random_weights_solve_nothing_and_meet_no_requirement_on_solving(card):
    assert card["held_out"]["red"]["solved"]["count"] == 0
    assert card["balanced"]["red"] == {"count": 0, "of": 0, "percent": None, "low": 0.0, "high": 100.0}
    assert [r["met"] for r in card["requirements"]][:4] == [False] * 4


def test_the_page_of_a_model_that_solves_nothing_says_so(card):
    page = evaluate.render(card)
    assert "**Requirements not met: red solved on held-out mazes" in page
    assert "no cases" in page
    assert "seed 3, steps 0, wall seconds 1" in page


def test_the_page_shows_the_figures_of_the_card(card, perfect):
    page = evaluate.render({**card, **perfect, "requirements": evaluate.requirements(perfect)[:4]})
    assert "**All requirements are met.**" in page
    assert "| red | 100.0 (61.0 to 100.0) |" in page
    assert "| 0 | 1.000 | 100.0 | 100.0 | 100.0 |" in page
    assert card["model"]["fingerprint"] in page
    assert "python -m pipeline.embedded.evaluate" in page


def test_a_card_without_training_record_says_so(card):
    page = evaluate.render({**card, "model": {**card["model"], "training": None}})
    assert "holds no record of its training" in page


def test_a_check_passes_counts_within_half_a_percent_and_names_those_outside():
    stored = json.loads(json.dumps(CARD))
    close, far = copy.deepcopy(stored), copy.deepcopy(stored)
    close["held_out"]["any"]["solved"]["count"] += 5
    far["held_out"]["any"]["solved"]["count"] -= 6
    far["x0_hat"]["any"]["solved"][1] += 6
    assert evaluate.differences(stored, close) == []
    assert evaluate.differences(stored, far) == [
        "held_out any solved: card 950, now 944 (may differ by 5)",
        "x0_hat any solved at step 1: card 900, now 906 (may differ by 5)",
    ]


def test_a_check_catches_other_weights_a_missing_step_and_a_changed_mean():
    other = copy.deepcopy(CARD)
    other["model"]["fingerprint"] = "other"
    other["x0_hat"]["sigma"].pop()
    other["held_out"]["red"]["trajectory"]["mean"] = 0.9
    found = evaluate.differences(CARD, other)
    assert found[0] == "model fingerprint: card abc, now other"
    assert any(line.startswith("sigma at step 1: card 0.5, now None") for line in found)
    assert any(line.startswith("held_out red trajectory: card 0.99, now 0.9") for line in found)
    assert len(found) == 3


def _prompt(solved):
    return {"solved": evaluate.proportion(solved, 1000), "trajectory": {"mean": 0.99, "floor": 0.0}}


def _curve():
    return {"runs": 1000, "solved": [100, 900], "solved_by_lean": [500, 900], "runs_that_end_at_a_goal": 950,
            "agrees_with_end": [100, 850]}  # fmt: skip


CARD = {
    "model": {"fingerprint": "abc", "parameters": 1},
    "held_out": {"red": _prompt(990), "blue": _prompt(990), "any": _prompt(950)},
    "balanced": {"solved": evaluate.proportion(90, 100), "mazes_by_share_of_red": {"0 %": 1}},
    "x0_hat": {"sigma": [1.0, 0.5], "red": _curve(), "blue": _curve(), "any": _curve()},
}


@pytest.mark.parametrize("bad", [{"mazes": 0}, {"seeds": 0}, {"first_seed": -1}])
def test_empty_evaluations_are_refused(bad):
    with pytest.raises(ValueError, match="cannot have these sizes"):
        evaluate.Settings(**bad)


def test_the_command_writes_a_card_that_its_check_confirms_until_it_is_changed(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "maze")
    paths = ["--model", "maze", "--out", "maze/model_card.json", "--docs", "docs/card.md", "--threads", "1"]
    sizes = ["--mazes", "1", "--balanced-mazes", "1", "--seeds", "2", "--steps", "2"]
    assert evaluate.main([*paths, *sizes]) == 0
    assert "red solved on held-out mazes: 0.0 %, asked at least 97 %: NOT MET" in capsys.readouterr().out
    out = tmp_path / "maze" / "model_card.json"
    card = json.loads(out.read_text())
    assert card["command"].startswith("python -m pipeline.embedded.evaluate --model maze --mazes 1 --balanced-mazes 1")
    assert str(tmp_path) not in out.read_text()
    assert (tmp_path / "docs" / "card.md").read_text() == evaluate.render(card)

    assert evaluate.main([*paths, "--check"]) == 0
    assert "figures confirmed" in capsys.readouterr().out

    card["held_out"]["red"]["trajectory"]["mean"] = 0.5
    out.write_text(json.dumps(card))
    assert evaluate.main([*paths, "--check"]) == 1
    printed = capsys.readouterr().out
    assert "held_out red trajectory: card 0.5" in printed
    assert "docs/card.md is not the page of maze/model_card.json" in printed
