"""The commands that send a sweep to a cluster: what is sent, what is refused, what is said."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import cluster.jobs
import pipeline.store
from cluster.jobs import JobError
from pipeline.cli import BAD_INPUT, FAILED, INTERRUPTED, OK, app, main
from pipeline.commands.jobs import AFTER_DRAIN_S, EXCLUDES, work_id
from pipeline.config import load_config
from pipeline.store import Lease
from pipeline.store.lease import Holder
from tests.jobs_fixture import ADDRESS, Details, FakeClient, jobs_of
from tests.store_fixture import write_store

CONFIG = """\
name: tiny
model: {id: embedded:maze}
task: {name: maze, mazes: 1}
sampler: {steps: 3}
metrics: [goal_evidence]
experiments:
  map: {kind: patch, step: all, layer: [0]}
run: {replicas: 1, drain_s: 30.5}
"""
STORE = "s3://bucket/tiny.zarr"


class Listening(FakeClient):
    """A cluster that looks into the folder that travels while it is there."""

    files: dict[str, str] | None = None

    def submit_job(self, *, runtime_env, **rest):
        folder = Path(runtime_env["working_dir"])
        self.files = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
        return super().submit_job(runtime_env=runtime_env, **rest)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An own working directory with a good config in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def client(monkeypatch):
    """The cluster that every address leads to; the addresses asked for are kept."""
    client = Listening()
    client.addresses = []

    def connect(address):
        client.addresses.append(address)
        return jobs_of(client)

    monkeypatch.setattr(cluster.jobs, "connect", connect)
    return client


def submit(*more, config="c.yaml", store=STORE):
    return main(["submit", config, "--address", ADDRESS, "--store", store, *more])


def job_id(*overrides):
    return work_id(load_config(Path("c.yaml"), overrides))


class TestSubmit:
    def test_id_is_the_hash_and_the_only_result(self, here, client, capsys):
        assert submit() == OK
        captured = capsys.readouterr()
        assert captured.out == f"stepscope-{load_config(Path('c.yaml')).hash()[:16]}\n"
        assert f"stepscope logs {captured.out.strip()} --address {ADDRESS} --follow" in captured.err
        assert f"Results go to {STORE}." in captured.err
        assert client.addresses == [ADDRESS]

    def test_config_alone_travels(self, here, client):
        (here / "secret.txt").write_text("x")
        submit()
        assert client.files == {"c.yaml": CONFIG}
        assert not Path(client.submitted[0]["env"]["working_dir"]).exists(), "the copy does not stay"

    def test_a_folder_travels_with_the_config_in_it(self, here, client):
        (here / "sub").mkdir()
        (here / "sub" / "my config.yaml").write_text(CONFIG)
        (here / "prompts.txt").write_text("x")
        assert submit("--working-dir", ".", config="sub/my config.yaml") == OK
        assert {"prompts.txt", "sub/my config.yaml"} <= set(client.files)
        assert shlex.split(client.submitted[0]["entrypoint"])[2] == "sub/my config.yaml"

    def test_stores_and_weights_never_travel(self, here, client):
        submit()
        assert client.submitted[0]["env"]["excludes"] == list(EXCLUDES)
        assert {"*.zarr", "runs/", "*.safetensors", "*.bin", "*.ckpt", ".venv", ".git"} <= set(EXCLUDES)

    def test_the_job_serves_metrics_if_it_is_told_to(self, here, client):
        assert submit("--metrics-port", "9108", "--metrics-host", "0.0.0.0") == OK
        words = shlex.split(client.submitted[0]["entrypoint"])
        assert words[-4:] == ["--metrics-port", "9108", "--metrics-host", "0.0.0.0"]
        _, bound, _ = app.parse_args(words[1:], exit_on_error=False, print_error=False)
        assert bound.arguments["metrics_port"] == 9108

    def test_the_job_runs_the_sweep_with_the_same_settings(self, here, client):
        """The entry point goes through a shell and must come out as the arguments that went in."""
        overrides = ["--set", "sampler.steps=2", "--set", "task.pairs=['red/blue', red/any]"]
        assert submit(*overrides, "--replicas", "4", store="/shared/my runs/$x.zarr") == OK
        words = shlex.split(client.submitted[0]["entrypoint"])
        assert words[:3] == ["stepscope", "run", "c.yaml"]
        command, bound, _ = app.parse_args(words[1:], exit_on_error=False, print_error=False)
        assert command.__name__ == "run"
        assert bound.arguments["set_"] == overrides[1::2]
        assert bound.arguments["replicas"] == 4
        assert str(bound.arguments["store"]) == "/shared/my runs/$x.zarr"

    def test_a_stopped_job_gets_the_time_that_the_config_gives(self, here, client):
        submit()
        assert client.submitted[0]["env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": str(31 + AFTER_DRAIN_S)}

    def test_metadata_says_what_and_where(self, here, client):
        submit()
        loaded = load_config(Path("c.yaml"))
        expected = {"config": "tiny", "hash": loaded.hash(), "store": STORE, "attempt_of": job_id()}
        assert client.submitted[0]["meta"] == expected

    @pytest.mark.parametrize("how", [["--replicas", "7"], ["--set", "run.drain_s=5"], []], ids=["pool", "run", "same"])
    def test_a_double_submit_is_refused_however_it_is_to_run(self, here, client, capsys, how):
        submit()
        capsys.readouterr()
        assert submit(*how) == BAD_INPUT
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"stepscope: job {job_id()} is pending already at {ADDRESS}. Follow it with:")
        assert captured.err.count("\n") == 1

    def test_another_sweep_is_another_job(self, here, client):
        assert submit() == OK
        assert submit("--set", "sampler.steps=2") == OK
        assert len({job["id"] for job in client.submitted}) == 2

    def test_the_same_command_resumes_what_has_ended(self, here, client, capsys):
        submit()
        client.jobs[job_id()].status = "STOPPED"
        capsys.readouterr()
        assert submit() == OK
        assert capsys.readouterr().out == f"{job_id()}-2\n"
        first, second = client.submitted
        assert first["entrypoint"] == second["entrypoint"]


class TestRefused:
    """What is wrong here is said here: no cluster is asked."""

    @pytest.mark.parametrize(
        ("store", "words"),
        [
            ("runs/x.zarr", "--store runs/x.zarr would lie in a temporary folder of the head node and be lost. Use an"),
            ("x.zarr", "would lie in a temporary folder"),
            ("~/x.zarr", "would lie in a temporary folder"),
            ("s3:/b/x.zarr", "would lie in a temporary folder"),
            ("az://b/x.zarr", "stores cannot be at az://. Use an absolute path on shared storage, s3:// or gs://."),
            ("file:///x.zarr", "stores cannot be at file://."),
            ("s3://", "s3:// names no bucket. Use, for example, s3://BUCKET/run.zarr."),
            ("gs:///", "gs:/// names no bucket."),
            ("s3://key:hush@bucket/x.zarr", "holds no credentials"),
            ("s3://bucket/x.zarr?token=hush", "holds no credentials"),
        ],
    )
    def test_store_that_no_node_shares(self, here, client, capsys, store, words):
        assert submit(store=store) == BAD_INPUT
        captured = capsys.readouterr()
        assert words in captured.err
        assert "hush" not in captured.err
        assert captured.err.count("\n") == 1
        assert client.addresses == []

    @pytest.mark.parametrize("store", ["/shared/x.zarr", "s3://b/x.zarr", "gs://b/deep/x.zarr"])
    def test_store_that_nodes_may_share(self, here, client, store):
        assert submit(store=store) == OK
        assert store in shlex.split(client.submitted[0]["entrypoint"])

    def test_a_store_must_be_given(self, here, client, capsys):
        assert main(["submit", "c.yaml", "--address", ADDRESS]) == BAD_INPUT
        assert "--store" in capsys.readouterr().err

    def test_bad_config(self, here, client, capsys):
        (here / "c.yaml").write_text(CONFIG.replace("steps: 3", "stpes: 3"))
        assert submit() == BAD_INPUT
        assert capsys.readouterr().err.startswith("stepscope: c.yaml:4: sampler.stpes: unknown key")
        assert client.addresses == []

    def test_a_model_that_only_the_cluster_has_is_no_fault(self, here, client):
        assert submit("--set", "model.id=/weights/that/are/there") == OK

    @pytest.mark.parametrize(
        ("working_dir", "config", "words"),
        [
            ("nowhere", "c.yaml", "--working-dir nowhere is no folder."),
            ("c.yaml", "c.yaml", "--working-dir c.yaml is no folder."),
            ("sub", "c.yaml", "c.yaml lies outside of --working-dir sub. Move it inside, or leave out"),
            ("sub", "sub/../c.yaml", "lies outside of --working-dir sub."),
            (".", "runs/c.yaml", "runs/c.yaml would not travel, as runs/ is left out."),
            (".", "old.zarr/c.yaml", "old.zarr/c.yaml would not travel, as *.zarr is left out."),
        ],
    )
    def test_folder_that_does_not_fit(self, here, client, capsys, working_dir, config, words):
        for folder in ("sub", "runs", "old.zarr"):
            (here / folder).mkdir()
            (here / folder / "c.yaml").write_text(CONFIG)
        assert submit("--working-dir", working_dir, config=config) == BAD_INPUT
        assert words in capsys.readouterr().err
        assert client.submitted == []


class TestEnvironment:
    def test_nothing_travels_unasked(self, here, client, monkeypatch):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
        submit()
        assert "hush" not in str(client.submitted)

    def test_what_is_named_travels_and_is_not_shown(self, here, client, capsys, monkeypatch):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
        monkeypatch.setenv("AWS_REGION", "far")
        assert submit("--env", "AWS_SECRET_ACCESS_KEY", "--env", "AWS_REGION") == OK
        (job,) = client.submitted
        assert job["env"]["env_vars"].items() >= {"AWS_SECRET_ACCESS_KEY": "hush", "AWS_REGION": "far"}.items()
        assert "hush" not in str(job["meta"]) + job["entrypoint"] + "".join(capsys.readouterr())

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("NOT_SET_ANYWHERE", "--env NOT_SET_ANYWHERE: there is no such environment variable here."),
            ("KEY=hush", "--env takes only a name"),
            ("RAY_AUTH_TOKEN", "would show the cluster's token"),
        ],
    )
    def test_what_cannot_travel(self, here, client, capsys, monkeypatch, name, words):
        monkeypatch.setenv("RAY_AUTH_TOKEN", "hush")
        assert submit("--env", name) == BAD_INPUT
        captured = capsys.readouterr().err
        assert words in captured
        assert "hush" not in captured
        assert client.submitted == []

    def test_address_may_come_from_the_environment(self, here, client, monkeypatch):
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://tunnel:1")
        assert main(["submit", "c.yaml", "--store", STORE]) == OK
        assert main(["status", job_id()]) == OK
        assert client.addresses == ["http://tunnel:1"] * 2


ENDS = [
    pytest.param("SUCCEEDED", 0, "", OK, id="succeeded"),
    pytest.param("FAILED", 2, "exit code 2\nlong log", BAD_INPUT, id="bad-input"),
    pytest.param("FAILED", 1, "exit code 1", FAILED, id="failed-cells"),
    pytest.param("FAILED", None, "node died", FAILED, id="without-a-code"),
    pytest.param("STOPPED", None, "", INTERRUPTED, id="stopped"),
]


class TestWatching:
    @pytest.mark.parametrize("how", ["--wait", "--follow"])
    @pytest.mark.parametrize(("state", "code", "message", "expected"), ENDS)
    def test_exit_code_is_that_of_the_job(self, here, client, capsys, how, state, code, message, expected):
        client.states, client.streams = ["RUNNING", state], [["one\n"], ["one\ntwo\n"]]
        client.jobs = {}
        original = client.get_job_info

        def informed(id_):
            details = original(id_)
            details.driver_exit_code, details.message = code, message
            return details

        client.get_job_info = informed
        assert submit(how) == expected
        captured = capsys.readouterr()
        assert captured.out == f"{job_id()}\n" + ("one\ntwo\n" if how == "--follow" else "")
        assert (f"{job_id()} {state}: " in captured.err) == (state != "SUCCEEDED")
        assert "long log" not in captured.err

    @pytest.mark.parametrize("target", ["id", "config"])
    def test_logs_of_a_job_by_its_id_or_its_config(self, here, client, capsys, target):
        submit("--set", "sampler.steps=2")
        capsys.readouterr()
        name = job_id("sampler.steps=2")
        by = {"id": [name], "config": ["c.yaml", "--set", "sampler.steps=2"]}
        assert main(["logs", *by[target], "--address", ADDRESS]) == OK
        assert capsys.readouterr().out == f"log of {name}\n"

    def test_the_id_of_a_config_needs_its_overrides(self, here, client, capsys):
        submit("--set", "sampler.steps=2")
        assert main(["logs", "c.yaml", "--address", ADDRESS]) == BAD_INPUT
        assert f"no job {job_id()} at {ADDRESS}. Jobs there: {job_id('sampler.steps=2')}." in capsys.readouterr().err

    def test_overrides_without_a_config(self, here, client, capsys):
        assert main(["logs", "stepscope-1", "--set", "sampler.steps=2"]) == BAD_INPUT
        assert "--set belongs to a config, and stepscope-1 is none." in capsys.readouterr().err

    def test_a_config_that_is_not_there(self, here, client, capsys):
        assert main(["logs", "d.yaml"]) == BAD_INPUT
        assert "cannot read config d.yaml" in capsys.readouterr().err

    def test_who_stops_watching_does_not_stop_the_job(self, here, client, capsys):
        submit()
        client.streams = [["one\n", KeyboardInterrupt()]]
        assert main(["logs", job_id(), "--follow"]) == INTERRUPTED
        assert f"The job goes on. Stop it with: stepscope cancel {job_id()}" in capsys.readouterr().err
        assert client.stopped == []


class TestCancel:
    @pytest.mark.parametrize("target", ["id", "config"])
    def test_a_job_is_asked_to_stop(self, here, client, capsys, target):
        submit()
        assert main(["cancel", {"id": job_id(), "config": "c.yaml"}[target], "--address", ADDRESS]) == OK
        assert client.stopped == [job_id()]
        assert "Submitting it again resumes." in capsys.readouterr().err

    @pytest.mark.parametrize("state", ["SUCCEEDED", "FAILED", "STOPPED"])
    def test_a_job_that_has_ended(self, here, client, capsys, state):
        submit()
        client.jobs[job_id()].status = state
        assert main(["cancel", job_id(), "--address", ADDRESS]) == BAD_INPUT
        assert f"has ended already: {state}. There is nothing to cancel." in capsys.readouterr().err

    @pytest.mark.parametrize("store", ["s3://b/x.zarr", "gs://b/x", "x.zarr", "runs/x", "/shared/x", "folder"])
    def test_a_store_carries_the_request_itself(self, here, client, capsys, monkeypatch, store):
        asked = []
        opened = SimpleNamespace(location=store)
        monkeypatch.setattr(pipeline.store, "open_store", lambda given: opened if given == store else None)
        monkeypatch.setattr(pipeline.store, "request_stop", lambda *given: asked.append(given) or "process 1 on here")
        (here / "folder").mkdir()
        assert main(["cancel", store]) == OK
        assert asked == [(store, "stepscope cancel")]
        assert f"Asked the driver of {store} to stop" in capsys.readouterr().err
        assert client.addresses == []

    @pytest.mark.parametrize("store", ["x.zarr", "folder/", "runs/x.zarr"])
    def test_what_is_no_store_is_refused_and_left_alone(self, here, client, capsys, store):
        (here / "folder").mkdir()
        before = sorted(here.rglob("*"))
        assert main(["cancel", store]) == BAD_INPUT
        assert "Create one with: stepscope run" in capsys.readouterr().err
        assert sorted(here.rglob("*")) == before

    @pytest.mark.parametrize("driver", ["none", "released", "dead"])
    def test_a_store_that_nobody_drives(self, here, client, capsys, driver):
        store = here / "x.zarr"
        write_store(store)
        shutil.rmtree(store / "lease", ignore_errors=True)
        if driver != "none":
            lease = Lease(store, beats=False, holder=replace(Holder.here(), started="another process's"))
            lease.acquire()
            if driver == "released":
                lease.release()
        assert main(["cancel", "x.zarr"]) == BAD_INPUT
        assert capsys.readouterr().err == "stepscope: nobody drives store x.zarr. There is nothing to cancel.\n"
        assert not (store / "stop.json").exists()


class TestStatus:
    def job(self, client, **changes):
        metadata = {"config": "tiny", "hash": "f" * 64, "store": STORE, "attempt_of": "stepscope-" + "f" * 16}
        details = Details("stepscope-" + "f" * 16, "RUNNING", metadata)
        for key, value in changes.items():
            setattr(details, key, value)
        client.jobs = {details.submission_id: details}
        return details.submission_id

    def test_says_how_it_is_and_where_results_go(self, here, client, capsys):
        name = self.job(client)
        assert main(["status", name, "--address", ADDRESS]) == OK
        rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert rows.keys() == {"job", "state", "started", "config", "hash", "store"}
        assert (rows["job"], rows["state"], rows["store"]) == (name, "RUNNING", STORE)

    def test_json_is_the_same(self, here, client, capsys):
        name = self.job(client, status="FAILED", driver_exit_code=2)
        assert main(["status", name, "--address", ADDRESS, "--json"]) == FAILED
        facts = json.loads(capsys.readouterr().out)
        assert (facts["job"], facts["state"], facts["exit_code"], facts["ended"]) == (name, "FAILED", 2, None)

    def test_an_id_needs_no_address(self, here, client):
        assert main(["status", self.job(client)]) == OK
        assert client.addresses == ["http://127.0.0.1:8265"]

    def test_a_config_names_its_job(self, here, client, capsys):
        submit()
        capsys.readouterr()
        assert main(["status", "c.yaml", "--address", ADDRESS]) == OK
        assert job_id() in capsys.readouterr().out

    def test_a_store_stays_a_store(self, here, client, capsys):
        assert main(["status", "stepscope.zarr"]) == BAD_INPUT
        (here / ("stepscope-" + "a" * 16)).mkdir()
        assert main(["status", "stepscope-" + "a" * 16]) == BAD_INPUT
        assert "is not a stepscope store" in capsys.readouterr().err
        assert client.addresses == []

    def test_other_peoples_metadata_is_not_shown(self, here, client, capsys):
        name = self.job(client, metadata={"store": STORE, "password": "hush"})
        assert main(["status", name]) == OK
        assert "hush" not in capsys.readouterr().out


def test_a_cluster_that_refuses_is_one_sentence(here, monkeypatch, capsys):
    def connect(address):
        raise JobError(f"no Ray dashboard answers at {address}: nobody.")

    monkeypatch.setattr(cluster.jobs, "connect", connect)
    for arguments in (["submit", "c.yaml", "--store", STORE], ["logs", "x"], ["cancel", "x"], ["status", "x"]):
        assert main([*arguments, "--address", ADDRESS]) == BAD_INPUT
        assert capsys.readouterr().err == f"stepscope: no Ray dashboard answers at {ADDRESS}: nobody.\n"
