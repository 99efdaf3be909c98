"""Every kind in one sweep through the command line: values, other samples and seeds, resume, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from interventions.base import KINDS
from pipeline.cli import main
from pipeline.config import load_config
from pipeline.models import load_pipeline
from pipeline.plan import make_plan
from pipeline.replica import Computer
from pipeline.store import DONE, open_store
from tests.sweep_fixture import arrays, assert_same_arrays, save_tiny_model, tiny_config, write_config

HIDDEN = {"step": [1], "layer": "all", "component": ["attn1"]}
EXPERIMENTS: dict[str, Any] = {
    "ablate": {"kind": "ablate", "value": ["zero", "resample", "gaussian"], **HIDDEN},
    "mean": {"kind": "ablate", "value": "mean", "reference": 3, **HIDDEN},
    "block_skip": {"kind": "block_skip", "mode": ["skip", "repeat"], "step": [2], "layer": [0, 1]},
    "compose": {
        "kind": "compose",
        "step": [0, 2],
        "parts": {
            "1_shuffle": {"kind": "frame_shuffle", "mode": "reverse"},
            "2_ablate": {"kind": "ablate", "value": "zero", "layer": 0, "component": "ffn"},
        },
    },
    "frame_shuffle": {"kind": "frame_shuffle", "mode": ["reverse"], "space": "hidden", "step": [1], "layer": [0]},
    "hidden_noise": {"kind": "hidden_noise", "strength": [0.5, 1.0], **HIDDEN},
    "knockout": {"kind": "knockout", "pattern": ["causal", "anti_causal"], "step": [1], "layer": [0, 1]},
    "latent_noise": {"kind": "latent_noise", "step": [1, 2], "frames": ["2-3", "4"]},
    "latent_swap": {"kind": "latent_swap", "donor": ["pair", "seed", "sample"], "step": [1, 3]},
    "noise": {"kind": "noise", "at": "frame", "frame": [1]},
    "patch": {"kind": "patch", **HIDDEN, "head": [0, 1]},
    "wrong_pair": {"kind": "patch", "donor_sample": 1, **HIDDEN},
    "prompt_swap": {"kind": "prompt_swap", "step": [0, 1]},
    "seed_ensemble": {"kind": "seed_ensemble", "seeds": 3, "step": 0, "layer": [0], "layers": 2, "component": "update"},
    "steer": {"kind": "steer", "reference": 3, "strength": [0.0, 1.0], **HIDDEN},
    "step_skip": {"kind": "step_skip", "mode": ["swap"], "step": [0, 1]},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("kinds")
    raw = tiny_config(save_tiny_model(folder / "model"), experiments=EXPERIMENTS)
    raw |= {"task": {"name": "maze", "mazes": 3, "pairs": ["red/blue"]}, "previews": {"samples": []}}
    return write_config(folder / "kinds.yaml", raw)


@pytest.fixture(scope="module")
def swept(config):
    store = config.parent / "run.zarr"
    assert main(["run", str(config), "--store", str(store)]) == 0
    return store


def test_every_kind_is_swept(config):
    assert {raw["kind"] for raw in EXPERIMENTS.values()} == set(KINDS)


def test_every_cell_has_a_value(swept):
    store = open_store(swept)
    for group in store.groups():
        assert (store.status(group) == DONE).all()
    for name, value in arrays(swept).items():
        if name.split("/")[-1] in ("goal_evidence", "latent_distance"):
            assert np.isfinite(value).all(), name


def test_every_kind_changes_something(swept):
    found = arrays(swept)
    for name, raw in EXPERIMENTS.items():
        recipient = 1 if raw["kind"] in ("patch", "steer") else 0
        baseline = found["baseline/latent_distance"][:, recipient]
        distance = found[f"{name}/latent_distance"].reshape(len(baseline), -1)
        assert (np.abs(distance - baseline[:, None]).max(axis=1) > 1e-5).all(), name


@pytest.fixture(scope="module")
def computer(config):
    plan = make_plan(load_config(config), config)
    return Computer(plan, load_pipeline(plan.model, dtype="float32", device="cpu"))


@pytest.mark.parametrize("name", ["mean", "wrong_pair", "latent_swap", "seed_ensemble", "steer"])
@pytest.mark.parametrize("sample", [0, 2])
def test_other_runs_are_those_of_the_sweep(name, sample, swept, computer):
    """Stored values equal forks whose donor runs are recorded here, from the task's own samples and seeds."""
    plan, grid = computer.plan, computer.plan.by_name[name]

    def others(ref):
        index = ref.sample if ref.fixed else (sample + ref.sample) % 3
        about = plan.samples[index]
        about = type(about)(**{**{f: getattr(about, f) for f in about.__slots__}, "seed": about.seed + ref.seed})
        return computer.engine.record(plan.task.inputs(computer.pipe, about, plan.config.sampler))

    record = computer.record(sample)
    rows = list(grid.interventions())
    final = computer.engine.fork(record, rows, others=others).final
    expected = computer.measure(record, final, plan.samples[sample])["latent_distance"]
    stored = arrays(swept)[f"{name}/latent_distance"][sample].reshape(-1)
    np.testing.assert_allclose(stored, expected, atol=1e-5)


def test_a_steering_strength_of_zero_changes_nothing(swept):
    found = arrays(swept)
    zero = found["steer/latent_distance"][..., list(found["steer/strength"]).index(0.0)]
    np.testing.assert_allclose(zero, found["baseline/latent_distance"][:, 1][:, None, None, None] + 0 * zero, atol=1e-6)


def test_a_second_store_is_the_same_bit_for_bit(config, swept, tmp_path):
    assert main(["run", str(config), "--store", str(tmp_path / "again.zarr")]) == 0
    assert_same_arrays(swept, tmp_path / "again.zarr")


def test_effects_and_report_of_every_kind(swept, tmp_path, capsys):
    assert main(["effects", str(swept), "--replicates", "50"]) == 0
    assert main(["report", str(swept), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert all(name in page for name in EXPERIMENTS)


@pytest.mark.parametrize(
    ("experiment", "says"),
    [
        pytest.param(
            {"kind": "ablate", "value": "mean", "reference": 9, "step": 0, "layer": 0},
            "reference problems; the task has 3",
            id="more-references-than-problems",
        ),
        pytest.param(
            {"kind": "ablate", "value": ["zero", "gaussian", "resample", "mean"], "step": 0, "layer": 0},
            "reads 8 or more reference problems; the task has 3",
            id="more-references-in-a-later-cell",
        ),
        pytest.param(
            {"kind": "prompt_swap", "donor": "sample", "step": [0]},
            "every problem of the task has the same one",
            id="the-same-prompt-everywhere",
        ),
        pytest.param({"kind": "patch", "step": 0, "layer": 0, "frames": "5-2"}, "not a set of frames", id="descending"),
        pytest.param(
            {"kind": "knockout", "pattern": "from_frames", "step": 0, "layer": 0, "frames": "5-2"},
            "not a set of frames",
            id="descending-frames-of-a-cut",
        ),
        pytest.param(
            {"kind": "patch", "step": 0, "layer": 0, "frames": "0-99999999999"}, "not a set of frames", id="huge-frame"
        ),
        pytest.param({"kind": "patch", "step": "1:", "steps": 99, "layer": 0}, "selects nothing", id="window-too-long"),
        pytest.param(
            {"kind": "frame_shuffle", "mode": "reverse", "space": "hidden", "step": 0, "steps": 3000000, "layer": 0},
            "reach beyond the last, step 3",
            id="huge-window",
        ),
        pytest.param(
            {"kind": "seed_ensemble", "seeds": 1000000, "step": 0, "layer": 0}, "less than or equal to 1024", id="seeds"
        ),
        pytest.param(
            {
                "kind": "compose",
                "parts": {
                    "1_ablate": {"kind": "ablate", "value": "zero", "step": 0, "layer": 0},
                    "2_noise": {"kind": "noise", "at": "step", "step": 2},
                },
            },
            "undoes part 1_ablate before it: use latent_noise",
            id="noise-that-restores",
        ),
        pytest.param(
            {"kind": "patch", "donor_sample": 3, "step": 0, "layer": 0},
            "with 3 in the task that is the same one",
            id="another-sample-that-is-the-same",
        ),
        pytest.param(
            {"kind": "patch", "step": 0, "layer": 0, "component": "attn1", "head": 2}, "heads 0 to 1", id="head"
        ),
        pytest.param(
            {"kind": "patch", "step": 0, "layer": 0, "component": "attn1", "stream": "text"},
            "text enters it by cross-attention alone",
            id="text-tokens",
        ),
        pytest.param(
            {"kind": "patch", "step": 0, "layer": 0, "denoiser": "transformer_2"},
            "transformer computes steps [0, 1, 2, 3]",
            id="second-expert",
        ),
        pytest.param(
            {"kind": "patch", "step": 3, "steps": 2, "layer": 0}, "reach beyond the last, step 3", id="window"
        ),
        pytest.param({"kind": "patch", "step": 0, "layer": 0, "box": "0:9,0:2"}, "5 x 5 tokens", id="box"),
        pytest.param({"kind": "patch", "step": 0, "layer": 0, "frames": "1-99"}, "frames 0 to", id="frames"),
        pytest.param(
            {"kind": "patch", "step": 0, "layer": 0, "branch": "uncond"}, "not computed by this sampler", id="branch"
        ),
        pytest.param(
            {"kind": "knockout", "pattern": "causal", "component": "attn2", "step": 0, "layer": 0},
            "attn2",
            id="frames-of-text",
        ),
    ],
)
def test_a_site_that_the_model_does_not_have_is_refused_with_what_it_has(experiment, says, config, tmp_path, capsys):
    import yaml

    raw = {**yaml.safe_load(config.read_text()), "experiments": {"one": experiment}}
    path = write_config(tmp_path / "bad.yaml", raw)
    assert main(["plan", str(path), "--no-calibrate"]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "experiments.one" in err
    assert "Traceback" not in err
