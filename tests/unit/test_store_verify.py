"""Verification: every kind of damage to a finished store is found, undone, and repaired by going on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cli import BAD_INPUT, FAILED, OK, main
from pipeline.plan import Plan
from pipeline.store import (
    DONE,
    PENDING,
    Findings,
    Journal,
    Lease,
    LeaseLostError,
    Location,
    Place,
    StoreError,
    locate,
    open_store,
    states_of,
    verify,
)
from pipeline.store import lease as lease_module
from pipeline.store import verify as verify_function
from pipeline.store.contents import chunk_keys
from tests.planted_units import finish, small_plan
from tests.sweep_fixture import arrays, assert_same_arrays

METRIC = "map/solved/c/1/0/0/0"
"""A chunk of the third unit of map: sample 1, first window."""


@pytest.fixture(scope="module")
def plan() -> Plan:
    return small_plan()


@pytest.fixture(scope="module")
def undisturbed(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run.zarr"
    finish(folder, plan)
    return folder


@pytest.fixture
def folder(undisturbed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(undisturbed, tmp_path / "run.zarr"))


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, folder: Path) -> Location:
    """The same finished store in both kinds of place."""
    if request.param == "folder":
        return locate(folder)
    copy = locate(f"{request.getfixturevalue('bucket')}/run.zarr")
    for key in locate(folder).list():
        copy.write(key, locate(folder).read(key) or b"")
    return copy


def flip(place: Place, key: str, at: float = 0.7, bit: int = 3) -> None:
    content = bytearray(locate(place).read(key) or b"")
    content[int(at * len(content))] ^= 1 << bit
    locate(place).write(key, bytes(content))


def truncate(place: Place, key: str, to: float = 0.5) -> None:
    content = locate(place).read(key) or b""
    locate(place).write(key, content[: int(to * len(content))])


def delete(place: Place, key: str) -> None:
    assert locate(place).exists(key)
    locate(place).delete(key)


def bad(found: Findings) -> list[tuple[str, int, str]]:
    return [(unit.group, unit.index, unit.cause) for unit in found.bad]


def test_undisturbed_store_is_good(place, plan):
    before = {key: locate(place).read(key) for key in locate(place).list() if not key.startswith("lease")}
    found = verify(place)
    assert found.good
    assert found.checked == found.units == sum(plan.group_units(g) for g in ("baseline", "map", "one", "screened"))
    assert found.undigested == found.skipped_lines == 0
    assert {key: locate(place).read(key) for key in locate(place).list() if not key.startswith("lease")} == before


def test_leftovers_of_killed_writers_are_no_damage_and_are_deleted(folder):
    leftover = folder / "map" / "goal_evidence" / "c.0.abc.partial"
    leftover.write_bytes(b"torn")
    found = verify(folder)
    assert (found.good, found.leftovers) == (True, 1)
    assert not leftover.exists()


@pytest.mark.parametrize(
    ("damage", "key", "unit"),
    [
        pytest.param(flip, METRIC, ("map", 2, "unreadable"), id="bit-of-a-metric"),
        pytest.param(truncate, METRIC, ("map", 2, "unreadable"), id="metric-cut-short"),
        pytest.param(lambda p, k: truncate(p, k, 0), METRIC, ("map", 2, "unreadable"), id="metric-emptied"),
        pytest.param(delete, METRIC, ("map", 2, "missing"), id="metric-gone"),
        pytest.param(delete, "map/goal_evidence/c/0/1/0/0", ("map", 1, "missing"), id="last-short-window-gone"),
        pytest.param(flip, "one/solved/c/1", ("one", 1, "unreadable"), id="experiment-without-axes"),
        pytest.param(delete, "one/goal_evidence/c/0", ("one", 0, "missing"), id="experiment-without-axes-gone"),
        pytest.param(flip, "baseline/solved/c/0/0", ("baseline", 0, "unreadable"), id="baseline"),
        pytest.param(flip, "baseline/solved_by_step/c/1/0/0", ("baseline", 1, "unreadable"), id="baseline-by-step"),
        pytest.param(delete, "baseline/solved_by_step/c/1/0/0", ("baseline", 1, "missing"), id="by-step-gone"),
        pytest.param(flip, "previews/x0_hat/c/0/0/0/0/0/0/0", ("baseline", 1, "unreadable"), id="preview"),
        pytest.param(delete, "previews/x0_hat/c/0/0/0/0/0/0/0", ("baseline", 1, "missing"), id="preview-gone"),
        pytest.param(flip, "screened/estimate/c/1/0/0/0", ("baseline", 1, "unreadable"), id="estimate"),
        pytest.param(delete, "screened/estimate/c/0/0/0/0", ("baseline", 0, "missing"), id="estimate-gone"),
        pytest.param(flip, "screened/solved/c/0/0/0/0", ("screened", 0, "unreadable"), id="screened-metric"),
        pytest.param(delete, "screened/solved/c/0/0/0/0", ("screened", 0, "missing"), id="screened-metric-gone"),
    ],
)
def test_damaged_unit_is_found_made_pending_and_done_again(place, plan, undisturbed, damage, key, unit):
    damage(place, key)
    found = verify(place)
    assert bad(found) == [unit]
    group, index, cause = unit
    states = states_of(open_store(place))
    assert [(g, i) for g, values in states.items() for i in np.flatnonzero(values != DONE)] == [(group, index)]
    assert open_store(place).status(group)[index] == PENDING
    assert [e["unset"] for e in Journal(place).entries() if "unset" in e] == [cause]
    assert verify(place).good, "chunks of pending units are nobody's yet"
    finish(place, plan)
    assert verify(place).good
    assert_same_arrays(place, undisturbed)


class TestNumbersThatChanged:
    """Chunks that are whole and readable, with numbers that nobody computed."""

    @pytest.mark.parametrize(
        ("path", "selection", "unit"),
        [
            pytest.param("map/solved", (1, 0, 3, 1), ("map", 2), id="one-cell"),
            pytest.param("baseline/solved_by_step", (0, 1, 2), ("baseline", 0), id="one-step"),
            pytest.param("screened/estimate", (1, 0, 0), ("baseline", 1), id="one-estimate"),
            pytest.param("previews/x0_hat", (0, 0, 0, 0, 0, 0, 0), ("baseline", 1), id="one-pixel"),
        ],
    )
    def test_are_told_by_the_digest(self, folder, path, selection, unit):
        array = open_store(folder).array(path)
        array[selection] = array[selection] + 1
        assert bad(verify(folder)) == [(*unit, "not what was written")]

    def test_without_a_receipt_only_checksums_speak(self, folder, plan):
        (folder / "journal.jsonl").unlink()
        array = open_store(folder).array("map/solved")
        array[1, 0, 3, 1] += 1
        found = verify(folder)
        assert found.good
        assert found.undigested == found.units

    def test_last_receipt_counts(self, folder):
        array = open_store(folder).array("one/solved")
        array[0] = 5.0
        wrong = next(e for e in Journal(folder).entries() if (e["group"], e["index"]) == ("one", 0))
        values = {f"one/{m}": np.asarray(open_store(folder).array(f"one/{m}")[0]) for m in ("solved", "goal_evidence")}
        from pipeline.store import digest_of

        Journal(folder).append(**{**wrong, "digest": digest_of(values)})
        assert verify(folder).good


class TestCellsWithoutAValue:
    def test_failed_units_with_holes_are_as_they_should_be(self, plan, tmp_path):
        finish(tmp_path / "run.zarr", plan, holes={0: 1, 1: 3, 9: 1})
        found = verify(tmp_path / "run.zarr")
        assert found.good
        assert found.checked == found.units

    def test_holes_in_a_done_unit_are_found_without_a_receipt(self, folder):
        (folder / "journal.jsonl").unlink()
        open_store(folder).array("map/solved")[0, 1, 2, 0] = np.nan
        assert bad(verify(folder)) == [("map", 0, "done, with cells without a value")]

    @pytest.mark.parametrize("path", ["baseline/solved", "screened/estimate"])
    def test_holes_in_a_baseline_are_found_without_a_receipt(self, folder, path):
        (folder / "journal.jsonl").unlink()
        array = open_store(folder).array(path)
        values = array[1]
        values[..., 0] = np.nan
        array[1] = values
        assert bad(verify(folder)) == [("baseline", 1, "done, with cells without a value")]

    def test_holes_along_the_steps_are_allowed(self, folder):
        (folder / "journal.jsonl").unlink()
        open_store(folder).array("baseline/solved_by_step")[0, 0, 0] = np.nan
        assert verify(folder).good

    def test_cells_that_were_never_due_are_no_holes_and_due_ones_are(self, folder):
        """Most cells of a screened experiment have an estimate only."""
        (folder / "journal.jsonl").unlink()
        assert verify(folder).good
        store = open_store(folder)
        chosen = np.argwhere(store.array("screened/exact")[...] == 1)[0]
        store.array("screened/solved")[(0, *chosen)] = np.nan
        index = chosen[0] // store.array("screened/solved").chunks[1]
        assert bad(verify(folder)) == [("screened", index, "done, with cells without a value")]

    def test_failed_unit_with_every_value_is_found(self, folder):
        entry = next(e for e in Journal(folder).entries() if (e["group"], e["index"]) == ("map", 1))
        Journal(folder).append(**{**entry, "failed": 2})
        assert bad(verify(folder)) == [("map", 1, "failed, with a value in every cell")]

    def test_unit_that_raised_may_have_stored_anything_that_can_be_read(self, folder):
        for index in (0, 1, 2):
            Journal(folder).append(group="map", index=index, error="out of memory", failed=4)
        delete(folder, "map/solved/c/0/0/0/0")
        flip(folder, METRIC)
        assert bad(verify(folder)) == [("map", 2, "unreadable")]


class TestStatusAndSelection:
    @pytest.mark.parametrize("damage", [flip, truncate, delete], ids=["flipped", "cut", "gone"])
    def test_damaged_status_is_filled_from_the_journal(self, place, plan, damage, undisturbed):
        damage(place, "map/status/c/0")
        found = verify(place)
        assert (found.rebuilt, found.bad, found.good) == (["map/status"], [], False)
        assert (open_store(place).status("map") == DONE).all()
        assert verify(place).good
        assert_same_arrays(place, undisturbed)

    def test_damaged_status_without_a_journal_is_all_pending(self, folder, plan, undisturbed):
        flip(folder, "map/status/c/0")
        (folder / "journal.jsonl").unlink()
        with pytest.raises(StoreError, match=r"map/status cannot be read: .*Check the store with: stepscope verify "):
            states_of(open_store(folder))
        verify(folder)
        assert (open_store(folder).status("map") == PENDING).all()
        finish(folder, plan)
        assert_same_arrays(folder, undisturbed)

    def test_units_that_only_the_journal_knows_are_checked_too(self, folder):
        open_store(folder).write_status("map", np.zeros(4, np.uint8))
        flip(folder, METRIC)
        found = verify(folder)
        assert bad(found) == [("map", 2, "unreadable")]
        assert found.checked == found.units
        assert open_store(folder).status("map").tolist() == [DONE, DONE, PENDING, DONE]

    @pytest.mark.parametrize("damage", [flip, truncate, delete], ids=["flipped", "cut", "gone"])
    @pytest.mark.parametrize("name", ["exact", "drawn"])
    def test_damaged_selection_is_chosen_again(self, place, plan, undisturbed, name, damage):
        damage(place, f"screened/{name}/c/0/0/0")
        found = verify(place)
        assert (found.rebuilt, found.bad) == (["screened/exact"], [])
        assert open_store(place).chosen("screened", 0, 1) is None
        finish(place, plan)
        assert_same_arrays(place, undisturbed)
        assert verify(place).good

    def test_selection_that_was_not_made_yet_is_no_damage(self, plan, tmp_path):
        from pipeline.store import open_or_create

        open_or_create(tmp_path / "run.zarr", plan)
        found = verify(tmp_path / "run.zarr")
        assert found.good
        assert found.checked == 0

    def test_driver_killed_between_the_two_halves_of_a_selection_left_no_damage(self, plan, tmp_path):
        from pipeline.store import open_or_create

        store = open_or_create(tmp_path / "run.zarr", plan)
        store.array("screened/drawn")[...] = 0
        assert verify(tmp_path / "run.zarr").good


class TestTemplateAndEffects:
    @pytest.mark.parametrize("damage", [flip, truncate, delete], ids=["flipped", "cut", "gone"])
    @pytest.mark.parametrize(
        "key",
        [
            "samples/prompt/c/0",
            "map/component/c/0",
            "baseline/sigma/c/0",
            "baseline/goal_evidence_floor/c/0",
            "map/sample/c/0",
        ],
    )
    def test_damaged_coordinate_is_told_and_restored_by_the_next_run(self, folder, plan, undisturbed, key, damage):
        if not (folder / key).exists():
            pytest.skip("this metric has no floor")
        damage(folder, key)
        found = verify(folder)
        word = "missing" if damage is delete else "unreadable"
        assert found.template == [f"{key.removesuffix('/c/0')} ({word})"]
        assert (found.bad, found.unchecked, found.good) == ([], [], False)
        finish(folder, plan)
        assert verify(folder).good
        assert_same_arrays(folder, undisturbed)

    @pytest.mark.parametrize("damage", [truncate, delete, lambda p, k: flip(p, k, 0.0)], ids=["cut", "gone", "flipped"])
    @pytest.mark.parametrize(
        ("key", "unchecked"),
        [
            pytest.param("map/solved/zarr.json", ["map"], id="metric"),
            pytest.param("map/zarr.json", ["map"], id="group"),
            pytest.param("map/status/zarr.json", ["map"], id="status"),
            pytest.param("samples/seed/zarr.json", [], id="samples"),
            pytest.param("previews/x0_hat/zarr.json", ["baseline"], id="previews"),
            pytest.param("screened/estimate/zarr.json", ["baseline", "screened"], id="estimates"),
        ],
    )
    def test_units_behind_a_damaged_description_are_left_alone(self, folder, plan, undisturbed, key, unchecked, damage):
        damage(folder, key)
        found = verify(folder)
        assert (found.template, found.unchecked, found.bad) == ([key], unchecked, [])
        finish(folder, plan)
        assert verify(folder).good
        assert_same_arrays(folder, undisturbed)

    def test_previews_that_nobody_can_assign_leave_the_baseline_unchecked(self, folder, plan):
        flip(folder, "previews/preview/c/0")
        found = verify(folder)
        assert (found.template, found.unchecked) == (["previews/preview (unreadable)"], ["baseline"])
        finish(folder, plan)
        assert verify(folder).good

    def test_root_without_consolidated_metadata_is_told_and_restored(self, folder, plan, undisturbed):
        root = json.loads((folder / "zarr.json").read_text())
        del root["consolidated_metadata"]
        (folder / "zarr.json").write_text(json.dumps(root))
        found = verify(folder)
        assert found.template == ["zarr.json (consolidated metadata)"]
        assert found.unchecked == ["baseline", "map", "one", "screened"]
        finish(folder, plan)
        assert verify(folder).good
        assert_same_arrays(folder, undisturbed)

    @pytest.mark.parametrize("damage", [flip, truncate, delete], ids=["flipped", "cut", "gone"])
    @pytest.mark.parametrize("part", ["map/solved_difference/c/0/0/0/0", "map/pair/c/0", "map/solved_n/zarr.json"])
    def test_damaged_effects_are_told_and_computed_again(self, folder, capsys, part, damage):
        assert main(["effects", str(folder), "--replicates", "20"]) == OK
        before = arrays(folder)
        assert verify(folder).good
        damage(folder, f"effects/{part}")
        capsys.readouterr()
        assert main(["verify", str(folder)]) == FAILED
        captured = capsys.readouterr()
        assert f"effects/{part.split('/c/')[0]}" in captured.out
        assert captured.err == f"Compute the effects again: stepscope effects {folder}\n"
        assert main(["effects", str(folder), "--replicates", "20"]) == OK
        assert verify(folder).good
        assert arrays(folder).keys() == before.keys()


class TestLease:
    def test_driven_store_is_refused(self, folder):
        lease = Lease(folder)
        lease.acquire()
        with pytest.raises(StoreError, match="is being driven by process"):
            verify(folder)
        lease.release()
        assert verify(folder).good

    def test_lost_lease_writes_no_status(self, folder, monkeypatch):
        flip(folder, METRIC)

        def lose(self: Lease) -> None:
            raise LeaseLostError("taken over")

        monkeypatch.setattr(lease_module.Lease, "check", lose)
        with pytest.raises(LeaseLostError, match="taken over"):
            verify_function(folder)
        assert (open_store(folder).status("map") == DONE).all()

    def test_storage_that_does_not_answer_flips_nothing(self, place, monkeypatch):
        from pipeline.store import contents

        def away(self: Any, group: str, index: int) -> None:
            raise StoreError("no answer")

        monkeypatch.setattr(contents.Contents, "values", away)
        with pytest.raises(StoreError, match="no answer"):
            verify(place)
        assert all((states == DONE).all() for states in states_of(open_store(place)).values())


def keys_to_damage(folder: Path) -> list[str]:
    skipped = ("lease/", "journal")
    return [key for key in locate(folder).list() if not key.startswith(skipped) and key != "zarr.json"]


@pytest.mark.parametrize("seed", range(12))
def test_any_damage_is_repaired_to_the_same_bits(folder, plan, undisturbed, seed):
    """Several keys at once, of any kind: verify, go on, verify, go on, and everything is as it was."""
    rng = np.random.default_rng(seed)
    kinds: list[Callable[[Place, str], None]] = [
        delete,
        truncate,
        lambda p, k: flip(p, k, float(rng.random()), int(rng.integers(8))),
    ]
    for key in rng.choice(keys_to_damage(folder), size=6, replace=False):
        kinds[int(rng.integers(3))](folder, str(key))
    for _ in range(3):
        if verify(folder).good:
            break
        finish(folder, plan)
    assert verify(folder).good
    assert_same_arrays(folder, undisturbed)


def test_every_key_of_a_finished_store_is_watched(folder, plan):
    """Deleting any key but those of lease and journal is found, one at a time."""
    for key in keys_to_damage(folder):
        content = locate(folder).read(key)
        delete(folder, key)
        assert not verify(folder).good, key
        finish(folder, plan)
        assert locate(folder).read(key) == content, key


class TestCommand:
    def test_good_store_is_exit_code_zero(self, folder, capsys):
        assert main(["verify", str(folder)]) == OK
        captured = capsys.readouterr()
        assert captured.out.endswith(" units checked, 0 bad\n")
        assert captured.err == ""

    def test_bad_units_are_listed_with_what_to_do(self, folder, capsys):
        flip(folder, METRIC)
        delete(folder, "one/solved/c/0")
        assert main(["verify", str(folder)]) == FAILED
        captured = capsys.readouterr()
        for line in (
            " units checked, 2 bad\n",
            "       1  unreadable\n",
            "       1  missing\n",
            "  map[2]: unreadable, pending again\n",
            "  one[0]: missing, pending again\n",
        ):
            assert line in captured.out
        assert captured.err == (
            f"Run the same command again, it repairs the rest: stepscope run CONFIG --store {folder}\n"
        )

    def test_json_holds_everything(self, folder, capsys):
        delete(folder, "one/solved/c/0")
        flip(folder, "map/step/c/0")
        assert main(["verify", str(folder), "--json"]) == FAILED
        told = json.loads(capsys.readouterr().out)
        assert told["good"] is False
        assert told["bad"] == [{"group": "one", "index": 0, "cause": "missing"}]
        assert told["template"] == ["map/step (unreadable)"]

    def test_long_lists_are_cut(self, folder, capsys):
        for key in chunk_keys(open_store(folder).array("screened/solved")):
            delete(folder, key)
        for key in chunk_keys(open_store(folder).array("map/solved")):
            delete(folder, key)
        for key in chunk_keys(open_store(folder).array("baseline/solved")):
            delete(folder, key)
        assert main(["verify", str(folder)]) == FAILED
        out = capsys.readouterr().out
        shown = out.count("pending again")
        assert shown <= 10
        found = int(out.split(" bad\n")[0].split()[-1])
        assert (f"and {found - 10} more; --json lists all" in out) == (found > 10)

    def test_torn_journal_is_told_and_no_fault(self, folder, capsys):
        with (folder / "journal.jsonl").open("ab") as handle:
            handle.write(b'{"unit": 2, "gro')
        assert main(["verify", str(folder)]) == OK
        assert "1 lines of the journal are torn or corrupted, and were skipped" in capsys.readouterr().out

    def test_place_without_a_store_is_bad_input(self, tmp_path, capsys):
        assert main(["verify", str(tmp_path / "nothing")]) == BAD_INPUT
        assert "does not exist. Create one with" in capsys.readouterr().err
