"""Following a journal: every entry once, whatever is being written while it is read, wherever it lies."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import LocalStore, MemoryStore

from pipeline import tail
from pipeline.store import Journal
from pipeline.tail import JournalReader, LocalFiles, Offset, ZarrFiles
from tests.journal_fixture import append


def drain(reader, offset=None):
    """Read to the end; return the entries and the offset there."""
    entries, offset = [], offset or Offset()
    for block, after in reader.new(offset):
        entries += block
        offset = after
    return entries, offset


class Counting(LocalFiles):
    """Local files that count what is read."""

    def __init__(self, root):
        super().__init__(root)
        self.bytes = 0
        self.largest = 0

    def read(self, name, start, count):
        found = super().read(name, start, count)
        self.bytes, self.largest = self.bytes + len(found), max(self.largest, len(found))
        return found


class TestGrowingFile:
    def test_no_journal_is_no_entry(self, tmp_path):
        assert JournalReader(LocalFiles(tmp_path)).read(Offset()) == ([], Offset())

    def test_only_what_is_new_is_read(self, tmp_path):
        files = Counting(tmp_path)
        reader = JournalReader(files)
        append(tmp_path, *({"n": n} for n in range(1000)))
        entries, offset = drain(reader)
        assert [e["n"] for e in entries] == list(range(1000))
        before = files.bytes
        append(tmp_path, {"n": 1000})
        entries, offset = drain(reader, offset)
        assert [e["n"] for e in entries] == [1000]
        assert files.bytes - before == len('{"n": 1000}\n')
        assert drain(reader, offset) == ([], offset)

    def test_line_that_is_being_written_waits(self, tmp_path):
        reader, file = JournalReader(LocalFiles(tmp_path)), tmp_path / "journal.jsonl"
        file.write_text('{"n": 1}\n{"n": 2, "text": "ab')
        entries, offset = drain(reader)
        assert [e["n"] for e in entries] == [1]
        with file.open("a") as handle:
            handle.write('c"}\n')
        entries, offset = drain(reader, offset)
        assert entries == [{"n": 2, "text": "abc"}]

    def test_whole_last_line_without_line_end_counts_once(self, tmp_path):
        reader, file = JournalReader(LocalFiles(tmp_path)), tmp_path / "journal.jsonl"
        file.write_text('{"n": 1}\n{"n": 2}')
        entries, offset = drain(reader)
        assert [e["n"] for e in entries] == [1, 2]
        with file.open("a") as handle:
            handle.write('\n{"n": 3}\n')
        assert [e["n"] for e in drain(reader, offset)[0]] == [3]

    @pytest.mark.parametrize(
        "line",
        [
            b'{"torn": "by a kill',
            b"\xff\xfe\x00",
            b"[1, 2]",
            b"7",
            b"",
            b"{" * 5000,
            b'{"n": ' + b"9" * 5000 + b"}",
        ],
        ids=["torn", "binary", "list", "number", "empty", "deep", "huge-number"],
    )
    def test_line_that_is_no_entry_is_passed_over(self, tmp_path, line):
        (tmp_path / "journal.jsonl").write_bytes(b'{"n": 1}\n' + line + b'\n{"n": 2}\n')
        entries, _ = drain(JournalReader(LocalFiles(tmp_path)))
        assert [e["n"] for e in entries] == [1, 2]

    @pytest.mark.parametrize("bit", range(8))
    def test_line_that_was_changed_is_passed_over(self, tmp_path, bit):
        """As the driver does, so that no status is shown that a resume would not go by."""
        journal, file = Journal(tmp_path), tmp_path / "journal.jsonl"
        for index in (1, 2, 3):
            journal.append(group="map", index=index, failed=0)
        content = bytearray(file.read_bytes())
        content[content.index(b'"index": 2') + len(b'"index": ')] ^= 1 << bit
        file.write_bytes(content)
        shown = [entry["index"] for entry in drain(JournalReader(LocalFiles(tmp_path)))[0]]
        assert shown == [entry["index"] for entry in Journal(tmp_path).entries()] == [1, 3]

    def test_reading_takes_bounded_blocks(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tail, "BLOCK", 100)
        files = Counting(tmp_path)
        append(tmp_path, *({"n": n} for n in range(50)), {"long": "x" * 1000}, {"n": 50})
        entries, _ = drain(JournalReader(files))
        assert [e["n"] for e in entries if "n" in e] == list(range(51))
        assert files.largest == 100

    @settings(max_examples=60)
    @given(
        cuts=st.lists(st.integers(0, 400), max_size=8),
        texts=st.lists(st.text(max_size=12), min_size=1, max_size=12),
        block=st.integers(64, 200),
    )
    def test_every_entry_comes_once_wherever_writing_is_cut(self, tmp_path_factory, cuts, texts, block):
        folder = tmp_path_factory.mktemp("cut")
        whole = b"".join(json.dumps({"t": text[:4]}).encode() + b"\n" for text in texts)
        reader, offset, found, written = JournalReader(LocalFiles(folder)), Offset(), [], 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tail, "BLOCK", block)
            for cut in [*sorted(min(c, len(whole)) for c in cuts), len(whole)]:
                with (folder / "journal.jsonl").open("ab") as handle:
                    handle.write(whole[written:cut])
                written = cut
                entries, offset = drain(reader, offset)
                found += entries
        assert [e["t"] for e in found] == [text[:4] for text in texts]


class TestOtherJournal:
    def test_shorter_file_is_another_journal(self, tmp_path):
        reader = JournalReader(LocalFiles(tmp_path))
        append(tmp_path, {"n": 1}, {"n": 2})
        _, offset = drain(reader)
        assert not reader.shrunk(offset)
        (tmp_path / "journal.jsonl").write_text('{"n": 9}\n')
        assert reader.shrunk(offset)

    def test_nothing_read_is_no_other_journal(self, tmp_path):
        assert not JournalReader(LocalFiles(tmp_path)).shrunk(Offset())


def put(store, key, text):
    sync(store.set(key, default_buffer_prototype().buffer.from_bytes(text.encode())))


def object_store():
    obstore = pytest.importorskip("obstore.store")
    from zarr.storage import ObjectStore

    return ObjectStore(obstore.MemoryStore())


class TestSegments:
    @pytest.fixture(params=["memory", "local", "objects"])
    def bucket(self, request, tmp_path):
        stores = {"memory": MemoryStore, "local": lambda: LocalStore(tmp_path), "objects": object_store}
        return stores[request.param]()

    @pytest.mark.parametrize("prefix", ["", "sweeps/run.zarr"], ids=["root", "prefix"])
    def test_segments_follow_each_other(self, bucket, prefix):
        at = f"{prefix}/" if prefix else ""
        put(bucket, f"{at}journal/000001-000002.jsonl", '{"n": 3}\n')
        put(bucket, f"{at}journal/000001-000001.jsonl", '{"n": 1}\n{"n": 2}\n')
        reader = JournalReader(ZarrFiles(bucket, prefix))
        entries, offset = drain(reader)
        assert [e["n"] for e in entries] == [1, 2, 3]
        assert drain(reader, offset) == ([], offset)

    def test_last_segment_grows_and_the_next_one_comes(self, bucket):
        reader = JournalReader(ZarrFiles(bucket))
        put(bucket, "journal/000001-000001.jsonl", '{"n": 1}\n')
        entries, offset = drain(reader)
        put(bucket, "journal/000001-000001.jsonl", '{"n": 1}\n{"n": 2}\n')
        put(bucket, "journal/000002-000001.jsonl", '{"n": 3}\n')
        more, offset = drain(reader, offset)
        assert [e["n"] for e in [*entries, *more]] == [1, 2, 3]
        assert not reader.shrunk(offset)

    def test_torn_end_of_a_segment_does_not_hold_up_the_next(self, bucket):
        put(bucket, "journal/000001-000001.jsonl", '{"n": 1}\n{"n": ')
        put(bucket, "journal/000002-000001.jsonl", '{"n": 3}\n')
        assert [e["n"] for e in drain(JournalReader(ZarrFiles(bucket)))[0]] == [1, 3]

    def test_nothing_there_is_no_entry(self, bucket):
        files = ZarrFiles(bucket)
        assert drain(JournalReader(files)) == ([], Offset())
        assert (files.size("journal.jsonl"), files.read("journal.jsonl", 0, 9)) == (0, b"")

    def test_copied_to_a_bucket_the_file_is_older(self, bucket):
        put(bucket, "journal.jsonl", '{"n": 1}\n')
        put(bucket, "journal/000001-000001.jsonl", '{"n": 2}\n')
        assert [e["n"] for e in drain(JournalReader(ZarrFiles(bucket)))[0]] == [1, 2]

    def test_copied_to_a_folder_the_segments_are_older(self, tmp_path):
        append(tmp_path, {"n": 2})
        append(tmp_path, {"n": 1}, name="journal/000001-000001.jsonl")
        reader = JournalReader(LocalFiles(tmp_path))
        entries, offset = drain(reader)
        append(tmp_path, {"n": 3})
        assert [e["n"] for e in [*entries, *drain(reader, offset)[0]]] == [1, 2, 3]


def test_only_json_files_are_listed(tmp_path):
    for name in ("000002.json", "000001.json", "000003.json.77.partial", "x.txt"):
        (tmp_path / "lease").mkdir(exist_ok=True)
        (tmp_path / "lease" / name).write_text("{}")
    assert LocalFiles(tmp_path).names("lease") == ["lease/000001.json", "lease/000002.json"]
    assert ZarrFiles(LocalStore(tmp_path)).names("lease") == ["lease/000001.json", "lease/000002.json"]
    assert LocalFiles(tmp_path).names("nowhere") == []
