"""Why a sweep stops early: signals, a request in the store, a machine that will go."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from pipeline import stopping
from pipeline.stopping import ASK_SECONDS, Stopping
from pipeline.store import Lease, StoreError, request_stop
from pipeline.store.location import Folder


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def handlers():
    """The handlers before the test, which must be there again after it."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield before
    assert {number: signal.getsignal(number) for number in numbers} == before


def test_nothing_is_no_reason(tmp_path, clock):
    assert Stopping(tmp_path, 1, clock=clock)() is None


class TestRequests:
    def test_a_request_in_the_store_is_a_reason(self, tmp_path, clock):
        lease = Lease(tmp_path, beats=False)
        lease.acquire()
        asked = Stopping(tmp_path, lease.generation, clock=clock)
        request_stop(tmp_path, "cancelled by ada")
        assert asked() == "cancelled by ada"
        lease.release()

    def test_a_request_to_an_earlier_driver_is_none(self, tmp_path, clock):
        first, second = Lease(tmp_path, beats=False), Lease(tmp_path, beats=False)
        first.acquire()
        request_stop(tmp_path, "cancelled")
        first.release()
        second.acquire()
        assert Stopping(tmp_path, second.generation, clock=clock)() is None

    def test_the_store_is_asked_every_few_seconds_only(self, tmp_path, clock, monkeypatch):
        asked = []
        monkeypatch.setattr(stopping, "stop_requested", lambda place, generation: asked.append(clock.now))
        stop = Stopping(tmp_path, 1, clock=clock)
        for _ in range(100):
            stop()
            clock.now += ASK_SECONDS / 10
        assert len(asked) == 10

    def test_a_reason_stays(self, tmp_path, clock):
        Lease(tmp_path, beats=False).acquire()
        stop = Stopping(tmp_path, 1, clock=clock)
        request_stop(tmp_path, "enough")
        assert stop() == "enough"
        (tmp_path / "stop.json").unlink()
        clock.now += 10 * ASK_SECONDS
        assert stop() == "enough"

    @pytest.mark.parametrize("error", [OSError(5, "Input/output error"), StoreError("s3://b/x cannot be reached")])
    def test_a_store_that_does_not_answer_is_asked_again_later(self, error, tmp_path, clock, monkeypatch):
        """A week of work must not end because one small file could not be read for a moment."""
        lease = Lease(tmp_path, beats=False)
        lease.acquire()
        request_stop(tmp_path, "enough")
        stop = Stopping(tmp_path, lease.generation, clock=clock)
        with monkeypatch.context() as away:
            away.setattr(Folder, "read", lambda *args: (_ for _ in ()).throw(error))
            assert stop() is None
        clock.now += ASK_SECONDS
        assert stop() == "enough"


class TestNotices:
    def test_a_file_that_appears_is_a_reason(self, tmp_path, clock):
        notice = tmp_path / "going"
        stop = Stopping(tmp_path, 1, [f"file:{notice}"], clock=clock)
        assert stop() is None
        notice.touch()
        assert stop() is None, "the machine was asked just now"
        clock.now += ASK_SECONDS
        assert stop() == f"{notice} is there"

    def test_a_source_that_does_not_exist_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="no source of notices is called 'azur'"):
            Stopping(tmp_path, 1, ["azur"])


class TestSignals:
    @pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
    def test_the_first_signal_is_a_reason_and_says_what_happens(self, number, name, tmp_path, handlers):
        said: list[str] = []
        stop = Stopping(tmp_path, 1)
        with stop.on_signals(45, said.append):
            os.kill(os.getpid(), number)
            assert stop() == name
        assert said == [f"{name}: units in flight may finish within 45 s; once more stops at once."]

    @pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM], ids=["ctrl_c", "sigterm"])
    def test_the_second_signal_interrupts(self, second, tmp_path, handlers):
        def sweep() -> None:
            with Stopping(tmp_path, 1).on_signals(45, lambda text: None):
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), second)

        with pytest.raises(KeyboardInterrupt):
            sweep()

    def test_the_signal_that_a_notice_announces_lets_units_finish(self, tmp_path, handlers):
        """Clouds say that a machine will go, and send SIGTERM some time later."""
        notice = tmp_path / "going"
        notice.touch()
        stop = Stopping(tmp_path, 1, [f"file:{notice}"])
        with stop.on_signals(45, lambda text: None):
            assert stop() == f"{notice} is there"
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 0, "a limit holds from now on"
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
        assert stop() == f"{notice} is there"

    def test_ctrl_c_after_another_reason_interrupts(self, tmp_path, handlers):
        notice = tmp_path / "going"
        notice.touch()
        stop = Stopping(tmp_path, 1, [f"file:{notice}"])
        with stop.on_signals(45, lambda text: None):
            stop()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)

    def test_a_unit_that_outlives_the_limit_is_interrupted(self, tmp_path, handlers, monkeypatch):
        monkeypatch.setattr(stopping, "_GRACE_S", 0.01)
        stop = Stopping(tmp_path, 1)

        def sweep() -> None:
            with stop.on_signals(0.01, lambda text: None):
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait(60)

        with pytest.raises(KeyboardInterrupt):
            sweep()
        assert stop() == "SIGTERM"

    def test_no_alarm_is_left_behind(self, tmp_path, handlers):
        with Stopping(tmp_path, 1).on_signals(45, lambda text: None):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)

    def test_other_threads_leave_signals_alone(self, tmp_path, handlers):
        inside = []

        def sweep() -> None:
            with Stopping(tmp_path, 1).on_signals(45, lambda text: None):
                inside.append(signal.getsignal(signal.SIGTERM))

        thread = threading.Thread(target=sweep)
        thread.start()
        thread.join()
        assert inside == [handlers[signal.SIGTERM]]
