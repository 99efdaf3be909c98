"""Units that wait to be handed out: by locality, oldest first, found without looking at all of them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import dataclass
from itertools import chain

from cluster.work import WorkUnit


@dataclass(slots=True, eq=False)
class Waiting:
    """A unit that nobody holds.

    Attributes
    ----------
    arrival : position of the unit in the order in which units were pulled.
    alone : whether it must not share the window of a replica, as it may be the one that kills.
    avoid : the replica on which it failed last; another one tells a bad unit from a bad replica.
    avoid_until : time after which any replica will do, as the others do not come free.
    """

    unit: WorkUnit
    arrival: int
    alone: bool = False
    avoid: int | None = None
    avoid_until: float = float("inf")


def _arrival(waiting: Waiting) -> int:
    return waiting.arrival


class Backlog:
    """The waiting units of a run; those of one locality stand in one queue, in the order of their arrival."""

    def __init__(self) -> None:
        self._queues: dict[Hashable, list[Waiting]] = {}
        # Localities by the arrival of their oldest unit, which is unique.
        self._order: list[tuple[int, Hashable]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, waiting: Waiting) -> None:
        """Take in a unit, at the place of its arrival."""
        locality = waiting.unit.locality
        queue = self._queues.get(locality)
        if queue is None:
            self._queues[locality] = [waiting]
            self._rank(waiting.arrival, locality)
        else:
            oldest = queue[0].arrival
            insort(queue, waiting, key=_arrival)
            if queue[0].arrival != oldest:
                self._unrank(oldest)
                self._rank(queue[0].arrival, locality)
        self._size += 1

    def pop(self, own: Hashable, taken: Collection[Hashable], accept: Callable[[Waiting], bool]) -> Waiting | None:
        """Hand out the best acceptable unit: of the own locality, else of one not taken, else the oldest.

        Parameters
        ----------
        own : locality that the asking replica served last. taken : localities that others serve.
        """
        for locality in self._by_preference(own, taken):
            queue = self._queues[locality]
            for position, waiting in enumerate(queue):
                if accept(waiting):
                    self._remove(locality, position)
                    return waiting
        return None

    def _by_preference(self, own: Hashable, taken: Collection[Hashable]) -> Iterator[Hashable]:
        first = (own,) if own in self._queues else ()
        free = (locality for _, locality in self._order if locality != own and locality not in taken)
        rest = (locality for _, locality in self._order if locality != own and locality in taken)
        return chain(first, free, rest)

    def _remove(self, locality: Hashable, position: int) -> None:
        queue = self._queues[locality]
        removed = queue.pop(position)
        self._size -= 1
        if position == 0:
            self._unrank(removed.arrival)
            if queue:
                self._rank(queue[0].arrival, locality)
            else:
                del self._queues[locality]

    def _rank(self, arrival: int, locality: Hashable) -> None:
        insort(self._order, (arrival, locality), key=lambda entry: entry[0])

    def _unrank(self, arrival: int) -> None:
        del self._order[bisect_left(self._order, arrival, key=lambda entry: entry[0])]
