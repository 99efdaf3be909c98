"""What a large run needs, computed from measured figures: every formula of ``docs/scale.md`` is a function here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DAY_S = 86_400
VALUE_BYTES = 4
"""Of a stored number."""
CLIPS = {"256 x 256 x 33": 6.9e15, "480 x 832 x 81": 1.8e17, "1024 x 1024 x 97": 1.15e18}
"""Operations of one clip of a model of 14 billion parameters, by height, width and frames: 50 steps of two calls."""
SUSTAINED = 5e14
"""Operations a second of a GPU, assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The figures that needs are computed from.

    Attributes
    ----------
    pool_ms, sweep_ms : the driver's processor time a unit, in its pool of many replicas and in all the rest.
    most_units_a_second : units that a driver of that many replicas kept up with.
    driver_mib, units_mib : the driver's memory at its start, and what a million units add.
    writes_a_metric : requests to write of a unit for each metric. overhead_bytes : of a request beside the values.
    journal_bytes : of a unit. segment_bytes : of a part of the journal, which is written whole each time.
    flush_s, beat_s, ask_s : between two writings of status and journal, two heartbeats, two looks for a stop request.
    nodes, gcs_cores, gcs_mib : the service that knows the whole cluster, with so many nodes at work.
    """

    pool_ms: float
    sweep_ms: float
    most_units_a_second: float
    driver_mib: float
    units_mib: float
    writes_a_metric: float
    overhead_bytes: float
    journal_bytes: float
    segment_bytes: float
    flush_s: float
    beat_s: float
    ask_s: float
    nodes: int
    gcs_cores: float
    gcs_mib: float

    @classmethod
    def of(cls, benchmarks: Mapping[str, Any]) -> Measured:
        """Take the figures out of the results of all benchmarks by name."""
        figures = {name: result["figures"] for name, result in benchmarks.items()}
        wide, million, nodes = figures["wide_pool"], figures["million_units"], figures["many_nodes"]
        bucket, constants = figures["store_requests"]["bucket"], figures["store_requests"]["constants"]
        one, two = (bucket[f"units_of_{n}"]["unit"]["cells"] for n in (1, 2))
        written = two["requests"]["PUT"] - one["requests"]["PUT"]
        overhead = [unit["bytes_sent"] - unit["bytes_of_values"] for unit in (one, two)]
        return cls(
            pool_ms=wide["one_by_one"]["driver_ms_a_unit"],
            sweep_ms=million["driver_ms_a_unit"],
            most_units_a_second=wide["in_heaps"]["units_a_second"],
            driver_mib=million["mib_at_start"],
            units_mib=million["mib_above_start"],
            writes_a_metric=written,
            overhead_bytes=(overhead[1] - overhead[0]) / written,
            journal_bytes=bucket["units_of_2"]["journal_bytes_a_unit"],
            segment_bytes=constants["journal_segment_bytes"],
            flush_s=constants["status_and_journal_every_s"],
            beat_s=constants["heartbeat_every_s"],
            ask_s=constants["stop_asked_every_s"],
            nodes=nodes["nodes"],
            gcs_cores=nodes["cores_while_running"]["gcs"],
            gcs_mib=nodes["memory"]["gcs"]["mib_each"],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A sweep on a cluster.

    Attributes
    ----------
    gpus : replicas, one a GPU. unit_s : seconds of a unit. metrics : arrays of an experiment.
    experiments : besides the baseline. cells : of a unit. units : of the whole sweep.
    """

    gpus: int
    unit_s: float
    metrics: int
    experiments: int
    cells: int
    units: int

    @property
    def units_a_second(self) -> float:
        """Units that end in a second."""
        return self.gpus / self.unit_s

    @property
    def hours(self) -> float:
        """Length of the whole sweep."""
        return self.units / self.units_a_second / 3600


def driver_cores(run: Run, measured: Measured) -> float:
    """Return the share of a core that the driver takes."""
    return run.units_a_second * (measured.pool_ms + measured.sweep_ms) / 1000


def replica_puts(run: Run, measured: Measured) -> float:
    """Return the requests to write that all replicas make in a second."""
    return run.units_a_second * run.metrics * measured.writes_a_metric


def replica_bytes(run: Run, measured: Measured) -> float:
    """Return the bytes that all replicas write in a second, as if values could not be compressed."""
    return replica_puts(run, measured) * (run.cells * VALUE_BYTES + measured.overhead_bytes)


def driver_puts(run: Run, measured: Measured) -> float:
    """Return the requests to write of the driver: status of each group and journal at a flush, and its heartbeat."""
    return (1 + run.experiments + 1) / measured.flush_s + 1 / measured.beat_s


def driver_lists(measured: Measured) -> float:
    """Return the requests to list of the driver: whether another took over, before status, journal and heartbeat."""
    return 2 / measured.flush_s + 1 / measured.beat_s


def driver_gets(measured: Measured) -> float:
    """Return the requests to read of the driver: its own claim, each time that it lists, and whether it is to stop."""
    return driver_lists(measured) + 1 / measured.ask_s


def driver_bytes(run: Run, measured: Measured) -> float:
    """Return the most bytes that the driver writes in a second: half a segment on average, and a byte for each unit."""
    return (measured.segment_bytes / 2 + run.units) / measured.flush_s


def start_gets(run: Run) -> int:
    """Return the most requests to read when all replicas start: the root, and each array that a unit writes.

    The baseline has two arrays a metric.
    """
    return run.gpus * (1 + run.metrics * (run.experiments + 2))


def journal_bytes(run: Run, measured: Measured) -> float:
    """Return the size of the journal of the whole sweep."""
    return run.units * measured.journal_bytes


def gcs_cores(nodes: int, measured: Measured) -> float:
    """Return the cores of the service that knows the whole cluster, in proportion to its nodes."""
    return measured.gcs_cores * nodes / measured.nodes


def gcs_mib(nodes: int, measured: Measured) -> float:
    """Return its memory, in proportion to the nodes."""
    return measured.gcs_mib * nodes / measured.nodes


def shortest_unit_s(gpus: int, measured: Measured) -> float:
    """Return the length of units below which the driver could not keep all GPUs at work."""
    return gpus / measured.most_units_a_second


def clip_s(size: str) -> float:
    """Return the seconds that a clip takes on one GPU, by the model of costs above."""
    return CLIPS[size] / SUSTAINED
