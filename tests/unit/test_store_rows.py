"""The rows of a store: one number for everybody, first come first kept, and only ever fewer."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store import StoreError
from pipeline.store.location import Folder
from pipeline.store.rows import CHOSEN, FOLDER, RowsRecord


@pytest.fixture(params=["folder", "bucket"])
def record(request, tmp_path):
    """A record in a place of each kind."""
    if request.param == "folder":
        return RowsRecord(tmp_path / "run.zarr")
    return RowsRecord(f"{request.getfixturevalue('bucket')}/run.zarr")


class TestChoosing:
    def test_nothing_is_chosen_at_first(self, record):
        assert record.read() is None

    def test_the_first_number_is_kept(self, record):
        assert record.choose(18, hardware="this") == 18
        assert record.choose(7, hardware="that") == 18
        assert RowsRecord(record.location).read() == 18

    def test_of_many_at_once_all_have_the_same(self, tmp_path):
        start, found = threading.Barrier(12), []

        def propose(rows):
            record = RowsRecord(tmp_path / "run.zarr")
            start.wait()
            found.append(record.choose(rows))

        threads = [threading.Thread(target=propose, args=(rows,)) for rows in range(1, 13)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 12
        assert set(found) == {RowsRecord(tmp_path / "run.zarr").read()}

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"[]", b'{"rows": 0}', b'{"rows": true}', b'{"rows": "18"}', b'{"rows": 1e9}', b"[" * 99_999],
        ids=["empty", "torn", "list", "none", "truth", "text", "too many", "deep"],
    )  # fmt: skip
    def test_a_damaged_number_is_refused_in_one_sentence(self, tmp_path, content):
        record = RowsRecord(tmp_path / "run.zarr")
        record.location.write(CHOSEN, content)
        with pytest.raises(StoreError, match=r"chosen\.json does not say how many rows share a forward.*delete it"):
            record.read()
        with pytest.raises(StoreError):
            record.choose(4)


class TestHalving:
    @pytest.mark.parametrize(("rows", "half"), [(18, 9), (9, 4), (3, 1), (2, 1), (1, 1)])
    def test_is_half_and_at_least_one(self, record, rows, half):
        record.choose(rows)
        assert record.halve(rows, error="out of memory") == half
        assert record.read() == half

    def test_of_two_that_fail_at_once_both_have_the_same(self, record):
        record.choose(16)
        assert [record.halve(16), record.halve(16)] == [8, 8]
        assert record.read() == 8

    def test_one_that_is_late_takes_what_is_in_force(self, record):
        record.choose(16)
        record.halve(16)
        record.halve(8)
        assert record.halve(16) == 4
        assert record.read() == 4

    def test_a_choice_that_comes_after_does_not_raise_it(self, record):
        record.halve(8)
        assert record.choose(16) == 4

    def test_why_is_kept_for_people(self, tmp_path):
        record = RowsRecord(tmp_path / "run.zarr")
        record.choose(16, hardware="x86_64")
        record.halve(16, error="tried to allocate 2 GiB")
        assert "x86_64" in (tmp_path / "run.zarr" / CHOSEN).read_text()
        assert "2 GiB" in (tmp_path / "run.zarr" / FOLDER / "halved-0000008.json").read_text()

    def test_other_files_of_the_folder_say_nothing(self, tmp_path):
        record = RowsRecord(tmp_path / "run.zarr")
        record.choose(16)
        for name in ("halved-2.json", "halved-000000x.json", "halved-0000002.json.bak", "notes.txt"):
            record.location.write(f"{FOLDER}/{name}", b"")
        assert record.read() == 16

    @given(st.integers(1, 64), st.lists(st.tuples(st.sampled_from("ch"), st.integers(1, 64)), max_size=12))
    @settings(max_examples=40, deadline=None)
    def test_whatever_happens_it_never_rises(self, tmp_path_factory, first, calls):
        record = RowsRecord(Folder(tmp_path_factory.mktemp("rows") / "run.zarr"))
        latest = record.choose(first)
        for kind, rows in calls:
            now = record.choose(rows) if kind == "c" else record.halve(rows)
            assert now == record.read() <= latest
            assert kind == "c" or now <= max(1, rows // 2)
            latest = now
