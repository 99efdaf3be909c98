"""Export: one zip file that opens with xarray alone and holds what the store holds; and digests of values."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli import BAD_INPUT, OK, main
from pipeline.plan import Plan
from pipeline.store import (
    Journal,
    Lease,
    StoreError,
    digest_of,
    export_store,
    locate,
    open_or_create,
    open_store,
    request_stop,
)
from pipeline.store.location import Folder
from tests.planted_units import finish, small_plan
from tests.sweep_fixture import arrays


@pytest.fixture(scope="module")
def plan() -> Plan:
    return small_plan()


@pytest.fixture(scope="module")
def finished(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run.zarr"
    finish(folder, plan)
    lease = Lease(folder)
    lease.acquire()
    request_stop(folder, "cancelled")
    lease.release()
    (folder / "map" / "x.123.partial").write_bytes(b"half")
    return folder


def zipped_arrays(path: Path) -> dict[str, np.ndarray]:
    root = zarr.open_group(zarr.storage.ZipStore(path, read_only=True), mode="r")
    return {name: np.asarray(item[...]) for name, item in root.members(max_depth=None) if isinstance(item, zarr.Array)}


def test_zip_holds_the_arrays_and_the_journal_and_nothing_of_the_driver(finished, tmp_path):
    out = tmp_path / "deep" / "out.zarr.zip"
    assert export_store(finished, out) == out.stat().st_size
    found, expected = zipped_arrays(out), arrays(finished)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].tobytes() == values.tobytes() or (found[name] == values).all(), name
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.read("journal.jsonl") == (finished / "journal.jsonl").read_bytes()
    assert len(names) == len(set(names))
    assert not [n for n in names if n.startswith("lease") or n == "stop.json" or n.endswith(".partial")]
    assert [p.name for p in out.parent.iterdir()] == ["out.zarr.zip"]


def test_two_exports_are_the_same_file(finished, tmp_path):
    export_store(finished, tmp_path / "a.zip")
    export_store(finished, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_bucket_gives_the_same_arrays_as_a_folder(finished, tmp_path, bucket):
    copy = locate(f"{bucket}/run.zarr")
    for key in locate(finished).list():
        copy.write(key, locate(finished).read(key) or b"")
    export_store(copy, tmp_path / "bucket.zip")
    export_store(finished, tmp_path / "folder.zip")
    assert (tmp_path / "bucket.zip").read_bytes() == (tmp_path / "folder.zip").read_bytes()


def test_zip_opens_with_xarray_alone_and_without_a_warning(finished, tmp_path):
    out = tmp_path / "out.zarr.zip"
    export_store(finished, out)
    code = f"""
        import sys
        import xarray
        from zarr.storage import ZipStore
        tree = xarray.open_datatree(ZipStore({str(out)!r}, read_only=True), engine="zarr")
        assert sorted(tree.children) == ["baseline", "map", "one", "previews", "samples", "screened"]
        assert float(tree["one"]["solved"].isel(sample=0)) == float(tree["one"]["solved"].values[0])
        assert tree["map"]["solved"].dims == ("sample", "step", "layer", "component")
        assert "pipeline" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


class TestRefusals:
    def test_unfinished_store_only_when_asked_for(self, plan, tmp_path):
        open_or_create(tmp_path / "run.zarr", plan)
        with pytest.raises(StoreError, match=r"has \d+ pending units\. Finish it, or export it with --partial\.$"):
            export_store(tmp_path / "run.zarr", tmp_path / "out.zip")
        assert not (tmp_path / "out.zip").exists()
        export_store(tmp_path / "run.zarr", tmp_path / "out.zip", partial=True)
        assert np.isnan(zipped_arrays(tmp_path / "out.zip")["map/solved"]).all()

    def test_units_that_only_the_journal_knows_are_finished(self, finished, tmp_path):
        folder = Path(shutil.copytree(finished, tmp_path / "run.zarr"))
        open_store(folder).write_status("map", np.zeros(4, np.uint8))
        export_store(folder, tmp_path / "out.zip")
        Journal(folder).append(group="map", index=0, unset="missing")
        with pytest.raises(StoreError, match="has 1 pending units"):
            export_store(folder, tmp_path / "out2.zip")

    def test_file_that_exists_only_when_asked_for(self, finished, tmp_path):
        (tmp_path / "out.zip").write_text("precious")
        with pytest.raises(StoreError, match=r"out\.zip exists\. Choose another name, or replace it with --force\.$"):
            export_store(finished, tmp_path / "out.zip")
        assert (tmp_path / "out.zip").read_text() == "precious"
        export_store(finished, tmp_path / "out.zip", force=True)
        assert zipfile.is_zipfile(tmp_path / "out.zip")

    def test_failed_export_leaves_the_old_file_and_no_rest(self, finished, tmp_path, monkeypatch):
        (tmp_path / "out.zip").write_text("precious")

        def full(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
        with pytest.raises(StoreError, match=r"^cannot write .*out\.zip: No space left on device\. Choose a place"):
            export_store(finished, tmp_path / "out.zip", force=True)
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("out.zip", "precious")]

    @pytest.mark.parametrize("name", ["file/out.zip", "folder"])
    def test_place_that_cannot_be_written_is_one_sentence(self, finished, tmp_path, name):
        (tmp_path / "file").write_text("")
        (tmp_path / "folder").mkdir()
        with pytest.raises(StoreError, match=r"^cannot write .*: .*\. Choose a place that can be written\.$"):
            export_store(finished, tmp_path / name, force=True)
        assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


class TestCommand:
    def test_says_what_it_wrote(self, finished, tmp_path, capsys):
        assert main(["export", str(finished), str(tmp_path / "out.zip")]) == OK
        size = (tmp_path / "out.zip").stat().st_size
        assert capsys.readouterr().out == f"Wrote {tmp_path}/out.zip ({size:,} bytes).\n"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            pytest.param(["nothing.zarr", "out.zip"], "does not exist. Create one with", id="no-store"),
            pytest.param(["STORE", "s3://bucket/out.zip"], "is a URL. Copy the file there afterwards.", id="url"),
            pytest.param(["STORE", "STORE"], "exists. Choose another name, or replace it with --force.", id="itself"),
        ],
    )
    def test_bad_input_is_one_sentence(self, finished, capsys, arguments, message):
        assert main(["export", *(str(finished) if a == "STORE" else a for a in arguments)]) == BAD_INPUT
        captured = capsys.readouterr().err
        assert message in captured
        assert captured.count("\n") == 1


VALUES = {
    "map/solved": np.arange(6, dtype=np.float32).reshape(2, 3),
    "map/goal": np.array([np.nan, 0.5], dtype=np.float32),
}


class TestDigest:
    def test_is_what_was_agreed_on(self):
        """Receipts of old stores must keep their meaning."""
        assert digest_of(VALUES) == "d872bdd2ea36ad41778642fa80aba75d"
        assert digest_of({}) == "e3b0c44298fc1c149afbf4c8996fb924", "the SHA-256 of nothing"

    def test_does_not_depend_on_order_layout_or_byte_order(self):
        turned = {name: VALUES[name] for name in reversed(VALUES)}
        assert digest_of(turned) == digest_of(VALUES)
        assert digest_of({n: v.astype(">f4") for n, v in VALUES.items()}) == digest_of(VALUES)
        assert digest_of({n: np.asfortranarray(v) for n, v in VALUES.items()}) == digest_of(VALUES)

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param({"map/solved": np.arange(6, dtype=np.float32).reshape(3, 2)}, id="shape"),
            pytest.param({"map/solved": np.arange(6, dtype=np.int32).reshape(2, 3)}, id="type"),
            pytest.param({"map/goal": np.array([np.nan, -0.0], dtype=np.float32)}, id="value"),
            pytest.param({"map/more": np.zeros(1, np.float32)}, id="one-more"),
            pytest.param({"map/empty": np.zeros(0, np.float32)}, id="one-more-of-no-size"),
        ],
    )
    def test_every_change_shows(self, change):
        assert digest_of({**VALUES, **change}) != digest_of(VALUES)

    def test_negative_zero_is_not_zero(self):
        assert digest_of({"a": np.array([0.0], np.float32)}) != digest_of({"a": np.array([-0.0], np.float32)})

    @given(
        values=st.lists(st.floats(width=32), min_size=1, max_size=20),
        bit=st.integers(0, 31),
        data=st.data(),
    )
    def test_every_bit_counts(self, values, bit, data):
        array = np.array(values, dtype=np.float32)
        other = array.copy()
        other.view(np.uint32)[data.draw(st.integers(0, len(values) - 1))] ^= np.uint32(1 << bit)
        assert digest_of({"a": array}) != digest_of({"a": other})
        assert digest_of({"a": array}) == digest_of({"a": array.copy()})


def test_receipts_in_the_journal_have_the_digest_of_what_is_stored(finished):
    entry = next(e for e in Journal(finished).entries() if (e["group"], e["index"]) == ("one", 1))
    store = open_store(finished)
    values = {f"one/{m}": np.asarray(store.array(f"one/{m}")[1]) for m in ("goal_evidence", "solved")}
    assert entry["digest"] == digest_of(values)
    assert json.dumps(entry)


@pytest.mark.parametrize("fault", ["unlisted", "unread"])
def test_what_cannot_be_read_is_never_left_out(fault, finished, tmp_path, monkeypatch):
    """A copy that lacks some chunks would look whole: missing ones read as NaN."""
    fault_at = str(finished / "map")
    scandir, read = os.scandir, Folder.read

    def refuse(path):
        raise OSError(errno.EIO, "Input/output error", path)

    if fault == "unlisted":
        monkeypatch.setattr(os, "scandir", lambda path: refuse(path) if str(path) == fault_at else scandir(path))
    else:
        monkeypatch.setattr(
            Folder, "read", lambda self, key: refuse(key) if "/c/" in key and key[:3] == "map" else read(self, key)
        )
    with pytest.raises(StoreError, match=r"cannot be read: Input/output error\. Check the store with"):
        export_store(finished, tmp_path / "out.zip")
    assert list(tmp_path.iterdir()) == []
