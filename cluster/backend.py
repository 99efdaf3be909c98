"""What a pool needs of the machinery below it: processes that come, build a worker, answer and die."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from cluster.work import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A replica has found a place: its process is up, and the worker is being built."""

    replica: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A replica has its worker."""

    replica: int
    hardware: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildFailed:
    """The factory of the worker raised."""

    replica: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """One call has its outcome."""

    replica: int
    ticket: int
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaving:
    """The node of a replica has been told that it will go; the replica refuses what it has not begun."""

    replica: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Died:
    """The process of a replica is gone, with all its calls."""

    replica: int
    error: str


Answer: TypeAlias = Placed | Built | BuildFailed | Finished | Leaving | Died


class Backend(Protocol):
    """Replicas by number. After ``kill`` no answer of a replica is given any more, whatever it had been asked.

    What one ``wait`` has returned already may name a replica that is killed because of an answer ahead of it.
    """

    def open(self) -> None:
        """Check that replicas can be asked for; raises PoolError if not."""

    def capacity(self) -> tuple[int, str]:
        """Return how many replicas the nodes of now could hold if they were idle, and a text that says so."""

    def spawn(self, replica: int) -> None:
        """Ask for a process with a worker, to be answered by ``Placed``, then ``Built`` or ``BuildFailed``."""

    def kill(self, replica: int, *, shun_node: bool = False) -> None:
        """End a replica at once; with ``shun_node`` no later one is placed on its node."""

    def send(self, replica: int, ticket: int, payload: Any) -> None:
        """Ask a replica to run a payload after those that it was sent before."""

    def wait(self, timeout_s: float) -> list[Answer]:
        """Return what has been answered, waiting for the first answer at most this long."""

    def close(self) -> None:
        """Kill every replica."""
