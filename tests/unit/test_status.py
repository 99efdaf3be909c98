"""Status: units and cells from arrays and journal, time left, whether the sweep lives; all from made-up stores."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import zarr

from pipeline.status import (
    PATIENCE_SECONDS,
    Driver,
    GroupStatus,
    Watch,
    count_group,
    estimate_work,
    files_of,
    judge,
    merge_status,
    read_lease,
    summarise,
    unit_cells,
)
from pipeline.store import DONE, FAILED, PENDING, StoreError, open_store
from pipeline.tail import LocalFiles, ZarrFiles
from pipeline.tally import UNTOLD
from tests.journal_fixture import CREATED, START, append, done, failed, retried, set_status, unset, write_store


class Clock:
    def __init__(self, now=START):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path):
    """Two samples; a map of 5 steps x 3 layers in windows of 2 steps: units of 6, 6 and 3 cells; one cell alone."""
    return write_store(tmp_path / "run.zarr", {"map": (5, 3), "single": ()})


def lease(path, *, time="2027-01-15T08:00:00Z", released=False, number=1, **holder):
    told = {"generation": number, "holder": {"host": "node-1", "process": 7, **holder}, "time": time, "beat": 1}
    append(path, {**told, "released": released, "token": "secret"}, name=f"lease/{number:06d}.json")


class TestCells:
    @pytest.mark.parametrize(
        ("group", "cells"),
        [("baseline", [2]), ("map", [6, 6, 3]), ("single", [1])],
        ids=["baseline", "windows", "one-cell"],
    )
    def test_from_shapes_and_chunks(self, store, group, cells):
        found, final = unit_cells(open_store(store), group)
        assert (found.tolist(), final) == (cells, True)

    def test_group_whose_arrays_say_nothing_counts_units(self, store):
        del zarr.open_group(str(store), mode="r+")["map/score"]
        assert unit_cells(open_store(store), "map")[0].tolist() == [1]

    def test_screened_group_expects_its_share_until_cells_are_chosen(self, tmp_path):
        screen = {"top": 0.2, "metric": "latent", "random": 0.1, "seed": 0}
        path = write_store(tmp_path / "s.zarr", {"map": (4, 5)}, screened={"map": screen})
        assert unit_cells(open_store(path), "map") == (pytest.approx(np.array([3, 3])), False)
        chosen = np.zeros((4, 5), dtype=np.uint8)
        chosen[0, :4], chosen[3, 0] = 1, 1
        array = zarr.open_group(str(path), mode="r+")["map/exact"]
        array[...] = chosen
        cells, final = unit_cells(open_store(path), "map")
        assert (cells.tolist(), final) == ([4, 1], True)

    def test_choice_that_is_made_meanwhile_is_seen(self, tmp_path, clock):
        screen = {"top": 0.5, "metric": "latent", "random": 0.0}
        path = write_store(tmp_path / "s.zarr", {"map": (4, 5)}, screened={"map": screen}, samples=1)
        watch = Watch(path, clock)
        assert watch.look().groups[1].cells == 10
        zarr.open_group(str(path), mode="r+")["map/exact"][...] = np.ones((4, 5), dtype=np.uint8)
        assert watch.look().groups[1].cells == 20

    def test_count_weighs_units_by_their_window(self):
        status = np.array([DONE, FAILED, PENDING, PENDING, DONE, DONE], dtype=np.uint8)
        counted = count_group("map", status, np.array([6, 6, 3]))
        assert counted == GroupStatus(
            group="map", units=6, done=3, pending=2, failed=1, cells=30, cells_done=15, cells_pending=9
        )

    def test_name_of_a_group_cannot_drive_a_terminal(self):
        assert count_group("a\x1b[2Jb", np.zeros(1, dtype=np.uint8), np.array([1])).group == "a [2Jb"


class TestMerge:
    def test_journal_is_ahead_of_the_array(self):
        stored = np.array([PENDING, DONE, FAILED, DONE], dtype=np.uint8)
        told = np.array([DONE, UNTOLD, DONE, PENDING], dtype=np.uint8)
        assert merge_status(stored, told).tolist() == [DONE, DONE, DONE, PENDING]

    def test_summary_counts_both(self, store):
        set_status(store, "map", [1, 0, 0, 0, 2, 1])
        append(store, done("map", 1), failed("map", 2, "boom"), unset("map", 0))
        assert summarise(store) == [
            {"group": "baseline", "units": 2, "done": 0, "pending": 2, "failed": 0},
            {"group": "map", "units": 6, "done": 2, "pending": 2, "failed": 2},
            {"group": "single", "units": 2, "done": 0, "pending": 2, "failed": 0},
        ]

    def test_status_that_is_written_meanwhile_is_seen(self, store, clock):
        watch = Watch(store, clock)
        assert watch.look().total("done") == 0
        set_status(store, "single", [1, 1])
        assert watch.look().total("done") == 2


class TestTimeLeft:
    def test_unknown_before_the_first_unit(self):
        assert estimate_work({"baseline": (4, 0.0, 0), "map": (100, 0.0, 0)}) is None

    def test_every_group_has_its_own_cost(self):
        work = {"baseline": (2, 40.0, 2), "map": (100, 10.0, 10), "swap": (10, 30.0, 10)}
        assert estimate_work(work) == 2 * 20 + 100 * 1 + 10 * 3

    def test_group_that_has_not_begun_is_like_the_other_experiments(self):
        assert estimate_work({"baseline": (0, 500.0, 10), "map": (0, 10.0, 10), "swap": (7, 0.0, 0)}) == 7.0

    def test_baseline_alone_is_a_guess_for_all(self):
        assert estimate_work({"baseline": (0, 10.0, 4), "map": (8, 0.0, 0)}) == 20.0

    @pytest.mark.parametrize("cost", [0.01, 100.0], ids=["cheap-baselines", "dear-baselines"])
    def test_baselines_do_not_fool_it(self, tmp_path, clock, cost):
        """All baselines are done at once, then cells come at one a second: what is left takes as many seconds."""
        path = write_store(tmp_path / "b.zarr", {"map": (5, 4)}, samples=50, width=5)
        append(path, *(done("baseline", i, cost * (i + 1), cells=2, seconds=cost) for i in range(50)))
        append(path, *(done("map", i, cost * 50 + 20 * (i + 1), cells=20, seconds=20.0) for i in range(25)))
        clock.now = START + cost * 50 + 500
        shown = Watch(path, clock).look()
        assert shown.total("pending") == 25
        assert shown.left_s == pytest.approx(500, rel=0.01)

    def test_replicas_share_what_is_left(self, tmp_path, clock):
        path = write_store(tmp_path / "r.zarr", {"map": (2, 5)}, samples=100)
        units = [done("map", i, 10 * (1 + i // 4), replica=i % 4, cells=10, seconds=10.0) for i in range(80)]
        append(path, *units, *(done("baseline", i, 200, cells=2, seconds=0.0) for i in range(100)))
        clock.now = START + 200
        shown = Watch(path, clock).look()
        assert shown.speed.busy == pytest.approx(4)
        assert shown.left_s == pytest.approx(20 * 10 / 4)

    def test_nothing_left_takes_no_time(self, store, clock):
        set_status(store, "map", [1] * 6)
        set_status(store, "single", [1, 1])
        append(store, done("baseline", 0), done("baseline", 1, 1))
        shown = Watch(store, clock).look()
        assert (shown.state, shown.left_s) == ("finished", 0.0)


class TestGrowing:
    def test_only_new_lines_are_read(self, store, clock):
        watch = Watch(store, clock)
        append(store, done("map", 0), done("map", 1))
        watch.look()
        assert watch.tally.entries == 2
        append(store, done("map", 2), done("map", 0))
        assert watch.look().groups[1].done == 3
        assert watch.tally.entries == 4

    def test_store_that_was_begun_again_is_counted_anew(self, store, clock):
        watch = Watch(store, clock)
        append(store, done("map", 0), done("map", 1), failed("map", 2, "boom"))
        assert watch.look().total("done") == 2
        shutil.rmtree(store)
        write_store(store, {"other": (4,)})
        append(store, done("other", 0))
        shown = watch.look()
        assert [g.group for g in shown.groups] == ["baseline", "other"]
        assert (shown.total("done"), shown.causes) == (1, ())

    def test_store_that_is_gone_is_one_sentence(self, store, clock):
        watch = Watch(store, clock)
        shutil.rmtree(store)
        with pytest.raises(StoreError, match=rf"^store {store} can no longer be read: .*\. Has it been moved\?$"):
            watch.look()

    def test_path_that_is_no_store(self, tmp_path):
        with pytest.raises(StoreError, match="is not a stepscope store"):
            Watch(tmp_path)


class TestWhetherItLives:
    @pytest.mark.parametrize(
        ("group", "driver", "heard_s", "state"),
        [
            pytest.param("pending", None, 59.0, "running", id="heard-of"),
            pytest.param("pending", None, 61.0, "silent", id="not-heard-of"),
            pytest.param("pending", ("held", 5.0), 900.0, "running", id="heart-beats-during-a-long-unit"),
            pytest.param("pending", ("held", 61.0), 61.0, "silent", id="heart-stopped"),
            pytest.param("pending", ("released", 2.0), 2.0, "stopped", id="gave-back"),
            pytest.param("failed", None, 5.0, "finished", id="rest-failed"),
            pytest.param("failed", ("held", 5.0), 5.0, "running", id="failed-may-be-tried-again"),
            pytest.param("failed", ("held", 500.0), 500.0, "finished", id="failed-and-driver-dead"),
            pytest.param("failed", ("released", 5.0), 5.0, "finished", id="failed-and-gave-back"),
            pytest.param("done", ("held", 5.0), 5.0, "finished", id="all-done"),
            pytest.param("done", None, 1e6, "finished", id="all-done-long-ago"),
        ],
    )
    def test_state(self, group, driver, heard_s, state):
        now = START + 1e6
        units = {"pending": [DONE, FAILED, PENDING], "failed": [DONE, FAILED], "done": [DONE]}[group]
        counted = count_group("map", np.array(units, dtype=np.uint8), np.array([1]))
        found = driver and Driver(holder="x", heartbeat=now - driver[1], released=driver[0] == "released")
        assert judge([counted], found, heard_s, now, 60.0) == state

    def test_long_units_are_waited_for(self, store, clock):
        append(store, done("map", 0, 0, seconds=600.0))
        watch = Watch(store, clock)
        clock.now = START + 3 * 600 - 1
        assert watch.look().state == "running"
        clock.now = START + 3 * 600 + 1
        shown = watch.look()
        assert (shown.state, round(shown.heard_s)) == ("silent", 1801)

    def test_new_store_is_heard_of_since_it_was_made(self, store, clock):
        watch = Watch(store, clock)
        clock.now = START + 10
        assert (watch.look().state, watch.look().heard_s) == ("running", 10.0)
        clock.now = START + PATIENCE_SECONDS + 1
        assert watch.look().state == "silent"

    def test_heart_beat_is_heard(self, store, clock):
        append(store, done("map", 0))
        lease(store, time="2027-01-15T08:10:00Z")
        clock.now = START + 603
        shown = Watch(store, clock).look()
        assert (shown.state, shown.heard_s) == ("running", 3.0)
        assert shown.driver == Driver(holder="process 7 on node-1", heartbeat=START + 600, released=False)

    def test_clock_of_another_machine_may_be_ahead(self, store, clock):
        append(store, done("map", 0, 5.0))
        assert Watch(store, clock).look().heard_s == 0.0


class TestLease:
    def test_none_is_nobody(self, store):
        assert read_lease(LocalFiles(store)) is None

    def test_newest_counts(self, store):
        lease(store, number=2, process=8)
        lease(store, number=10, process=9, released=True)
        append(store, {"why": "asked"}, name="lease/stop.json")
        assert read_lease(LocalFiles(store)) == Driver(holder="process 9 on node-1", heartbeat=START, released=True)

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", "7", '{"holder": 7, "time": 1}',
         '{"holder": {"host": "a", "process": 1}, "time": "noon"}',
         '{"holder": {"host": "a", "process": 1}, "time": NaN, "released": 1}',
         '{"holder": {"host": "a"}}', "[" * 5000],
        ids=["empty", "torn", "list", "number", "no-holder", "no-time", "nan", "half", "deep"],
    )  # fmt: skip
    def test_what_is_no_lease_is_nobody(self, store, text):
        (store / "lease").mkdir()
        (store / "lease" / "000001.json").write_text(text)
        assert read_lease(LocalFiles(store)) is None

    def test_holder_cannot_drive_a_terminal(self, store):
        lease(store, host="\x1b[2J" + "x" * 500)
        holder = read_lease(LocalFiles(store)).holder
        assert "\x1b" not in holder
        assert len(holder) <= 100


class TestSnapshot:
    def test_json_holds_everything_and_no_token(self, store, clock):
        lease(store)
        append(store, done("map", 0, 1, replica=3, gpu_bytes=7), failed("map", 1, "ValueError: bad 3", 2))
        append(store, retried(2, "ValueError: bad 4", 3), retried(None, "died", 3, replica=3))
        clock.now = START + 4
        told = json.loads(json.dumps(Watch(store, clock).look().as_dict()))
        assert told["groups"][1] == {
            "group": "map", "units": 6, "done": 1, "pending": 4, "failed": 1,
            "cells": 30, "cells_done": 6, "cells_pending": 18,
        }  # fmt: skip
        assert (told["state"], told["heard_s"], told["retries"], told["losses"]) == ("running", 1.0, 1, 1)
        assert (told["bytes"], told["row_forwards"], told["gpu_bytes"], told["replicas_seen"]) == (100, 10, 7, 2)
        assert told["speed"]["cells_per_s"] == 4.0
        assert [r["last"] for r in told["replicas"]] == ["", "map 0"]
        assert told["replicas"][1]["cells_per_s"] == 4.0
        assert [(c["cause"], c["units"], c["retries"], c["where"]) for c in told["causes"]] == [
            ("ValueError: bad <n>", 1, 1, "unit 2"),
            ("died", 0, 0, "replica 3"),
        ]
        assert "secret" not in json.dumps(told)

    def test_made_up_time_is_the_start(self):
        from datetime import datetime

        assert datetime.fromisoformat(CREATED).timestamp() == START


class TestPlace:
    def test_folder_is_read_as_files(self, store):
        files = files_of(open_store(store))
        assert isinstance(files, LocalFiles)
        assert files.root == store

    def test_other_backends_are_read_through_zarr(self, store):
        opened = open_store(store)
        opened.root = zarr.create_group(zarr.storage.MemoryStore(), path="sweeps/run.zarr")
        files = files_of(opened)
        assert isinstance(files, ZarrFiles)
        assert files.prefix == "sweeps/run.zarr/"
