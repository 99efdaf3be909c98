"""Sweeps in rounds with a real model: the command line, Ray, and what is refused."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.precision import replay
from pipeline.cli import main
from pipeline.config import load_config
from pipeline.plan import make_plan
from pipeline.store import DONE, open_store
from tests.integration.test_sweep import kill_when, start
from tests.sweep_fixture import arrays, save_tiny_model, tiny_config, write_config
from tests.unit.test_config import TINY, bound, refusal

PRECISION = {"half_width": 0.008, "metric": "goal_evidence", "first": 6, "growth": 1.5}
MAP = {
    "kind": "patch",
    "direction": ["denoising", "self"],
    "step": [0, 1],
    "layer": [1],
    "component": ["attn2", "update"],
}
PROBLEMS = 10
LOOKS = (6, 9, 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("precise")
    save_tiny_model(folder / "model")
    return folder


def config_of(folder: Path, name: str, precision: dict[str, Any] | None, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "experiments": {"map": {**MAP, **({"precision": precision} if precision else {})}},
        "task": {"name": "maze", "mazes": PROBLEMS, "pairs": ["red/blue"]},
        "sampler": {"steps": 2},
        "previews": {"samples": []},
    }
    return write_config(folder / f"{name}.yaml", tiny_config(folder / "model", **{**settings, **changes}))


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    return config_of(folder, "rounds", PRECISION)


@pytest.fixture(scope="module")
def store(folder: Path, config: Path) -> Path:
    assert main(["run", str(config), "--store", str(folder / "rounds.zarr")]) == 0
    return folder / "rounds.zarr"


@pytest.fixture(scope="module")
def full(folder: Path) -> Path:
    assert main(["run", str(config_of(folder, "full", None)), "--store", str(folder / "full.zarr")]) == 0
    return folder / "full.zarr"


def test_computed_cells_equal_those_of_the_full_sweep(store, full):
    """The same interventions, later in smaller batches."""
    found, whole = arrays(store), arrays(full)
    for metric in ("goal_evidence", "latent_distance"):
        values, expected = found[f"map/{metric}"], whole[f"map/{metric}"]
        computed = np.isfinite(values)
        assert computed[: LOOKS[0]].all()
        assert 0 < computed[LOOKS[0] :].sum() < computed[LOOKS[0] :].size
        assert values[: LOOKS[0]].tobytes() == expected[: LOOKS[0]].tobytes()
        np.testing.assert_allclose(values[computed], expected[computed], atol=1e-5)
        assert found[f"baseline/{metric}"].tobytes() == whole[f"baseline/{metric}"].tobytes()


def test_replay_on_the_full_sweep_is_what_the_sweep_in_rounds_did(config, store, full):
    """What the benchmark counts is what a sweep computes."""
    rounds = replay(make_plan(load_config(config)), open_store(full))["map"]
    computed = np.isfinite(arrays(store)["map/goal_evidence"]).sum(axis=0)
    assert np.array_equal(np.array(LOOKS)[rounds - 1], computed)


def test_runs_patched_with_themselves_stop_first(store):
    """Their effect is 0 everywhere."""
    stopped = arrays(store)["map/stopped"]
    assert (stopped[0][..., 1] == 1).all()
    assert (stopped[0][..., 0] == 0).any()


def test_every_command_reads_such_a_store(store, tmp_path, capsys):
    assert main(["status", str(store)]) == 0
    assert all((open_store(store).status(group) == DONE).all() for group in open_store(store).groups())
    assert main(["verify", str(store)]) == 0
    assert main(["export", str(store), str(tmp_path / "run.zarr.zip")]) == 0
    assert main(["effects", str(store), "--replicates", "50"]) == 0
    assert main(["report", str(store), "--out", str(tmp_path / "report")]) == 0
    assert "p (Holm)" in (tmp_path / "report" / "report.html").read_text()
    found, computed = arrays(store), np.isfinite(arrays(store)["map/goal_evidence"]).sum(axis=0)
    assert np.array_equal(found["effects/map/goal_evidence_n"][0], computed)
    capsys.readouterr()


def test_replicas_of_ray_compute_the_same(ray_session, folder, store, monkeypatch):
    """Rounds end for all replicas at once, and what they compute is the same."""
    path = folder / "ray.zarr"
    raw = config_of(folder, "ray", PRECISION, run={"replicas": 2})
    assert main(["run", str(raw), "--store", str(path)]) == 0
    names = [name for name in arrays(path) if name.startswith(("map/", "baseline/"))]
    ours, theirs = arrays(store), arrays(path)
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in names if ours[name].dtype.kind in "fiu")


class TestPlan:
    def facts(self, path: Path, capsys: Any) -> dict[str, Any]:
        assert main(["plan", str(path), "--no-calibrate", "--json"]) == 0
        return dict(json.loads(capsys.readouterr().out))

    def test_shows_the_least_and_the_most(self, folder, config, full, store, capsys):
        facts = self.facts(config, capsys)
        assert (facts["cells_least"], facts["cells"]) == (LOOKS[0] * 8, PROBLEMS * 8)
        plain = self.facts(folder / "full.yaml", capsys)
        assert facts["row_forwards"] == plain["row_forwards"]
        assert facts["looks"] == {"map": list(LOOKS)}
        computed = np.isfinite(arrays(store)["map/goal_evidence"]).sum()
        assert facts["cells_least"] < computed < facts["cells"]
        lines = (store / "journal.jsonl").read_text().splitlines()
        spent = sum(json.loads(line).get("row_forwards", 0) for line in lines)
        assert facts["row_forwards_least"] < spent < facts["row_forwards"]
        assert not {"cells_least", "looks"} & plain.keys()

    def test_tells_where_the_looks_are(self, config, capsys):
        assert main(["plan", str(config), "--no-calibrate"]) == 0
        out = capsys.readouterr().out
        assert "looks map  after 6, 9 of 10 problems" in out
        assert "cells least  48" in out


GOOD = "{half_width: 0.1, metric: goal_evidence}"
MAZES = TINY.replace("mazes: 1", "mazes: 20")


def with_precision(text: str, precision: str, more: str = "") -> str:
    return text.replace("    kind: patch", f"    kind: patch\n    precision: {precision}{more}")


class TestConfig:
    def test_good_settings_are_taken(self, tmp_path):
        config = bound(tmp_path, with_precision(MAZES, GOOD))
        precision = config.build_experiments()[0].precision
        assert precision is not None
        assert (precision.half_width, precision.first, precision.growth, precision.by) == (0.1, 8, 1.5, "difference")

    @pytest.mark.parametrize(
        ("precision", "key", "message"),
        [
            pytest.param(
                "0.1", "", "expected a mapping such as {half_width: 0.05, metric: NAME}, got 0.1", id="number"
            ),
            pytest.param("{metric: goal_evidence}", ".half_width", "Field required", id="no half-width"),
            pytest.param("{half_width: 0.1}", ".metric", "Field required", id="no metric"),
            pytest.param("{half_width: 0, metric: goal_evidence}", ".half_width", "greater than 0", id="no width"),
            pytest.param(
                "{half_width: 0.1, metric: solved}", ".metric", "allowed: goal_evidence", id="metric not computed"
            ),
            pytest.param(GOOD[:-1] + ", frist: 8}", ".frist", "did you mean 'first'?", id="unknown key"),
            pytest.param(GOOD[:-1] + ", first: 5}", ".first", "greater than or equal to 6, got 5", id="too early"),
            pytest.param(GOOD[:-1] + ", growth: 1}", ".growth", "greater than or equal to 1.1", id="no growth"),
            pytest.param(GOOD[:-1] + ", level: 1.0}", ".level", "less than 1", id="certain"),
            pytest.param(GOOD[:-1] + ", by: ratio}", ".by", "'difference' or 'recovery'", id="unknown effect"),
            pytest.param(GOOD[:-1] + ", first: 20}", "", "no cell could stop: .* 20 prompts", id="too few problems"),
        ],
    )
    def test_wrong_settings_are_refused_with_their_key(self, precision, key, message, tmp_path):
        (found,) = refusal(tmp_path, with_precision(MAZES, precision))
        where, _, text = found.partition(": ")[2].partition(": ")
        assert where == f"experiments.map.precision{key}"
        assert re.search(message, text)

    def test_a_field_has_no_one_interval(self, tmp_path):
        text = MAZES.replace("metrics: [goal_evidence]", "metrics: [goal_evidence, change_map]")
        (found,) = refusal(tmp_path, with_precision(text, "{half_width: 0.1, metric: change_map}"))
        assert "experiments.map.precision.metric: change_map is a field over latent_frame, latent_y" in found

    def test_screening_and_rounds_do_not_mix(self, tmp_path):
        screen = "\n    screen: {top: 0.5, metric: clean_projection}"
        (found,) = refusal(tmp_path, with_precision(MAZES, GOOD, screen))
        assert "an experiment is screened or computed to a precision, not both; make it two experiments" in found

    def test_kinds_without_a_contrast_have_no_recovery(self, tmp_path):
        text = MAZES.replace(
            "kind: patch", f"kind: step_skip\n    mode: drop\n    precision: {GOOD[:-1]}, by: recovery}}"
        )
        (found,) = refusal(tmp_path, text.replace("    layer: [0]\n", ""))
        assert "experiments.map.precision.by: cells of kind step_skip have no recovery; use difference" in found

    def test_a_preview_has_no_precision(self, tmp_path):
        patched = f"  patched: {{kind: patch, step: 1, layer: 0, precision: {GOOD}}}\n"
        (found,) = refusal(tmp_path, MAZES + patched)
        assert "previews.patched.precision: a preview is one run, which has no precision" in found

    def test_belongs_to_the_identity_and_its_absence_leaves_it_alone(self, tmp_path):
        plain, precise = bound(tmp_path, MAZES), bound(tmp_path, with_precision(MAZES, GOOD))
        assert plain.hash() != precise.hash()
        assert "precision" not in json.dumps(plain.identity())


def test_a_killed_run_resumes_to_the_same_store(config, store, tmp_path):
    """SIGKILL in the second round."""
    process = start(config, tmp_path / "run.zarr")
    kill_when(process, tmp_path / "run.zarr", 2 * LOOKS[0] + 2, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert main(["run", str(config), "--store", str(tmp_path / "run.zarr")]) == 0
    ours = {n: v for n, v in arrays(store).items() if not n.startswith("effects/")}
    theirs = arrays(tmp_path / "run.zarr")
    assert ours.keys() == theirs.keys()
    assert all(v.tobytes() == theirs[n].tobytes() for n, v in ours.items() if v.dtype.kind in "fiu")
