"""Permissions and secrets in real sweeps: what is allowed reaches every replica, what is secret reaches nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import xarray as xr
import zarr

from pipeline.cli import BAD_INPUT, FAILED, OK, main
from pipeline.config import validate
from pipeline.executors import inline_executor, ray_executor
from pipeline.permissions import NOTHING, Permissions
from pipeline.plan import make_plan
from pipeline.sweep import run_sweep

CONFIG = """\
name: tiny
model: {id: "embedded:maze"}
task: {name: maze, mazes: 2}
sampler: {steps: 2}
metrics: [goal_evidence, own_metrics:brightness]
experiments:
  map: {kind: patch, step: all, layer: [0, 1], component: attn2}
previews: {samples: []}
run: {replicas: 0}
"""
BRIGHTNESS = '''\
def brightness(given):
    """Mean of the last frame."""
    return given.video[:, -1].mean(axis=(1, 2, 3)).astype("float64")
'''
ALLOWED = ["--allow-metric", "own_metrics:brightness"]
SECRET = "s3cr3t/with+signs=and more"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with a config and the function that it names."""
    (tmp_path / "c.yaml").write_text(CONFIG)
    (tmp_path / "own_metrics.py").write_text(BRIGHTNESS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    NOTHING.apply()
    sys.modules.pop("own_metrics", None)


class TestOwnMetric:
    @pytest.mark.parametrize("command", ["run", "plan"])
    def test_refused_without_the_option(self, here, capsys, command):
        assert main([command, "c.yaml"]) == BAD_INPUT
        said = capsys.readouterr().err
        assert said.startswith(
            "stepscope: c.yaml:5: metrics.1: 'own_metrics:brightness' is a function of the user's own"
        )
        assert said.count("\n") == 1
        assert "own_metrics" not in sys.modules
        assert not (here / "runs").exists()

    def test_not_allowed_by_the_config_itself(self, here, capsys):
        (here / "c.yaml").write_text(CONFIG + "allow_metric: [own_metrics:brightness]\n")
        assert main(["plan", "c.yaml", "--no-calibrate"]) == BAD_INPUT
        assert (
            main(["plan", "c.yaml", "--no-calibrate", "--set", "run.allow_metric=own_metrics:brightness"]) == BAD_INPUT
        )
        assert "own_metrics" not in sys.modules

    def test_not_allowed_by_an_earlier_command_of_the_process(self, here):
        assert main(["plan", "c.yaml", "--no-calibrate", *ALLOWED]) == OK
        assert main(["plan", "c.yaml", "--no-calibrate"]) == BAD_INPUT

    def test_from_run_to_report(self, here, capsys):
        assert main(["run", "c.yaml", "--store", "s.zarr", *ALLOWED]) == OK
        dataset = xr.open_zarr("s.zarr", group="map", consolidated=False)
        assert float(dataset["own_metrics_brightness"].min()) > 0
        assert "sha256 of its module's source" in dataset["own_metrics_brightness"].attrs["description"]
        sources = json.loads(zarr.open_group("s.zarr", mode="r").attrs["config_json"])["metric_sources"]
        assert set(sources) == {"own_metrics:brightness"}
        assert main(["status", "s.zarr"]) == OK
        assert main(["effects", "s.zarr", "--replicates", "20"]) == OK
        assert main(["report", "s.zarr", "--out", "out"]) == OK
        assert "Mean of the last frame" in (here / "out" / "report.html").read_text()

    def test_a_changed_function_does_not_continue_a_store(self, here, capsys):
        assert main(["run", "c.yaml", "--store", "s.zarr", *ALLOWED]) == OK
        (here / "own_metrics.py").write_text(BRIGHTNESS.replace("-1", "0"))
        NOTHING.apply()
        del sys.modules["own_metrics"]
        assert main(["run", "c.yaml", "--store", "s.zarr", *ALLOWED]) == BAD_INPUT
        assert "Differing: metric_sources.own_metrics:brightness is" in capsys.readouterr().err

    @pytest.mark.ray
    def test_replicas_of_a_cluster_find_it(self, ray_session, here):
        permissions = Permissions(metrics=("own_metrics:brightness",), folder=str(here))
        permissions.apply()
        raw = {**_raw(), "metrics": ["own_metrics:brightness"], "run": {"replicas": 1}}
        plan = make_plan(validate(raw, {}, "c.yaml"), permissions=permissions)
        result = run_sweep(plan, here / "ray.zarr", make_executor=ray_executor)
        assert (result.failed, result.pending) == (0, 0)
        run_sweep(plan, here / "inline.zarr", make_executor=inline_executor)
        both = [
            zarr.open_group(str(here / f"{n}.zarr"), mode="r")["map/own_metrics_brightness"][:]
            for n in ("ray", "inline")
        ]
        assert (both[0] == both[1]).all()

    @pytest.mark.parametrize(
        ("code", "said"),
        [
            pytest.param("return 5", "metric own_metrics:brightness returned int, not an array", id="wrong-type"),
            pytest.param("raise ValueError('mine')", "ValueError: mine", id="raises"),
        ],
    )
    def test_a_function_that_fails_fails_its_units(self, here, capsys, code, said):
        (here / "own_metrics.py").write_text(f"def brightness(given):\n    {code}\n")
        assert main(["run", "c.yaml", "--store", "s.zarr", *ALLOWED, "--set", "run.max_attempts=1"]) == FAILED
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error


def _raw():
    import yaml

    return yaml.safe_load(CONFIG)


def everything_in(folder: Path) -> bytes:
    return b"\n".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


class TestSecrets:
    def test_an_error_that_quotes_a_secret_is_kept_without_it(self, here, monkeypatch, capsys):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        text = f"403 for https://me:hunter2@host/x?X-Amz-Signature=abc123 with {SECRET}"
        (here / "own_metrics.py").write_text(f"def brightness(given):\n    raise ValueError({text!r})\n")
        assert main(["run", "c.yaml", "--store", "s.zarr", *ALLOWED]) == FAILED
        assert main(["status", "s.zarr"]) == FAILED
        said = capsys.readouterr()
        kept = everything_in(here / "s.zarr").decode(errors="replace")
        for shown in (said.err, said.out, kept):
            assert "403 for https://***@host/x?X-Amz-Signature=*** with ***" in shown
            assert not any(secret in shown for secret in (SECRET, "hunter2", "abc123"))

    @pytest.mark.parametrize(
        ("old", "new", "what"),
        [
            ('"embedded:maze"', '"https://me:hunter2@host/model"', "a URL with user and password"),
            ('"embedded:maze"', '"https://host/model?sig=hunter2"', "a signed URL"),
            ("name: tiny", "name: hunter2-hunter2", "the value of the environment variable HF_TOKEN"),
            ("goal_evidence", "https://me:hunter2@host/", "a URL with user and password"),
            ("  map:", "  hunter2-hunter2:", "the value of the environment variable HF_TOKEN"),
        ],
        ids=["url", "signed", "variable", "in-a-list", "as-a-key"],
    )
    def test_a_config_with_a_credential_is_refused_without_showing_it(self, here, monkeypatch, capsys, old, new, what):
        monkeypatch.setenv("HF_TOKEN", "hunter2-hunter2")
        (here / "c.yaml").write_text(CONFIG.replace(", own_metrics:brightness", "").replace(old, new))
        assert main(["run", "c.yaml", "--store", "s.zarr"]) == BAD_INPUT
        said = capsys.readouterr().err
        assert f"holds {what}, which would be kept with the results" in said
        assert "hunter2" not in said.replace("c.yaml", "")
        assert not (here / "s.zarr").exists()

    def test_a_credential_in_an_override_is_refused(self, here, capsys):
        assert main(["plan", "c.yaml", "--no-calibrate", *ALLOWED, "--set", "name=http://a:hunter2@b"]) == BAD_INPUT
        said = capsys.readouterr().err
        assert "--set: name: holds a URL with user and password" in said
        assert "hunter2" not in said

    def test_no_attribute_of_a_store_holds_a_variable(self, here, monkeypatch):
        monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
        monkeypatch.setenv("ORDINARY", "not-a-secret-but-private")
        assert main(["run", "c.yaml", "--store", "s.zarr", *ALLOWED]) == OK
        kept = everything_in(here / "s.zarr")
        assert SECRET.encode() not in kept
        assert b"not-a-secret-but-private" not in kept
