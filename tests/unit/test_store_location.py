"""Where a store can lie: names that are accepted and refused, and the same few operations on folders and buckets."""

from __future__ import annotations

import errno
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.store import Location, StorageFullError, StorageReadOnlyError, StoreError, locate
from pipeline.store.location import Bucket, Folder


class TestNames:
    @pytest.mark.parametrize(
        ("text", "kind", "shown", "name"),
        [
            pytest.param("runs/a.zarr", Folder, "runs/a.zarr", "a.zarr", id="relative"),
            pytest.param("/runs/a.zarr", Folder, "/runs/a.zarr", "a.zarr", id="absolute"),
            pytest.param("runs/a.zarr/", Folder, "runs/a.zarr", "a.zarr", id="slash-at-the-end"),
            pytest.param("s3://bucket/a.zarr", Bucket, "s3://bucket/a.zarr", "a.zarr", id="s3"),
            pytest.param("s3://bucket/deep/er/a.zarr/", Bucket, "s3://bucket/deep/er/a.zarr", "a.zarr", id="s3-deep"),
            pytest.param("gs://bucket/a.zarr", Bucket, "gs://bucket/a.zarr", "a.zarr", id="gs"),
        ],
    )
    def test_text_becomes_a_location(self, text, kind, shown, name):
        location = locate(text)
        assert isinstance(location, kind)
        assert (str(location), location.name) == (shown, name)

    def test_location_and_path_are_taken_as_they_are(self, tmp_path):
        location = locate(tmp_path)
        assert locate(location) is location
        assert location == locate(str(tmp_path))
        assert location != locate("s3://bucket/a.zarr")

    def test_address_holds_from_any_working_directory(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert locate("a/../b.zarr").address == str(tmp_path / "b.zarr")
        assert locate("s3://bucket/a.zarr").address == "s3://bucket/a.zarr"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            pytest.param(
                "az://bucket/a.zarr", r"unknown kind of store: az://\. Give a folder, s3://BUCKET", id="azure"
            ),
            pytest.param("http://host/a.zarr", r"unknown kind of store: http://\.", id="http"),
            pytest.param(
                "s3://bucket", r"does not name a store in a bucket\. Write s3://BUCKET/NAME", id="bucket-alone"
            ),
            pytest.param("s3://bucket/", "does not name a store in a bucket", id="bucket-and-slash"),
            pytest.param("s3:///a.zarr", "does not name a store in a bucket", id="no-bucket"),
            pytest.param("gs://bucket/a/../b", "does not name a store in a bucket", id="dots"),
            pytest.param("gs://bucket/a//b", "does not name a store in a bucket", id="two-slashes"),
            pytest.param(
                Path("s3://bucket/a.zarr"), r"has one slash\. Write s3://bucket/a\.zarr\.", id="path-of-a-url"
            ),
        ],
    )
    def test_other_text_is_refused_in_one_sentence(self, text, message):
        with pytest.raises(StoreError, match=message) as caught:
            locate(text)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param("s3://AKIAUSER:hunter2@bucket/a.zarr", id="user-and-password"),
            pytest.param("s3://hunter2@bucket/a.zarr", id="user"),
            pytest.param("ftp://AKIAUSER:hunter2@bucket/a.zarr", id="of-another-kind"),
            pytest.param("s3://bucket/a.zarr?X-Amz-Signature=hunter2", id="signed"),
            pytest.param("gs://bucket/a.zarr#hunter2", id="fragment"),
        ],
    )
    def test_credentials_in_a_url_are_refused_and_not_repeated(self, text):
        with pytest.raises(StoreError, match=r"a store's URL must hold no (user or password|parameters): ") as caught:
            locate(text)
        assert "hunter2" not in str(caught.value)
        assert "AKIAUSER" not in str(caught.value)

    def test_report_of_a_bucket_lies_here_and_of_a_folder_beside_it(self, tmp_path):
        assert locate(tmp_path / "a.zarr").report_folder == tmp_path / "a_report"
        assert locate("s3://bucket/deep/a.zarr").report_folder == Path("a_report")

    def test_pickled_bucket_holds_its_name_alone(self, bucket):
        location = locate(f"{bucket}/a.zarr")
        location.write("x", b"1")
        again = pickle.dumps(location)
        assert b"not-a-secret" not in again
        assert pickle.loads(again).read("x") == b"1"


@pytest.fixture(params=["folder", "bucket"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "folder":
        return locate(tmp_path / "run.zarr")
    return locate(f"{request.getfixturevalue('bucket')}/deep/run.zarr")


class TestKeys:
    def test_what_was_written_is_read(self, location):
        assert location.read("a/b") is None
        location.write("a/b", b"one")
        location.write("a/b", b"two")
        assert location.read("a/b") == b"two"

    def test_key_is_created_once(self, location):
        assert location.create("a/b", b"one")
        assert not location.create("a/b", b"two")
        assert location.read("a/b") == b"one"

    def test_deleted_key_is_gone_and_may_be_created_again(self, location):
        location.delete("a")
        location.write("a", b"one")
        assert location.exists("a")
        location.delete("a")
        assert not location.exists("a")
        assert location.create("a", b"two")

    def test_keys_are_those_of_a_folder_and_below(self, location):
        for key in ("zarr.json", "lease/2", "lease/10", "lease/deep/1", "lease.json", "leases/1"):
            location.write(key, b"")
        assert location.list("lease") == ["lease/10", "lease/2", "lease/deep/1"]
        assert location.list() == ["lease.json", "lease/10", "lease/2", "lease/deep/1", "leases/1", "zarr.json"]
        assert location.list("nothing") == []

    def test_of_many_creators_exactly_one_wins(self, location):
        """What is there afterwards is the winner's, whole."""
        won: list[int] = []
        barrier = threading.Barrier(8)

        def create(number: int) -> None:
            barrier.wait()
            if location.create("lease/1", bytes([number]) * 10_000):
                won.append(number)

        threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = won
        assert location.read("lease/1") == bytes([winner]) * 10_000
        assert location.list() == ["lease/1"]

    def test_zarr_sees_the_keys(self, location):
        import zarr

        zarr.create_group(location.zarr(), attributes={"a": 1})
        assert b'"a": 1' in (location.read("zarr.json") or b"")
        assert zarr.open_group(location.zarr(read_only=True), mode="r").attrs["a"] == 1


class TestFolder:
    def test_unfinished_files_are_no_keys_and_are_swept(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "c.123.partial").write_bytes(b"half")
        assert locate(tmp_path).list() == []
        assert locate(tmp_path).sweep_partial() == 1
        assert not (tmp_path / "a" / "c.123.partial").exists()

    @pytest.mark.parametrize("folder", ["", "lease", "map/c"], ids=["root", "asked", "below"])
    def test_folder_that_does_not_answer_is_not_an_empty_one(self, tmp_path, monkeypatch, folder):
        """Else a lease would seem free, and a copy whole."""
        location = locate(tmp_path)
        for key in ("lease/000001.json", "map/c/0"):
            location.write(key, b"x")
        scandir = os.scandir

        def fail(path):
            if os.path.abspath(path) == str(tmp_path / folder):
                raise OSError(errno.EIO, "Input/output error", path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", fail)
        with pytest.raises(OSError, match="Input/output error"):
            location.list(folder if folder == "lease" else "")

    def test_folder_that_is_not_there_is_an_empty_one(self, tmp_path):
        (tmp_path / "file").write_text("")
        assert locate(tmp_path).list("lease") == locate(tmp_path).list("file") == []

    def test_failed_write_leaves_the_old_content_and_no_rest(self, tmp_path, monkeypatch):
        location = locate(tmp_path)
        location.write("a", b"old")

        def fail(*args: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(StorageFullError, match=r"^cannot write a of store .*: No space left on device\. Finished"):
            location.write("a", b"new")
        assert location.read("a") == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["a"]

    def test_file_swept_by_a_new_driver_is_written_again(self, tmp_path, monkeypatch):
        replace, swept = os.replace, []

        def sweep_first(source: Path, target: Path) -> None:
            if not swept:
                swept.append(locate(tmp_path).sweep_partial())
            replace(source, target)

        monkeypatch.setattr(os, "replace", sweep_first)
        locate(tmp_path).write("a", b"new")
        assert swept == [1]
        assert locate(tmp_path).read("a") == b"new"

    @pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP], ids=errno.errorcode.get)
    def test_file_system_without_hard_links_creates_once_too(self, tmp_path, monkeypatch, code):
        def fail(*args: Any) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "link", fail)
        location = locate(tmp_path)
        assert location.create("a", b"one")
        assert not location.create("a", b"two")
        assert location.read("a") == b"one"

    def test_parent_that_is_a_file_is_no_taken_name(self, tmp_path):
        (tmp_path / "lease").write_text("")
        with pytest.raises(OSError, match=r"exists|directory"):
            locate(tmp_path).create("lease/1", b"")


class TestBucketErrors:
    def test_missing_bucket_is_one_sentence(self, bucket):
        with pytest.raises(
            StoreError, match=r"^store s3://no-such/a\.zarr cannot be reached: there is no bucket no-such"
        ):
            locate("s3://no-such/a.zarr").write("x", b"")

    def test_silent_server_is_one_sentence(self, bucket, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        with pytest.raises(
            StoreError, match=r"^store s3://b/a\.zarr cannot be reached: .* Check its name, the net"
        ) as caught:
            locate("s3://b/a.zarr").read("x")
        assert "\n" not in str(caught.value)
        assert "not-a-secret" not in str(caught.value)

    def test_missing_credentials_file_of_google_is_one_sentence(self, monkeypatch):
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere.json")
        with pytest.raises(
            StoreError,
            match=r"^store gs://b/a\.zarr cannot be reached: .*Check .* and GOOGLE_APPLICATION_CREDENTIALS\.$",
        ) as caught:
            locate("gs://b/a.zarr").read("x")
        assert "\n" not in str(caught.value)

    def test_google_url_is_a_google_store_below_its_prefix(self, monkeypatch):
        from obstore.store import GCSStore

        monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
        store = locate("gs://my-bucket/deep/a.zarr").zarr().store
        assert isinstance(store, GCSStore)
        assert (store.config["bucket"], store.prefix) == ("my-bucket", "deep/a.zarr")

    @pytest.mark.parametrize(
        ("name", "text", "kind"),
        [
            pytest.param("PermissionDeniedError", "AccessDenied", StorageReadOnlyError, id="denied"),
            pytest.param("UnauthenticatedError", "token has expired", StorageReadOnlyError, id="expired"),
            pytest.param("GenericError", "<Code>QuotaExceeded</Code>", StorageFullError, id="quota"),
        ],
    )
    def test_refused_write_names_the_key(self, bucket, monkeypatch, name, text, kind):
        import obstore

        def fail(*args: Any, **kwargs: Any) -> None:
            raise getattr(obstore.exceptions, name)(text)

        monkeypatch.setattr(obstore, "put", fail)
        with pytest.raises(kind, match=r"^cannot write lease/1 of store s3://.*/a\.zarr: "):
            locate(f"{bucket}/a.zarr").create("lease/1", b"")
