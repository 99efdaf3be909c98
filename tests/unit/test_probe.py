"""When the probe ends, and what it has then: measured numbers are given, so nothing is timed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import probe as module
from pipeline.config import SweepConfig
from pipeline.models import load_pipeline
from pipeline.plan import make_plan
from pipeline.probe import measure, probe
from pipeline.replica import Computer
from pipeline.rows import MOST_ROWS, Measured


class Machine:
    """Batches of so many seconds and bytes, and what was run."""

    def __init__(self, seconds=lambda rows: 1.0, peak=lambda rows: 100, fits=10**9):
        self.seconds, self.peak, self.fits, self.ran = seconds, peak, fits, []

    def __call__(self, rows):
        self.ran.append(rows)
        if rows > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Measured(rows=rows, seconds=self.seconds(rows), peak=self.peak(rows))


def measured(machine, largest=MOST_ROWS, bare=100, capacity=None):
    return measure(machine, bare, largest, lambda: capacity)


class TestEnd:
    @pytest.mark.parametrize(
        ("largest", "ran"),
        [(1, [1]), (2, [1, 2]), (18, [1, 2, 4, 8, 16, 18]), (1000, [1, 2, 4, 8, 16, 32, 64])],
        ids=["one", "two", "between", "more than are ever tried"],
    )
    def test_at_the_largest_batch_of_use(self, largest, ran):
        machine = Machine()
        found = measured(machine, largest)
        assert machine.ran == ran == [each.rows for each in found.batches]
        assert found.reaches(largest)
        assert found.reaches(largest + 1) == (largest >= MOST_ROWS)

    @pytest.mark.parametrize(
        ("seconds", "ran"),
        [
            (lambda rows: float(rows), [1, 2, 4]),
            (lambda rows: 1.0 + rows, [1, 2, 4, 8, 16, 32, 64]),
            (lambda rows: max(4.0, rows), [1, 2, 4, 8, 16]),
            (lambda rows: 3.0 if rows == 2 else 1.0, [1, 2, 4, 8, 16, 32, 64]),
        ],
        ids=["rows are all that costs", "the forward costs", "until the device is full", "one slip"],
    )
    def test_where_more_no_longer_pays(self, seconds, ran):
        machine = Machine(seconds)
        found = measured(machine)
        assert machine.ran == ran
        assert found.whole == (ran[-1] < MOST_ROWS)

    def test_where_memory_runs_out(self):
        machine = Machine(fits=5)
        found = measured(machine)
        assert machine.ran == [1, 2, 4, 8]
        assert [each.rows for each in found.batches] == [1, 2, 4]
        assert found.whole

    def test_past_the_share_that_a_replica_may_have(self):
        found = measured(Machine(peak=lambda rows: 100 + 5 * rows))
        assert [each.rows for each in found.batches] == [1, 2, 4, 8]

    def test_before_the_device_is_full(self):
        machine = Machine(peak=lambda rows: 1000 + 10 * rows)
        found = measured(machine, bare=1000, capacity=1160)
        assert [each.rows for each in found.batches] == [1, 2, 4, 8, 16], "32 rows would take 1320"

    def test_memory_that_nobody_knows_ends_nothing(self):
        assert measured(Machine(peak=lambda rows: 0), bare=0).most == MOST_ROWS

    @pytest.mark.parametrize(
        "error", [torch.OutOfMemoryError("out of memory"), ValueError("a bug")], ids=["memory", "bug"]
    )
    def test_a_first_row_that_fails_is_an_error(self, error):
        def batch(rows):
            raise error

        with pytest.raises(type(error)):
            measured(batch)

    def test_a_bug_with_more_rows_is_an_error(self):
        def batch(rows):
            if rows > 2:
                raise ValueError("a bug")
            return Measured(rows=rows, seconds=1.0, peak=1)

        with pytest.raises(ValueError, match="a bug"):
            measured(batch)

    @given(
        st.integers(1, 200),
        st.lists(st.floats(0.01, 100), min_size=8, max_size=8),
        st.lists(st.integers(0, 500), min_size=8, max_size=8),
        st.integers(1, 80),
        st.none() | st.integers(0, 1000),
    )
    @settings(max_examples=40, deadline=None)
    def test_always_a_table_of_doublings(self, largest, seconds, peaks, fits, capacity):
        machine = Machine(lambda rows: seconds[rows.bit_length()], lambda rows: peaks[rows.bit_length()], fits)
        found = measured(machine, largest, capacity=capacity)
        rows = [each.rows for each in found.batches]
        assert rows == [n for n in machine.ran if n <= fits]
        assert found.most <= min(largest, MOST_ROWS, fits)
        assert all(n & (n - 1) == 0 for n in rows[:-1])


@pytest.fixture(scope="module")
def computer():
    raw = {
        "name": "probe",
        "model": {"id": "embedded:maze"},
        "task": {"name": "maze", "mazes": 1},
        "sampler": {"steps": 4},
        "metrics": ["goal_evidence"],
        "experiments": {"map": {"kind": "patch", "step": "all", "layer": [0, 1, 2], "component": ["attn1"]}},
        "engine": {"batch_rows": "auto"},
    }
    plan = make_plan(SweepConfig.model_validate(raw))
    return Computer(plan, load_pipeline(plan.model, dtype="float32", device="cpu"))


class TestOnAModel:
    def test_real_batches_of_the_plan_are_measured(self, computer, monkeypatch):
        ran = []
        fork = computer.engine.fork

        def spy(record, rows, **options):
            ran.append(len(rows))
            return fork(record, rows, **options)

        monkeypatch.setattr(computer.engine, "fork", spy)
        found = probe(computer)
        assert [each.rows for each in found.batches] == [1, 2, 3]
        assert set(ran) == {1, 2, 3}
        assert all(each.seconds > 0 for each in found.batches)
        assert found.bare_peak > 50 * 2**20, "weights and libraries count"
        assert not found.whole

    def test_a_slow_model_is_timed_where_it_computes_least(self, computer, monkeypatch):
        rows = []
        fork = computer.engine.fork

        def spy(record, taken, **options):
            rows.append({row.step for row in taken})
            return fork(record, taken, **options)

        monkeypatch.setattr(module, "_SLOW_S", 0.0)
        monkeypatch.setattr(computer.engine, "fork", spy)
        probe(computer)
        assert rows[1:] == [{3}] * (len(rows) - 1)
        assert len(rows) > 3

    def test_the_bare_run_has_nothing_of_ours(self, computer, monkeypatch):
        """Else its peak would not be the model's own."""
        traces = []
        monkeypatch.setattr(computer.engine, "_trace", lambda *given: traces.append(given))
        module.bare_run(computer, 0)
        assert traces == []
