"""The backlog against a list that looks at everything: the same unit in the same order, whatever is asked."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.backlog import Backlog, Waiting
from cluster.work import WorkUnit

LOCALITIES = st.sampled_from("abcd")


def waiting(arrival: int, locality: str, *, alone: bool = False, avoid: int | None = None) -> Waiting:
    return Waiting(WorkUnit(arrival, locality, None), arrival, alone, avoid)


class NaiveBacklog:
    """Does what the docstrings say, by sorting all units at every question."""

    def __init__(self) -> None:
        self.units: list[Waiting] = []

    def pop(self, own: Any, taken: set[str], accept: Any) -> Waiting | None:
        def preference(each: Waiting) -> tuple[int, int, int]:
            locality = each.unit.locality
            group = 0 if locality == own else 1 if locality not in taken else 2
            oldest = min(other.arrival for other in self.units if other.unit.locality == locality)
            return group, oldest, each.arrival

        for each in sorted(self.units, key=preference):
            if accept(each):
                self.units.remove(each)
                return each
        return None


class Comparison(RuleBasedStateMachine):
    """Units come in any order and go by any question; both backlogs must agree."""

    def __init__(self) -> None:
        super().__init__()
        self.backlog, self.naive = Backlog(), NaiveBacklog()
        self.fresh = 0
        self.out: list[Waiting] = []

    @rule(locality=LOCALITIES, alone=st.booleans(), avoid=st.none() | st.integers(0, 2))
    def arrive(self, locality: str, alone: bool, avoid: int | None) -> None:
        self.put(waiting(self.fresh, locality, alone=alone, avoid=avoid))
        self.fresh += 1

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        """A unit that was handed out returns to its old place, in front of those that came after it."""
        self.put(self.out.pop(data.draw(st.integers(0, len(self.out) - 1))))

    @rule(own=st.none() | LOCALITIES, taken=st.sets(LOCALITIES), replica=st.integers(0, 2), busy=st.booleans())
    def ask(self, own: str | None, taken: set[str], replica: int, busy: bool) -> None:
        def accept(each: Waiting) -> bool:
            return not (each.alone and busy) and each.avoid != replica

        got, expected = self.backlog.pop(own, taken, accept), self.naive.pop(own, taken, accept)
        assert got is expected
        if got is not None:
            self.out.append(got)

    @invariant()
    def sizes_agree(self) -> None:
        assert len(self.backlog) == len(self.naive.units)

    def put(self, each: Waiting) -> None:
        self.backlog.add(each)
        self.naive.units.append(each)


TestComparison = Comparison.TestCase
TestComparison.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


@given(arrivals=st.permutations(list(range(12))), localities=st.lists(LOCALITIES, min_size=12, max_size=12))
def test_everything_comes_out_once(arrivals: list[int], localities: list[str]) -> None:
    backlog = Backlog()
    for arrival in arrivals:
        backlog.add(waiting(arrival, localities[arrival]))
    out = []
    while (each := backlog.pop(None, (), lambda _: True)) is not None:
        out.append(each.arrival)
    assert sorted(out) == list(range(12))
    assert len(backlog) == 0


@pytest.mark.parametrize(
    ("own", "taken", "expected"),
    [
        pytest.param("b", {"b"}, 1, id="own locality first, even if others serve it"),
        pytest.param(None, {"a"}, 1, id="then the oldest of a locality that nobody serves"),
        pytest.param("z", {"a", "b", "c"}, 0, id="then the oldest of all"),
        pytest.param("c", set(), 2, id="own locality before older ones"),
    ],
)
def test_units_are_preferred_by_locality_then_by_age(own: str | None, taken: set[str], expected: int) -> None:
    backlog = Backlog()
    for arrival, locality in enumerate("abcabc"):
        backlog.add(waiting(arrival, locality))
    each = backlog.pop(own, taken, lambda _: True)
    assert each is not None
    assert each.arrival == expected


def test_a_unit_that_nobody_may_have_now_stays() -> None:
    backlog = Backlog()
    backlog.add(waiting(0, "a"))
    assert backlog.pop("a", (), lambda _: False) is None
    assert len(backlog) == 1


def test_the_oldest_of_many_localities_is_found_without_looking_at_all_units() -> None:
    """Each question looks at one unit, however many wait."""
    backlog, looked = Backlog(), 0

    def accept(each: Waiting) -> bool:
        nonlocal looked
        looked += 1
        return True

    for arrival in range(2000):
        backlog.add(waiting(arrival, str(arrival % 500)))
    out = [backlog.pop("none", (), accept) for _ in range(2000)]
    assert looked == 2000
    assert [each.arrival for each in out if each is not None] == list(range(2000))
