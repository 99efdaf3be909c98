"""Sweeps into a bucket of a local S3 server: the same arrays as in a folder, through every command."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from pipeline.cli import BAD_INPUT, FAILED, OK, main
from pipeline.config import load_config
from pipeline.plan import Plan, make_plan
from pipeline.store import DONE, PENDING, Journal, Lease, StoreError, is_store, locate, open_or_create, open_store
from pipeline.store import opening as opening_module
from tests.sweep_fixture import arrays, assert_same_arrays, save_tiny_model, tiny_config, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("s3")
    model = save_tiny_model(folder / "tiny")
    experiments = {
        "map": {"kind": "patch", "step": "all", "layer": "all", "component": ["attn2"]},
        "skip": {"kind": "step_skip", "mode": ["freeze", "drop"], "step": [0, 2]},
    }
    return write_config(folder / "tiny.yaml", tiny_config(model, experiments=experiments))


@pytest.fixture(scope="module")
def local(config, tmp_path_factory) -> Path:
    """The same sweep in a folder."""
    store = tmp_path_factory.mktemp("local") / "run.zarr"
    assert main(["run", str(config), "--store", str(store)]) == OK
    return store


@pytest.fixture
def plan(config) -> Plan:
    return make_plan(load_config(config), config)


def test_sweep_effects_and_report_work_as_in_a_folder(config, local, bucket, tmp_path, monkeypatch, capsys):
    store = f"{bucket}/deep/run.zarr"
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(config), "--store", store]) == OK
    assert_same_arrays(store, local)
    assert main(["status", store, "--json"]) == OK
    assert all(row["done"] == row["units"] for row in json.loads(capsys.readouterr().out)["groups"])

    assert main(["report", store]) == BAD_INPUT
    assert f"Run first: stepscope effects {store}" in capsys.readouterr().err
    assert main(["effects", store]) == OK
    copy = shutil.copytree(local, tmp_path / "copy.zarr")
    assert main(["effects", str(copy)]) == OK
    assert_same_arrays(store, copy)
    assert main(["report", store]) == OK
    assert (tmp_path / "run_report" / "report.html").stat().st_size > 10_000

    before = len(list(Journal(store).entries()))
    assert main(["run", str(config), "--store", store]) == OK
    assert "(0 computed now)" in capsys.readouterr().err
    assert len(list(Journal(store).entries())) == before


def test_interrupted_sweep_resumes_to_the_same_arrays(config, local, bucket, monkeypatch):
    store = f"{bucket}/run.zarr"
    import pipeline.replica

    run, done = pipeline.replica.Replica.run, []

    def interrupt(self, unit):
        done.append(unit)
        if len(done) > 4:
            raise KeyboardInterrupt
        return run(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.replica.Replica, "run", interrupt)
        assert main(["run", str(config), "--store", store]) == 130
    held = sum(int((open_store(store).status(g) == DONE).sum()) for g in open_store(store).groups())
    assert held == 4
    assert main(["run", str(config), "--store", store]) == OK
    assert_same_arrays(store, local)
    generations = {key.split("/")[1].split("-")[0] for key in locate(store).list("journal")}
    assert generations == {"000001", "000002"}


def test_units_that_only_the_journal_knows_are_not_computed_again(config, bucket, plan):
    store = f"{bucket}/run.zarr"
    assert main(["run", str(config), "--store", store]) == OK
    opened = open_store(store)
    opened.write_status("map", np.full(plan.group_units("map"), PENDING, np.uint8))
    before = len(list(Journal(store).entries()))
    assert main(["run", str(config), "--store", store]) == OK
    assert (open_store(store).status("map") == DONE).all()
    assert len(list(Journal(store).entries())) == before


def test_corrupted_and_deleted_objects_are_found_and_computed_again(config, local, bucket, tmp_path, capsys):
    store = f"{bucket}/run.zarr"
    assert main(["run", str(config), "--store", store]) == OK
    assert main(["verify", store]) == OK
    location = locate(store)
    content = bytearray(location.read("map/goal_evidence/c/0/0/0/0") or b"")
    content[len(content) // 2] ^= 1
    location.write("map/goal_evidence/c/0/0/0/0", bytes(content))
    location.delete("skip/latent_distance/c/1/0/0")
    location.delete("samples/prompt/c/0")
    capsys.readouterr()
    assert main(["verify", store]) == FAILED
    captured = capsys.readouterr()
    assert "map[0]: unreadable, pending again" in captured.out
    assert "skip[1]: missing, pending again" in captured.out
    assert "samples/prompt (missing): damaged part of the template" in captured.out
    assert captured.err == (f"Run the same command again, it repairs the rest: stepscope run CONFIG --store {store}\n")
    assert main(["run", str(config), "--store", store]) == OK
    captured = capsys.readouterr()
    assert "damaged parts of the template were written anew: samples/prompt/c/0." in captured.err
    assert "(2 computed now)" in captured.err
    assert main(["verify", store]) == OK
    assert_same_arrays(store, local)
    assert main(["export", store, str(tmp_path / "run.zarr.zip")]) == OK


def test_two_drivers_on_one_bucket_are_refused(config, bucket, plan, capsys):
    store = f"{bucket}/run.zarr"
    open_or_create(store, plan)
    lease = Lease(store)
    lease.acquire()
    try:
        assert main(["run", str(config), "--store", store]) == BAD_INPUT
    finally:
        lease.release()
    captured = capsys.readouterr().err
    assert re.fullmatch(
        rf"stepscope: store {store} is being driven by process \d+ on .*\. Wait for it or stop it\.\n", captured
    )


def test_other_config_is_refused(config, bucket, plan, capsys):
    store = f"{bucket}/run.zarr"
    open_or_create(store, plan)
    assert main(["run", str(config), "--store", store, "--set", "sampler.steps=5"]) == BAD_INPUT
    assert "sampler.steps is 4 in the store, 5 in the config" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "effects", "report"])
def test_store_that_is_not_there_is_one_sentence(command, bucket, capsys):
    assert main([command, f"{bucket}/nothing.zarr"]) == BAD_INPUT
    captured = capsys.readouterr().err
    assert captured == (
        f"stepscope: {bucket}/nothing.zarr does not exist. "
        f"Create one with: stepscope run CONFIG --store {bucket}/nothing.zarr\n"
    )


def test_store_opens_with_xarray_alone_and_without_a_warning(bucket, plan):
    store = f"{bucket}/run.zarr"
    open_or_create(store, plan)
    lease = Lease(store)
    lease.acquire()
    lease.release()
    Journal(store).append(unit=0)
    code = (
        "import os, sys, xarray; from obstore.store import S3Store; from zarr.storage import ObjectStore; "
        "s = S3Store.from_url(sys.argv[1], client_options={'allow_http': True}); "
        "print(xarray.open_datatree(ObjectStore(s, read_only=True), engine='zarr')['map']['goal_evidence'].dims); "
        "assert 'pipeline' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, store], capture_output=True, text=True, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr
    assert "'sample', 'step'" in done.stdout
    assert done.stderr == ""


class TestCreation:
    def test_bucket_holds_what_a_folder_does(self, bucket, plan, tmp_path):
        store = f"{bucket}/run.zarr"
        open_or_create(store, plan)
        open_or_create(tmp_path / "run.zarr", plan)
        assert_same_arrays(store, tmp_path / "run.zarr")
        assert locate(store).list() == locate(tmp_path / "run.zarr").list()

    def test_root_comes_last(self, bucket, plan, monkeypatch):
        created = []
        create = type(locate(bucket + "/x")).create

        def note(self, key, data):
            created.append(key)
            return create(self, key, data)

        monkeypatch.setattr(type(locate(bucket + "/x")), "create", note)
        open_or_create(f"{bucket}/run.zarr", plan)
        assert created[0] == "creating.json"
        assert created[-1] == "zarr.json"
        assert len(created) > 20

    @pytest.mark.parametrize("uploads", [0, 1, 10, 25], ids="after-{}".format)
    def test_half_created_store_is_no_store_and_the_next_start_completes_it(
        self, uploads, bucket, plan, tmp_path, monkeypatch
    ):
        store = f"{bucket}/run.zarr"
        kind, lock, count = type(locate(store)), threading.Lock(), []
        create = kind.create

        def die(self, key, data):
            with lock:
                count.append(key)
                if len(count) > uploads + 1:
                    raise KeyboardInterrupt
            return create(self, key, data)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "create", die)
            with pytest.raises(KeyboardInterrupt):
                open_or_create(store, plan)
        assert not is_store(store)
        with pytest.raises(StoreError, match="is not a stepscope store"):
            open_store(store)
        open_or_create(store, plan)
        open_or_create(tmp_path / "run.zarr", plan)
        assert_same_arrays(store, tmp_path / "run.zarr")
        assert not locate(store).exists("creating.json")

    def test_beginnings_of_another_config_are_refused(self, bucket, plan, config, monkeypatch):
        store = f"{bucket}/run.zarr"
        opening_module._claim_prefix(locate(store), plan)
        other = make_plan(load_config(config, ["sampler.steps=5"]), config)
        with pytest.raises(
            StoreError, match=r"holds the beginnings of a store of another config\. Use another --store"
        ):
            open_or_create(store, other)
        open_or_create(store, plan)

    def test_prefix_with_other_objects_is_refused_and_left_alone(self, bucket, plan):
        location = locate(f"{bucket}/run.zarr")
        location.write("notes.txt", b"hello")
        with pytest.raises(StoreError, match=r"exists and is not a stepscope store\. Use another --store\.$"):
            open_or_create(location, plan)
        assert location.list() == ["notes.txt"]

    # Warnings are silenced for a whole process, so that threads at once undo each other's silence.
    @pytest.mark.filterwarnings("ignore:Consolidated metadata")
    def test_first_starts_at_once_end_with_one_template(self, bucket, plan, tmp_path):
        store, barrier = f"{bucket}/run.zarr", threading.Barrier(4)

        def start(number: int) -> str:
            barrier.wait()
            return open_or_create(store, plan).config_hash

        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(start, range(4))) == {plan.config.hash()}
        open_or_create(tmp_path / "run.zarr", plan)
        assert_same_arrays(store, tmp_path / "run.zarr")
        assert not locate(store).exists("creating.json")

    def test_late_first_start_overwrites_nothing_that_the_other_wrote(self, bucket, plan, monkeypatch):
        """One start is slow: before its first upload, another has created the store and finished units."""
        store = f"{bucket}/run.zarr"
        build = opening_module.template_of

        def slow(plan):
            monkeypatch.setattr(opening_module, "template_of", build)
            made = open_or_create(store, plan)
            made.write_status("map", np.full(plan.group_units("map"), DONE, np.uint8))
            return build(plan)

        monkeypatch.setattr(opening_module, "template_of", slow)
        late = open_or_create(store, plan)
        assert (late.status("map") == DONE).all()

    def test_missing_bucket_is_one_sentence(self, bucket, plan):
        with pytest.raises(StoreError, match=r"there is no bucket no-such-bucket\. Create it first\.$"):
            open_or_create("s3://no-such-bucket/run.zarr", plan)


def test_every_array_has_a_checksum(local, tmp_path):
    store = shutil.copytree(local, tmp_path / "run.zarr")
    assert main(["effects", str(store)]) == OK
    root, found = zarr.open_group(str(store), mode="r"), arrays(store)
    assert {name.split("/")[0] for name in found} == {"samples", "baseline", "previews", "map", "skip", "effects"}
    for name in found:
        codecs = [str(codec) for codec in root[name].metadata.codecs]
        assert any("ZstdCodec" in codec and "checksum=True" in codec for codec in codecs), name
