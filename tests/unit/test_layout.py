"""Units by number: every unit once, in running order, whatever the shape of the sweep."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.layout import BASELINE, Layout, Unit, Windows


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    groups = draw(
        st.lists(
            st.builds(
                lambda extent, width, verifies: (extent, min(width, extent), verifies),
                st.integers(1, 12),
                st.integers(1, 12),
                st.booleans(),
            ),
            max_size=4,
        )
    )
    named = tuple(
        Windows(group=f"g{i}", extent=extent, width=width, verifies=verifies)
        for i, (extent, width, verifies) in enumerate(groups)
    )
    return Layout(draw(st.integers(0, 5)), named)


def by_loops(layout: Layout) -> list[Unit]:
    """The same units written out: samples around groups, those that verify last."""
    units: list[Unit] = []
    for verifying in (False, True):
        for sample in range(layout.samples):
            if not verifying:
                units.append(Unit(id=len(units), group=BASELINE, index=sample, sample=sample))
            for group in layout.groups:
                if group.verifies != verifying:
                    continue
                starts = range(0, group.extent, group.width)
                for window, start in enumerate(starts):
                    stop = min(start + group.width, group.extent)
                    index = sample * len(starts) + window
                    units.append(
                        Unit(id=len(units), group=group.group, index=index, sample=sample, start=start, stop=stop)
                    )
    return units


@given(layouts())
def test_units_are_those_of_the_loops(layout):
    expected = by_loops(layout)
    assert list(layout) == expected
    assert len(layout) == len(expected)


@given(layouts())
def test_indices_of_a_group_are_its_status_positions(layout):
    units = list(layout)
    for group in (BASELINE, *(g.group for g in layout.groups)):
        indices = sorted(unit.index for unit in units if unit.group == group)
        assert indices == list(range(layout.group_units(group)))


@given(layouts())
def test_what_verifies_comes_after_everything_else(layout):
    verifies = {g.group for g in layout.groups if g.verifies}
    assert [layout.unit(n).group in verifies for n in layout.screening] == [False] * len(layout.screening)
    assert [layout.unit(n).group in verifies for n in layout.verifying] == [True] * len(layout.verifying)
    assert [*layout.screening, *layout.verifying] == list(range(len(layout)))


@pytest.mark.parametrize("number", [-1, 6], ids=["before the first", "after the last"])
def test_a_unit_that_does_not_exist_is_named(number):
    layout = Layout(2, (Windows(group="map", extent=4, width=2),))
    with pytest.raises(IndexError, match=rf"unit {number} does not exist; there are units 0 to 5"):
        layout.unit(number)


def test_a_huge_sweep_is_a_small_value():
    layout = Layout(10**9, (Windows(group="map", extent=1000, width=1),))
    assert len(layout) == 1001 * 10**9
    assert layout.unit(len(layout) - 1).sample == 10**9 - 1
    assert sys.getsizeof(layout) < 1000
