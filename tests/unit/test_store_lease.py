"""The lease: one driver at a time, taken over from the dead, never from the living, wherever the store lies."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.store import Lease, LeaseLostError, Location, StoreError, locate, request_stop, stop_requested
from pipeline.store.lease import Claim, Holder, key_of, newest_claim, newest_generation

ROOT = Path(__file__).parents[2]
HERE = Holder(host="here", process=1, started="10", boot="boot-a", namespace="pid:[1]")
NEIGHBOUR = replace(HERE, process=2, started="20")
AWAY = Holder(host="away", process=7, started="5", boot="boot-b", namespace="pid:[1]")


class Clock:
    """A clock that only sleeping moves; what others do meanwhile is done by ``during``, told the time."""

    def __init__(self, during: Callable[[float], None] = lambda now: None) -> None:
        self.now, self.during = 1000.0, during

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.during(self.now)


def lease_of(
    place: Location | Path, holder: Holder, clock: Clock | None = None, *, alive: tuple[Holder, ...] = (), **more: Any
) -> Lease:
    clock = clock or Clock()
    return Lease(
        place, holder=holder, clock=clock, sleep=clock.sleep, lives=lambda who: who in alive, beats=False, **more
    )


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "folder":
        return locate(tmp_path / "run.zarr")
    return locate(f"{request.getfixturevalue('bucket')}/run.zarr")


class TestAcquire:
    def test_first_takes_it_and_the_next_after_its_release(self, place):
        first, second = lease_of(place, HERE), lease_of(place, AWAY)
        first.acquire()
        assert first.generation == 1
        first.release()
        second.acquire()
        assert second.generation == 2

    def test_living_process_of_this_machine_is_refused_at_once(self, place):
        clock = Clock(during=lambda now: pytest.fail("waited"))
        lease_of(place, NEIGHBOUR).acquire()
        with pytest.raises(
            StoreError, match=r"^store .*run\.zarr is being driven by process 2 on here\. Wait for it or stop it\.$"
        ):
            lease_of(place, HERE, clock, alive=(NEIGHBOUR,)).acquire()

    def test_dead_process_of_this_machine_is_followed_at_once(self, place):
        said: list[str] = []
        lease_of(place, NEIGHBOUR).acquire()
        lease = lease_of(place, HERE, Clock(during=lambda now: pytest.fail("waited")), say=said.append)
        lease.acquire()
        assert lease.generation == 2
        assert said == [f"store {place} was driven by process 2 on here, which has ended. Taking over."]

    def test_silent_process_elsewhere_is_waited_for_and_followed(self, place):
        said: list[str] = []
        lease_of(place, AWAY).acquire()
        clock = Clock()
        lease = lease_of(place, HERE, clock, alive=(AWAY,), say=said.append)
        lease.acquire()
        assert lease.generation == 2
        assert 30 < clock.now - 1000 < 35
        waiting, taking = said
        assert waiting.startswith(f"store {place} was driven by process 7 on away, last heard of at 20")
        assert waiting.endswith("; waiting up to 30 s to see whether it lives.")
        assert taking == f"store {place}: nothing heard of process 7 on away for 30 s. Taking over."

    def test_process_elsewhere_that_beats_is_refused_as_soon_as_it_does(self, place):
        other = lease_of(place, AWAY)
        other.acquire()
        clock = Clock(during=lambda now: other.beat() if now > 1005 else None)
        with pytest.raises(StoreError, match=r"is being driven by process 7 on away\. Wait for it or stop it\.$"):
            lease_of(place, HERE, clock).acquire()
        assert clock.now < 1010

    def test_wall_clocks_do_not_matter(self, place):
        """A holder whose clock is years ahead or behind lives while its file changes, and not otherwise."""
        lease_of(place, AWAY).acquire()
        told = json.loads(place.read(key_of(1)))
        for year in ("1970", "2200"):
            place.write(key_of(1), json.dumps({**told, "time": f"{year}-01-01T00:00:00Z"}).encode())
            clock = Clock(during=lambda now: place.write(key_of(1), json.dumps({**told, "beat": now}).encode()))
            with pytest.raises(StoreError, match="is being driven by"):
                lease_of(place, HERE, clock).acquire()
        lease_of(place, HERE).acquire()

    def test_release_while_waiting_ends_the_wait(self, place):
        other = lease_of(place, AWAY)
        other.acquire()
        clock = Clock(during=lambda now: other.release())
        lease = lease_of(place, HERE, clock)
        lease.acquire()
        assert lease.generation == 2
        assert clock.now < 1005

    def test_third_process_that_is_faster_is_refused_to(self, place):
        """While we wait for a dead holder, somebody else takes over."""
        lease_of(place, AWAY).acquire()
        third = lease_of(place, replace(AWAY, process=8))
        clock = Clock(during=lambda now: third.acquire() if now > 1010 and not third.generation else None)
        with pytest.raises(StoreError, match="is being driven by process 8 on away"):
            lease_of(place, HERE, clock).acquire()

    @pytest.mark.parametrize("content", [b"", b"\x00\xff{", b"[]", b"{}", b'{"holder": {"process": "x"}}'], ids=repr)
    def test_corrupted_lease_is_waited_for_like_one_elsewhere(self, place, content):
        place.write(key_of(4), content)
        clock, said = Clock(), []
        lease = lease_of(place, HERE, clock, say=said.append)
        lease.acquire()
        assert lease.generation == 5
        assert clock.now > 1030
        assert "was driven by another process; waiting" in said[0]

    def test_same_machine_is_told_by_boot_namespace_and_host(self):
        assert HERE.shares_machine(NEIGHBOUR)
        for field in ("host", "boot", "namespace"):
            assert not HERE.shares_machine(replace(NEIGHBOUR, **{field: "other"}))
            unknown = replace(HERE, **{field: ""})
            assert not unknown.shares_machine(replace(NEIGHBOUR, **{field: ""})), "unknown is not the same"

    def test_only_two_generations_are_kept(self, place):
        for _ in range(5):
            lease = lease_of(place, HERE)
            lease.acquire()
            lease.release()
        assert place.list("lease") == [key_of(4), key_of(5)]

    def test_number_freed_by_others_is_not_taken(self, place):
        """Between our look and our claim three drivers came and went, and deleted the file we would create."""
        lease_of(place, HERE).acquire()
        late = lease_of(place, AWAY)
        for _ in range(4):
            other = lease_of(place, replace(HERE, process=9))
            other.acquire()
            other.release()
        assert not place.exists(key_of(2))
        assert not late._claim(2)
        assert place.list("lease") == [key_of(4), key_of(5)]
        assert late.generation == 0

    def test_claim_whose_answer_was_lost_is_recognised(self, place, monkeypatch):
        """The first sending created the file, the second is told that it exists."""
        create = type(place).create

        def twice(self: Location, key: str, data: bytes) -> bool:
            create(self, key, data)
            return create(self, key, data)

        monkeypatch.setattr(type(place), "create", twice)
        lease = lease_of(place, HERE)
        lease.acquire()
        assert lease.generation == 1

    def test_place_that_cannot_be_written_is_one_sentence(self, tmp_path):
        (tmp_path / "lease").write_text("")
        with pytest.raises(StoreError, match=rf"^store {tmp_path} cannot be written: (File exists|Not a directory): "):
            lease_of(tmp_path, HERE).acquire()


class TestKeeping:
    def test_holder_may_write_while_it_beats(self, place):
        clock = Clock()
        lease = lease_of(place, HERE, clock)
        lease.acquire()
        for _ in range(10):
            clock.now += 20
            lease.beat()
            lease.check()

    def test_every_beat_changes_the_file(self, place):
        lease = lease_of(place, HERE)
        lease.acquire()
        seen = {place.read(key_of(1))}
        for _ in range(3):
            lease.beat()
            seen.add(place.read(key_of(1)))
        assert len(seen) == 4

    def test_paused_holder_that_was_followed_notices_at_its_next_check(self, place):
        paused, other = lease_of(place, AWAY), lease_of(place, HERE)
        paused.acquire()
        other.acquire()
        for act in (paused.check, paused.beat, paused.check):
            with pytest.raises(
                LeaseLostError, match=r"was taken over by process 1 on here while this one was silent\. What it had"
            ):
                act()
        other.check()

    def test_lost_lease_is_not_released_over_its_follower(self, place):
        paused, other = lease_of(place, AWAY), lease_of(place, HERE)
        paused.acquire()
        other.acquire()
        paused.release()
        claim = newest_claim(place)
        assert claim is not None
        assert (claim.generation, claim.holder, claim.released) == (2, HERE, False)
        other.check()

    def test_paused_holder_that_nobody_followed_goes_on(self, place):
        clock = Clock()
        lease = lease_of(place, AWAY, clock)
        lease.acquire()
        before = place.read(key_of(1))
        clock.now += 1000
        lease.check()
        assert place.read(key_of(1)) != before, "whoever waits sees that it lives"

    def test_storage_that_fails_for_longer_than_the_limit_loses_the_lease(self, place, monkeypatch):
        clock = Clock()
        lease = lease_of(place, HERE, clock)
        lease.acquire()

        def fail(*args: Any) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(type(place), "write", fail)
        clock.now += 29
        lease.check()
        clock.now += 2
        with pytest.raises(
            LeaseLostError, match=r"could not be written for 31 seconds: Input/output error\. Another process may drive"
        ):
            lease.check()

    def test_storage_that_cannot_be_listed_for_a_moment_is_forgiven(self, place, monkeypatch):
        clock = Clock()
        lease = lease_of(place, HERE, clock)
        lease.acquire()
        with monkeypatch.context() as away:
            away.setattr(type(place), "keys", lambda *args: (_ for _ in ()).throw(StoreError("no answer")))
            clock.now += 10
            lease.check()
            clock.now += 21
            with pytest.raises(LeaseLostError, match="could not be written for 31 seconds: no answer"):
                lease.check()
        lease.check()

    @pytest.mark.parametrize("anew", [False, True], ids=["removed", "removed-and-begun-anew"])
    def test_driver_of_a_store_that_was_removed_stops_and_writes_nothing(self, place, anew):
        """Also where another driver has begun the store anew, with the same number as the first."""
        first, second = lease_of(place, AWAY), lease_of(place, HERE)
        first.acquire()
        for key in place.list():
            place.delete(key)
        if anew:
            second.acquire()
            assert second.generation == first.generation
        before = {key: place.read(key) for key in place.list()}
        for act in (first.check, first.beat):
            with pytest.raises(LeaseLostError, match=r"was removed while this process drove it\. Nothing"):
                act()
        first.release()
        assert {key: place.read(key) for key in place.list()} == before
        if anew:
            second.check()

    @pytest.mark.parametrize("content", [b"", b"{}", b'{"token": '], ids=repr)
    def test_driver_whose_file_is_damaged_goes_on(self, place, content):
        lease = lease_of(place, HERE)
        lease.acquire()
        place.write(key_of(1), content)
        lease.check()
        lease.beat()
        assert newest_claim(place).holder == HERE

    def test_check_without_the_lease_is_an_error(self, place):
        lease = lease_of(place, HERE)
        with pytest.raises(LeaseLostError, match="is not held by this process"):
            lease.check()
        lease.acquire()
        lease.release()
        with pytest.raises(LeaseLostError, match="is not held by this process"):
            lease.check()

    def test_release_twice_or_without_is_nothing(self, place):
        lease = lease_of(place, HERE)
        lease.release()
        lease.acquire()
        lease.release()
        lease.release()
        assert newest_claim(place).released

    def test_thread_beats_by_itself_and_ends_with_the_release(self, tmp_path):
        others = set(threading.enumerate())
        lease = Lease(tmp_path, ttl=0.06)
        lease.acquire()
        (beating,) = set(threading.enumerate()) - others
        before, changed = locate(tmp_path).read(key_of(1)), threading.Event()

        def watch() -> None:
            while locate(tmp_path).read(key_of(1)) == before:
                pass
            changed.set()

        threading.Thread(target=watch, daemon=True).start()
        assert changed.wait(timeout=60)
        lease.release()
        beating.join(timeout=60)
        assert not beating.is_alive()


class TestRaces:
    def test_of_many_at_once_exactly_one_wins(self, place):
        """Over a dead holder, whom all of them find at the same moment."""
        lease_of(place, AWAY).acquire()
        leases = [lease_of(place, replace(HERE, process=n), alive=ALL) for n in range(100, 106)]
        barrier, refused = threading.Barrier(len(leases)), []

        def acquire(lease: Lease) -> None:
            barrier.wait()
            try:
                lease.acquire()
            except StoreError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=acquire, args=(lease,)) for lease in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = (lease for lease in leases if lease.generation)
        assert len(refused) == len(leases) - 1
        assert all(f"is being driven by {winner._holder}." in text for text in refused)
        winner.check()

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(script=st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abcrpw")), max_size=25))
    def test_no_two_ever_hold_it(self, tmp_path, script):
        """Three processes acquire, beat, check, release, fall silent for long (p) or die (w), in any order.

        Whoever passes a check is the last who was given the lease.
        """
        place = locate(tmp_path / f"run-{next(NUMBERS)}.zarr")
        clock = Clock()
        holders = [HERE, NEIGHBOUR, AWAY]
        dead: set[Holder] = set()
        leases: list[Lease | None] = [None, None, None]
        last: Lease | None = None
        for who, act in script:
            lease = leases[who]
            if act == "a" and lease is None:
                lease = Lease(
                    place,
                    holder=holders[who],
                    clock=clock,
                    sleep=clock.sleep,
                    lives=lambda holder: holder not in dead,
                    beats=False,
                )
                try:
                    lease.acquire()
                except StoreError:
                    continue
                assert last is None or lease.generation > last.generation
                last = leases[who] = lease
            elif act == "w":
                dead.add(holders[who])
                holders[who] = replace(holders[who], process=holders[who].process + 10)
                leases[who] = None
            elif act == "p":
                clock.now += 100
            elif lease is not None and act in "bc":
                try:
                    lease.beat() if act == "b" else lease.check()
                except LeaseLostError:
                    assert lease is not last
                else:
                    assert lease is last
            elif lease is not None and act == "r":
                lease.release()
                leases[who] = None


NUMBERS = itertools.count()
ALL = tuple(replace(HERE, process=n) for n in range(100, 106))


class TestStopRequest:
    def test_driver_hears_why(self, place):
        lease = lease_of(place, HERE)
        lease.acquire()
        assert stop_requested(place, lease.generation) is None
        assert request_stop(place, "cancelled by a user") == "process 1 on here"
        assert stop_requested(place, lease.generation) == "cancelled by a user"

    def test_next_driver_is_not_stopped(self, place):
        first, second = lease_of(place, HERE), lease_of(place, HERE)
        first.acquire()
        request_stop(place, "cancelled")
        first.release()
        second.acquire()
        assert not place.exists("stop.json")
        assert stop_requested(place, second.generation) is None

    def test_request_at_the_moment_of_the_start_is_heard(self, place, monkeypatch):
        """It comes after the lease was taken, and before the new driver tidies up."""
        lease = lease_of(place, HERE)
        tidy = Lease._tidy

        def requested(self: Lease) -> None:
            assert request_stop(place, "cancelled") is not None
            tidy(self)

        monkeypatch.setattr(Lease, "_tidy", requested)
        lease.acquire()
        assert stop_requested(place, lease.generation) == "cancelled"

    def test_request_that_crosses_a_new_driver_is_meant_for_the_old_one(self, place):
        first, second = lease_of(place, HERE), lease_of(place, HERE)
        first.acquire()
        request_stop(place, "cancelled")
        late = place.read("stop.json")
        first.release()
        second.acquire()
        place.write("stop.json", late)
        assert stop_requested(place, second.generation) is None

    def test_nobody_drives_a_released_or_untouched_store(self, place):
        assert request_stop(place, "why") is None
        lease = lease_of(place, HERE)
        lease.acquire()
        lease.release()
        assert request_stop(place, "why") is None

    @pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"why": "x"}', b"\xff"], ids=repr)
    def test_corrupted_request_stops_nobody(self, place, content):
        place.write("stop.json", content)
        assert stop_requested(place, 0) is None


class TestProcesses:
    """With real processes: this machine's death notices need no waiting."""

    HOLD = (
        "import sys; from pipeline.store import Lease; l = Lease(sys.argv[1]); l.acquire(); print('held', flush=True); "
    )

    def hold(self, place: Path, then: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", self.HOLD + then, str(place)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    @pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the death of a process is seen in /proc")
    def test_killed_driver_is_followed_at_once_and_a_living_one_refused(self, tmp_path):
        process = self.hold(tmp_path, "input()")
        try:
            with pytest.raises(StoreError, match=rf"is being driven by process {process.pid} on "):
                Lease(tmp_path).acquire()
        finally:
            process.send_signal(signal.SIGKILL)
        # Not waited for yet: a zombie drives nothing either.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        lease = Lease(tmp_path, sleep=lambda seconds: pytest.fail("waited"))
        lease.acquire()
        assert lease.generation == 2
        lease.release()
        process.communicate()

    def test_driver_that_ends_without_a_word_is_followed(self, tmp_path):
        process = self.hold(tmp_path, "import os; os._exit(9)")
        process.communicate()
        lease = Lease(tmp_path, sleep=lambda seconds: pytest.fail("waited"))
        lease.acquire()
        assert newest_generation(tmp_path) == 2
        lease.release()

    def test_this_process_lives(self):
        here = Holder.here()
        assert here.lives()
        assert here.shares_machine(Holder.here())
        assert not replace(here, started="1").lives(), "the number was given to another process"
        assert str(here) == f"process {os.getpid()} on {here.host}"

    def test_file_holds_no_more_than_it_needs(self, tmp_path):
        lease = Lease(tmp_path)
        lease.acquire()
        told = json.loads((tmp_path / key_of(1)).read_text())
        assert told.keys() == {"generation", "holder", "token", "beat", "time", "released"}
        assert Claim.read(locate(tmp_path), 1).holder == Holder.here()
        lease.release()
