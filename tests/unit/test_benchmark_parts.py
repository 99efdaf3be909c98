"""The parts of the benchmarks on Ray that need no Ray: what they measure between, and how nodes are started."""

from __future__ import annotations

import random
import threading

import pytest

from benchmarks import many_nodes, wide_pool
from benchmarks.many_nodes import START_ATTEMPTS, Nodes, Story
from benchmarks.wide_pool import CASES, Meter, units_of
from cluster import UnitDone, UnitRetried


def done(unit: int, receipt: object = "a") -> UnitDone:
    return UnitDone(unit=unit, replica=0, attempt=1, seconds=1.0, receipt=receipt)


class TestMeter:
    def test_counts_only_between_the_two_units(self, monkeypatch):
        now = {"wall": 0.0, "busy": 0.0}
        monkeypatch.setattr(wide_pool.time, "perf_counter", lambda: now["wall"])
        monkeypatch.setattr(wide_pool.time, "process_time", lambda: now["busy"])
        meter = Meter(settle=3, stop=7)
        for unit in range(1, 11):
            # The first units cost much, the last ones as well; from 3 to 7, one takes 2 s and 0.5 s of a core.
            steady = 3 < unit <= 7
            now["wall"] += 2.0 if steady else 100.0
            now["busy"] += 0.5 if steady else 90.0
            meter.hear(UnitRetried(unit=unit, replica=0, attempt=1, error="none"))
            meter.hear(done(unit))
        assert meter.done == 10
        assert meter.figures() == {"units_a_second": 0.5, "driver_cores": 0.25, "driver_ms_a_unit": 500.0}

    @pytest.mark.parametrize("case", CASES)
    def test_every_case_has_units_between_its_first_and_its_last_ones(self, case):
        seconds, rounds = CASES[case]
        assert seconds > 0
        assert rounds > 2 + 1

    def test_units_have_the_length_that_is_drawn_and_a_hundred_share_a_sample(self):
        chance = random.Random(3)
        units = list(units_of(250, lambda: chance.uniform(1, 2)))
        assert [unit.id for unit in units] == list(range(250))
        assert {unit.locality for unit in units} == {0, 1, 2}
        assert all(1 <= unit.payload <= 2 for unit in units)
        assert len({unit.payload for unit in units}) > 200


class TestStory:
    """Two nodes, a and b, of which b comes late."""

    @pytest.fixture
    def told(self, monkeypatch) -> list[str]:
        monkeypatch.setattr(many_nodes.processes, "started", list)
        return []

    def play(self, story: Story, late: int) -> None:
        """Do the units as they are given out, the first ones all on one node."""
        for number, unit in enumerate(story.supply()):
            assert (unit.id, unit.payload) == (number, 2.0)
            story.hear(done(unit.id, receipt="b" if number >= late and number % 2 else "a"))

    @pytest.mark.parametrize("late", [0, 5, 50], ids=["at once", "late", "later than all units would take"])
    def test_all_units_are_measured_once_all_nodes_work(self, told, late):
        story = Story(nodes=2, units=6, unit_s=2.0, half=lambda: told.append(f"half at {len(story.done)}"))
        self.play(story, late)
        before = len(story.done) - 6
        assert before >= late
        assert told == [f"half at {before + 3}"]
        assert story.given == len(story.done) == sum(story.used.values())
        assert set(story.used) == {"a", "b"}
        assert story.seconds_to_start > 0
        assert story.busy["units_a_second"] > 0
        story.require_all_nodes()

    def test_a_node_that_never_works_is_an_error_and_the_units_end(self, told, monkeypatch):
        now = iter(range(1000))
        monkeypatch.setattr(many_nodes, "_now", lambda: float(next(now)))
        story = Story(nodes=2, units=6, unit_s=2.0, half=lambda: told.append("half"), patience_s=30.0, _began=0.0)
        self.play(story, late=10_000)
        assert told == []
        assert len(story.done) == 30
        with pytest.raises(RuntimeError, match=r"only 1 of 2 nodes did a unit within 30 s\. Try again"):
            story.require_all_nodes()

    def test_a_unit_that_does_not_come_back_is_missed(self, told):
        story = Story(nodes=1, units=4, unit_s=2.0, half=lambda: told.append("half"))
        for unit in story.supply():
            if unit.id != 3:
                story.hear(done(unit.id))
        assert story.given - len(story.done) == 1

    def test_a_unit_that_is_told_twice_counts_once(self, told):
        story = Story(nodes=1, units=4, unit_s=2.0, half=lambda: told.append("half"))
        for unit in (0, 1, 1, 2):
            story.hear(done(unit))
        assert len(story.done) == 3


class FakeCluster:
    """Nodes that fail to start as often as a table says."""

    def __init__(self, failures: dict[str, int]) -> None:
        self.failures = dict(failures)
        self.names: list[str] = []
        self.waited = 0
        self._lock = threading.Lock()

    def add_node(self, *, raylet_socket_name: str, plasma_store_socket_name: str, **options: object) -> str:
        name = raylet_socket_name.rpartition("raylet")[2]
        assert plasma_store_socket_name.endswith(f"plasma{name}")
        assert (options["num_gpus"], options["num_cpus"], options["wait"]) == (1, 1, False)
        number = name.partition(".")[0]
        with self._lock:
            self.names.append(name)
            if self.failures.get(number, 0):
                self.failures[number] -= 1
                raise RuntimeError("the raylet has ended")
        return number

    def wait_for_nodes(self, timeout: float) -> None:
        self.waited += 1


class TestNodes:
    def nodes(self, tmp_path, failures) -> Nodes:
        nodes = Nodes.__new__(Nodes)
        nodes.cluster, nodes.nodes, nodes._folder = FakeCluster(failures), [], tmp_path
        return nodes

    def test_grow_adds_what_is_missing_in_order_and_waits_each_time(self, tmp_path):
        nodes = self.nodes(tmp_path, {})
        nodes.grow(3)
        nodes.grow(8)
        assert nodes.nodes == [str(n) for n in range(8)]
        assert nodes.cluster.waited == 2
        assert len(set(nodes.cluster.names)) == 8

    def test_a_node_that_does_not_start_is_tried_again_under_another_name(self, tmp_path):
        nodes = self.nodes(tmp_path, {"2": START_ATTEMPTS - 1})
        nodes.grow(4)
        assert nodes.nodes == ["0", "1", "2", "3"]
        names = [name for name in nodes.cluster.names if name.startswith("2.")]
        assert len(names) == len(set(names)) == START_ATTEMPTS

    def test_one_that_never_starts_ends_the_benchmark(self, tmp_path):
        nodes = self.nodes(tmp_path, {"1": START_ATTEMPTS})
        with pytest.raises(RuntimeError, match="the raylet has ended"):
            nodes.grow(2)
