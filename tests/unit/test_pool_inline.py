"""The in-process pool, and the values that every pool is made of."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster import (
    Event,
    Executor,
    InlinePool,
    PoolError,
    PoolHaltedError,
    PoolOptions,
    ReplicaLost,
    ReplicaStarted,
    ReplicaStartError,
    UnitDone,
    UnitFailed,
    UnitRetried,
    UnitStarted,
    WorkUnit,
)
from cluster.pool import Pool
from cluster.work import describe_error
from tests.fake_pool import FakeBackend, counted, work


class FullDiskError(OSError):
    """An error that every unit would meet."""

    halts_pool = True


@dataclass
class FaultyWorker:
    """Raises in the attempts that a table names by unit and attempt, and returns a receipt in all others."""

    faults: dict[tuple[int, int], BaseException]
    attempts: Counter[int] = field(default_factory=Counter)
    hardware: str = "a laptop"

    def run(self, payload: int) -> dict[str, int]:
        self.attempts[payload] += 1
        if fault := self.faults.get((payload, self.attempts[payload])):
            raise fault
        return {"payload": payload}


def run_inline(faults: dict[tuple[int, int], BaseException], count: int, max_attempts: int = 3) -> list[Event]:
    events: list[Event] = []
    pool: Executor = InlinePool(lambda: FaultyWorker(faults), PoolOptions(max_attempts=max_attempts))
    assert pool.run(work(count), events.append) is True
    pool.close()
    return events


class TestInlinePool:
    def test_unit_without_fault_is_started_and_done(self) -> None:
        started, begun, done = run_inline({}, count=1)
        assert started == ReplicaStarted(replica=0, hardware="a laptop")
        assert begun == UnitStarted(unit=0, replica=0, attempt=1)
        assert isinstance(done, UnitDone)
        assert (done.unit, done.replica, done.attempt, done.receipt) == (0, 0, 1, {"payload": 0})
        assert done.seconds >= 0

    def test_raising_unit_is_retried_then_done(self) -> None:
        events = run_inline({(1, 1): ValueError("bad luck")}, count=3)
        assert UnitRetried(unit=1, replica=0, attempt=1, error="ValueError: bad luck") in events
        done = [event for event in events if isinstance(event, UnitDone)]
        assert [(event.unit, event.attempt) for event in done] == [(0, 1), (1, 2), (2, 1)]

    def test_poison_unit_fails_and_the_others_are_done(self) -> None:
        events = run_inline({(1, attempt): KeyError("x") for attempt in (1, 2, 3)}, count=3)
        assert [event for event in events if isinstance(event, UnitFailed)] == [
            UnitFailed(unit=1, attempts=3, error="KeyError: 'x'")
        ]
        assert {event.unit for event in events if isinstance(event, UnitDone)} == {0, 2}

    def test_sys_exit_in_a_unit_is_an_error_of_that_unit(self) -> None:
        events = run_inline({(0, 1): SystemExit(2)}, count=1)
        assert UnitRetried(unit=0, replica=0, attempt=1, error="SystemExit: 2") in events

    def test_interrupt_leaves_the_run_and_drops_the_worker(self) -> None:
        built: list[FaultyWorker] = []

        def factory() -> FaultyWorker:
            built.append(FaultyWorker({(0, 1): KeyboardInterrupt()} if not built else {}))
            return built[-1]

        pool = InlinePool(factory)
        with pytest.raises(KeyboardInterrupt):
            pool.run(work(2), lambda event: None)
        pool.run(work(2), lambda event: None)
        assert len(built) == 2

    def test_worker_is_built_at_the_first_unit_and_kept_between_runs(self) -> None:
        built: list[FaultyWorker] = []

        def factory() -> FaultyWorker:
            built.append(FaultyWorker({}))
            return built[-1]

        pool = InlinePool(factory)
        assert pool.run([], lambda event: None) is True
        assert not built
        pool.run(work(2), lambda event: None)
        pool.run(work(2), lambda event: None)
        assert len(built) == 1
        assert built[0].attempts == {0: 2, 1: 2}

    @pytest.mark.parametrize(
        ("error", "text"), [(OSError("no weights"), "OSError: no weights"), (SystemExit(3), "SystemExit: 3")]
    )
    def test_factory_that_raises_ends_the_run_after_its_attempts(self, error: BaseException, text: str) -> None:
        calls: list[Event] = []

        def factory() -> FaultyWorker:
            raise error

        pool = InlinePool(factory, PoolOptions(max_attempts=2))
        with pytest.raises(ReplicaStartError, match=rf"Replica 0 cannot start \(tried 2 times\): {text}\."):
            pool.run(work(2), calls.append)
        assert calls == [
            ReplicaLost(replica=0, error=text, again_in_s=0.0),
            ReplicaLost(replica=0, error=text, again_in_s=None),
        ]

    def test_factory_that_recovers_starts_the_replica(self) -> None:
        failures = iter([OSError("busy")])
        events: list[Event] = []

        def factory() -> FaultyWorker:
            for failure in failures:
                raise failure
            return FaultyWorker({})

        InlinePool(factory).run(work(1), events.append)
        assert events[:2] == [
            ReplicaLost(replica=0, error="OSError: busy", again_in_s=0.0),
            ReplicaStarted(replica=0, hardware="a laptop"),
        ]

    def test_units_are_pulled_only_a_few_ahead(self) -> None:
        progress = Counter[str]()

        def watch(event: Event) -> None:
            progress["done"] += isinstance(event, UnitDone)
            assert progress["pulled"] - progress["done"] <= 4 + 1

        InlinePool(lambda: FaultyWorker({})).run(counted(work(100), progress), watch)
        assert progress == {"pulled": 100, "done": 100}

    def test_errors_of_the_iterator_reach_the_caller(self) -> None:
        def source() -> Iterator[WorkUnit]:
            yield from work(10)
            raise RuntimeError("plan is broken")

        with pytest.raises(RuntimeError, match="plan is broken"):
            InlinePool(lambda: FaultyWorker({})).run(source(), lambda event: None)

    def test_a_reason_to_stop_is_heard_between_units(self) -> None:
        events: list[Event] = []
        pool = InlinePool(lambda: FaultyWorker({}))

        def stop() -> str | None:
            return "told to" if any(isinstance(event, UnitDone) and event.unit == 3 for event in events) else None

        assert pool.run(work(10), events.append, stop) is False
        assert [event.unit for event in events if isinstance(event, UnitDone)] == [0, 1, 2, 3]
        assert isinstance(events[-1], UnitDone)
        assert pool.run(work(10)[4:], events.append) is True

    def test_a_reason_to_stop_after_the_last_unit_leaves_the_run_whole(self) -> None:
        events: list[Event] = []
        pool = InlinePool(lambda: FaultyWorker({}))
        assert pool.run(work(2), events.append, lambda: "told to" if len(events) == 5 else None) is True

    def test_an_error_that_would_meet_every_unit_ends_the_run_uncharged(self) -> None:
        events: list[Event] = []
        pool = InlinePool(lambda: FaultyWorker({(2, 1): FullDiskError("disk full")}))
        with pytest.raises(PoolHaltedError, match="FullDiskError: disk full"):
            pool.run(work(5), events.append)
        assert [event.unit for event in events if isinstance(event, UnitDone)] == [0, 1]
        assert events[-1] == UnitRetried(unit=2, replica=0, attempt=1, error="not charged: FullDiskError: disk full")


class TestValues:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("replicas", -1),
            ("in_flight", 0),
            ("max_attempts", 0),
            ("max_restarts", -1),
            ("gpus_per_replica", -0.5),
            ("lease_s", -1),
            ("drain_s", float("nan")),
        ],
    )
    def test_option_out_of_range_is_refused_by_name(self, name: str, value: float) -> None:
        with pytest.raises(ValueError, match=rf"PoolOptions\.{name} is too small: {value}\."):
            PoolOptions(**{name: value})  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("first", "losses", "pause"), [(1, 1, 1), (1, 4, 8), (1, 9, 60), (0.5, 3, 2), (0, 5, 0), (1, 10_000, 60)]
    )
    def test_pause_doubles_with_every_loss_up_to_a_minute(self, first: float, losses: int, pause: float) -> None:
        assert PoolOptions(backoff_s=first).backoff(losses) == pause

    def test_pool_of_processes_without_replicas_is_refused(self) -> None:
        with pytest.raises(ValueError, match="A pool needs replicas: 0 were asked for"):
            Pool(FakeBackend(), PoolOptions(replicas=0))

    def test_error_text_is_one_short_line_with_both_ends(self) -> None:
        text = describe_error(ValueError("begin\n  " + "x" * 5000 + "\nend"))
        assert text.startswith("ValueError: begin x")
        assert text.endswith("x end")
        assert len(text) <= 500

    def test_error_without_text_shows_its_type(self) -> None:
        assert describe_error(ValueError()) == "ValueError"

    @pytest.mark.parametrize("error", [ReplicaStartError, PoolHaltedError])
    def test_every_error_of_a_pool_is_a_pool_error(self, error: type[Exception]) -> None:
        assert issubclass(error, PoolError)

    def test_package_does_not_import_ray(self) -> None:
        command = "import sys, cluster; sys.exit('ray' in sys.modules)"
        root = Path(__file__).resolve().parents[2]
        assert subprocess.run([sys.executable, "-c", command], cwd=root, check=False).returncode == 0
