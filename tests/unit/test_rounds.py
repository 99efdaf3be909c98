"""Sweeps in rounds, driven for real over replicas without a model: kills, failures, damage, and what is counted."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import pipeline.sweep
from pipeline.cli import main
from pipeline.effects.experiment import Experiment
from pipeline.layout import BASELINE, Layout, Windows
from pipeline.ledger import Ledger
from pipeline.looks import spread_level
from pipeline.plan import Plan
from pipeline.precision import mean_bounds
from pipeline.rounds import decide, make_look
from pipeline.status import Watch, count_group, unit_cells
from pipeline.store import (
    DONE,
    FAILED,
    PENDING,
    CorruptedError,
    Journal,
    Lease,
    Store,
    StoreError,
    export_store,
    open_or_create,
    open_store,
    verify,
)
from tests.rounds_fixture import ENDS, MAP, PRECISION, plan_of, sweep
from tests.sweep_fixture import arrays, assert_same_arrays


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of()


@pytest.fixture(scope="module")
def undisturbed(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed") / "run.zarr"
    assert sweep(plan, path).pending == 0
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sweep without precision: the same values in every cell."""
    path = tmp_path_factory.mktemp("full") / "run.zarr"
    experiments = {"map": MAP, "one": {"kind": "patch", "step": 1, "layer": 2}}
    sweep(plan_of(experiments=experiments), path)
    return path


def widths(full: Path, problems: int) -> Any:
    """The half-widths of the cells of the map after some problems, computed anew; the corrupted run is patched."""
    found = arrays(full)
    values = (found["map/goal_evidence"] - found["baseline/goal_evidence"][:, 1].reshape(-1, 1, 1))[:problems]
    return mean_bounds(
        values.astype(np.float64).reshape(problems, -1), level=spread_level(0.95, [ENDS])
    ).half_width.reshape(3, 2)


class TestStopping:
    def test_cells_stop_at_the_first_look_at_which_they_are_narrow(self, undisturbed, full):
        stopped = arrays(undisturbed)["map/stopped"]
        first = widths(full, ENDS[0]) <= PRECISION["half_width"]
        second = first | (widths(full, ENDS[1]) <= PRECISION["half_width"])
        assert np.array_equal(stopped, [first, second])
        assert 0 < first.sum() < second.sum() < first.size, "all three must happen for this test to say anything"

    def test_a_cell_is_computed_until_it_stops_and_never_after(self, undisturbed, full):
        found, whole = arrays(undisturbed), arrays(full)
        for name in ("goal_evidence", "solved"):
            for sample, values in enumerate(found[f"map/{name}"]):
                round_ = sum(sample >= end for end in ENDS)
                goes_on = found["map/stopped"][round_ - 1] == 0 if round_ else np.ones(values.shape, bool)
                assert np.array_equal(values[goes_on], whole[f"map/{name}"][sample][goes_on])
                assert np.isnan(values[~goes_on]).all()

    def test_replay_on_the_full_sweep_equals_the_real_one(self, plan, undisturbed, full):
        for name in ("map", "one"):
            stopped = np.zeros(plan.by_name[name].shape, dtype=bool)
            for look in range(plan.rounds[name].looks - 1):
                stopped = decide(plan, open_store(full), name, look, stopped)
                assert np.array_equal(stopped, arrays(undisturbed)[f"{name}/stopped"][look] == 1)

    def test_experiments_keep_rounds_of_their_own(self, plan, undisturbed):
        found = arrays(undisturbed)
        assert plan.rounds["one"].problems == (7, 11, 13)
        assert found["one/stopped"].tolist() == [1, 1]
        assert np.isfinite(found["one/solved"]).tolist() == [True] * 7 + [False] * 6
        assert np.isfinite(found["plain/solved"]).all()
        assert np.isfinite(found["baseline/solved"]).all()

    def test_looks_tell_where_they_are(self, undisturbed):
        group = zarr.open_group(str(undisturbed), mode="r")["map"]
        assert (list(group["look"]), list(group["look_samples"])) == ([6, 9], [6, 9])
        about = json.loads(group.attrs["precision"])
        assert {name: about[name] for name in PRECISION} == PRECISION
        assert (about["looks"], about["level"]) == (3, 0.95)
        assert about["prompts"] == [list(ENDS)]
        assert about["level_at_look"] == spread_level(0.95, [ENDS])
        assert "independent of all spreads" in about["interval"]

    def test_a_look_needs_the_one_before(self, plan, tmp_path):
        with pytest.raises(ValueError, match=r"look 1 of map comes before look 0"):
            make_look(plan, open_or_create(tmp_path / "run.zarr", plan), "map", 1)

    def test_a_value_that_is_gone_is_no_missing_value(self, plan, undisturbed, tmp_path):
        """A chunk that is not there reads as NaN: the others would stop without it."""
        store = copy_of(undisturbed, tmp_path)
        store.location.delete("map/goal_evidence/c/2/0/0")
        with pytest.raises(CorruptedError, match=r"map/goal_evidence/c/2/0/0 is missing.*stepscope verify"):
            decide(plan, store, "map", 0, np.zeros((3, 2), dtype=bool))
        store.location.delete("baseline/goal_evidence/c/3/0")
        with pytest.raises(CorruptedError, match=r"baseline/goal_evidence/c/3/0 is missing"):
            decide(plan, store, "one", 0, np.zeros((), dtype=bool))


def copy_of(store: Path, folder: Path) -> Store:
    import shutil

    shutil.copytree(store, folder / "run.zarr")
    return open_store(folder / "run.zarr")


class TestUnits:
    def test_of_stopped_cells_are_done_without_a_replica(self, plan, undisturbed):
        lines = {(e["group"], e["index"]): e for e in Journal(undisturbed).entries()}
        assert len(lines) == len(plan.layout)
        skipped = {key for key, entry in lines.items() if entry.get("skipped")}
        assert {index for group, index in skipped if group == "one"} == set(range(7, 13))
        stopped = arrays(undisturbed)["map/stopped"] == 1
        for (group, index), entry in lines.items():
            if group == "map":
                sample, window = divmod(index, 2)
                round_ = sum(sample >= end for end in ENDS)
                cells = (~stopped[round_ - 1] if round_ else np.ones((3, 2)))[2 * window : 2 * window + 2]
                assert entry["cells"] == cells.sum()
                assert ((group, index) in skipped) == (cells.sum() == 0)
        assert all((open_store(undisturbed).status(group) == DONE).all() for group in (BASELINE, "map", "one", "plain"))

    def test_that_are_skipped_are_told_to_observers(self, plan, tmp_path):
        heard = []
        sweep(plan, tmp_path / "run.zarr", observe=lambda event, unit: heard.append((event, unit)))
        done = [(e, u) for e, u in heard if type(e).__name__ == "UnitDone"]
        assert sorted(u.id for _, u in done) == list(range(len(plan.layout)))
        assert {u.index for e, u in done if e.replica == -1 and u.group == "one"} == set(range(7, 13))
        assert all(e.receipt.cells == e.receipt.bytes == 0 for e, _ in done if e.replica == -1)

    def test_weigh_what_they_compute(self, plan, undisturbed, tmp_path):
        store = copy_of(undisturbed, tmp_path)
        ledger = Ledger(store, plan, Journal(store.location), Lease(store.location, beats=False))
        drive = pipeline.sweep._Drive(plan, store, ledger, Journal(store.location), None, None)
        stopped = arrays(undisturbed)["map/stopped"] == 1
        for unit in plan.layout:
            if unit.group == "map" and unit.sample >= ENDS[0]:
                cells = ~stopped[0 if unit.sample < ENDS[1] else 1][unit.start : unit.stop]
                assert ledger.cells(unit) == cells.sum()
                assert drive._weight(unit) == plan.unit_forwards(unit) * cells.sum() / cells.size

    def test_run_again_do_nothing(self, plan, undisturbed, tmp_path):
        store = copy_of(undisturbed, tmp_path)
        assert sweep(plan, store.location).computed == 0
        assert_same_arrays(store.location, undisturbed)


class Killed(BaseException):
    """The process is no more."""


class Fuse:
    """Lets so many writes happen; the next one and all later ones find the process dead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, writes: int | None) -> None:
        self.left, self.count, self.named = writes, 0, []
        for owner, name in (
            *((Store, n) for n in ("write_cells", "write_sample", "write_status", "write_look")),
            (Journal, "append"),
        ):
            monkeypatch.setattr(owner, name, self._watched(name, getattr(owner, name)))
        # The lease of a process that is dead is followed at once; this one only pretends to be.
        lease = functools.partial(Lease, beats=False, lives=lambda holder: False)
        monkeypatch.setattr(pipeline.sweep, "Lease", lease)

    def _watched(self, name: str, write: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*given: Any, **more: Any) -> Any:
            if self.left is not None and self.count >= self.left:
                raise Killed
            self.count += 1
            self.named.append(name if name != "append" or not more.get("skipped") else "skip")
            return write(*given, **more)

        return watched


@pytest.fixture(scope="module")
def writes(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of all writes of the sweep, in order."""
    with pytest.MonkeyPatch.context() as patch:
        fuse = Fuse(patch, None)
        sweep(plan, tmp_path_factory.mktemp("counted") / "run.zarr")
    return fuse.named


def places(writes: list[str]) -> Iterator[int]:
    """Before and after every look, around the first and last skipped units, and here and there between."""
    looks = [i for i, name in enumerate(writes) if name == "write_look"]
    skips = [i for i, name in enumerate(writes) if name == "skip"]
    near = {i + d for i in [*looks, skips[0], skips[-1]] for d in (0, 1)}
    yield from sorted(near | set(range(3, len(writes), 37)))


def test_a_kill_at_any_write_changes_nothing(plan, undisturbed, writes, tmp_path):
    """Around every look, units that are skipped, and ordinary units: the same arrays, bit for bit."""
    assert writes.count("write_look") == 4
    for number, place in enumerate(places(writes)):
        path = tmp_path / f"{number}.zarr"
        with pytest.MonkeyPatch.context() as patch:
            Fuse(patch, place)
            with pytest.raises(Killed):
                sweep(plan, path)
        with pytest.MonkeyPatch.context() as patch:
            Fuse(patch, None)
            assert sweep(plan, path).pending == 0
        assert_same_arrays(path, undisturbed)


def test_kills_again_and_again_change_nothing(plan, undisturbed, tmp_path):
    kills = 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            Fuse(patch, 23)
            try:
                result = sweep(plan, tmp_path / "run.zarr")
            except Killed:
                kills += 1
            else:
                break
    assert kills > 5
    assert result.pending == 0
    assert_same_arrays(tmp_path / "run.zarr", undisturbed)


def unit_of(plan: Plan, group: str, sample: int, window: int = 0) -> int:
    return next(u.id for u in plan.layout if (u.group, u.sample) == (group, sample) and u.start == 2 * window)


class TestFailures:
    @pytest.mark.parametrize("group", ["map", BASELINE])
    def test_a_unit_that_raised_holds_the_next_round_back(self, group, plan, undisturbed, tmp_path):
        """Which cells stop must not depend on what happened to fail, so the next call ends as an undisturbed one."""
        path, raises = tmp_path / "run.zarr", frozenset({unit_of(plan, group, 4)})
        result = sweep(plan, path, raises=raises)
        assert "map: round 2 begins once 1 more units are computed" in result.errors
        found = arrays(path)
        assert (found["map/stopped"] == 255).all()
        assert (found["map/status"][2 * ENDS[0] :] == PENDING).all()
        assert (found["plain/status"] == DONE).all()
        held = group == BASELINE
        assert (found["one/stopped"] == (255 if held else 1)).all()
        assert sweep(plan, path).failed == 0
        assert_same_arrays(path, undisturbed)

    def test_a_unit_of_a_later_round_does_not_unmake_a_look(self, plan, undisturbed, tmp_path):
        path = tmp_path / "run.zarr"
        result = sweep(plan, path, raises=frozenset({unit_of(plan, "map", 7)}))
        assert "map: round 3 begins once 1 more units are computed" in result.errors
        assert np.array_equal(arrays(path)["map/stopped"][0], arrays(undisturbed)["map/stopped"][0])
        assert sweep(plan, path).failed == 0
        assert_same_arrays(path, undisturbed)

    def test_a_cell_without_a_value_is_not_stopped_by_that(self, tmp_path):
        """It has one prompt too few at the first look, however wide the interval may be."""
        precision = {**PRECISION, "half_width": 99.0}
        plan = plan_of(experiments={"map": {**MAP, "precision": precision}})
        result = sweep(plan, tmp_path / "run.zarr", holes=frozenset({unit_of(plan, "map", 2)}))
        found = arrays(tmp_path / "run.zarr")
        (lost,) = np.argwhere(np.isnan(found["map/goal_evidence"][2]))
        expected = np.ones((3, 2), dtype=bool)
        expected[tuple(lost)] = False
        assert np.array_equal(found["map/stopped"][0] == 1, expected)
        assert (found["map/stopped"][1] == 1).all()
        assert (result.failed, result.failed_cells, result.pending) == (1, 1, 0)
        assert found["map/status"][4] == FAILED


class TestReaders:
    def test_status_counts_cells_that_are_computed(self, plan, undisturbed):
        computed = sum(e["cells"] for e in Journal(undisturbed).entries() if e["group"] == "map")
        (group,) = [g for g in Watch(undisturbed).look().groups if g.group == "map"]
        assert (group.done, group.pending, group.failed) == (26, 0, 0)
        assert (group.cells, group.cells_done) == (computed, computed)
        assert computed == np.isfinite(arrays(undisturbed)["map/solved"]).sum() < 13 * 6

    def test_status_counts_the_most_that_may_come_before_the_looks(self, plan, tmp_path):
        store = open_or_create(tmp_path / "run.zarr", plan)
        cells, final = unit_cells(store, "map")
        assert (cells.tolist(), final) == ([4, 2] * 13, False)
        assert unit_cells(store, "one")[0].tolist() == [1] * 13
        store.write_look("map", 0, np.array([[True, True], [True, True], [False, True]]))
        cells, final = unit_cells(store, "map")
        assert (cells.tolist(), final) == ([4, 2] * 6 + [0, 1] * 7, False)
        assert count_group("map", np.zeros(26, dtype=np.uint8), cells).cells_pending == 36 + 7

    def test_the_ledger_counts_the_same(self, plan, tmp_path):
        store = open_or_create(tmp_path / "run.zarr", plan)
        others = 13 * (2 + 2 + 1)

        def todo() -> int:
            return Ledger(store, plan, Journal(store.location), Lease(store.location, beats=False)).todo()[1]

        assert todo() == others + 13 * 6
        store.write_look("map", 0, np.array([[True, True], [True, True], [False, True]]))
        assert todo() == others + 36 + 7
        store.write_look("map", 1, np.ones((3, 2), dtype=bool))
        assert todo() == others + 36 + 3

    def test_verify_finds_nothing_wrong(self, undisturbed, tmp_path):
        found = verify(copy_of(undisturbed, tmp_path).location)
        assert found.good
        assert (found.undigested, found.units) == (0, 13 * 5)
        skipped = sum(bool(e.get("skipped")) for e in Journal(undisturbed).entries())
        assert found.checked == 13 * 5 - skipped

    @pytest.mark.parametrize("way", ["flipped", "deleted"])
    @pytest.mark.parametrize("look", [0, 1])
    def test_a_damaged_look_is_made_again(self, way, look, plan, undisturbed, tmp_path):
        store = copy_of(undisturbed, tmp_path)
        key = f"map/stopped/c/{look}/0/0"
        content = store.location.read(key)
        if way == "deleted":
            store.location.delete(key)
        else:
            store.location.write(key, content[:-1] + bytes([content[-1] ^ 1]))
        assert f"map/stopped[{look}]" in verify(store.location).rebuilt
        assert sweep(plan, store.location).pending == 0
        assert_same_arrays(store.location, undisturbed)
        assert verify(store.location).good

    def test_a_value_of_a_stopped_cell_is_found(self, plan, undisturbed, tmp_path):
        """Nobody computed it, so its unit's digest does not know it."""
        store = copy_of(undisturbed, tmp_path)
        array, stopped = store.array("map/solved"), arrays(undisturbed)["map/stopped"][1] == 1
        windows = [w for w in (slice(0, 2), slice(2, 3)) if stopped[w].any() and not stopped[w].all()]
        values = np.asarray(array[12, windows[0]])
        array[12, windows[0]] = np.where(stopped[windows[0]], 0.5, values)
        assert [(bad.group, bad.cause) for bad in verify(store.location).bad] == [("map", "not what was written")]
        sweep(plan, store.location)
        assert_same_arrays(store.location, undisturbed)

    def test_damage_to_where_looks_are_leaves_the_group_unchecked(self, plan, undisturbed, tmp_path):
        store = copy_of(undisturbed, tmp_path)
        store.location.delete("map/look_samples/c/0")
        found = verify(store.location)
        assert (found.unchecked, found.template) == (["map"], ["map/look_samples (missing)"])
        sweep(plan, store.location)
        assert_same_arrays(store.location, undisturbed)

    @pytest.mark.parametrize("samples", [[9, 6], [-5, 99], [10**12, 0]], ids=str)
    def test_a_foreign_store_with_looks_anywhere_breaks_nothing(self, samples, undisturbed, tmp_path, capsys):
        store = copy_of(undisturbed, tmp_path)
        store.array("map/look_samples")[...] = np.array(samples)
        assert main(["status", str(store.location)]) == 0
        assert main(["verify", str(store.location)]) in (0, 1)
        assert "Traceback" not in capsys.readouterr().err

    def test_stores_are_exported_and_finished(self, undisturbed, tmp_path, capsys):
        assert export_store(undisturbed, tmp_path / "run.zip") > 0
        assert main(["status", str(undisturbed)]) == 0
        assert "finished" in capsys.readouterr().out

    def test_no_stopped_cell_is_a_failed_one(self, undisturbed):
        experiment = Experiment.open(undisturbed, "map")
        assert np.array_equal(experiment.computed, np.isfinite(experiment.dataset["solved"].values))


def test_a_replica_refuses_a_round_that_has_not_begun(plan, tmp_path):
    """No driver asks it to; if one did, it would compute cells that may have stopped."""
    from pipeline.replica import Replica

    open_or_create(tmp_path / "run.zarr", plan)
    replica = Replica(plan.config.model_dump(mode="json"), str(tmp_path / "run.zarr"))
    unit = plan.layout.unit(unit_of(plan, "map", ENDS[0]))
    with pytest.raises(StoreError, match="round 2 of map has not begun"):
        replica.run(unit)


class TestLayout:
    LAYOUT = Layout(10, (Windows(group="a", extent=4, width=2), Windows(group="v", extent=1, width=1, verifies=True)))

    @pytest.mark.parametrize(
        ("cuts", "samples"),
        [
            pytest.param((), (10,), id="no rounds"),
            pytest.param((4, 8, 10), (4, 8, 10), id="one experiment"),
            pytest.param((4, 10, 3, 7, 10), (3, 4, 7, 10), id="two experiments"),
        ],
    )
    def test_phases_end_where_some_round_does(self, cuts, samples):
        layout = Layout(self.LAYOUT.samples, self.LAYOUT.groups, cuts)
        phases = layout.phases
        assert [unit for phase in phases for unit in phase] == list(range(len(layout)))
        assert [layout.unit(phase[-1]).sample + 1 for phase in phases[:-1]] == list(samples)
        assert phases[-1] == layout.verifying
        assert list(layout) == list(self.LAYOUT), "rounds leave every unit its number"
