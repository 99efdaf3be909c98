"""Small real sweeps for tests: a random two-block maze pipeline on disk and a config over every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
import zarr

from pipeline.embedded.build import build_pipeline, save_pipeline
from pipeline.store import Place, locate

STEPS = 4

EXPERIMENTS: dict[str, Any] = {
    "patch_map": {
        "kind": "patch",
        "direction": ["denoising", "self"],
        "step": "all",
        "layer": "all",
        "component": ["attn2", "update"],
    },
    "skip": {"kind": "step_skip", "mode": ["freeze", "drop", "repeat"], "step": "all"},
    "reuse": {"kind": "step_skip", "mode": "reuse", "step": "1:"},
    "shuffle": {"kind": "frame_shuffle", "mode": ["permute", "reverse"], "step": [0, 2]},
    "noise_step": {"kind": "noise", "at": "step", "path": ["off_path", "on_path"], "step": "all"},
    "noise_frame": {"kind": "noise", "at": "frame", "frame": "all"},
}


def save_tiny_model(folder: Path, seed: int = 5) -> Path:
    """Save a pipeline whose weights are large enough that every intervention changes its videos."""
    pipe = build_pipeline(seed, num_layers=2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=generator))
    save_pipeline(pipe, folder)
    return folder


def tiny_config(model: Path, **changes: Any) -> dict[str, Any]:
    """Return raw settings of a sweep that takes seconds."""
    return {
        "name": "tiny",
        "model": {"id": str(model)},
        "task": {"name": "maze", "mazes": 2, "pairs": ["red/blue"]},
        "sampler": {"steps": STEPS},
        "metrics": ["goal_evidence", "latent_distance"],
        "experiments": EXPERIMENTS,
        "previews": {"samples": [1], "patched": {"kind": "patch", "step": 1, "layer": 1, "component": "residual"}},
        "unit_cells": 8,
        "run": {"replicas": 0},
        **changes,
    }


def write_config(path: Path, raw: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def arrays(store: Place) -> dict[str, np.ndarray]:
    """Read every array of a store by its path."""
    root = zarr.open_group(locate(store).zarr(read_only=True), mode="r")
    return {name: np.asarray(item[...]) for name, item in root.members(max_depth=None) if isinstance(item, zarr.Array)}


def assert_same_arrays(a: Place, b: Place) -> None:
    """Assert that two stores hold the same arrays, bit for bit."""
    left, right = arrays(a), arrays(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype
        assert value.shape == right[name].shape
        if value.dtype.kind == "f":
            same = value.view(np.uint8).tobytes() == right[name].view(np.uint8).tobytes()
        else:
            same = bool((value == right[name]).all())
        assert same, f"{name} differs"
