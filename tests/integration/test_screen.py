"""Screening: estimates against finite differences of exact patches, and sweeps that screen, then verify."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import pipeline.sweep
from interventions import kinds  # noqa: F401  (registers every kind)
from interventions.engine import Engine
from interventions.families.family import family_of
from interventions.kinds.patch import Patch
from interventions.record import Record, RunInputs
from interventions.run import tap_of
from interventions.screen import NotScreenableError, screen
from interventions.sites import RUNS, Geometry, Site
from pipeline.cli import main
from pipeline.metrics.objective import OBJECTIVES
from pipeline.store import DONE, FAILED, PENDING, Journal, open_store
from tests.integration.test_sweep import kill_when, start
from tests.sweep_fixture import arrays, assert_same_arrays, save_tiny_model, tiny_config, write_config

STEPS, STEP = 3, 1
FAMILIES = ("wan22_ti2v", "wan22_a14b", "ltx", "ltx2", "cogvideox", "hunyuan_video")


def host(name: str, guidance: bool) -> tuple[Engine, Record]:
    torch.set_num_threads(1)
    module = importlib.import_module(f"tests.families.{name}")
    pipe = module.build()
    shared, per_run = module.arguments(pipe, steps=STEPS, guidance=guidance)
    engine = Engine(pipe, family_of(type(pipe).__name__))
    return engine, engine.record(RunInputs(shared=shared, per_run=per_run, names=RUNS, seed=(0,)))


HOSTED = [(name, guidance) for name in FAMILIES for guidance in (False, True)]


@pytest.fixture(scope="module", params=HOSTED, ids=lambda p: f"{p[0]}-{p[1]}")
def hosted(request) -> tuple[Engine, Record]:
    return host(*request.param)


@pytest.fixture(scope="module")
def guided() -> tuple[Engine, Record]:
    return host("wan22_ti2v", True)


def objective_of(record: Record, name: str = "clean_projection") -> Callable[[torch.Tensor], torch.Tensor]:
    clean, corrupted = record.final
    return lambda x0_hat: OBJECTIVES[name].compute(x0_hat, clean, corrupted)


def exact(engine: Engine, record: Record, patches: list[Patch], alpha: float, name: str = "clean_projection") -> Any:
    """Return the objective under each patch at a strength, by forks."""
    rows = [patch.model_copy(update={"alpha": alpha}) for patch in patches]
    values = engine.fork(record, rows, keep_x0_hat=True).x0_hat[patches[0].step]
    return objective_of(record, name)(values).double().numpy()


def slopes(engine: Engine, record: Record, patches: list[Patch], name: str = "clean_projection") -> Any:
    """Return the derivative of the objective at alpha 0: central differences, extrapolated to no step at all."""
    coarse, fine = (
        (exact(engine, record, patches, h, name) - exact(engine, record, patches, -h, name)) / (2 * h)
        for h in (0.08, 0.04)
    )
    return (4 * fine - coarse) / 3


def every_patch(geometry: Geometry) -> list[Patch]:
    """Return patches of every component, stream and head of every block in both directions, and of parts of one."""
    found: list[dict[str, Any]] = []
    for block in range(geometry.blocks):
        for component in geometry.components_of(block):
            streams = ["video", "text"] if component in geometry.text_components else ["video"]
            heads = [None, 1] if component in geometry.head_components else [None]
            here = {"layer": block, "component": component}
            found += [{**here, "head": head} for head in heads] + [{**here, "stream": stream} for stream in streams[1:]]
    part = {"layer": 1, "component": "update"}
    found += [{**part, "frame": 1}, {**part, "frames": "0,2-3", "box": "0:1,1:3"}, {**part, "layers": 2, "layer": 0}]
    found += [{**part, "branch": branch} for branch in geometry.branches]
    cells = [Patch(step=STEP, **settings) for settings in found]
    both = [*cells, *(cell.model_copy(update={"direction": "noising"}) for cell in cells[::3])]
    return [cell for cell in both if exists(cell, geometry)]


def exists(cell: Patch, geometry: Geometry) -> bool:
    try:
        cell.check(geometry)
    except ValueError:
        return False
    return True


def test_estimates_are_the_slope_of_the_exact_effect(hosted):
    """Every component, stream, head and part of every family's blocks, to 1e-3 of the largest."""
    engine, record = hosted
    patches = every_patch(record.geometry)
    assert len(patches) > 20
    found = np.array(screen(engine, record, patches, objective_of(record)))
    expected = slopes(engine, record, patches)
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    assert (np.abs(found) > 1e-6).mean() > 0.8


def test_a_curved_objective_is_differentiated_too(guided):
    engine, record = guided
    patches = [Patch(step=STEP, layer=layer, component=c) for layer in range(2) for c in ("attn1", "update")]
    found = np.array(screen(engine, record, patches, objective_of(record, "latent_distance")))
    expected = slopes(engine, record, patches, "latent_distance")
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_a_distance_of_zero_has_no_slope_instead_of_nan():
    latents = torch.ones(1, 2, 1, 1, 1, requires_grad=True)
    OBJECTIVES["latent_distance"].compute(latents, torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)).sum().backward()
    assert torch.equal(latents.grad, torch.zeros_like(latents))


def test_estimates_are_exact_where_the_rest_of_the_model_is_linear():
    """Without the last norm, what follows the last block is linear, and so is the objective."""
    engine, record = host("wan22_ti2v", True)
    engine.pipe.transformer.norm_out = torch.nn.Identity()
    engine = Engine(engine.pipe, engine.family)
    record = engine.record(record.inputs)
    last = record.geometry.blocks - 1
    patches = [Patch(step=STEP, layer=last, component=c) for c in ("ffn", "update", "residual")]
    found = np.array(screen(engine, record, patches, objective_of(record)))
    whole = exact(engine, record, patches, 1.0) - exact(engine, record, patches, 0.0)
    assert np.abs(found - whole).max() < 1e-4 * np.abs(whole).max()
    assert np.abs(whole).min() > 1e-4


def test_estimates_scale_with_alpha_and_a_self_patch_has_none(guided):
    engine, record = guided
    patch = Patch(step=STEP, layer=1, component="attn2")
    half, own = patch.model_copy(update={"alpha": 0.5}), patch.model_copy(update={"direction": "self"})
    whole, halved, none = screen(engine, record, [patch, half, own], objective_of(record))
    assert halved == pytest.approx(whole / 2)
    assert none == 0.0


def test_parts_add_up_to_the_whole(guided):
    """An estimate is a sum over tokens and branches, so frames and branches are its parts."""
    engine, record = guided
    whole = Patch(step=STEP, layer=0, component="attn1")
    frames = [whole.model_copy(update={"frame": f}) for f in range(record.geometry.frames)]
    branches = [whole.model_copy(update={"branch": b}) for b in record.geometry.branches]
    total, *parts = screen(engine, record, [whole, *frames, *branches], objective_of(record))
    assert sum(parts[: len(frames)]) == pytest.approx(total, rel=1e-6)
    assert sum(parts[len(frames) :]) == pytest.approx(total, rel=1e-6)


def test_a_step_costs_one_trace_whatever_the_number_of_patches(guided, monkeypatch):
    engine, record = guided
    traces, original = [], Engine._trace

    def counted(self, run, *rest):
        traces.append(run.stop_after_loop)
        return original(self, run, *rest)

    monkeypatch.setattr(Engine, "_trace", counted)
    patches = [Patch(step=s, layer=n, component=c) for s in (2, 0) for n in (0, 1) for c in ("attn1", "residual")]
    screen(engine, record, patches, objective_of(record))
    assert traces == [0, 2]


def test_screening_changes_no_value_and_leaves_no_gradient_behind(guided):
    """Zeros are added, so the estimate of the screened forward is the recorded one, bit for bit."""
    engine, record = guided
    engine.pipe.transformer.requires_grad_(True)
    sites = [Site(STEP, b, n, c) for b in record.geometry.branches for n in (0, 1) for c in ("attn1", "residual")]
    found = engine.gradients(record, STEP, sites, lambda x: objective_of(record)(x).sum())
    assert torch.equal(found.x0_hat, record.x0_hat[STEP])
    assert found.values.keys() == found.slopes.keys() == set(sites)
    captured = engine.capture(record, STEP, sites, range(2))
    assert all(torch.equal(found.values[site], captured[site]) for site in sites)
    assert all(p.requires_grad and p.grad is None for p in engine.pipe.transformer.parameters())
    assert torch.equal(engine.record(record.inputs).final, record.final)
    assert not engine.record(record.inputs).final.requires_grad


def test_heads_share_a_tap_of_their_own():
    assert tap_of(Site(0, "cond", 0, "attn1", head=1)) == "attn1.heads"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"steps": 2}, "a patch of 2 steps cannot be screened"), ({"donor_sample": 1}, "from another sample or seed")],
)
def test_patches_without_a_slope_of_one_step_are_refused(settings, reason, guided):
    engine, record = guided
    with pytest.raises(NotScreenableError, match=reason):
        screen(engine, record, [Patch(step=0, layer=0, **settings)], objective_of(record))


# Sweeps on the tiny maze model.

MAP = {
    "kind": "patch",
    "direction": ["denoising", "self"],
    "step": "all",
    "layer": "all",
    "component": ["attn2", "update"],
}
CELLS = 4 * 2 * 2 * 2
SCREEN = {"top": 0.2, "metric": "clean_projection", "random": 0.1}
TOP, RANDOM = 7, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("screened")
    save_tiny_model(folder / "model")
    return folder


def config_of(folder: Path, name: str, settings: dict[str, Any] | None, **changes: Any) -> Path:
    experiments = {
        "map": {**MAP, **({"screen": settings} if settings else {})},
        "shuffle": {"kind": "frame_shuffle", "mode": ["permute", "reverse"], "step": [0, 2]},
    }
    return write_config(folder / f"{name}.yaml", tiny_config(folder / "model", experiments=experiments, **changes))


@pytest.fixture(scope="module")
def config(folder) -> Path:
    return config_of(folder, "some", SCREEN)


@pytest.fixture(scope="module")
def store(folder, config) -> Path:
    """The store of one uninterrupted screened sweep."""
    assert main(["run", str(config), "--store", str(folder / "some.zarr")]) == 0
    return folder / "some.zarr"


@pytest.fixture(scope="module")
def unscreened(folder) -> Path:
    path = folder / "full.zarr"
    assert main(["run", str(config_of(folder, "full", None)), "--store", str(path)]) == 0
    return path


def test_the_largest_mean_estimates_and_a_few_others_are_verified(store):
    found = arrays(store)
    exact, drawn = found["map/exact"] == 1, found["map/drawn"] == 1
    assert (exact.sum(), drawn.sum()) == (TOP + RANDOM, RANDOM)
    assert set(np.unique(found["map/exact"])) == {0, 1}
    size = np.abs(found["map/estimate"].astype(np.float64).mean(axis=0))
    assert size[exact & ~drawn].min() >= size[~(exact & ~drawn)].max()
    assert np.isfinite(found["map/estimate"]).all()
    for metric in ("goal_evidence", "latent_distance"):
        assert np.isfinite(found[f"map/{metric}"][:, exact]).all()
        assert np.isnan(found[f"map/{metric}"][:, ~exact]).all()


def test_verified_cells_equal_those_of_the_unscreened_sweep(store, unscreened):
    """The same interventions in smaller batches."""
    found, full = arrays(store), arrays(unscreened)
    exact = found["map/exact"] == 1
    for metric in ("goal_evidence", "latent_distance"):
        np.testing.assert_allclose(found[f"map/{metric}"][:, exact], full[f"map/{metric}"][:, exact], atol=1e-5)
    assert found["shuffle/goal_evidence"].tobytes() == full["shuffle/goal_evidence"].tobytes()
    assert found["baseline/goal_evidence"].tobytes() == full["baseline/goal_evidence"].tobytes()


def test_verifying_everything_is_the_unscreened_sweep_bit_for_bit(folder, unscreened):
    path = folder / "all.zarr"
    assert main(["run", str(config_of(folder, "all", {**SCREEN, "top": 1.0})), "--store", str(path)]) == 0
    found, full = arrays(path), arrays(unscreened)
    assert found.keys() - full.keys() == {"map/estimate", "map/exact", "map/drawn"}
    for name, value in full.items():
        assert value.dtype.kind not in "fiu" or value.tobytes() == found[name].tobytes(), name


def test_no_cell_counts_as_failed_for_being_estimated_only(store, capsys):
    assert all((open_store(store).status(group) == DONE).all() for group in open_store(store).groups())
    assert sum(entry["failed"] for entry in Journal(store).entries()) == 0
    assert sum(entry["cells"] for entry in Journal(store).entries() if entry["group"] == "map") == 2 * (TOP + RANDOM)
    assert main(["status", str(store)]) == 0
    assert capsys.readouterr().out.split("map")[1].split()[:4] == ["4", "4", "0", "0"]


def test_effects_keep_estimates_apart(store, tmp_path):
    store = Path(shutil.copytree(store, tmp_path / "run.zarr"))
    assert main(["effects", str(store), "--replicates", "50"]) == 0
    group = zarr.open_group(str(store), mode="r")["effects/map"]
    found, exact = arrays(store), arrays(store)["map/exact"] == 1
    np.testing.assert_array_equal(found["effects/map/exact"], found["map/exact"])
    assert found["effects/map/goal_evidence_failed"].sum() == 0
    for name in ("goal_evidence_difference", "goal_evidence_recovery", "goal_evidence_p_fwer"):
        assert (np.isfinite(found[f"effects/map/{name}"][0]) == exact).all()
    np.testing.assert_allclose(found["effects/map/estimate"][0], found["map/estimate"].mean(axis=0), rtol=1e-6)
    assert "estimate_difference" not in group
    assert json.loads(group.attrs["agreement"]) == json.loads(
        zarr.open_group(str(store), mode="r")["map"].attrs["agreement"]
    )


def test_the_experiment_says_how_well_its_estimates_rank(store):
    attrs = zarr.open_group(str(store), mode="r")["map"].attrs
    found = json.loads(attrs["agreement"])
    assert (found["cells"], found["top_cells"], found["random_cells"]) == (CELLS, TOP, RANDOM)
    for metric in ("goal_evidence", "latent_distance"):
        assert -1 <= found["metrics"][metric]["spearman"] <= 1
        assert 0 <= found["metrics"][metric]["recall"] <= 1
    assert json.loads(attrs["screen"])["top"] == 0.2
    assert zarr.open_group(str(store), mode="r").attrs["solver"].startswith("FlowMatchEulerDiscreteScheduler")


@pytest.mark.parametrize("lines", [1, 4, 6], ids=["while_screening", "after_the_last_baseline", "while_verifying"])
def test_resume_after_sigkill_is_bit_identical(lines, config, store, tmp_path):
    """Two baselines and two units of shuffles, then four units that verify."""
    path = tmp_path / "run.zarr"
    process = start(config, path)
    kill_when(process, path, lines, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert main(["run", str(config), "--store", str(path)]) == 0
    assert_same_arrays(path, store)


def test_a_kill_before_the_choice_is_complete_is_repaired(config, store, tmp_path, monkeypatch):
    """Killed between the two arrays of the choice: what is verified is chosen again from what is stored."""
    path = tmp_path / "run.zarr"

    def killed(self, group, selection):
        self.root[f"{group}/drawn"][...] = selection.drawn
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.store.Store, "write_selection", killed)
        with pytest.raises(SystemExit):
            main(["run", str(config), "--store", str(path)])
    assert (arrays(path)["map/exact"] == 255).all()
    assert main(["run", str(config), "--store", str(path)]) == 0
    assert_same_arrays(path, store)


def test_agreement_is_written_even_if_the_sweep_died_just_before(config, store, tmp_path, monkeypatch):
    path = tmp_path / "run.zarr"

    def killed(*args, **kwargs):
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.sweep, "_judge", killed)
        with pytest.raises(SystemExit):
            main(["run", str(config), "--store", str(path)])
    assert main(["run", str(config), "--store", str(path)]) == 0
    a, b = (zarr.open_group(str(p), mode="r")["map"].attrs["agreement"] for p in (path, store))
    assert a == b


def test_a_verified_cell_without_a_finite_value_still_fails(config, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.zarr"
    fork = pipeline.replica.Computer.fork

    def poisoned(self, sample, rows, **kwargs):
        result = fork(self, sample, rows, **kwargs)
        if rows[0].kind == "patch":
            result.final[0] = float("nan")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.replica.Computer, "fork", poisoned)
        assert main(["run", str(config), "--store", str(path)]) == 1
    found = arrays(path)
    lost = np.isnan(found["map/goal_evidence"]) & (found["map/exact"] == 1)
    assert 0 < lost.sum() < 2 * (TOP + RANDOM)
    assert f"{lost.sum()} cells have no finite value" in capsys.readouterr().err
    assert (found["map/status"] == FAILED).any()


def test_cells_are_chosen_once_every_sample_is_screened(config, store, tmp_path, monkeypatch, capsys):
    """A sample that raises holds the choice back, so that the next call ends where an undisturbed one does."""
    path = tmp_path / "run.zarr"
    original = pipeline.replica.Computer.estimates

    def broken(self, grid, sample):
        if sample == 1:
            raise RuntimeError("planted failure")
        return original(self, grid, sample)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.replica.Computer, "estimates", broken)
        assert main(["run", str(config), "--store", str(path), "--set", "run.max_attempts=1"]) == 1
    assert "map: cells are verified once 1 more samples are screened" in capsys.readouterr().err
    found = arrays(path)
    assert (found["map/exact"] == 255).all()
    assert (found["map/status"] == PENDING).all()
    assert (found["shuffle/status"] == DONE).all()
    assert main(["run", str(config), "--store", str(path)]) == 0
    assert_same_arrays(path, store)


def test_an_estimate_that_is_not_finite_fails_its_sample_and_leaves_the_others(config, tmp_path, monkeypatch):
    """The model gave no number; the next call would not get one either, so the other samples choose."""
    path = tmp_path / "run.zarr"
    original = pipeline.replica.Computer.estimates
    monkeypatch.setattr(
        pipeline.replica.Computer,
        "estimates",
        lambda self, grid, sample: original(self, grid, sample) * (np.nan if sample == 1 else 1),
    )
    assert main(["run", str(config), "--store", str(path)]) == 1
    found = arrays(path)
    assert list(found["baseline/status"]) == [DONE, FAILED]
    assert (found["map/exact"] == 1).sum() == TOP + RANDOM
    assert np.isfinite(found["map/goal_evidence"][:, found["map/exact"] == 1]).all()


def test_plan_shows_what_screening_saves(folder, capsys):
    facts = {}
    for name, settings in (("many", None), ("few", {"top": 0.05, "metric": "clean_projection", "random": 0.0})):
        path = config_of(folder, name, settings, sampler={"steps": 10})
        assert main(["plan", str(path), "--no-calibrate", "--json"]) == 0
        facts[name] = json.loads(capsys.readouterr().out)
    assert facts["few"]["row_forwards"] < 0.7 * facts["many"]["row_forwards"]
    assert facts["few"]["cells"] == 2 * (4 + 4)
    assert facts["few"]["estimates"] == 2 * 80
    assert "estimates" not in facts["many"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top": 0.1, "metric": "solved"}, "unknown differentiable metric 'solved'"),
        ({"top": 0, "metric": "clean_projection"}, "greater than 0, got 0"),
        ({"top": 0.1}, "metric: Field required"),
        ({"top": 0.1, "metric": "clean_projection", "bottom": 1}, "unknown key 'bottom'"),
        ("all", "expected a mapping such as {top: 0.1"),
    ],
    ids=["metric", "top", "missing", "key", "type"],
)
def test_wrong_settings_are_refused_with_their_line(settings, message, folder, capsys):
    path = config_of(folder, "wrong", settings)
    assert main(["plan", str(path), "--no-calibrate"]) == 2
    error = capsys.readouterr().err
    assert "experiments.map.screen" in error
    assert message in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 2}, "a patch of 2 steps cannot be screened"),
        ({"kind": "noise", "at": "step"}, "only experiments of kind patch can be screened"),
    ],
    ids=["window", "kind"],
)
def test_experiments_that_cannot_be_screened_are_refused(change, message, folder, capsys):
    base = {"step": [0, 1], "screen": SCREEN}
    entry = {**({"kind": "patch", "layer": 0} if "kind" not in change else {}), **base, **change}
    raw = tiny_config(folder / "model", experiments={"map": entry})
    assert main(["plan", str(write_config(folder / "bad.yaml", raw)), "--no-calibrate"]) == 2
    error = capsys.readouterr().err
    assert "experiments.map.screen" in error
    assert message in error
