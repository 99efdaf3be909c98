"""Measure the embedded maze model and write its card: ``python -m pipeline.embedded.evaluate`` (``--check`` to verify).

The runs are those a sweep records: problems, noise and decoding come from the maze task, denoising from the
pipeline's own ``__call__``. Only ``scheduler.step`` is watched, for the clean estimate at each step.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import models
from pipeline.embedded import build
from pipeline.samples import Sample
from pipeline.tasks import maze_score
from pipeline.tasks import maze_world as world
from pipeline.tasks.maze import MazeTask
from pipeline.tasks.task import Sampler

FOLDER = Path(__file__).parent / "maze"
TOLERANCE = 0.005
"""Share of cases by which a count may differ on another machine, where floating-point sums are ordered otherwise."""
Z95 = 1.959964
SPLIT = (
    "A maze is held out if a hash of its canonical form (the smallest of its 16 images under rotation, reflection "
    f"and exchange of goals) falls on one value in {world.HELD_OUT_SHARE}; training never sees any image of it."
)
Answer = world.Goal | None
Card = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The size of an evaluation; with the weights, all that decides its figures.

    Attributes
    ----------
    mazes : held-out mazes 0 to ``mazes`` - 1, each run once with every prompt.
    balanced_mazes, seeds : held-out mazes with equally far goals, and runs of "any" on each.
    steps : Euler steps. first_seed : first noise seed.
    """

    mazes: int = 1000
    balanced_mazes: int = 100
    seeds: int = 16
    steps: int = 20
    first_seed: int = 0

    def __post_init__(self) -> None:
        empty = {name: value for name, value in asdict(self).items() if value < int(name != "first_seed")}
        if empty:
            raise ValueError(f"an evaluation cannot have these sizes: {empty}. Give at least 1 (first_seed: 0).")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What one pipeline call shows.

    Attributes
    ----------
    final : classes of the final videos, (rows, FRAMES, SIZE, SIZE).
    x0_hat : classes of the last frame of the clean estimate, (steps, rows, SIZE, SIZE).
    lean : the same to the nearest colour, clear or not; see ``maze_score.lean``.
    sigmas : noise level entering each step.
    """

    final: NDArray[np.uint8]
    x0_hat: NDArray[np.uint8]
    lean: NDArray[np.uint8]
    sigmas: tuple[float, ...]


@dataclass(slots=True)
class Tally:
    """Results of the runs with one prompt."""

    answers: list[Answer] = field(default_factory=list)
    trajectories: list[float] = field(default_factory=list)
    legal: list[bool] = field(default_factory=list)
    by_step: list[list[Answer]] = field(default_factory=list)
    lean_by_step: list[list[Answer]] = field(default_factory=list)

    def add(self, maze: world.Maze, shown: Rollout, row: int) -> None:
        """Score one row: its final video, and its clean estimate at every step."""
        score = maze_score.score(maze, shown.final[row])
        self.answers.append(score.answer)
        self.trajectories.append(score.trajectory)
        self.legal.append(all(score.legal))
        self.by_step.append([maze_score.answer(maze, frame) for frame in shown.x0_hat[:, row]])
        self.lean_by_step.append([maze_score.answer(maze, frame) for frame in shown.lean[:, row]])


@contextmanager
def watched_steps(pipe: Any) -> Iterator[list[torch.Tensor]]:
    """Collect ``x0_hat = sample - sigma * model_output`` of every solver step taken inside the block."""
    scheduler, original = pipe.scheduler, pipe.scheduler.step
    estimates: list[torch.Tensor] = []

    def step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sigma = float(scheduler.sigmas[len(estimates)])
        estimates.append(sample - sigma * model_output)
        return original(model_output, timestep, sample, *args, **kwargs)

    scheduler.step = step
    try:
        yield estimates
    finally:
        del scheduler.step


def rollout(pipe: Any, task: MazeTask, maze: int, rows: list[tuple[str, int]], steps: int) -> Rollout:
    """Run one maze for rows of (prompt, noise seed) in one call of the pipeline."""
    seeds = sorted({seed for _, seed in rows})
    inputs = {seed: task.inputs(pipe, _sample(task, maze, seed), Sampler(steps=steps)) for seed in seeds}
    embeds = build.encode_prompts(pipe, [prompt for prompt, _ in rows])
    with watched_steps(pipe) as estimates:
        final = pipe(
            **inputs[seeds[0]].shared,
            latents=torch.cat([inputs[seed].per_run["latents"][:1] for _, seed in rows]),
            prompt_embeds=embeds,
            output_type="latent",
            return_dict=False,
        )[0]
    last = np.stack([task.video(pipe, estimate[:, :, -1:])[:, 0] for estimate in estimates])
    return Rollout(
        final=maze_score.classify(task.video(pipe, final)),
        x0_hat=maze_score.classify(last),
        lean=maze_score.lean(last),
        sigmas=tuple(float(s) for s in pipe.scheduler.sigmas[: len(estimates)]),
    )


def _sample(task: MazeTask, maze: int, seed: int) -> Sample:
    parameters: dict[str, int | float | str] = {"maze": maze, "balanced": task.balanced}
    return Sample(
        index=0, prompt=f"maze-{maze:05d}", seed=seed, pair="red/any", clean_prompt="red", corrupted_prompt="any",
        parameters=parameters,
    )  # fmt: skip


def interval(count: int, of: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share; (0, 1) without cases."""
    if of == 0:
        return 0.0, 1.0
    share, z2 = count / of, Z95**2 / of
    centre = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / 4)) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def proportion(count: int, of: int) -> Card:
    """Return a count as the card shows it: with its cases, percentage and 95 % interval in percent."""
    low, high = interval(count, of)
    percent = round(100 * count / of, 2) if of else None
    return {"count": count, "of": of, "percent": percent, "low": round(100 * low, 2), "high": round(100 * high, 2)}


def measure(pipe: Any, settings: Settings, track: Any = None) -> Card:
    """Run the evaluation.

    Parameters
    ----------
    track : wraps an iterable and a label to show progress, as ``rich.progress.track`` does.
    """
    follow = track or (lambda items, label: items)
    tallies, sigmas = _held_out(pipe, settings, follow)
    runs = _balanced(pipe, settings, follow)
    return {
        "held_out": {prompt: _prompt_figures(prompt, tally) for prompt, tally in tallies.items()},
        "x0_hat": {
            "sigma": [round(s, 4) for s in sigmas],
            **{prompt: _step_figures(prompt, tally) for prompt, tally in tallies.items()},
        },
        "balanced": _balanced_figures(runs),
    }


def _held_out(pipe: Any, settings: Settings, follow: Any) -> tuple[dict[str, Tally], tuple[float, ...]]:
    task, tallies = MazeTask(), {prompt: Tally() for prompt in build.PROMPTS}
    sigmas: tuple[float, ...] = ()
    rows = [(prompt, settings.first_seed) for prompt in build.PROMPTS]
    for index in follow(range(settings.mazes), "held-out mazes"):
        shown = rollout(pipe, task, index, rows, settings.steps)
        sigmas = shown.sigmas
        for i, prompt in enumerate(build.PROMPTS):
            tallies[prompt].add(maze_score.held_out_maze(index), shown, i)
    return tallies, sigmas


def _balanced(pipe: Any, settings: Settings, follow: Any) -> list[list[Answer]]:
    task = MazeTask(balanced="yes")
    rows = [("any", settings.first_seed + k) for k in range(settings.seeds)]
    runs = []
    for index in follow(range(settings.balanced_mazes), "balanced mazes"):
        maze = maze_score.held_out_maze(index, "yes")
        final = rollout(pipe, task, index, rows, settings.steps).final
        runs.append([maze_score.answer(maze, video[-1]) for video in final])
    return runs


def _is_solved(prompt: str, answer: Answer) -> bool:
    return answer is not None if prompt == "any" else answer == prompt


def _prompt_figures(prompt: str, tally: Tally) -> Card:
    of = len(tally.answers)
    return {
        "solved": proportion(sum(_is_solved(prompt, a) for a in tally.answers), of),
        "ends_at_red": proportion(tally.answers.count("red"), of),
        "ends_at_blue": proportion(tally.answers.count("blue"), of),
        "every_frame_legal": proportion(sum(tally.legal), of),
        "trajectory": {"mean": round(float(np.mean(tally.trajectories)), 4) if of else None, "floor": 0.0},
    }


def _step_figures(prompt: str, tally: Tally) -> Card:
    solved = np.array([[_is_solved(prompt, a) for a in run] for run in tally.by_step], dtype=bool)
    leaning = np.array([[_is_solved(prompt, a) for a in run] for run in tally.lean_by_step], dtype=bool)
    ended = [(last, steps) for last, steps in zip(tally.answers, tally.lean_by_step, strict=True) if last is not None]
    agrees = np.array([[a == last for a in run] for last, run in ended], dtype=bool)
    return {
        "runs": len(tally.answers),
        "solved": solved.sum(axis=0).tolist(),
        "solved_by_lean": leaning.sum(axis=0).tolist(),
        "runs_that_end_at_a_goal": len(ended),
        "agrees_with_end": agrees.sum(axis=0).tolist() if ended else [0] * solved.shape[1],
    }


def _balanced_figures(runs: list[list[Answer]]) -> Card:
    answers = [answer for maze in runs for answer in maze]
    solved = sum(a is not None for a in answers)
    red_of_solved = [(maze.count("red"), len(maze) - maze.count(None)) for maze in runs]
    bins = {"0 %": 0, "0 to 25 %": 0, "25 to 50 %": 0, "50 to 75 %": 0, "75 to 100 %": 0, "100 %": 0, "none solved": 0}
    for red, of in red_of_solved:
        inner = "none solved" if of == 0 else list(bins)[1 + min(3, 4 * red // of)]
        bins[{0: "0 %", of: "100 %"}.get(red, inner) if of else inner] += 1
    return {
        "solved": proportion(solved, len(answers)),
        "red": proportion(answers.count("red"), solved),
        "blue": proportion(answers.count("blue"), solved),
        "mazes_with_both_goals": proportion(sum(0 < red < of for red, of in red_of_solved), len(runs)),
        "mazes_by_share_of_red": bins,
    }


def requirements(card: Card) -> list[Card]:
    """Compare a card with what studies on the model presuppose: determined prompts solved, "any" truly open."""
    percent = {prompt: card["held_out"][prompt]["solved"]["percent"] for prompt in build.PROMPTS}
    early = card["x0_hat"]["any"]
    checks = [
        ("red solved on held-out mazes", percent["red"], 97.0, 100.0),
        ("blue solved on held-out mazes", percent["blue"], 97.0, 100.0),
        ("any solved on held-out mazes", percent["any"], 92.0, 100.0),
        ("red among solved any on balanced mazes", card["balanced"]["red"]["percent"], 30.0, 70.0),
        ("x0_hat of any solved at step 0", _percent(early["solved"], 0, early["runs"]), 0.0, 20.0),
    ]
    return [
        {"what": what, "percent": value, "least": low, "most": high, "met": value is not None and low <= value <= high}
        for what, value, low, high in checks
    ]


def _percent(counts: list[int], step: int, of: int) -> float | None:
    return round(100 * counts[step] / of, 2) if of else None


def describe(pipe: Any, folder: Path) -> Card:
    """Return what identifies the weights: fingerprint, sizes and the record of their training if there is one."""
    training = folder / "training.json"
    weights = sorted(folder.rglob("*.safetensors"))
    return {
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "shift": pipe.scheduler.config.get("shift"),
        "parameters": sum(p.numel() for p in pipe.transformer.parameters()),
        "fingerprint": models.describe(str(folder)).fingerprint,
        "weight_bytes": {str(file.relative_to(folder)): file.stat().st_size for file in weights},
        "training": json.loads(training.read_text()) if training.exists() else None,
    }


def evaluate(folder: Path, settings: Settings, track: Any = None, command: str = "") -> Card:
    """Load a model folder and return its whole card."""
    pipe = models.load_pipeline(models.describe(str(folder)), dtype="float32", device="cpu")
    mazes = [maze_score.held_out_maze(i) for i in range(settings.mazes)]
    figures = measure(pipe, settings, track)
    return {
        "command": command,
        "settings": asdict(settings),
        "requirements": requirements(figures),
        "model": describe(pipe, folder),
        "split": SPLIT,
        "distinct_mazes": len({world.canonical_key(m.walls, m.start, (m.red, m.blue)) for m in mazes}),
        **figures,
        "libraries": {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
    }


def compared_figures(card: Card) -> dict[str, tuple[float | None, float]]:
    """Return every figure that a check compares, with the difference that rounding across machines may make."""
    found: dict[str, tuple[float | None, float]] = {}
    groups = {**{f"held_out {p}": card["held_out"][p] for p in build.PROMPTS}, "balanced": card["balanced"]}
    for group, figures in groups.items():
        for name, value in figures.items():
            if isinstance(value, dict) and "count" in value:
                found[f"{group} {name}"] = value["count"], _allowed(value["of"])
            elif name == "trajectory":
                found[f"{group} {name}"] = value["mean"], TOLERANCE
    for prompt in build.PROMPTS:
        curve = card["x0_hat"][prompt]
        for name in ("solved", "solved_by_lean", "agrees_with_end"):
            for step, count in enumerate(curve[name]):
                found[f"x0_hat {prompt} {name} at step {step}"] = count, _allowed(curve["runs"])
    for step, sigma in enumerate(card["x0_hat"]["sigma"]):
        found[f"sigma at step {step}"] = sigma, 1e-4
    return found


def _allowed(of: int) -> float:
    return math.ceil(TOLERANCE * of)


def differences(stored: Card, fresh: Card) -> list[str]:
    """Return one line for every figure of a stored card that a fresh one does not confirm."""
    lines = [
        f"model {key}: card {stored['model'][key]}, now {fresh['model'][key]}"
        for key in ("fingerprint", "parameters")
        if stored["model"][key] != fresh["model"][key]
    ]
    old, new = compared_figures(stored), compared_figures(fresh)
    for name in sorted(old.keys() | new.keys()):
        before, tolerance = old.get(name, (None, 0.0))
        after, _ = new.get(name, (None, 0.0))
        same = before is None and after is None
        if not same and (before is None or after is None or abs(before - after) > tolerance + 1e-9):
            lines.append(f"{name}: card {before}, now {after} (may differ by {tolerance:g})")
    return lines


def render(card: Card) -> str:
    """Return the documentation page of a card."""
    model, settings = card["model"], card["settings"]
    met = all(r["met"] for r in card["requirements"])
    missed = [r["what"] for r in card["requirements"] if not r["met"]]
    size = sum(model["weight_bytes"].values()) / 1e6
    parts = [
        "# Model card: embedded maze model",
        "This page is generated from `model_card.json` by the command at its end; do not edit it.",
        (f"A `{model['pipeline']}` with {model['parameters']:,} transformer parameters ({size:.1f} MB of weights) "
        f"that walks a {world.SIZE}x{world.SIZE} maze in {world.FRAMES} latent frames from a given first frame. The "
        'prompts "red" and "blue" determine the goal, "any" leaves it open. '
        f"{settings['steps']} steps of {model['scheduler']} with shift {model['shift']}, guidance 1."),
        "**All requirements are met.**" if met else f"**Requirements not met: {'; '.join(missed)}.**",
        (
            f'Decoding decides the last one: {_lean_at_start(card)} % of the estimates of "any" at step 0 lean to a '
            "solved maze, read by nearest colour alone; see below."
        ),
        _table(
            ["requirement", "asked", "measured", ""],
            [[r["what"], _asked(r), _show(r["percent"]), "met" if r["met"] else "**not met**"]
             for r in card["requirements"]],
        ),
        *_held_out_page(card),
        *_balanced_page(card),
        *_steps_page(card),
        "## Weights and training",
        f"sha256 of the denoiser's weights: `{model['fingerprint']}`.",
        _training(model["training"]),
        "## How to reproduce",
        (f"```\n{card['command']}\n```\n\nWith `--check` the command recomputes the figures at the card's own "
        f"settings, writes nothing and fails if a count differs by more than {100 * TOLERANCE} % of its cases. Noise "
        f"depends on maze and seed alone; seeds from {settings['first_seed']}. Libraries: "
        + ", ".join(f"{name} {number}" for name, number in card["libraries"].items()) + "."),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _held_out_page(card: Card) -> list[str]:
    settings, rows = card["settings"], []
    for prompt, figures in card["held_out"].items():
        shares = [_interval(figures[name]) for name in ("solved", "ends_at_red", "ends_at_blue", "every_frame_legal")]
        rows.append([prompt, *shares, f"{figures['trajectory']['mean']} ({figures['trajectory']['floor']})"])
    return [
        "## Held-out mazes",
        (
            f"{card['split']} Here: {settings['mazes']} mazes ({card['distinct_mazes']} distinct up to symmetry), one "
            "run each; percent with 95 % Wilson interval. Solved: the last frame is legal (no unclear pixel, walls "
            "intact, one agent, trail a simple path from the start) with the agent on the right goal, or on either "
            'for "any". Trajectory: '
            "share of generated frames that keep up a steady walk to a goal (in brackets: a video that does nothing)."
        ),
        _table(["prompt", "solved", "ends at red", "ends at blue", "every frame legal", "trajectory (floor)"], rows),
    ]


def _balanced_page(card: Card) -> list[str]:
    settings, figures = card["settings"], card["balanced"]
    bins = figures["mazes_by_share_of_red"]
    return [
        '## "any" when both goals are equally far',
        (
            f"{settings['balanced_mazes']} mazes, {settings['seeds']} noise seeds each. Solved: "
            f"{_interval(figures['solved'])} %. Of these to red: {_interval(figures['red'])} %, to blue: "
            f"{_interval(figures['blue'])} % (intervals take runs as independent, which runs of one maze are not "
            f"quite). Mazes on which both goals occur: {_interval(figures['mazes_with_both_goals'])} %."
        ),
        _table(["share of red on a maze", *bins], [["mazes", *map(str, bins.values())]]),
    ]


def _steps_page(card: Card) -> list[str]:
    curves, rows = card["x0_hat"], []
    for step, sigma in enumerate(curves["sigma"]):
        row = [str(step), f"{sigma:.3f}"]
        for prompt in build.PROMPTS:
            curve = curves[prompt]
            row += [_show(_percent(curve[name], step, curve["runs"])) for name in ("solved", "solved_by_lean")]
            row.append(_show(_percent(curve["agrees_with_end"], step, curve["runs_that_end_at_a_goal"])))
        rows.append(row)
    header = ["step", "sigma", *(f"{p} {what}" for p in build.PROMPTS for what in ("solved", "leans", "agrees"))]
    return [
        "## When the answer is there",
        (
            "The last frame of the clean estimate `x0_hat = x - sigma v` of the held-out runs at each step. Solved: "
            "percent of runs whose estimate solves the maze, decoded as final videos are: every pixel at least twice "
            "as near to its colour as to any other. Leans: the same with the nearest colour, however near; a majority "
            "vote, by which an estimate that blends both answers 55 to 45 counts as the one it leans to. Agrees: of "
            "the runs that end at a goal, percent whose estimate leans to that goal."
        ),
        _table(header, rows),
    ]


def _lean_at_start(card: Card) -> str:
    curve = card["x0_hat"]["any"]
    return _show(_percent(curve["solved_by_lean"], 0, curve["runs"]))


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _show(percent: float | None) -> str:
    return "no cases" if percent is None else f"{percent:.1f}"


def _interval(share: Card) -> str:
    return f"{_show(share['percent'])} ({share['low']:.1f} to {share['high']:.1f})"


def _asked(requirement: Card) -> str:
    low, high = requirement["least"], requirement["most"]
    return f"at least {low:g} %" if high == 100 else f"at most {high:g} %" if low == 0 else f"{low:g} to {high:g} %"


def _training(record: Card | None) -> str:
    if record is None:
        return "The model folder holds no record of its training."
    return "Training: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in record.items()) + "."


def _command(args: argparse.Namespace, settings: Settings) -> str:
    options = {"model": _shown(args.model), **asdict(settings), "out": _shown(args.out), "docs": _shown(args.docs)}
    flags = (f"--{name.replace('_', '-')} {shlex.quote(str(value))}" for name, value in options.items())
    return " ".join(["python -m pipeline.embedded.evaluate", *flags])


def _shown(path: Path) -> Path:
    # Where a checkout lies on one machine is nothing for a published card.
    full = path.resolve()
    return full.relative_to(Path.cwd()) if full.is_relative_to(Path.cwd()) else Path(full.name)


def _track(items: Iterable[int], label: str) -> Iterable[int]:
    from rich.console import Console
    from rich.progress import track

    return track(list(items), label, console=Console(stderr=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=FOLDER, help="diffusers folder")
    parser.add_argument("--out", type=Path, default=FOLDER / "model_card.json", help="the card, as JSON")
    parser.add_argument("--docs", type=Path, default=Path("docs/model_card.md"), help="the card, as a page")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1, help="torch threads; more rarely pay at this size")
    parser.add_argument("--check", action="store_true", help="recompute the stored card's figures; 1 if any differs")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 1 if ``--check`` finds a difference."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.check:
        stored = json.loads(args.out.read_text())
        fresh = evaluate(args.model, Settings(**stored["settings"]), _track)
        found = differences(stored, fresh)
        if args.docs.exists() and args.docs.read_text() != render(stored):
            found.append(f"{args.docs} is not the page of {args.out}: write it again")
        print("\n".join(found) or f"{args.out}: all {len(compared_figures(stored))} figures confirmed")
        return int(bool(found))
    settings = Settings(**{name: getattr(args, name) for name in asdict(Settings())})
    card = evaluate(args.model, settings, _track, _command(args, settings))
    for path, text in ((args.out, json.dumps(card, indent=2) + "\n"), (args.docs, render(card))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for r in card["requirements"]:
        print(f"{r['what']}: {_show(r['percent'])} %, asked {_asked(r)}: {'met' if r['met'] else 'NOT MET'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
