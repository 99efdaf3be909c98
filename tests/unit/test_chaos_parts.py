"""The parts of the chaos trials that must be right for a trial to mean anything: draws, damage, judge, tally."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest
import zarr

from pipeline.cli import main
from pipeline.config import load_config
from pipeline.plan import Plan, make_plan
from pipeline.store import verify
from pipeline.sweep import run_sweep
from tests.chaos import check, damage
from tests.chaos.__main__ import SYNTHETIC
from tests.chaos.draw import BIRTH, ENDING, KILL, KINDS, MODEL, NODE, RAY, REPLICA, SHARE, draw, kind_of
from tests.chaos.tally import Tally
from tests.synthetic import DEATHS, SyntheticReplica, sample_values, shapes_of, synthetic_factory

UNITS = 45


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    path.write_text(json.dumps(SYNTHETIC))
    return path


@pytest.fixture(scope="module")
def plan(config) -> Plan:
    return make_plan(load_config(config), config)


def finish(plan: Plan, store: Path) -> Path:
    from cluster import InlinePool

    result = run_sweep(plan, store, make_executor=lambda plan, place: InlinePool(synthetic_factory(plan, place)))
    assert (result.failed, result.pending) == (0, 0)
    return store


@pytest.fixture(scope="module")
def reference(plan, tmp_path_factory) -> Path:
    return finish(plan, tmp_path_factory.mktemp("reference") / "run.zarr")


@pytest.fixture
def store(reference, tmp_path) -> Path:
    return Path(shutil.copytree(reference, tmp_path / "run.zarr"))


def trials(count: int = 300) -> list:
    return [draw(0, number, kind_of(number), UNITS) for number in range(count)]


def test_a_trial_is_a_function_of_its_seed_and_number():
    assert trials(50) == trials(50)
    assert draw(1, 3, RAY, UNITS) != draw(2, 3, RAY, UNITS)
    assert draw(1, 3, RAY, UNITS) != draw(1, 4, RAY, UNITS)


def test_kinds_take_turns_in_proportion():
    kinds = [kind_of(number) for number in range(60)]
    assert [kinds.count(kind) for kind in KINDS] == list(SHARE)
    assert {*kinds[:3]} == {*KINDS}
    assert {kind_of(number, (MODEL,)) for number in range(30)} == {MODEL}


def test_nothing_strikes_a_driver_that_has_ended():
    for trial in trials():
        for round_ in trial.rounds:
            ends = [i for i, strike in enumerate(round_.strikes) if strike.what in ENDING]
            assert ends in ([], [len(round_.strikes) - 1])


def test_only_replicas_of_their_own_are_killed_alone():
    for trial in trials():
        whats = {strike.what for round_ in trial.rounds for strike in round_.strikes}
        assert trial.kind == RAY or not whats & {REPLICA, NODE}
        assert trial.kind == RAY or "hang" not in trial.faults.values()


def test_every_thing_that_can_happen_does():
    drawn = trials()
    whats = {strike.what for trial in drawn for round_ in trial.rounds for strike in round_.strikes}
    assert whats == {*ENDING, REPLICA, NODE, "driver frozen"}
    assert any(
        strike.what == KILL and strike.lines == BIRTH
        for trial in drawn
        for round_ in trial.rounds
        for strike in round_.strikes
    )
    assert {*DEATHS, "raise", "nan", "hang"} == {fault for trial in drawn for fault in trial.faults.values()}
    acts = {str(act) for trial in drawn for round_ in trial.rounds for act in round_.damage}
    assert {f"{way} data" for way in damage.WAYS} <= acts
    assert {f"{way} journal" for way in damage.JOURNAL_WAYS} <= acts
    assert {f"flip {target}" for target in damage.TARGETS} <= acts


@pytest.mark.parametrize(
    ("target", "way"),
    [(target, way) for target in damage.TARGETS if target != "journal" for way in damage.WAYS[:-1]]
    + [("data", "swap")],
)
def test_damage_changes_one_file_of_its_target(target, way, store):
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    hit = next(
        path for seed in range(50) if (path := damage.apply(damage.Damage(target, way, seed), store)) is not None
    )
    after = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    changed = {path for path in before if after.get(path) != before[path]}
    assert changed == {hit}
    assert damage.kind_of(hit.relative_to(store)) == target
    if way == "swap":
        assert after[hit] in before.values()
    if way == "truncate":
        assert before[hit].startswith(after[hit])
    assert (hit in after) == (way != "delete")


@pytest.mark.parametrize("way", damage.JOURNAL_WAYS)
def test_a_damaged_journal_keeps_its_other_lines(way, store):
    journal = store / damage.JOURNAL
    before = journal.read_bytes().splitlines()
    assert damage.apply(damage.Damage("journal", way, 5), store) == journal
    after = journal.read_bytes().splitlines() if journal.exists() else []
    kept = sum(line in after for line in before)
    assert kept == {"flip": len(before) - 1, "tear": len(before) - 1, "garble": len(before), "delete": 0}[way]


def test_damage_does_not_touch_what_says_what_the_store_is(store):
    rng = Random(0)
    keys = ("zarr.json", "lease")
    before = {path: path.read_bytes() for key in keys for path in [store / key] if path.is_file()}
    for _ in range(60):
        damage.apply(damage.draw(rng, swaps=True), store)
    assert {path: path.read_bytes() for path in before} == before


def test_synthetic_values_depend_on_path_sample_and_cell_alone(plan, reference):
    root = zarr.open_group(str(reference), mode="r")
    for name, grid in plan.by_name.items():
        if grid.experiment.screen is None:
            for sample in range(len(plan.samples)):
                values = np.asarray(root[f"{name}/goal_evidence"][sample])
                assert np.array_equal(values, sample_values(name, "goal_evidence", sample, tuple(grid.shape)))


def test_a_synthetic_replica_refuses_another_sweeps_store(config, reference, plan):
    other = make_plan(load_config(config, ["sampler.steps=5"]), config)
    with pytest.raises(ValueError, match="holds another config"):
        SyntheticReplica(shapes_of(other), str(reference))


def test_an_undisturbed_store_is_acquitted(plan, reference, store):
    assert check.verdict(store, reference, plan) == {"lost": [], "wrong": []}
    judged = check.judge(store, reference, plan)
    assert (judged["units"], judged["strays"], judged["done"]) == ([], [], [UNITS])


def edit(path: str, region, value):
    def change(store: Path) -> None:
        array = zarr.open_group(str(store), mode="r+", use_consolidated=False)[path]
        array[region] = value

    return change


def metadata(key: str, **changes):
    def change(store: Path) -> None:
        path = store / key / "zarr.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "attributes": {**content["attributes"], **changes}}))

    return change


CRIMES = {
    "a value": (edit("noise/goal_evidence", (1, 2), 0.5), [["noise", 1]], "wrong"),
    "the last bit": (
        lambda store: edit("noise/goal_evidence", (1, 2), np.nextafter(value(store), np.float32(9)))(store),
        [["noise", 1]],
        "wrong",
    ),
    "a hole": (edit("noise/goal_evidence", (1, 2), np.nan), [["noise", 1]], "wrong"),
    "a step of the baseline": (edit("baseline/goal_evidence_by_step", (2, 1, 3), 0.5), [["baseline", 2]], "wrong"),
    "an estimate": (edit("screened/estimate", (0, 0), 0.5), [["baseline", 0]], "wrong"),
    "a pixel": (edit("previews/x0_hat", (0, 0, 0), 7), [["baseline", 1]], "wrong"),
    "a prompt": (edit("samples/clean_prompt", (0,), "another"), ["samples/clean_prompt"], "wrong"),
    "a status": (edit("noise/status", (1,), 0), [["noise", 1]], "lost"),
    "a failure": (edit("noise/status", (1,), 2), [["noise", 1]], "lost"),
    "a selection": (edit("screened/exact", ..., 0), ["screened/exact"], "wrong"),
    "an attribute": (metadata("noise", kind="patch"), ["noise/zarr.json"], "wrong"),
    "a leftover": (lambda store: (store / "noise" / "x.partial").write_bytes(b""), ["noise/x.partial"], "wrong"),
    "a lost chunk": (
        lambda store: shutil.rmtree(store / "noise/goal_evidence/c"),
        [["noise", 0], ["noise", 1]],
        "wrong",
    ),
    "a lost array": (lambda store: shutil.rmtree(store / "noise/status"), [["noise", 0], ["noise", 1]], "lost"),
}


def value(store: Path) -> np.float32:
    return zarr.open_group(str(store), mode="r")["noise/goal_evidence"][1, 2]


@pytest.mark.parametrize(("commit", "where", "count"), CRIMES.values(), ids=[name.replace(" ", "-") for name in CRIMES])
def test_the_judge_convicts(commit, where, count, plan, reference, store):
    commit(store)
    found = check.verdict(store, reference, plan)[count]
    assert [place for place in where if place not in found] == []


def test_the_judge_tells_open_selections(plan, reference, store):
    edit("screened/exact", ..., 255)(store)
    assert "screened/exact is open" in check.verdict(store, reference, plan)["wrong"]
    assert check.judge(store, reference, plan)["strays"] == []


def test_the_judge_believes_status_and_journal_as_drivers_do(plan, store):
    units = {(unit.group, unit.index) for unit in plan.layout}
    assert check.believed_done(store, plan.layout) == units
    edit("noise/status", (1,), 0)(store)
    assert check.believed_done(store, plan.layout) == units, "its line of the journal says so"
    (store / damage.JOURNAL).unlink()
    assert check.believed_done(store, plan.layout) == units - {("noise", 1)}


def test_what_verification_undid_is_believed_done_no_more(plan, reference, store):
    path = store / "noise/goal_evidence/c/1/0"
    path.write_bytes(path.read_bytes()[:-3])
    assert check.judge(store, reference, plan)["units"] == [["noise", 1]]
    assert [(unit.group, unit.index) for unit in verify(store).bad] == [("noise", 1)]
    assert check.judge(store, reference, plan)["units"] == []


@pytest.mark.parametrize("name", ["lost", "wrong", "missed", "false_alarms", "broken"])
def test_a_tally_with_anything_amiss_is_not_clean(name):
    assert Tally().clean
    assert not Tally(**{name: ["a traceback"] if name == "broken" else 1}).clean


def test_tallies_add_up():
    total, one = Tally(), Tally(trials=1, drivers=3, found=2, broken=["x"])
    one.kills["node killed"] += 2
    total.add(one)
    total.add(one)
    assert (total.trials, total.drivers, total.found, total.broken) == (2, 6, 4, ["x", "x"])
    assert total.as_dict()["kills_in_all"] == total.as_dict()["kills"]["node killed"] == 4


def test_a_store_of_a_trial_is_one_of_the_product(config, reference, capsys):
    assert main(["status", str(reference)]) == 0
    assert main(["verify", str(reference)]) == 0
