"""The exclusive right to drive a store, wherever it lies: taken once, kept by a heartbeat, taken over from the dead."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.store.errors import LeaseLostError, StoreError, reason_of
from pipeline.store.journal import newest_told
from pipeline.store.location import Location, Place, locate

FOLDER = "lease"
STOP = "stop.json"
TTL_SECONDS = 30.0
"""How long a holder may be silent before another may take over."""
BEAT_SECONDS = 5.0
_ATTEMPTS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process, named so that another process of the same machine can tell whether it still lives.

    Attributes
    ----------
    host : name of the machine. process : its number. started : its start in clock ticks since boot.
    boot : identity of this run of the machine. namespace : where process numbers count.
    """

    host: str
    process: int
    started: str = ""
    boot: str = ""
    namespace: str = ""

    @classmethod
    def here(cls) -> Holder:
        """Return this process."""
        return cls(
            host=platform.node(),
            process=os.getpid(),
            started=_start_of(os.getpid()) or "",
            boot=_read("/proc/sys/kernel/random/boot_id"),
            namespace=_link("/proc/self/ns/pid"),
        )

    def shares_machine(self, other: Holder) -> bool:
        """Whether process numbers mean the same to both, so that death can be seen; False where that is unknown."""
        mine, theirs = (self.host, self.boot, self.namespace), (other.host, other.boot, other.namespace)
        return mine == theirs and all(mine)

    def lives(self) -> bool:
        """Whether the process still runs; only for holders on this machine."""
        return _start_of(self.process) == self.started

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One generation of the lease as its file says it; the file's bytes change with every heartbeat."""

    generation: int
    content: bytes
    holder: Holder | None = None
    released: bool = False
    token: str = ""
    time: str = ""

    @classmethod
    def read(cls, location: Location, generation: int) -> Claim | None:
        """Read a generation's file; None if it is gone. Of a corrupted one only the content is known."""
        content = location.read(key_of(generation))
        if content is None:
            return None
        try:
            told = json.loads(content)
            known = {f.name: told["holder"][f.name] for f in fields(Holder) if f.name in told["holder"]}
            holder = Holder(**known)
            if not isinstance(holder.process, int):
                raise TypeError("a process has a number")
            released, token, at = bool(told["released"]), str(told["token"]), str(told["time"])
        except (ValueError, LookupError, TypeError, RecursionError):
            return cls(generation=generation, content=content)
        return cls(generation=generation, content=content, holder=holder, released=released, token=token, time=at)

    def __str__(self) -> str:
        return str(self.holder or "another process")


class Lease:
    """The right of this process to drive a store.

    Parameters
    ----------
    ttl : seconds of silence after which a holder counts as dead, by this process's own clock.
    say : told when it waits for or takes over from a holder. clock, sleep, holder, lives : replaced by tests.
    beats : whether a thread keeps the lease alive; otherwise the owner calls ``beat``.

    Attributes
    ----------
    generation : number of this right, larger than that of every holder before; 0 while it is not held.
    """

    def __init__(
        self,
        place: Place,
        *,
        ttl: float = TTL_SECONDS,
        say: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        holder: Holder | None = None,
        lives: Callable[[Holder], bool] = Holder.lives,
        beats: bool = True,
    ) -> None:
        self.location = locate(place)
        self.ttl = ttl
        self.generation = 0
        self._say = say or (lambda text: None)
        self._clock, self._sleep, self._lives = clock, sleep, lives
        self._holder = holder or Holder.here()
        self._beats = beats
        self._token = ""
        self._count = 0
        self._heard = 0.0
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Take the lease; waits up to ``ttl`` seconds where only time can tell whether its holder lives.

        Raises
        ------
        StoreError : a living process drives this store, or it cannot be written.
        """
        try:
            for _ in range(_ATTEMPTS):
                # In this order: who has written to the journal already is found as the newest holder.
                told = newest_told(self.location)
                newest = newest_claim(self.location)
                if newest is not None and not newest.released:
                    self._await_death(newest)
                if self._claim(max(newest.generation if newest else 0, told) + 1):
                    break
            else:
                raise StoreError(f"store {self.location} is being fought over. Start one driver at a time.")
        except OSError as error:
            raise StoreError(
                f"store {self.location} cannot be written: {reason_of(error)}: {error.filename or FOLDER}."
            ) from error
        self._tidy()
        if self._beats:
            self._ended = threading.Event()
            threading.Thread(target=self._beat_until, args=(self._ended,), name="lease", daemon=True).start()

    def check(self) -> None:
        """Make sure that the lease is still held; call it before every write that only its holder may do.

        Raises
        ------
        LeaseLostError : another process took over, or may have, because this one was silent for too long; or the
            store was removed.
        """
        if not self.generation:
            raise LeaseLostError(f"store {self.location} is not held by this process. Run the same command again.")
        try:
            self._require_newest()
            if self._silence() > self.ttl:
                # This process was paused, or the storage did not answer: only a write can tell which.
                self.beat()
        except LeaseLostError:
            raise
        except (OSError, StoreError) as error:
            if self._silence() > self.ttl:
                raise LeaseLostError(
                    f"store {self.location} could not be written for {self._silence():.0f} seconds: "
                    f"{reason_of(error)}. Another process may drive it now; run the same command again."
                ) from error

    def beat(self) -> None:
        """Say that this process lives.

        Raises
        ------
        LeaseLostError : another process took over, or the store was removed.
        """
        with self._lock:
            if self.generation:
                self._require_newest()
                self._count += 1
                began = self._clock()
                self.location.write(key_of(self.generation), self._content())
                self._heard = began

    def release(self) -> None:
        """Give the lease back; one that is not held, or was lost, is left as it is."""
        self._ended.set()
        with self._lock:
            if not self.generation:
                return
            # Where that fails, whoever wants it next waits for it, or sees that this process has ended.
            with suppress(OSError, StoreError):
                self._require_newest()
                self.location.write(key_of(self.generation), self._content(released=True))
            self.generation = 0

    def _silence(self) -> float:
        return self._clock() - self._heard

    def _require_newest(self) -> None:
        newest = newest_generation(self.location)
        if newest > self.generation:
            claim = Claim.read(self.location, newest)
            raise LeaseLostError(
                f"store {self.location} was taken over by {claim or 'another process'} while this one was silent. "
                "What it had finished is safe; leave the rest to the other."
            )
        mine = Claim.read(self.location, self.generation)
        # A damaged file names nobody; one of a store that was begun anew in this place has another's token.
        if mine is None or (mine.token and mine.token != self._token):
            raise LeaseLostError(
                f"store {self.location} was removed while this process drove it. Nothing more is written there; "
                "run the same command again to begin it anew."
            )

    def _await_death(self, claim: Claim) -> None:
        """Return once the holder is known to be dead.

        Raises
        ------
        StoreError : it lives.
        """
        holder = claim.holder
        if holder is not None and self._holder.shares_machine(holder):
            if self._lives(holder):
                raise self._refusal(claim)
            self._say(f"store {self.location} was driven by {claim}, which has ended. Taking over.")
            return
        heard = f", last heard of at {claim.time}" if claim.time else ""
        self._say(
            f"store {self.location} was driven by {claim}{heard}; "
            f"waiting up to {self.ttl:.0f} s to see whether it lives."
        )
        began = self._clock()
        while self._clock() - began <= self.ttl:
            self._sleep(min(1.0, self.ttl / 10))
            now = newest_claim(self.location)
            if now is None or now.released:
                return
            if (now.generation, now.content) != (claim.generation, claim.content):
                raise self._refusal(now)
        self._say(f"store {self.location}: nothing heard of {claim} for {self.ttl:.0f} s. Taking over.")

    def _refusal(self, claim: Claim) -> StoreError:
        return StoreError(f"store {self.location} is being driven by {claim}. Wait for it or stop it.")

    def _claim(self, generation: int) -> bool:
        """Try to become the holder of a generation."""
        self._token, self._count = uuid.uuid4().hex, 0
        began = self._clock()
        created = self.location.create(key_of(generation), self._content(generation=generation))
        if not created:
            # A request that was sent twice finds what its first sending made.
            found = Claim.read(self.location, generation)
            created = found is not None and found.token == self._token
        if created and newest_generation(self.location) > generation:
            # Others came and went since the list was read, and the number was free again.
            self.location.delete(key_of(generation))
            return False
        if created:
            self.generation, self._heard = generation, began
        return created

    def _content(self, *, generation: int | None = None, released: bool = False) -> bytes:
        told: dict[str, Any] = {
            "generation": self.generation if generation is None else generation,
            "holder": asdict(self._holder),
            "token": self._token,
            "beat": self._count,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "released": released,
        }
        return json.dumps(told).encode()

    def _tidy(self) -> None:
        """Delete what earlier drivers left: files of generations before the last two, and their request to stop."""
        with suppress(OSError, StoreError):
            for generation in _generations(self.location)[:-2]:
                self.location.delete(key_of(generation))
            # One to this driver may be there already, from the moment that the lease was taken.
            if stop_requested(self.location, self.generation) is None:
                self.location.delete(STOP)

    def _beat_until(self, ended: threading.Event) -> None:
        while not ended.wait(min(BEAT_SECONDS, self.ttl / 6)):
            try:
                self.beat()
            except LeaseLostError:
                return
            except (OSError, StoreError):
                # ``check`` tells the driver once this has lasted for too long.
                continue


def key_of(generation: int) -> str:
    """Return the key of a generation's file."""
    return f"{FOLDER}/{generation:06d}.json"


def _generations(location: Location) -> list[int]:
    stems = [Path(key).stem for key in location.list(FOLDER) if key.endswith(".json")]
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def newest_generation(place: Place) -> int:
    """Return the number of the last lease that was taken, 0 if none was."""
    return max(_generations(locate(place)), default=0)


def newest_claim(place: Place) -> Claim | None:
    """Return the last lease that was taken, held or released; None if none was."""
    location = locate(place)
    for _ in range(_ATTEMPTS):
        generation = newest_generation(location)
        claim = Claim.read(location, generation) if generation else None
        # Deleted between the two requests: a newer one exists.
        if claim is not None or not generation:
            return claim
    return None


def request_stop(place: Place, why: str) -> str | None:
    """Ask the driver of a store to finish what runs and stop.

    Returns
    -------
    Its name, or None if nobody holds the lease, so that nothing was written. One of another machine may have died
    without a word.
    """
    location = locate(place)
    claim = newest_claim(location)
    if claim is None or claim.released or _has_ended(claim.holder):
        return None
    location.write(STOP, json.dumps({"why": why, "generation": claim.generation}).encode())
    return str(claim)


def _has_ended(holder: Holder | None) -> bool:
    """Whether a holder is known to be dead."""
    return holder is not None and Holder.here().shares_machine(holder) and not holder.lives()


def stop_requested(place: Place, since_generation: int) -> str | None:
    """Return why the driver of a generation is asked to stop, None if it is not."""
    content = locate(place).read(STOP)
    if content is None:
        return None
    try:
        told = json.loads(content)
        return str(told["why"]) if int(told["generation"]) >= since_generation else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _start_of(process: int) -> str | None:
    """Return when a process started; None if there is none, or none that can still do anything."""
    stat = _read(f"/proc/{process}/stat")
    # The name is in brackets and may hold spaces.
    values = stat.rpartition(")")[2].split()
    return values[19] if len(values) > 19 and values[0] not in ("Z", "X") else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
