"""The journal: every line of a folder at once, of a bucket with each flush; bad lines cost only themselves."""

from __future__ import annotations

import errno
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from pipeline.store import DONE, FAILED, PENDING, Journal, Lease, StorageFullError, locate, status_of
from pipeline.store import journal as journal_module


def units(journal: Journal) -> list[Any]:
    return [entry.get("unit") for entry in journal.entries()]


class TestStatusOfALine:
    @pytest.mark.parametrize(
        ("entry", "status"),
        [
            pytest.param({"group": "a", "index": 0, "failed": 0}, DONE, id="done"),
            pytest.param({"group": "a", "index": 0, "failed": 2}, FAILED, id="cells-failed"),
            pytest.param({"group": "a", "index": 0, "error": "boom"}, FAILED, id="raised"),
            pytest.param({"group": "a", "index": 0, "unset": "missing chunk"}, PENDING, id="unset"),
            pytest.param({"unit": 3, "replica": 0, "retried": "boom"}, None, id="retried"),
            pytest.param({"group": "a", "index": "0"}, None, id="index-is-no-number"),
        ],
    )
    def test_is_what_it_says(self, entry, status):
        assert status_of(entry) == status


class TestFolder:
    def test_entries_come_back_with_their_time(self, tmp_path):
        journal = Journal(tmp_path)
        journal.append(unit=1, error="ümlaut\nand line")
        (entry,) = journal.entries()
        assert entry.pop("time") > 1.7e9
        assert entry == {"unit": 1, "error": "ümlaut\nand line"}

    def test_no_journal_is_no_entries(self, tmp_path):
        assert units(Journal(tmp_path)) == []

    def test_line_is_in_the_file_when_append_returns(self, tmp_path):
        journal = Journal(tmp_path)
        for number in range(3):
            journal.append(unit=number)
            assert units(Journal(tmp_path)) == list(range(number + 1))

    def test_file_is_opened_once(self, tmp_path, monkeypatch):
        opened = []
        open_ = os.open
        monkeypatch.setattr(os, "open", lambda *args: opened.append(args) or open_(*args))
        journal = Journal(tmp_path)
        for number in range(50):
            journal.append(unit=number)
        journal.close()
        journal.append(unit=50)
        assert len(opened) == 2
        assert units(journal) == list(range(51))

    @pytest.mark.parametrize(
        "torn",
        [
            pytest.param(b'{"unit": 2, "gro', id="half-a-line"),
            pytest.param(b"{", id="one-character"),
            pytest.param(b"\x00\x00\x00", id="zeros-after-power-loss"),
            pytest.param(b'{"error": "\xc3', id="half-a-character"),
        ],
    )
    def test_torn_last_line_costs_only_itself(self, tmp_path, torn):
        journal = Journal(tmp_path)
        journal.append(unit=1)
        journal.close()
        with (tmp_path / "journal.jsonl").open("ab") as handle:
            handle.write(torn)
        assert units(journal) == [1]
        assert journal.skipped == 1
        journal.append(unit=3)
        journal.append(unit=4)
        assert units(journal) == [1, 3, 4]
        assert journal.skipped == 1

    @pytest.mark.parametrize(
        "line",
        [
            pytest.param(b'{"unit": 2, "group": "ma\xff\xfe', id="bits-flipped"),
            pytest.param(b"[1, 2]", id="a-list"),
            pytest.param(b"null", id="null"),
            pytest.param(b"7", id="a-number"),
            pytest.param(b"\x00" * 100, id="zeros"),
        ],
    )
    def test_corrupted_line_in_the_middle_is_skipped_and_counted(self, tmp_path, line):
        (tmp_path / "journal.jsonl").write_bytes(b'{"unit": 1}\n' + line + b'\n\n{"unit": 3}\n')
        journal = Journal(tmp_path)
        assert units(journal) == [1, 3]
        assert journal.skipped == 1
        assert units(journal) == [1, 3]
        assert journal.skipped == 1, "counted anew with every reading"

    def test_line_that_a_full_disk_cut_is_followed_by_whole_ones(self, tmp_path, monkeypatch):
        journal, write = Journal(tmp_path), os.write
        journal.append(unit=1)
        with monkeypatch.context() as full:
            full.setattr(os, "write", lambda file, data: write(file, data[:9]))
            with pytest.raises(StorageFullError, match=r"journal\.jsonl: No space left on device"):
                journal.append(unit=2)
        journal.append(unit=3)
        assert units(journal) == [1, 3]

    def test_full_disk_is_a_sentence(self, tmp_path, monkeypatch):
        def fail(*args: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "write", fail)
        with pytest.raises(
            StorageFullError, match=r"^cannot write .*journal\.jsonl: No space left on device\. Finished"
        ):
            Journal(tmp_path).append(unit=1)

    def test_reading_holds_one_line_at_a_time(self, tmp_path):
        line = json.dumps({"unit": 1, "group": "map", "index": 0, "error": "x" * 1000}) + "\n"
        (tmp_path / "journal.jsonl").write_text(line * 20_000)
        tracemalloc.start()
        count = sum(1 for _ in Journal(tmp_path).entries())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 20_000
        assert peak < 1_000_000, "the file has 20 MB"


class TestBucket:
    @pytest.fixture
    def place(self, bucket: str) -> str:
        return f"{bucket}/run.zarr"

    def test_lines_are_there_after_the_flush(self, place):
        journal = Journal(place, generation=3)
        journal.append(unit=1)
        assert units(Journal(place)) == []
        journal.flush()
        journal.append(unit=2)
        assert units(Journal(place)) == [1]
        journal.close()
        assert units(Journal(place)) == [1, 2]
        assert locate(place).list("journal") == ["journal/000003-000001.jsonl"]

    def test_flush_without_news_writes_nothing(self, place, monkeypatch):
        journal = Journal(place)
        journal.append(unit=1)
        journal.flush()
        monkeypatch.setattr(type(locate(place)), "write", lambda *args: pytest.fail("written"))
        journal.flush()

    def test_long_journal_is_cut_into_segments(self, place, monkeypatch):
        monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 200)
        journal = Journal(place, generation=1)
        for number in range(20):
            journal.append(unit=number)
        journal.flush()
        assert units(Journal(place)) == list(range(20))
        segments = locate(place).list("journal")
        assert len(segments) > 3
        assert all(len(locate(place).read(key) or b"") < 300 for key in segments)

    def test_drivers_follow_one_another_by_their_generation(self, place):
        for generation in (9, 10, 11):
            journal = Journal(place, generation)
            journal.append(unit=generation)
            journal.close()
        assert units(Journal(place)) == [9, 10, 11]

    def test_second_journal_of_a_generation_overwrites_nothing(self, place):
        for number in range(3):
            journal = Journal(place, 1)
            journal.append(unit=number)
            journal.close()
        assert units(Journal(place)) == [0, 1, 2]

    def test_foreign_file_among_the_segments_does_not_matter(self, place):
        locate(place).write("journal/000001-backup.jsonl", b"")
        journal = Journal(place, 1)
        journal.append(unit=1)
        journal.close()
        assert "journal/000001-000001.jsonl" in locate(place).list("journal")

    def test_store_that_was_copied_without_its_lease_goes_on_behind_its_journal(self, place):
        """As an export does: what a later driver undoes must not be overruled by the lines of an earlier one."""
        for state in ({"failed": 0}, {"error": "boom"}, {"failed": 0}):
            lease = Lease(place, beats=False)
            lease.acquire()
            journal = Journal(place, lease.generation)
            journal.append(group="map", index=0, **state)
            journal.close()
            lease.release()
        for key in locate(place).list("lease"):
            locate(place).delete(key)
        lease = Lease(place, beats=False)
        lease.acquire()
        journal = Journal(place, lease.generation)
        journal.append(group="map", index=0, unset="not what was written")
        journal.close()
        assert [status_of(entry) for entry in Journal(place).entries()] == [DONE, FAILED, DONE, PENDING]

    def test_lines_survive_a_flush_that_fails(self, place, monkeypatch):
        journal = Journal(place)
        journal.append(unit=1)
        with monkeypatch.context() as away:
            away.setattr(type(locate(place)), "write", lambda *args: (_ for _ in ()).throw(OSError("away")))
            with pytest.raises(OSError, match="away"):
                journal.flush()
        journal.append(unit=2)
        journal.flush()
        assert units(Journal(place)) == [1, 2]


class TestCopies:
    def test_segments_copied_into_a_folder_are_older_than_its_own_lines(self, tmp_path):
        (tmp_path / "journal").mkdir()
        (tmp_path / "journal" / "000001-000001.jsonl").write_text('{"unit": 1}\n')
        (tmp_path / "journal" / "000002-000001.jsonl").write_text('{"unit": 2}\n')
        journal = Journal(tmp_path)
        journal.append(unit=3)
        assert units(journal) == [1, 2, 3]

    def test_file_copied_into_a_bucket_is_older_than_its_segments(self, bucket, tmp_path: Path):
        local = Journal(tmp_path)
        local.append(unit=1)
        place = locate(f"{bucket}/run.zarr")
        place.write("journal.jsonl", (tmp_path / "journal.jsonl").read_bytes())
        journal = Journal(place)
        journal.append(unit=2)
        journal.close()
        assert units(journal) == [1, 2]
