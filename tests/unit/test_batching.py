"""The rows in force while a replica works: kept, halved on failure, and never another's number for a result."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.batching import ChosenRows, FixedRows, indivisible
from pipeline.memory_errors import MemoryExhaustedError
from pipeline.store.rows import RowsRecord


class Device:
    """Work that fits up to so many rows, and remembers what was tried."""

    def __init__(self, fits: int) -> None:
        self.fits, self.tried = fits, []

    def __call__(self, rows: int) -> str:
        self.tried.append(rows)
        if rows > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return f"computed by {rows}"


@pytest.fixture
def record(tmp_path):
    found = RowsRecord(tmp_path / "run.zarr")
    found.choose(18)
    return found


class TestChosen:
    def test_what_fits_runs_once(self, record):
        device = Device(18)
        assert ChosenRows(record, 18).run(device) == ("computed by 18", 18)
        assert device.tried == [18]

    @pytest.mark.parametrize(
        ("fits", "tried"), [(17, [18, 9]), (8, [18, 9, 4]), (1, [18, 9, 4, 2, 1])], ids=["once", "twice", "down to one"]
    )
    def test_what_does_not_fit_runs_with_half(self, record, fits, tried):
        rows, device = ChosenRows(record, 18), Device(fits)
        assert rows.run(device) == (f"computed by {tried[-1]}", tried[-1])
        assert device.tried == tried
        assert record.read() == tried[-1]
        device.tried.clear()
        rows.run(device)
        assert device.tried == [tried[-1]], "later work begins with what fitted"

    def test_one_row_that_does_not_fit_is_one_sentence(self, record):
        with pytest.raises(MemoryExhaustedError, match=r"with one row of a forward: CUDA out of memory\. Use a device"):
            ChosenRows(record, 18).run(Device(0))
        assert record.read() == 1

    def test_other_errors_halve_nothing(self, record):
        def broken(rows):
            raise ValueError("a bug")

        with pytest.raises(ValueError, match="a bug"):
            ChosenRows(record, 18).run(broken)
        assert record.read() == 18

    def test_what_another_replica_halved_meanwhile_is_computed_again(self, record):
        tried = []

        def work(rows):
            tried.append(rows)
            if rows == 18:
                record.halve(18)
            return rows

        assert ChosenRows(record, 18).run(work) == (9, 9)
        assert tried == [18, 9]

    def test_a_replica_that_comes_late_fails_no_more(self, record):
        early, late = Device(5), Device(5)
        ChosenRows(record, 18).run(early)
        second = ChosenRows(record, 18)
        assert second.run(late) == ("computed by 4", 4)
        assert late.tried == [18, 4]

    def test_a_record_that_is_gone_raises_nothing(self, record):
        rows = ChosenRows(record, 18)
        rows.run(Device(9))
        for key in record.location.list():
            record.location.delete(key)
        assert rows.run(Device(18)) == ("computed by 9", 9)

    def test_what_failed_work_held_is_gone_before_the_next_try(self, record):
        held = []

        def work(rows):
            tensor = torch.zeros(3)
            held.append(weakref.ref(tensor))
            if rows > 9:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return [ref() is not None for ref in held]

        gc.disable()
        try:
            assert ChosenRows(record, 18).run(work) == ([False, True], 9)
        finally:
            gc.enable()

    @given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), max_size=20), st.integers(1, 40))
    @settings(max_examples=40, deadline=None)
    def test_however_replicas_fail_all_use_one_number_that_never_rises(self, tmp_path_factory, turns, first):
        record = RowsRecord(tmp_path_factory.mktemp("rows") / "run.zarr")
        replicas = [ChosenRows(record, record.choose(first)) for _ in range(3)]
        latest = first
        for number, fits in turns:
            result, rows = replicas[number].run(Device(fits))
            assert result == f"computed by {rows}"
            assert rows == record.read() <= min(latest, fits)
            latest = rows


class TestFixed:
    def test_the_number_of_the_config_is_used(self):
        assert FixedRows(7).run(Device(7)) == ("computed by 7", 7)

    def test_it_is_never_changed(self):
        device, rows = Device(6), FixedRows(7)
        for _ in range(2):
            with pytest.raises(MemoryExhaustedError, match=r"engine\.batch_rows 7: .* CUDA out of memory\. Set engine"):
                rows.run(device)
        assert device.tried == [7, 7]

    def test_other_errors_pass(self):
        with pytest.raises(KeyError):
            FixedRows(7).run(lambda rows: {}[rows])


class TestIndivisible:
    def test_result_passes(self):
        assert indivisible(lambda: 3) == 3

    def test_out_of_memory_is_one_sentence(self):
        with pytest.raises(MemoryExhaustedError, match="pair of runs of a sample does not fit the memory: CUDA out"):
            indivisible(lambda: Device(0)(1))

    def test_other_errors_pass(self):
        with pytest.raises(ZeroDivisionError):
            indivisible(lambda: 1 // 0)
