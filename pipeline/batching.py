"""The rows of one forward while a replica works: given by the config, or chosen by the tool and halved on failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from pipeline.config import AUTO
from pipeline.memory_errors import SMALLER, MemoryExhaustedError, is_out_of_memory, reason, release
from pipeline.peak_memory import capacity, on_gpu
from pipeline.plan import Plan
from pipeline.probe import probe
from pipeline.rows import Table, choose, loops_by_size, memory_limit, sampled_groups
from pipeline.rows_cache import RowsCache, about
from pipeline.store.location import Place
from pipeline.store.rows import RowsRecord

if TYPE_CHECKING:
    from pipeline.replica import Computer

T = TypeVar("T")


def indivisible(work: Callable[[], T]) -> T:
    """Return what some work gives that no number of rows can make smaller.

    Raises
    ------
    MemoryExhaustedError : it does not fit the memory.
    """
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = reason(error)
    release()
    raise MemoryExhaustedError(f"the pair of runs of a sample does not fit the memory: {said}. {SMALLER}")


class FixedRows:
    """The number that the config gives: results are a function of it, so nothing changes it."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def run(self, work: Callable[[int], T]) -> tuple[T, int]:
        """Return what some work gives with so many rows, and that number.

        Raises
        ------
        MemoryExhaustedError : it does not fit the memory.
        """
        said = ""
        try:
            return work(self.rows), self.rows
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = reason(error)
        release()
        raise MemoryExhaustedError(
            f"engine.batch_rows {self.rows}: so many rows of one forward do not fit the memory: {said}. "
            "Set engine.batch_rows to fewer or to auto, with another --store."
        )


class ChosenRows:
    """A number that the store keeps for all replicas; where it fails, half of it is in force for all from then on.

    Work is done with one number from its beginning to its end. Before its result is given back, the store is asked
    once more: what another replica has halved meanwhile is computed again, so that of two replicas that run one unit
    no one writes values of a number that is no longer in force.

    Parameters
    ----------
    record : of the store. rows : the number in force when the replica starts.
    """

    def __init__(self, record: RowsRecord, rows: int) -> None:
        self.record, self.rows = record, rows

    def run(self, work: Callable[[int], T]) -> tuple[T, int]:
        """Return what some work gives with the rows in force, and their number.

        Raises
        ------
        MemoryExhaustedError : one row does not fit the memory.
        """
        while True:
            used, said = self.rows, ""
            try:
                result = work(used)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                said = reason(error)
            if said:
                # Not in the handler: the error's traceback holds what the failed work has computed.
                release()
                self._halve(used, said)
                continue
            if self._in_force() == used:
                return result, used

    def _in_force(self) -> int:
        found = self.record.read()
        # A record that was deleted under way says nothing; the number never rises.
        self.rows = self.rows if found is None else min(found, self.rows)
        return self.rows

    def _halve(self, used: int, said: str) -> None:
        if used == 1:
            raise MemoryExhaustedError(f"a unit does not fit the memory with one row of a forward: {said}. {SMALLER}")
        self.rows = min(self._in_force(), self.record.halve(used, error=said))


def rows_for(plan: Plan, computer: Computer, place: Place, hardware: str) -> FixedRows | ChosenRows:
    """Return the rows of one forward of a replica; of a sweep that leaves them to the tool, choose them if need be.

    The store has the first word, then what was measured on this machine before, then a probe of the loaded model.

    Raises
    ------
    StoreError : what the store says of them is damaged, or it cannot be written.
    """
    if plan.config.engine.batch_rows != AUTO or plan.config.engine.mode == "naive":
        return FixedRows(plan.rows)
    record = RowsRecord(place)
    found = record.read()
    if found is None:
        found = record.choose(chosen_rows(plan, computer, hardware), hardware=hardware)
    return ChosenRows(record, found)


def chosen_rows(plan: Plan, computer: Computer, hardware: str) -> int:
    """Return the rows that the rule chooses on this machine, which is measured if it was not before."""
    cache = RowsCache(about(plan, hardware))
    table = cache.read()
    if table is None or not _is_enough(table, plan):
        table = probe(computer)
        cache.write(table)
    return _choice(table, plan, capacity(gpu=on_gpu(computer.pipe)))


def known_rows(plan: Plan, hardware: str) -> int | None:
    """Return the rows that would be chosen by what was measured on this machine before; None if nothing was."""
    table = RowsCache(about(plan, hardware)).read()
    return _choice(table, plan, None) if table is not None and _is_enough(table, plan) else None


def _is_enough(table: Table, plan: Plan) -> bool:
    return table.reaches(max((len(group.rows) for group in sampled_groups(plan)), default=1))


def _choice(table: Table, plan: Plan, capacity: int | None) -> int:
    return choose(table, loops_by_size(sampled_groups(plan)), memory_limit(table, capacity))
