"""Laws of the pool that hold for any table of faults, nodes and times."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import UnitDone, UnitFailed, UnitRetried, UnitStarted
from tests.fake_pool import Bench, Node, bench, value_of, work

GOOD = ("done", "slow x3")
BAD = ("raise", "die", "die after write", "hang", "slow x2 raise", "slow x4 die")
LEASE_S, RUNS = 20.0, 4


@dataclass(frozen=True)
class Table:
    """Everything that a run meets."""

    units: int
    fates: dict[tuple[int, int], str]
    localities: list[int]
    options: dict[str, Any]


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Units with the fates of their first runs, and a pool."""
    units = draw(st.integers(0, 25))
    fates = draw(
        st.dictionaries(
            st.tuples(st.integers(0, max(units - 1, 0)), st.integers(1, RUNS)),
            st.sampled_from([*GOOD, *BAD]),
            max_size=40,
        )
    )
    options = {
        "replicas": draw(st.integers(1, 5)),
        "in_flight": draw(st.integers(1, 3)),
        "max_attempts": draw(st.integers(1, 3)),
        "lease_s": LEASE_S,
        "backoff_s": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "idle_release_s": draw(st.sampled_from([0.0, 2.0, 60.0])),
        "linger_s": draw(st.sampled_from([0.0, 0.3, 2.0])),
        # Every unit may die and hang in every attempt, each time after a pause of a minute.
        "limit_s": (units + 1) * RUNS * (LEASE_S + 65.0),
    }
    return Table(units, fates, draw(st.lists(st.integers(0, 3), min_size=units, max_size=units)), options)


def check_story(pool: Bench, max_attempts: int) -> None:
    """Assert what every run keeps to, finished or not."""
    stories: dict[int, list[Any]] = defaultdict(list)
    for event in pool.of(UnitStarted, UnitRetried, UnitDone, UnitFailed):
        if not getattr(event, "copy", False):
            stories[event.unit].append(event)
    for unit, story in stories.items():
        starts, ends = story[::2], story[1::2]
        # Start, end, start, end: never two starts at once, and nothing after the unit has ended.
        assert all(isinstance(event, UnitStarted) for event in starts), story
        assert all(isinstance(event, UnitRetried) for event in ends[:-1]), story
        assert not any(isinstance(event, UnitStarted) for event in ends), story
        charged = [event for event in ends if not getattr(event, "error", "").startswith("not charged")]
        assert len(charged) <= max_attempts
        if isinstance(ends[-1:] and ends[-1], UnitFailed):
            assert ends[-1].attempts == max_attempts == len(charged)
        if isinstance(ends[-1:] and ends[-1], UnitDone):
            assert ends[-1].receipt == pool.backend.writes[unit] == value_of(unit)
            assert ends[-1].attempt == len(charged)
    assert not pool.backend.alive or pool.finished


def run(table: Table, nodes: list[Node] | None = None, stop_at: float = float("inf"), **more: Any) -> Bench:
    pool = bench(nodes or [Node(places=100)], fates=table.fates, **table.options, **more)
    units = work(table.units, locality=lambda unit: table.localities[unit])
    return pool.run(units, stop=lambda: "told to" if pool.backend.now >= stop_at else None)


@settings(max_examples=300, deadline=None)
@given(table=tables())
def test_the_first_good_attempt_decides_and_nothing_else(table: Table) -> None:
    """Without copies, nodes that go, or a replica given up, the fates of its own attempts are all a unit depends on."""
    pool = run(table, straggler_factor=0, max_restarts=10_000)
    assert pool.finished is True
    check_story(pool, table.options["max_attempts"])
    expected: dict[int, int | None] = {}
    for unit in range(table.units):
        tried = range(1, table.options["max_attempts"] + 1)
        expected[unit] = next((run for run in tried if table.fates.get((unit, run), "done") in GOOD), None)
    assert {event.unit: event.attempt for event in pool.of(UnitDone)} == {u: n for u, n in expected.items() if n}
    assert pool.failed == [unit for unit, attempt in expected.items() if attempt is None]


@settings(max_examples=200, deadline=None)
@given(table=tables())
def test_copies_help_units_and_harm_none(table: Table) -> None:
    """With copies, a unit that its own attempts would finish is done, and one that ends does so once."""
    pool = run(table, straggler_factor=1.5, max_restarts=10_000)
    assert pool.finished is True
    check_story(pool, table.options["max_attempts"])
    assert sorted([*pool.done, *pool.failed]) == list(range(table.units))
    for unit in pool.failed:
        # One that had a good run of any number among those that were made would be done.
        fates = [table.fates.get((unit, run.number), "done") for run in pool.runs_of(unit)]
        assert not set(fates) & set(GOOD)
        assert len(fates) >= table.options["max_attempts"]


@st.composite
def clouds(draw: st.DrawFn) -> list[Node]:
    """Nodes that come, are told to go, and go; and one that stays."""
    moments = st.integers(0, 60).map(float)
    nodes = [Node(name="home", places=draw(st.integers(1, 3)))]
    for index in range(draw(st.integers(0, 4))):
        joins = draw(moments)
        leaves = joins + draw(st.integers(1, 30))
        told = draw(st.none() | st.floats(0, 10).map(lambda before, leaves=leaves: leaves - before))
        nodes.append(
            Node(
                name=f"spot-{index}",
                places=draw(st.integers(1, 3)),
                joins=joins,
                leaves=leaves,
                notice=float("inf") if told is None else max(joins, told),
                hardware=draw(st.sampled_from(["", "other"])),
            )
        )
    return nodes


deaths = st.lists(st.tuples(st.floats(0, 60), st.integers(0, 4)), max_size=8)


@settings(max_examples=300, deadline=None)
@given(table=tables(), nodes=clouds(), kills=deaths, factor=st.sampled_from([0, 2]))
def test_nothing_is_lost_while_nodes_come_and_go(
    table: Table, nodes: list[Node], kills: list[tuple[float, int]], factor: float
) -> None:
    pool = run(table, nodes, kills=kills, straggler_factor=factor, max_restarts=10_000)
    assert pool.finished is True
    check_story(pool, table.options["max_attempts"])
    assert sorted([*pool.done, *pool.failed]) == list(range(table.units))
    assert max(Counter([*pool.done, *pool.failed]).values(), default=0) <= 1


@settings(max_examples=200, deadline=None)
@given(table=tables(), nodes=clouds(), kills=deaths, restarts=st.integers(0, 3), stop_at=st.none() | st.floats(0, 60))
def test_whatever_ends_a_run_the_next_ones_do_what_is_left(
    table: Table, nodes: list[Node], kills: list[tuple[float, int]], restarts: int, stop_at: float | None
) -> None:
    """A run may be stopped or give up; run again and again as a user would, in the end every unit has ended once."""
    halting = {(unit, 1): "halt" for unit in range(0, table.units, 5)}
    pool = run(
        Table(table.units, {**table.fates, **halting}, table.localities, table.options),
        nodes,
        stop_at=float("inf") if stop_at is None else stop_at,
        kills=kills,
        max_restarts=restarts,
        drain_s=10,
    )
    check_story(pool, table.options["max_attempts"])
    ended = set(pool.done) | set(pool.failed)
    assert (ended == set(range(table.units))) == (pool.finished is True)
    for _ in range(table.units * RUNS + 10):
        if pool.finished:
            break
        pool.log.clear()
        pool.run([unit for unit in work(table.units) if unit.id not in ended])
        check_story(pool, table.options["max_attempts"])
        fresh = [*pool.done, *pool.failed]
        assert len(fresh) == len(set(fresh))
        assert not ended & set(fresh)
        ended |= set(fresh)
    assert ended == set(range(table.units))
