"""Resuming restores the template: what creation wrote is written anew where it is damaged, and nothing else is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.plan import Plan
from pipeline.store import StoreError, is_store, locate, open_or_create, open_store
from pipeline.store.restore import _array_of
from pipeline.store.template import template_of
from tests.planted_units import finish, small_plan
from tests.sweep_fixture import assert_same_arrays


@pytest.fixture(scope="module")
def plan() -> Plan:
    return small_plan()


@pytest.fixture(scope="module")
def undisturbed(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run.zarr"
    finish(folder, plan)
    return folder


@pytest.fixture
def folder(undisturbed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(undisturbed, tmp_path / "run.zarr"))


def resumed(folder: Path, plan: Plan) -> list[str]:
    """Open the store as a run does; return what it says."""
    said: list[str] = []
    open_or_create(folder, plan, say=said.append)
    return said


def contents(folder: Path) -> dict[str, bytes | None]:
    return {key: locate(folder).read(key) for key in locate(folder).list()}


def test_template_is_a_function_of_the_plan_but_for_its_time(plan):
    one, other = template_of(plan), template_of(plan)
    assert {key for key in one if one[key] != other[key]} <= {"zarr.json"}
    assert one.keys() == other.keys()


def test_undamaged_store_is_left_as_it_is(folder, plan):
    before = contents(folder)
    assert resumed(folder, plan) == []
    assert contents(folder) == before


def test_everything_that_creation_wrote_can_be_lost(folder, plan, undisturbed):
    """All of it at once, but the root: what units wrote stays as it is."""
    for key in template_of(plan):
        if key != "zarr.json" and "/status/c/" not in key:
            (folder / key).unlink()
    (said,) = resumed(folder, plan)
    assert said.startswith(f"store {folder}: damaged parts of the template were written anew: baseline/")
    assert "samples/prompt/c/0" in said
    assert_same_arrays(folder, undisturbed)
    assert resumed(folder, plan) == []


@pytest.mark.parametrize(
    ("key", "change"),
    [
        pytest.param("map/solved/zarr.json", lambda b: b.replace(b'"solved"', b'"s0lved"'), id="name-in-metadata"),
        pytest.param("map/solved/zarr.json", lambda b: b.replace(b"NaN", b"0.0"), id="fill-value"),
        pytest.param("map/solved/zarr.json", lambda b: b[:-20], id="half-metadata"),
        pytest.param("map/zarr.json", lambda b: b.replace(b"patch", b"patsh"), id="attribute-of-a-group"),
        pytest.param("map/zarr.json", lambda b: b"[]", id="metadata-is-a-list"),
        pytest.param("map/zarr.json", lambda b: b'{"attributes": 3}', id="attributes-are-a-number"),
        pytest.param("samples/seed/c/0", lambda b: b"", id="empty-chunk"),
        pytest.param("samples/seed/c/0", lambda b: b[::-1], id="garbled-chunk"),
    ],
)
def test_one_damaged_part_is_named_and_written_anew(folder, plan, undisturbed, key, change):
    content = (folder / key).read_bytes()
    changed = change(content)
    if key == "map/solved/zarr.json":
        changed = changed if changed != content else content.replace(b"float32", b"float64")
    assert changed != content
    (folder / key).write_bytes(changed)
    assert resumed(folder, plan) == [f"store {folder}: damaged parts of the template were written anew: {key}."]
    assert (folder / key).read_bytes() == content
    assert_same_arrays(folder, undisturbed)


def test_wrong_values_in_a_sound_chunk_are_restored(folder, plan, undisturbed):
    open_store(folder).array("map/layer")[...] = 3
    assert "map/layer/c/0" in resumed(folder, plan)[0]
    assert_same_arrays(folder, undisturbed)


def test_same_values_packed_otherwise_are_left_alone(folder, plan):
    """As another version of the codec would."""
    import zarr

    array = zarr.create_array(
        str(folder.parent / "x.zarr"),
        shape=(6,),
        dtype="int64",
        compressors=[zarr.codecs.ZstdCodec(level=19, checksum=True)],
    )
    array[...] = open_store(folder).array("map/layer")[...]
    packed = (folder.parent / "x.zarr" / "c" / "0").read_bytes()
    assert packed != (folder / "map/layer/c/0").read_bytes(), "or nothing is tested here"
    (folder / "map/layer/c/0").write_bytes(packed)
    assert resumed(folder, plan) == []
    assert (folder / "map/layer/c/0").read_bytes() == packed


def test_agreement_and_effects_are_no_damage(folder, plan):
    import zarr

    group = zarr.open_group(str(folder), path="screened", mode="r+", use_consolidated=False)
    group.attrs["agreement"] = "{}"
    zarr.open_group(str(folder), mode="r+", use_consolidated=False).create_group("effects")
    assert resumed(folder, plan) == []
    assert group.attrs["agreement"] == "{}"


def test_store_in_a_bucket_is_restored_too(folder, plan, bucket, undisturbed):
    copy = locate(f"{bucket}/run.zarr")
    for key, content in contents(folder).items():
        copy.write(key, content or b"")
    copy.delete("map/component/c/0")
    copy.write("samples/zarr.json", b"{")
    said: list[str] = []
    open_or_create(copy, plan, say=said.append)
    assert said[0].endswith("written anew: map/component/c/0, samples/zarr.json.")
    assert_same_arrays(copy, undisturbed)


class TestRoot:
    @staticmethod
    def change(folder: Path, **attributes: Any) -> None:
        root = json.loads((folder / "zarr.json").read_text())
        root["attributes"].update(attributes)
        (folder / "zarr.json").write_text(json.dumps(root))

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"attributes": {}}', None], ids=repr)
    def test_damaged_root_is_refused_by_every_command_and_left_alone(self, folder, plan, content):
        if content is None:
            (folder / "zarr.json").unlink()
        else:
            (folder / "zarr.json").write_bytes(content)
        before = contents(folder)
        for act in (lambda: open_store(folder), lambda: open_or_create(folder, plan)):
            with pytest.raises(
                StoreError,
                match=r"^store .*run\.zarr is damaged: its zarr\.json does not say what it was created for\. Put back",
            ):
                act()
        assert contents(folder) == before
        assert not is_store(folder)

    @pytest.mark.parametrize(
        "attributes",
        [
            pytest.param({"config_json": "{"}, id="config-unreadable"),
            pytest.param({"config_json": "{}"}, id="config-emptied"),
            pytest.param({"config_sha256": "0" * 64}, id="hash-changed"),
            pytest.param({"schema_version": "2x"}, id="schema-is-a-word"),
        ],
    )
    def test_root_that_contradicts_itself_is_refused(self, folder, plan, attributes):
        self.change(folder, **attributes)
        with pytest.raises(StoreError, match=r"is damaged: its zarr\.json does not say what it was created for\."):
            open_or_create(folder, plan)

    @pytest.mark.parametrize("name", ["created", "hardware", "libraries", "code_version", "title"])
    def test_what_depends_on_time_and_machine_may_differ(self, folder, plan, name):
        self.change(folder, **{name: "something else"})
        assert resumed(folder, plan) == []
        assert open_store(folder).root.attrs[name] == "something else"

    def test_changed_repetition_of_metadata_is_consolidated_anew(self, folder, plan, undisturbed):
        text = (folder / "zarr.json").read_text()
        root = json.loads(text)
        root["consolidated_metadata"]["metadata"]["map/solved"]["shape"] = [1, 1, 1, 1]
        (folder / "zarr.json").write_text(json.dumps(root))
        (said,) = resumed(folder, plan)
        assert said.endswith("written anew: zarr.json (consolidated metadata).")
        assert json.loads((folder / "zarr.json").read_text()) == json.loads(text)


@pytest.mark.parametrize(
    ("key", "path"),
    [("map/step/c/0", "map/step"), ("one/exact/c", "one/exact"), ("c/c/c/0/1", "c/c"), ("a/b/c/0/0/0", "a/b")],
)
def test_chunk_belongs_to_its_array(key, path):
    assert _array_of(key) == path


def test_faster_first_start_in_a_folder_is_joined_even_when_it_ends_before_the_look_inside(plan, tmp_path, monkeypatch):
    """Between "it is no store" and the look at the folder, another first start moved its store there."""
    from pipeline.store import opening

    looks = []
    lost = opening._lost_its_root

    def finish_first(location):
        if not looks:
            looks.append(1)
            open_or_create(tmp_path / "run.zarr", plan)
        return lost(location)

    monkeypatch.setattr(opening, "_lost_its_root", finish_first)
    store = open_or_create(tmp_path / "run.zarr", plan)
    assert store.config_hash == plan.config.hash()
    assert np.asarray(store.status("map")).size
