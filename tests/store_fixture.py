"""A small synthetic store of the contracted layout with planted effects, for tests of effects and report."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray

PAIRS = ("red/blue", "green/yellow")
COMPONENTS = ("attn1", "attn2", "ffn")
DIRECTIONS = ("denoising", "noising", "self")
COLOURS = {"red": (214, 69, 65), "blue": (52, 101, 200), "green": (58, 157, 84), "yellow": (226, 185, 46)}
CLEAN, CORRUPTED, FLOOR = 0.9, 0.2, 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """What the store was built from.

    Attributes
    ----------
    recovery : true recovery of ``patch_map``, (step, layer, component).
    skip : true difference of ``skip``, (step, mode).
    clean, corrupted : metric ``goal_match`` of the recorded runs, (sample,).
    values : metric ``goal_match`` of every experiment as stored.
    prompts, pairs : per sample.
    """

    path: Path
    recovery: NDArray[np.float64]
    skip: NDArray[np.float64]
    clean: NDArray[np.float64]
    corrupted: NDArray[np.float64]
    values: dict[str, NDArray[np.float64]]
    prompts: list[str]
    pairs: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Extents of the synthetic sweep."""

    prompts: int = 8
    seeds: int = 2
    steps: int = 20
    layers: int = 6
    frames: int = 8

    @property
    def samples(self) -> int:
        """Number of samples, seeds of a prompt beside each other."""
        return self.prompts * self.seeds

    @property
    def sigma(self) -> NDArray[np.float32]:
        """Noise level entering each step, falling from 1."""
        t = np.linspace(1, 0, self.steps + 1)[:-1]
        return (3 * t / (1 + 2 * t)).astype(np.float32)


def write_store(
    path: Path, shape: Shape | None = None, *, noise: float = 0.04, failures: bool = True, previews: bool = True
) -> Planted:
    """Write the store and return what was planted in it."""
    shape = shape or Shape()
    rng = np.random.default_rng(7)
    prompts = [f"maze-{i // shape.seeds:04d}" for i in range(shape.samples)]
    pairs = [PAIRS[(i // shape.seeds) * len(PAIRS) // shape.prompts] for i in range(shape.samples)]
    # The spread lies between prompts, so that pooling seeds would shrink the intervals.
    clean, corrupted = (
        level + np.repeat(rng.normal(0, 0.05, shape.prompts), shape.seeds) for level in (CLEAN, CORRUPTED)
    )
    recovery, skip = _true_recovery(shape), _true_skip(shape)
    values = _experiment_values(shape, rng, noise, clean, corrupted, recovery, skip)
    _write_root(path)
    _write_samples(path, shape, prompts, pairs)
    _write_baseline(path, shape, rng, clean, corrupted)
    if previews:
        _write_previews(path, shape, pairs)
    for name, array in values.items():
        _write_experiment(path, shape, name, array, rng, failures=failures)
    # Files of the driver lie beside the arrays and must disturb no reader.
    (path / "journal.jsonl").write_text('{"unit": 0}\n')
    (path / "lease").mkdir()
    (path / "lease" / "000001.json").write_text("{}")
    consolidate(path)
    return Planted(
        path=path,
        recovery=recovery,
        skip=skip,
        clean=clean,
        corrupted=corrupted,
        values=values,
        prompts=prompts,
        pairs=pairs,
    )


def consolidate(path: Path) -> None:
    """Consolidate the root, silencing what Zarr says about that and about the files beside the arrays."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata", category=UserWarning)
        warnings.filterwarnings("ignore", message="Object at .* is not recognized", category=UserWarning)
        zarr.consolidate_metadata(str(path))


def _true_recovery(shape: Shape) -> NDArray[np.float64]:
    step = np.arange(shape.steps)[:, None, None] / shape.steps
    layer = np.arange(shape.layers)[None, :, None] / max(shape.layers - 1, 1)
    centre_step, centre_layer, height = (np.array(v) for v in ([0.15, 0.3, 0.5], [0.4, 0.8, 0.5], [0.8, 0.4, 0.0]))
    return height * np.exp(-(((step - centre_step) / 0.12) ** 2) - ((layer - centre_layer) / 0.25) ** 2)


def _true_skip(shape: Shape) -> NDArray[np.float64]:
    step = np.arange(shape.steps)[:, None] / shape.steps
    depth = np.array([-0.5, -0.35, -0.1])
    return depth * np.exp(-(((step - 0.2) / 0.15) ** 2))


def _experiment_values(
    shape: Shape,
    rng: np.random.Generator,
    noise: float,
    clean: NDArray[np.float64],
    corrupted: NDArray[np.float64],
    recovery: NDArray[np.float64],
    skip: NDArray[np.float64],
) -> dict[str, NDArray[np.float64]]:
    def draw(*sizes: int) -> NDArray[np.float64]:
        return rng.normal(0, noise, (shape.samples, *sizes)) if noise else np.zeros((shape.samples, *sizes))

    def along(values: NDArray[np.float64], axes: int) -> NDArray[np.float64]:
        return values.reshape(-1, *(1,) * axes)

    best = recovery.max(axis=(1, 2))
    unchanged = np.ones(shape.steps)
    low, high = along(corrupted, 1), along(clean, 1)
    frame = np.arange(1, shape.frames)
    loss = np.array([0.6, 0.25])[:, None] * np.exp(-frame / 3.0)
    directions = np.stack([low + (high - low) * best, high - (high - low) * best, high * unchanged], axis=2)
    return {
        "patch_map": along(corrupted, 3) + along(clean - corrupted, 3) * recovery + draw(*recovery.shape),
        "patch_direction": directions + draw(shape.steps, 3) * np.array([1, 1, 0]),
        "skip": along(clean, 2) + skip + draw(*skip.shape),
        "noise_frame": along(clean, 2) - loss + draw(*loss.shape),
    }


def _write_root(path: Path) -> None:
    config = {
        "metrics": ["goal_match", "path_length"],
        "model": {"family": "wan", "name": "embedded"},
        "sampler": {"steps": 20, "guidance": 1.0},
        "experiments": {"patch_map": {"kind": "patch", "component": list(COMPONENTS)}},
    }
    attrs = {
        "title": "Maze sweep on planted data",
        "schema_version": 1,
        "config_json": json.dumps(config),
        "config_sha256": "9f" * 32,
        "code_version": "0.1.0",
        "model": json.dumps({"name": "embedded maze model", "parameters": 1200000}),
        "created": "2026-01-05T10:00:00Z",
        "libraries": json.dumps({"torch": "2.13", "zarr": "3.1.6", "xarray": "2026.9.0"}),
        "hardware": json.dumps({"replicas": 2, "device": "cpu"}),
        "experimental_unit": "prompt",
    }
    zarr.open_group(str(path), mode="w", zarr_format=3, attributes=attrs)


def _write_samples(path: Path, shape: Shape, prompts: list[str], pairs: list[str]) -> None:
    strings = {
        "prompt": prompts,
        "pair": pairs,
        "clean_prompt": [f"go to {p.split('/')[0]}" for p in pairs],
        "corrupted_prompt": [f"go to {p.split('/')[1]}" for p in pairs],
        "parameters": [json.dumps({"maze": i}) for i in range(shape.samples)],
    }
    variables = {name: ("sample", np.array(v, dtype=object)) for name, v in strings.items()}
    seeds = ("sample", np.arange(shape.samples, dtype=np.int64) % shape.seeds)
    _write(path, "samples", xr.Dataset({**variables, "seed": seeds}, coords={"sample": _samples(shape)}))


def _write_baseline(
    path: Path, shape: Shape, rng: np.random.Generator, clean: NDArray[np.float64], corrupted: NDArray[np.float64]
) -> None:
    final = np.stack([clean, corrupted], axis=1)
    grow = 1 / (1 + np.exp(-(np.arange(shape.steps) / shape.steps - 0.3) * 18))
    by_step = FLOOR + (final[:, :, None] - FLOOR) * grow + rng.normal(0, 0.02, (*final.shape, shape.steps))
    described = {
        "goal_match": ("goal match", "share of frames in which the marker moves to the goal of the clean prompt"),
        "path_length": ("path length", "length of the marker's path over the shortest path"),
    }
    variables: dict[str, xr.Variable] = {}
    for metric, (long_name, description) in described.items():
        scale = 1.0 if metric == "goal_match" else 1.4
        attrs = {"long_name": long_name, "units": "1", "description": description}
        variables[metric] = xr.Variable(("sample", "run"), (scale * final).astype(np.float32), attrs)
        dims = ("sample", "run", "step")
        variables[f"{metric}_by_step"] = xr.Variable(dims, (scale * by_step).astype(np.float32), attrs)
    floor = np.full(shape.samples, FLOOR, np.float32)
    variables["goal_match_floor"] = xr.Variable(("sample",), floor, {"long_name": "floor of goal match"})
    variables["status"] = xr.Variable(("unit",), np.ones(shape.samples, np.uint8))
    coords = {"sample": _samples(shape), "run": np.array(["clean", "corrupted"], dtype=object), **_steps(shape)}
    _write(path, "baseline", xr.Dataset(variables, coords=coords))


def _write_experiment(
    path: Path, shape: Shape, name: str, values: NDArray[np.float64], rng: np.random.Generator, *, failures: bool
) -> None:
    stored = values.astype(np.float32)
    # As in a real sweep, a unit is a window along the first axis of one sample: two units a sample.
    window = -(-stored.shape[1] // 2)
    status = np.ones((shape.samples, 2), np.uint8)
    if failures and name == "patch_map":
        status[3, 1] = 2
        stored[3, window + 1 :] = np.nan
    if failures and name == "noise_frame":
        status[-2:] = 0
        stored[-2:] = np.nan
    strings = {
        "component": COMPONENTS,
        "direction": DIRECTIONS,
        "mode": ("freeze", "drop", "repeat"),
        "path": ("off_path", "on_path"),
    }
    dims, attrs = _EXPERIMENTS[name]
    coords: dict[str, object] = {"sample": _samples(shape)}
    for dim in dims:
        if dim == "step":
            coords |= _steps(shape)
        elif dim in strings:
            coords[dim] = np.array(strings[dim], dtype=object)
        else:
            first = 1 if dim == "frame" else 0
            coords[dim] = np.arange(first, first + stored.shape[1 + dims.index(dim)], dtype=np.int64)
    variables = {
        "goal_match": xr.Variable(("sample", *dims), stored, {"long_name": "goal match", "units": "1"}),
        "path_length": xr.Variable(("sample", *dims), 1.4 * stored, {"long_name": "path length", "units": "1"}),
        "status": xr.Variable(("unit",), status.ravel()),
    }
    encoding = {m: {"chunks": (1, window, *stored.shape[2:])} for m in ("goal_match", "path_length")}
    _write(path, name, xr.Dataset(variables, coords=coords, attrs=attrs), encoding)


_EXPERIMENTS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "patch_map": (
        ("step", "layer", "component"),
        {
            "kind": "patch",
            "formula": "h <- (1 - alpha) h_recipient + alpha h_donor",
            "contrast": "true",
            "fixed": json.dumps({"direction": "denoising", "alpha": 1.0}),
            "recipient": "corrupted",
        },
    ),
    "patch_direction": (
        ("step", "direction"),
        {
            "kind": "patch",
            "formula": "h <- (1 - alpha) h_recipient + alpha h_donor",
            "contrast": "true",
            "fixed": json.dumps({"component": "update", "layer": 3}),
            "recipient": "by direction",
        },
    ),
    "skip": (
        ("step", "mode"),
        {
            "kind": "step_skip",
            "formula": "freeze: x_{s+1} <- x_s; drop: sigma_s removed from the schedule; repeat: applied twice",
            "contrast": "false",
            "fixed": "{}",
            "recipient": "clean",
        },
    ),
    "noise_frame": (
        ("path", "frame"),
        {
            "kind": "noise",
            "formula": "off: x <- eps; on: x <- (1 - sigma) x0_hat + sigma eps",
            "contrast": "false",
            "fixed": json.dumps({"at": "frame"}),
            "recipient": "clean",
        },
    ),
}


def _write_previews(path: Path, shape: Shape, pairs: list[str]) -> None:
    size, chosen = 10, [0, shape.samples - 1]
    video = np.zeros((len(chosen), 3, shape.steps, shape.frames, size, size, 3), np.float32)
    rng = np.random.default_rng(3)
    for i, sample in enumerate(chosen):
        goals = pairs[sample].split("/")
        for r, goal in enumerate((goals[0], goals[1], goals[0])):
            final = _maze_video(shape.frames, size, goals, goal)
            for step, sigma in enumerate(shape.sigma):
                noise = rng.uniform(0, 255, final.shape)
                video[i, r, step] = (1 - sigma**2) * final + sigma**2 * noise
    coords = {
        "preview": np.array(chosen, np.int64),
        "run": np.array(["clean", "corrupted", "patched"], dtype=object),
        "frame": np.arange(shape.frames, dtype=np.int64),
        **_steps(shape),
    }
    dims = ("preview", "run", "step", "frame", "y", "x", "rgb")
    patched = json.dumps({"kind": "patch", "direction": "denoising", "step": 3, "layer": 2, "component": "attn1"})
    dataset = xr.Dataset({"x0_hat": (dims, video.astype(np.uint8))}, coords=coords, attrs={"patched": patched})
    _write(path, "previews", dataset)


def _maze_video(frames: int, size: int, goals: list[str], goal: str) -> NDArray[np.float32]:
    board = np.full((frames, size, size, 3), 236.0, np.float32)
    board[:, [0, -1]] = board[:, :, [0, -1]] = 60.0
    board[:, 3:7, 5] = 60.0
    ends = {goals[0]: (1, size - 2), goals[1]: (size - 2, size - 2)}
    for colour, (y, x) in ends.items():
        board[:, y, x] = COLOURS[colour]
    for frame in range(frames):
        reach = frame / max(frames - 1, 1)
        y, x = (round(a + (b - a) * reach) for a, b in zip((size // 2, 1), ends[goal], strict=True))
        board[frame, y, x] = (110, 60, 160)
    return board


def _samples(shape: Shape) -> NDArray[np.int64]:
    return np.arange(shape.samples, dtype=np.int64)


def _steps(shape: Shape) -> dict[str, object]:
    return {"step": np.arange(shape.steps, dtype=np.int64), "sigma": ("step", shape.sigma)}


def _write(path: Path, group: str, dataset: xr.Dataset, encoding: dict[str, dict[str, object]] | None = None) -> None:
    dataset.to_zarr(str(path), group=group, mode="w", consolidated=False, encoding=encoding or {})
