"""A state machine over drivers that plan, lease, write, crash and resume, whose store is compared after every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster import InlinePool
from pipeline.executors import pool_options
from pipeline.layout import Unit
from pipeline.store import Findings, Journal, LeaseLostError, StoreError, verify
from pipeline.sweep import SweepResult, run_sweep
from pipeline.tally import Tally
from tests.crash_driver import WINDOW, Attempt, Driver
from tests.crash_oracle import DONE, FAILED, PENDING, UnitKey, status_key
from tests.crash_world import LOCAL_JOURNAL, Process, World, raw_write

T = TypeVar("T")
STATES = ("pending", "done", "failed")
MACHINES = 2
DRIVERS = 3
UNITS_AHEAD = 12
"""Units that an heir does at most before a replica that outlived its driver goes on."""
ELSEWHERE = MACHINES
which = st.integers(0, 5)
machines = st.integers(0, MACHINES - 1)
thaws = st.sampled_from(["never", "in between", "at the last moment"])
kills = st.one_of(st.none(), st.integers(0, 3))
"""Writes after which the acting process is killed."""
shares = st.sampled_from([0.0, 0.5, 1.0])
faults = st.dictionaries(st.integers(0, 7), st.sampled_from(["raise", "nan"]), max_size=2)


class CrashMachine(RuleBasedStateMachine):
    """Drivers, replicas and verifications of one store, with anything that may happen between two of their writes.

    ``known`` is the state of every unit as it is stored: each rule says which of them it may change, and to what.
    """

    bucket = False
    seen: ClassVar[Counter[str]] = Counter()
    """What has happened in all examples, so that a test can tell that it did."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(bucket=self.bucket)
        self.oracle = self.world.oracle
        self.drivers: list[Driver] = []
        self.late: list[Attempt] = []
        self.known = self.oracle.states()
        self.sound = True

    # Drivers

    @initialize(units=st.integers(0, 8))
    def begin(self, units: int) -> None:
        """Start where a first driver is at work."""
        self.start_driver(0, "never", None, 0.0)
        for _ in range(units):
            self._receive(self.drivers[0], self._whole(self.drivers[0]))

    @precondition(lambda self: any(len(d.attempts) < WINDOW for d in self._awake()))
    @rule(pick=which, units=st.integers(1, 3), spoiled=st.booleans(), flushed=st.booleans())
    def work(self, pick: int, units: int, spoiled: bool, flushed: bool) -> None:
        """Do some units at once."""
        driver = _one([d for d in self._awake() if len(d.attempts) < WINDOW], pick)
        for _ in range(units):
            self._receive(driver, self._whole(driver, spoiled=spoiled and driver is self._holder()))
        if flushed and driver in self.drivers:
            self._act(driver, lambda: driver.ledger.flush(force=True), None, 0.0, forced=True)

    @precondition(lambda self: self._holder() is not None and len(self.drivers) < DRIVERS)
    @rule(late=st.booleans())
    def depose(self, late: bool) -> None:
        """Let the holder fall silent for so long that a driver elsewhere takes over, and then wake up."""
        holder = self._holder()
        assert holder is not None
        done = self._whole(holder)
        if holder in self.drivers:
            holder.process.state = "frozen"
            self.start_driver(1 - holder.process.machine, "never", None, 0.0)
            holder.process.state = "alive"
            if late:
                self._receive(holder, done)

    def _whole(self, driver: Driver, *, spoiled: bool = False) -> Attempt | None:
        """Let a driver hand out a unit, and its replica write it; None if there is none, or the driver ended."""
        before = list(driver.attempts)
        if len(before) < WINDOW:
            self._act(driver, lambda: driver.take(spoiled=spoiled), None, 0.0)
        new = [attempt for attempt in driver.attempts if attempt not in before and driver in self.drivers]
        for attempt in new:
            attempt.write()
        return new[0] if new else None

    def _receive(self, driver: Driver, attempt: Attempt | None) -> None:
        if attempt is not None:
            self._act(driver, lambda: driver.receive(attempt), None, 0.0)

    @precondition(lambda self: len(self.drivers) < DRIVERS)
    @rule(machine=machines, thaw=thaws, kill=kills, share=shares)
    def start(self, machine: int, thaw: str, kill: int | None, share: float) -> None:
        self.start_driver(machine, thaw, kill, share)

    def start_driver(self, machine: int, thaw: str, kill: int | None, share: float) -> None:
        """Start a driver, which may be refused."""
        process = self.world.start(machine)
        driver = self._with_lease(process, thaw, kill, share, lambda: Driver(self.world, process))
        if driver is not None:
            self.drivers.append(driver)
        self._settle({})

    @precondition(lambda self: any(len(d.attempts) < WINDOW for d in self._awake()))
    @rule(pick=which, values=st.sampled_from(["right", "spoiled", "twice"]), kill=kills, share=shares)
    def hand_out(self, pick: int, values: str, kill: int | None, share: float) -> None:
        driver = _one([d for d in self._awake() if len(d.attempts) < WINDOW], pick)
        taken = self._act(driver, lambda: driver.take(spoiled=values == "spoiled"), kill, share)
        if taken and values == "twice" and driver.attempts:
            driver.copy(driver.attempts[-1])
        if taken is False:
            self._act(driver, driver.stop, kill, share, forced=True)
            self._drop(driver)

    @precondition(lambda self: self._writing())
    @rule(pick=which, arrays=st.one_of(st.none(), st.integers(1, 3)))
    def write(self, pick: int, arrays: int | None) -> None:
        _one(self._writing(), pick).write(arrays)
        self._settle({})

    @precondition(lambda self: any(not a.writes for _, a in self._running()))
    @rule(pick=which, kill=kills, share=shares)
    def receive(self, pick: int, kill: int | None, share: float) -> None:
        driver, attempt = _one([(d, a) for d, a in self._running() if not a.writes], pick)
        self.late += self._act(driver, lambda: driver.receive(attempt), kill, share) or []

    @precondition(lambda self: any(True for _ in self._running()))
    @rule(pick=which, kill=kills, share=shares, died=st.booleans())
    def fail(self, pick: int, kill: int | None, share: float, died: bool) -> None:
        driver, attempt = _one(self._running(), pick)
        if died and attempt.writes:
            group, name = attempt.writes[0][:2]
            self.world.leave_partial(f"{group}/{name}/c/0/0")
        act = (lambda: driver.lose(attempt)) if died else (lambda: driver.fail(attempt, "ValueError: x"))
        self._act(driver, act, kill, share)

    @precondition(lambda self: self._awake())
    @rule(pick=which, kill=kills, share=shares)
    def flush(self, pick: int, kill: int | None, share: float) -> None:
        driver = _one(self._awake(), pick)
        self._act(driver, lambda: driver.ledger.flush(force=True), kill, share, forced=True)

    @precondition(lambda self: self._awake())
    @rule(pick=which, kill=kills, share=shares)
    def stop(self, pick: int, kill: int | None, share: float) -> None:
        driver = _one(self._awake(), pick)
        self._act(driver, driver.stop, kill, share, forced=True)
        self._drop(driver)

    @precondition(lambda self: self.drivers)
    @rule(pick=which)
    def kill(self, pick: int) -> None:
        self._drop(_one(self.drivers, pick))

    @precondition(lambda self: self._awake())
    @rule(pick=which)
    def freeze(self, pick: int) -> None:
        _one(self._awake(), pick).process.state = "frozen"

    @precondition(lambda self: len(self._awake()) < len(self.drivers))
    @rule(pick=which)
    def thaw(self, pick: int) -> None:
        _one([d for d in self.drivers if d.process.state == "frozen"], pick).process.state = "alive"

    @rule(seconds=st.sampled_from([3, 60]))
    def wait(self, seconds: int) -> None:
        for _ in range(0, seconds, 3):
            self.world.now += 3
            self.world.beat_all()
        self._settle({})

    # Replicas without a driver

    @precondition(lambda self: self.late)
    @rule(pick=which, arrays=st.one_of(st.none(), st.integers(0, 3)))
    def write_late(self, pick: int, arrays: int | None) -> None:
        self._write_late(pick, arrays)

    @precondition(lambda self: self._holder() is not None)
    @rule(pick=which, arrays=st.one_of(st.none(), st.integers(1, 3)))
    def outlive(self, pick: int, arrays: int | None) -> None:
        """Let a replica outlive its driver, and write when another driver has had the unit done."""
        holder = self._holder()
        assert holder is not None
        if len(holder.attempts) < WINDOW:
            self._act(holder, lambda: holder.take(spoiled=False), None, 0.0)
        mine = [attempt for attempt in holder.attempts if not attempt.spoiled]
        if holder not in self.drivers or not mine:
            return
        self._drop(holder)
        self.start_driver(holder.process.machine, "never", None, 0.0)
        for _ in range(UNITS_AHEAD):
            heir = self._holder()
            if heir is not None and any(self.known[attempt.key] != DONE for attempt in mine):
                self._receive(heir, self._whole(heir))
        if self.late:
            self._write_late(pick, arrays)

    def _write_late(self, pick: int, arrays: int | None) -> None:
        # Rare by chance alone: a unit that another driver has done meanwhile.
        done = [attempt for attempt in self.late if self.known[attempt.key] == DONE]
        attempt = _one(done or self.late, pick)
        self.seen["a late replica writes a unit that is done"] += self.known[attempt.key] == DONE
        attempt.write(arrays)
        if not attempt.writes or arrays == 0:
            self.late.remove(attempt)
        self._settle({})

    # Damage and verification

    @precondition(lambda self: self._begun())
    @rule(
        pick=st.integers(0, 999), way=st.sampled_from(["flip", "truncate", "delete", "swap"]), place=st.integers(0, 99)
    )
    def damage(self, pick: int, way: str, place: int) -> None:
        """Damage a chunk, and often verify at once."""
        keys = [key for key in self._damageable() if way != "swap" or self.oracle.others(key)]
        if not keys:
            return
        key = _one(keys, pick)
        content, others = self.world.location.read(key) or b"", self.oracle.others(key)
        at = place * len(content) // 100
        flipped = content[:at] + bytes([content[at] ^ (1 << pick % 8)]) + content[at + 1 :]
        changed = {"flip": flipped, "truncate": content[:at], "delete": None, "swap": _one([*others, b""], 0)}
        raw_write(self.world.location, key, changed[way])
        self.oracle.damaged.add(key)
        self.seen[f"damage: {way}"] += 1
        self.known = self.oracle.states()
        if pick % 2 and not self.world.refuses(ELSEWHERE):
            self._verify(ELSEWHERE, "never", None, 0.0)

    @precondition(lambda self: not self.bucket and self._begun())
    @precondition(lambda self: self.world.holder is None or self.world.holder.state == "dead")
    @rule(percent=st.integers(0, 90))
    def tear(self, percent: int) -> None:
        content = self.world.location.read(LOCAL_JOURNAL) or b""
        unit = self.oracle.last_line()
        if unit is not None and content.endswith(b"\n"):
            start = content[:-1].rfind(b"\n") + 1
            raw_write(self.world.location, LOCAL_JOURNAL, content[: start + percent * (len(content) - start) // 100])
            self.oracle.receiptless.add(unit)
            self.seen["the last line is torn"] += 1
            self._settle({unit: {PENDING, DONE, FAILED}})

    @precondition(lambda self: self._begun())
    @rule(machine=machines, thaw=thaws, kill=kills, share=shares)
    def verify(self, machine: int, thaw: str, kill: int | None, share: float) -> None:
        self._verify(machine, thaw, kill, share)

    def _verify(self, machine: int, thaw: str, kill: int | None, share: float) -> None:
        told = self.oracle.told()
        must = {u for u, (state, _) in told.items() if state == DONE and self.oracle.differing(u)}
        must |= {u for u in told if told[u] == (FAILED, False) and self.oracle.differing(u, spoiled=True)}
        may = must | {u for u in told if told[u] == (FAILED, True) and self.oracle.unreadable(u)}
        broken = self.oracle.broken([status_key(group) for group in self.oracle.groups])
        whole = self.oracle.selection_is("right") or self.oracle.selection_is("open")
        process = self.world.start(machine)
        found = self._with_lease(process, thaw, kill, share, lambda: verify(self.world.location))
        self._settle({unit: {PENDING} for unit in may})
        if found is not None:
            self._check_findings(found, must, may, broken, whole)

    def _check_findings(
        self, found: Findings, must: set[UnitKey], may: set[UnitKey], broken: list[str], whole: bool
    ) -> None:
        bad = {(unit.group, unit.index) for unit in found.bad}
        assert must <= bad, f"damage that was not found: {must - bad}"
        assert bad <= may, f"false alarms: {bad - may}"
        assert (found.unchecked, found.template, found.effects) == ([], [], [])
        rebuilt = {status_key(path.partition("/")[0]) for path in found.rebuilt if path.endswith("/status")}
        assert rebuilt == set(broken)
        if self.oracle.selection_is("right"):
            assert whole or found.rebuilt
        self.oracle.trust_done()
        self.seen["units found bad"] += len(bad)
        self.seen["status or selection rebuilt"] += len(found.rebuilt)

    # Whole sweeps

    @rule(machine=machines, thaw=thaws, kill=st.one_of(st.none(), st.integers(0, 40)), share=shares, faulty=faults)
    def sweep(self, machine: int, thaw: str, kill: int | None, share: float, faulty: dict[int, str]) -> None:
        process, before = self.world.start(machine), self.known
        result = self._with_lease(process, thaw, kill, share, lambda: self._sweep(faulty))
        self._settle({unit: {DONE, FAILED} for unit, state in before.items() if state != DONE})
        if result is not None:
            counts = [list(self.known.values()).count(state) for state in (DONE, FAILED, PENDING)]
            assert [result.done, result.failed, result.pending] == counts, "a sweep that counts otherwise"
            if not faulty and not self.oracle.damaged:
                assert result.done == len(self.known), f"a sweep that is not done: {result}"

    def _sweep(self, faulty: Mapping[int, str]) -> SweepResult:
        replica = FaultyReplica(self.world, faulty)
        return run_sweep(
            self.world.plan,
            self.world.location,
            make_executor=lambda plan, place: InlinePool(lambda: replica, pool_options(plan)),
        )

    # What must hold

    @invariant()
    def nothing_is_wrong(self) -> None:
        self.sound = False
        assert not self.world.violations, self.world.violations
        wrong = {name: what for name, what in self.oracle.wrong().items() if what}
        assert not wrong, wrong
        for driver in self.drivers:
            if driver.process is self.world.holder:
                assert driver.told() == {**self.known, **driver.memory}, "a driver that knows otherwise"
        self.sound = True

    def teardown(self) -> None:
        """Resume undisturbed, and compare with the undisturbed sweep."""
        try:
            if self.sound:
                self._finish()
        finally:
            self.world.close()

    def _finish(self) -> None:
        for driver in list(self.drivers):
            self._drop(driver)
        for attempt in self.late:
            attempt.write()
        if self.oracle.damaged:
            self._undisturbed(lambda: verify(self.world.location))
        result = self._undisturbed(lambda: self._sweep({}))
        units = self.oracle.reference.right
        assert (result.done, result.failed, result.pending) == (len(units), 0, 0), f"a sweep that is not done: {result}"
        assert result.failed_cells == 0, "failed cells that were made good"
        found = self._undisturbed(lambda: verify(self.world.location))
        assert found.good, f"false alarms: {found}"
        assert found.checked == len(units), "units that were not verified"
        assert set(self.oracle.status().values()) == {DONE}, "status without some unit"
        assert not [key for unit in units for key in self.oracle.differing(unit)], (
            "values of an undisturbed sweep differ"
        )
        assert self.oracle.selection_is("right"), "other cells than in an undisturbed sweep"
        assert not self.world.partial_files(), "partial files that are left"
        self._check_tally()

    def _check_tally(self) -> None:
        """The journal, added up, has every unit once, and no failure that was made good."""
        tally = Tally({group: self.world.plan.layout.group_units(group) for group in self.oracle.groups})
        for entry in Journal(self.world.location).entries():
            tally.add(entry)
        told = {(name, i): s for name, group in tally.groups.items() for i, s in enumerate(group.status)}
        assert {unit for unit, state in told.items() if state != DONE} <= self.oracle.receiptless, (
            "a tally without some unit"
        )
        assert sum(cause.units for cause in tally.failures()) <= len(self.oracle.receiptless), "failures told of"

    def _undisturbed(self, act: Callable[[], T]) -> T:
        with self.world.acting(self.world.start(ELSEWHERE)):
            try:
                return act()
            except StoreError as error:
                raise AssertionError("a sweep cannot be resumed") from error

    # How rules act

    def _act(
        self, driver: Driver, act: Callable[[], T], kill: int | None, share: float, *, forced: bool = False
    ) -> T | None:
        """Let a driver do something, and check what changed in the store; None if it ended instead.

        Parameters
        ----------
        forced : what it was told of must be safe afterwards.
        """
        self.sound = False
        mine, result = driver.process is self.world.holder, None
        with self.world.killing(driver.process, kill, share):
            try:
                result = act()
            except LeaseLostError:
                assert not mine, "the holder of the store is told that it lost it"
                self.seen["a deposed driver is told so"] += 1
                driver.leave()
                driver.process.state = "dead"
            except StoreError:
                assert self.oracle.damaged, "a store that is whole is refused"
                self.seen["a driver ends at damage"] += 1
                driver.leave()
                driver.process.state = "dead"
        self._settle({unit: {state} for unit, state in driver.memory.items()} if mine else {})
        if mine and driver.process.state == "alive" and (forced or not self.bucket):
            assert {unit: self.known[unit] for unit in driver.memory} == driver.memory, "what was told is not safe"
        driver.memory = {unit: state for unit, state in driver.memory.items() if self.known[unit] != state}
        if driver.process.state == "dead":
            self.seen["a driver ends in the middle"] += 1
            self._drop(driver)
            return None
        return result

    def _with_lease(
        self, process: Process, thaw: str, kill: int | None, share: float, act: Callable[[], T]
    ) -> T | None:
        """Let a new process do what needs the lease; None if it is refused, killed or meets damage."""
        self.sound, result = False, None
        self.world.thaws = thaw
        refused, taken = self.world.refuses(process.machine), self.world.holder is not None
        with self.world.killing(process, kill, share):
            try:
                result = act()
            except StoreError as error:
                if ("is being driven by" in str(error)) != refused or not (refused or self.oracle.damaged):
                    raise AssertionError(f"ended without a reason: {error}") from error
                process.state = "dead"
                self.seen["a process is refused" if refused else "a process ends at damage"] += 1
        self.world.thaws = "never"
        assert not refused or process.state == "dead", "two processes drive the store"
        self.seen["the lease is taken over"] += taken and self.world.holder is process
        self.seen["a process is killed"] += process.state == "dead" and not refused
        if process.state == "dead":
            return None
        return result

    def _settle(self, allowed: Mapping[UnitKey, Collection[int]]) -> None:
        """Check that no unit changed its state, but for those that may."""
        now = self.oracle.states()
        for unit, state in now.items():
            if state != self.known[unit]:
                self.seen[f"{STATES[self.known[unit]]} to {STATES[state]}"] += 1
        changed = {unit: (self.known[unit], state) for unit, state in now.items() if state != self.known[unit]}
        lost = {unit: change for unit, change in changed.items() if change[1] not in allowed.get(unit, ())}
        assert not lost, f"units that changed, from and to: {lost}"
        self.known = now

    def _drop(self, driver: Driver) -> None:
        """Forget a driver that has ended; its replicas may go on."""
        if driver not in self.drivers:
            return
        driver.process.state = "dead"
        self.drivers.remove(driver)
        self.late += [attempt for attempt in driver.attempts if not attempt.spoiled]

    def _damageable(self) -> list[str]:
        """Return the keys that were written since the store was created, and those of status.

        Where the line of a unit was torn off, status alone tells of it: without both it is computed again, which a
        driver that has read it before cannot know.
        """
        keys = [key for unit in self.oracle.reference.right.values() for key in unit]
        # What is chosen and counted hangs on these, and there are few of them.
        keys += 3 * (self.oracle.service_keys + [key for key in keys if "/estimate/" in key])
        last = {status_key(group) for group, _ in self.oracle.receiptless} if self.drivers else set()
        return [key for key in keys if key not in last and self.world.location.read(key)]

    def _begun(self) -> bool:
        """Whether some unit is not pending, so that there is something to damage and to verify."""
        return any(self.known.values())

    def _holder(self) -> Driver | None:
        """Return the driver that is awake and holds the store."""
        return next((driver for driver in self._awake() if driver.process is self.world.holder), None)

    def _awake(self) -> list[Driver]:
        return [driver for driver in self.drivers if driver.process.state == "alive"]

    def _running(self) -> list[tuple[Driver, Attempt]]:
        return [(driver, attempt) for driver in self._awake() for attempt in driver.attempts]

    def _writing(self) -> list[Attempt]:
        """Return the attempts that write, also while their driver sleeps.

        Of a deposed driver they come late, and what is late must be what was written before.
        """
        found = [(d, a) for d in self.drivers for a in d.attempts if a.writes]
        return [a for d, a in found if not a.spoiled or d.process is self.world.holder]


class BucketMachine(CrashMachine):
    """The same over a bucket, which cannot append to a journal."""

    bucket = True


class FaultyReplica:
    """The replica of a whole sweep, which fails at some units.

    Parameters
    ----------
    faulty : units that raise, or have a cell without a value.
    """

    def __init__(self, world: World, faulty: Mapping[int, str]) -> None:
        self.world, self.faulty = world, faulty

    def run(self, unit: Unit) -> Any:
        """Write a unit and return its receipt."""
        fault = self.faulty.get(unit.id)
        if fault == "raise":
            raise RuntimeError("planted")
        writes, receipt = self.world.replica.prepare(unit, spoiled=fault == "nan")
        for *_, write in writes:
            write()
        return replace(receipt, seconds=1.0)


def _one(items: list[T], pick: int) -> T:
    return items[pick % len(items)]
