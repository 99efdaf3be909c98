"""Sweeps that leave the rows of one forward to the tool: chosen once, kept, halved on failure, units reproducible."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from interventions.engine import Engine
from pipeline import batching
from pipeline.batching import chosen_rows
from pipeline.config import SweepConfig
from pipeline.executors import ray_executor
from pipeline.hardware import hardware_of
from pipeline.models import load_pipeline
from pipeline.plan import BASELINE, Plan, make_plan
from pipeline.replica import Computer, Replica
from pipeline.rows import Measured, Table
from pipeline.rows_cache import RowsCache, about
from pipeline.store import Journal, open_or_create, open_store, verify
from pipeline.store.rows import RowsRecord
from pipeline.sweep import SweepResult, run_sweep
from tests.sweep_fixture import arrays, assert_same_arrays, save_tiny_model, tiny_config

SMALL: dict[str, Any] = {
    "task": {"name": "maze", "mazes": 1, "pairs": ["red/blue"]},
    "experiments": {"map": {"kind": "patch", "step": [3], "layer": "all", "component": ["attn1", "attn2"]}},
    "previews": {"samples": []},
    "run": {"replicas": 0, "max_attempts": 1},
}
"""A sweep of one unit of cells, all of which can share a forward."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def plan_with(model, rows: Any, **changes: Any) -> Plan:
    raw = tiny_config(model, engine={"batch_rows": rows}, **{"unit_cells": 16, **changes})
    return make_plan(SweepConfig.model_validate(raw))


def table(best: int) -> Table:
    """A table from which the tiny sweep's rows are chosen: a forward of so many costs what one of one costs."""
    batches = [Measured(rows=n, seconds=1.0 if n <= best else float(n), peak=1) for n in sorted({1, best, 8})]
    return Table(bare_peak=10, batches=tuple(batches), whole=True)


@pytest.fixture
def probes(monkeypatch):
    """Let probes find that 8 rows are best, and count them."""
    made: list[int] = []

    def probe(computer):
        made.append(1)
        return table(8)

    monkeypatch.setattr(batching, "probe", probe)
    return made


@pytest.fixture(autouse=True)
def own_cache_of_the_test(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def memory_for(monkeypatch, most: int) -> list[int]:
    """Let every batch of more rows raise what CUDA raises; returns the sizes that were tried."""
    tried: list[int] = []
    fork = Computer.fork

    def limited(self, sample, rows, **options):
        tried.append(len(rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        return fork(self, sample, rows, **options)

    monkeypatch.setattr(Computer, "fork", limited)
    return tried


def rows_of_units(place) -> dict[tuple[str, int], int]:
    """Rows that each unit ran with, by the journal."""
    return {(e["group"], e["index"]): e["rows"] for e in Journal(place).entries() if "rows" in e}


@pytest.fixture(scope="module")
def fixed(model, tmp_path_factory):
    """Whole stores of configs that fix the rows, by their number; made when first asked for."""
    made: dict[int, Any] = {}

    def store(rows: int):
        if rows not in made:
            made[rows] = tmp_path_factory.mktemp("fixed") / "run.zarr"
            assert run_sweep(plan_with(model, rows), made[rows]).failed == 0
        return made[rows]

    return store


def assert_units_are_those_of_fixed_rows(plan: Plan, place, fixed) -> None:
    """Assert that each unit has the bits of a sweep whose config fixes the rows that its line in the journal names."""
    found, ran = arrays(place), rows_of_units(place)
    for unit in plan.units():
        rows = ran[unit.group, unit.index]
        if unit.group == BASELINE:
            assert rows == 0
            continue
        expected = arrays(fixed(rows))
        for name in plan.config.metrics:
            path = f"{unit.group}/{name}"
            region = (unit.sample, slice(unit.start, unit.stop))[: found[path].ndim]
            assert found[path][region].tobytes() == expected[path][region].tobytes(), (path, unit)


class TestChosen:
    def test_a_sweep_has_the_bits_of_one_that_fixes_the_chosen_number(self, model, probes, fixed, tmp_path):
        plan, place = plan_with(model, "auto"), tmp_path / "run.zarr"
        assert run_sweep(plan, place).failed == 0
        assert probes == [1]
        assert RowsRecord(place).read() == 8
        assert set(rows_of_units(place).values()) == {0, 8}
        assert_same_arrays(place, fixed(8))

    def test_a_real_probe_chooses_and_is_kept_for_the_next_sweep(self, model, tmp_path, monkeypatch):
        small = {"experiments": {"map": {"kind": "patch", "step": "all", "layer": "all"}}, "previews": {"samples": []}}
        plan = plan_with(model, "auto", **small)
        assert run_sweep(plan, tmp_path / "first.zarr").failed == 0
        chosen = RowsRecord(tmp_path / "first.zarr").read()
        assert chosen in (1, 2)

        def again(computer):
            raise AssertionError("it was measured before")

        monkeypatch.setattr(batching, "probe", again)
        assert run_sweep(plan, tmp_path / "second.zarr").failed == 0
        assert RowsRecord(tmp_path / "second.zarr").read() == chosen
        assert_same_arrays(tmp_path / "first.zarr", tmp_path / "second.zarr")

    def test_a_resumed_sweep_keeps_its_number_whatever_the_cache_says(self, model, probes, fixed, tmp_path):
        plan, place = plan_with(model, "auto"), tmp_path / "run.zarr"
        stopped = run_sweep(plan, place, make_executor=stops_after(5))
        assert stopped.interrupted
        cache = RowsCache(about(plan, hardware_of("cpu")))
        assert cache.read() == table(8)
        cache.write(table(2))
        assert run_sweep(plan, place).failed == 0
        assert probes == [1]
        assert set(rows_of_units(place).values()) == {0, 8}
        assert_same_arrays(place, fixed(8))

    def test_a_table_that_reaches_too_little_is_measured_anew(self, model, probes):
        plan = plan_with(model, "auto")
        short = Table(bare_peak=10, batches=(Measured(rows=1, seconds=1.0, peak=1),), whole=False)
        cache = RowsCache(about(plan, "here"))
        cache.write(short)
        nothing = SimpleNamespace(pipe=SimpleNamespace(device=torch.device("cpu")))
        assert chosen_rows(plan, nothing, "here") == 8  # type: ignore[arg-type]
        assert probes == [1]
        assert cache.read() == table(8)

    def test_two_replicas_that_probe_at_once_agree(self, model, tmp_path, monkeypatch):
        plan, place = plan_with(model, "auto"), tmp_path / "run.zarr"
        open_or_create(place, plan)
        together, answers = threading.Barrier(2, timeout=60), iter([4, 8])
        lock = threading.Lock()

        def probe(computer):
            with lock:
                best = next(answers)
            together.wait()
            return table(best)

        def choose_and_record(computer):
            found.append(batching.rows_for(plan, computer, place, "here").rows)

        monkeypatch.setattr(batching, "probe", probe)
        found: list[int] = []
        device = SimpleNamespace(pipe=SimpleNamespace(device=torch.device("cpu")))
        threads = [threading.Thread(target=choose_and_record, args=(device,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 2
        assert len(set(found)) == 1
        assert RowsRecord(place).read() == found[0] in (4, 8)

    def test_the_store_holds_the_word_and_no_number_in_its_config(self, model, probes, tmp_path):
        plan, place = plan_with(model, "auto"), tmp_path / "run.zarr"
        run_sweep(plan, place)
        assert '"batch_rows": "auto"' in str(open_store(place).root.attrs["config_json"])
        assert open_store(place).config_hash == plan.config.hash() != plan_with(model, 8).config.hash()

    @pytest.mark.ray
    def test_ray_replicas_use_one_number(self, model, fixed, tmp_path, ray_session):
        plan, place = plan_with(model, "auto", run={"replicas": 2, "cpus_per_replica": 1}), tmp_path / "run.zarr"
        assert run_sweep(plan, place, make_executor=ray_executor).failed == 0
        numbers = set(rows_of_units(place).values()) - {0}
        assert numbers == {RowsRecord(place).read()}
        assert_same_arrays(place, fixed(numbers.pop()))


class TestOutOfMemory:
    @pytest.mark.parametrize("most", [1, 3, 7])
    def test_halves_until_it_fits_and_units_are_reproducible(self, model, probes, fixed, tmp_path, monkeypatch, most):
        plan, place = plan_with(model, "auto"), tmp_path / "run.zarr"
        for rows in (8, 4, 2, 1):
            fixed(rows)
        memory_for(monkeypatch, most)
        result = run_sweep(plan, place)
        assert (result.failed, result.pending) == (0, 0)
        ran = rows_of_units(place)
        halved = {1: 1, 3: 2, 7: 4}[most]
        assert set(ran.values()) - {0} <= {8, 4, 2, 1}
        assert min(set(ran.values()) - {0}) == halved == RowsRecord(place).read()
        assert_units_are_those_of_fixed_rows(plan, place, fixed)
        assert verify(place).bad == []

    def test_nothing_is_retried_by_the_pool_nor_charged(self, model, probes, tmp_path, monkeypatch):
        memory_for(monkeypatch, 3)
        place = tmp_path / "run.zarr"
        run_sweep(plan_with(model, "auto", run={"replicas": 0, "max_attempts": 1}), place)
        assert not any("retried" in entry or "error" in entry for entry in Journal(place).entries())

    def test_a_halving_outlives_the_sweep(self, model, probes, tmp_path, monkeypatch):
        plan, place = plan_with(model, "auto"), tmp_path / "run.zarr"
        memory_for(monkeypatch, 3)
        assert run_sweep(plan, place, make_executor=stops_after(6)).interrupted
        tried = memory_for(monkeypatch, 100)
        assert run_sweep(plan, place).failed == 0
        assert tried
        assert max(tried) <= 2

    def test_a_unit_that_is_run_again_has_its_bits(self, model, probes, fixed, tmp_path, monkeypatch):
        """After a halving too: what a unit runs with now decides, and its new line says so."""
        plan, place = plan_with(model, "auto"), tmp_path / "run.zarr"
        run_sweep(plan, place)
        RowsRecord(place).halve(8)
        unit = next(u for u in plan.units() if u.group == "patch_map")
        store = open_store(place)
        values = np.full_like(store.array("patch_map/goal_evidence")[unit.sample, unit.start : unit.stop], 7.0)
        store.write_cells("patch_map", {"goal_evidence": values}, unit.sample, unit.start, unit.stop)
        assert [bad.index for bad in verify(place).bad] == [unit.index]
        assert run_sweep(plan, place).computed == 1
        assert rows_of_units(place)[unit.group, unit.index] == 4
        assert_units_are_those_of_fixed_rows(plan, place, fixed)

    def test_one_row_that_does_not_fit_parks_the_unit_with_one_sentence(self, model, probes, tmp_path, monkeypatch):
        plan, place = plan_with(model, "auto", **SMALL), tmp_path / "run.zarr"
        memory_for(monkeypatch, 0)
        result = run_sweep(plan, place)
        assert result.failed > 0
        assert all("with one row of a forward: CUDA out of memory. Use a device" in text for text in result.errors)

    def test_a_fixed_number_is_never_halved(self, model, tmp_path, monkeypatch):
        plan, place = plan_with(model, 8, **SMALL), tmp_path / "run.zarr"
        memory_for(monkeypatch, 3)
        result = run_sweep(plan, place)
        assert result.failed > 0
        assert any("engine.batch_rows 8: so many rows of one forward do not fit" in text for text in result.errors)
        assert RowsRecord(place).read() is None

    def test_a_pair_that_does_not_fit_is_one_sentence(self, model, probes, tmp_path, monkeypatch):
        def full(self, inputs):
            raise torch.OutOfMemoryError("CUDA out of memory")

        plan, place = plan_with(model, "auto"), tmp_path / "run.zarr"
        open_or_create(place, plan)
        replica = Replica(plan.config.model_dump(mode="json"), str(place))
        monkeypatch.setattr(Engine, "record", full)
        with pytest.raises(batching.MemoryExhaustedError, match="pair of runs of a sample does not fit the memory"):
            replica.run(next(plan.units()))

    def test_it_may_come_from_deep_inside_a_traced_model(self, probes, tmp_path, monkeypatch):
        """The engine must be as good as before after it: the same bits as with fewer rows from the start."""
        raw = {
            "name": "deep",
            "model": {"id": "embedded:maze"},
            "task": {"name": "maze", "mazes": 1},
            "sampler": {"steps": 3},
            "metrics": ["goal_evidence"],
            "experiments": {"map": {"kind": "patch", "step": [1], "layer": "all", "component": ["attn1", "ffn"]}},
            "previews": {"samples": []},
            "run": {"replicas": 0},
        }
        few, auto = (
            make_plan(SweepConfig.model_validate({**raw, "engine": {"batch_rows": rows}})) for rows in (3, "auto")
        )
        run_sweep(few, tmp_path / "few.zarr")
        load = load_pipeline

        def loaded(*given, **options):
            pipe = load(*given, **options)

            def limited(module, args, kwargs):
                if len(args[0]) > 5:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")

            pipe.transformer.blocks[3].register_forward_pre_hook(limited, with_kwargs=True)
            return pipe

        monkeypatch.setattr("pipeline.replica.load_pipeline", loaded)
        result = run_sweep(auto, tmp_path / "auto.zarr")
        assert result.errors == []
        assert RowsRecord(tmp_path / "auto.zarr").read() == 3
        assert_same_arrays(tmp_path / "few.zarr", tmp_path / "auto.zarr")


def stops_after(units: int) -> Any:
    """Return an executor that runs so many units in this process and then says that it was stopped."""
    from pipeline.executors import inline_executor

    class Stops:
        def __init__(self, plan, place):
            self.inner, self.done = inline_executor(plan, place), 0

        def run(self, work, on_event, stop=None):
            def counted(event):
                self.done += type(event).__name__ == "UnitDone"
                on_event(event)

            return self.inner.run(work, counted, lambda: "enough" if self.done >= units else None)

        def close(self):
            self.inner.close()

    return Stops


def test_result_of_a_stopped_sweep_says_so(model, probes, tmp_path):
    """What the tests above stand on."""
    result: SweepResult = run_sweep(plan_with(model, "auto"), tmp_path / "run.zarr", make_executor=stops_after(3))
    assert result.computed == 3


def test_a_computer_alone_batches_by_its_plan(model):
    plan = plan_with(model, "auto").with_rows(3)
    computer = Computer(plan, load_pipeline(plan.model, dtype="float32", device="cpu"))
    rows = plan.interventions(next(u for u in plan.units() if u.group == "patch_map"))
    assert max(len(batch) for batch in computer.plan.batches(rows)) == 3
