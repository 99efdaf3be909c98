"""Prometheus metrics of a running sweep: an observer of its events, and the port where they are read."""

from __future__ import annotations

from types import TracebackType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from cluster.events import (
    Event,
    PoolDraining,
    PoolWaiting,
    ReplicaLost,
    ReplicaReleased,
    ReplicaStarted,
    UnitDone,
    UnitFailed,
    UnitRetried,
    UnitStarted,
)
from pipeline.plan import Unit

PREFIX = "stepscope"
SECONDS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200)
"""Bounds of the histogram of seconds: from the embedded model to units of hours."""


class TelemetryError(ValueError):
    """The metrics cannot be served where that was asked for."""


class Telemetry:
    """Counts what a sweep tells. Each has a registry of its own, so that two in one process do not mix.

    Attributes
    ----------
    rows : name, kind, labels and meaning of every metric.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.rows: list[tuple[str, str, str, str]] = []
        self.units_done = self._counter("units_done", "units finished with a value for every cell")
        self.units_failed = self._counter(
            "units_failed", "units given up after their last attempt, or finished with a cell that has no finite value"
        )
        self.units_retried = self._counter("units_retried", "attempts at units that failed and are repeated")
        self.units_copied = self._counter("units_copied", "second copies of slow units that were started")
        self.cells = self._counter("cells", "cells computed")
        self.cells_failed = self._counter("cells_failed", "cells computed that have no finite value")
        self.bytes_written = self._counter("written_bytes", "bytes written to the store, uncompressed")
        self.row_forwards = self._counter("row_forwards", "denoiser forwards of one row each")
        self.unit_seconds = self._histogram("unit_seconds", "seconds that a finished unit took in its replica")
        self.units_pending = self._gauge("units_pending", "units of this run that are neither done nor failed")
        self.replica_starts = self._counter("replica_starts", "replicas that loaded their model", ())
        self.replica_losses = self._counter("replica_losses", "replicas that died, hung or could not start", ())
        self.replica_releases = self._counter("replica_releases", "replicas ended on purpose", ())
        self.replicas_up = self._gauge("replicas_up", "replicas that have loaded their model and live")
        self.waiting_seconds = self._gauge(
            "pool_waiting_seconds", "seconds since no replica had a place in the cluster; 0 once one has"
        )
        self.draining = self._gauge("pool_draining", "1 while no unit is handed out any more")
        self.gpu_peak = self._gauge(
            "replica_gpu_peak_bytes", "largest GPU memory that a unit of this replica allocated", ("replica",)
        )
        self._up: set[int] = set()
        self._peaks: dict[int, int] = {}

    def _counter(self, name: str, about: str, labels: tuple[str, ...] = ("group",)) -> Counter:
        self.rows.append((f"{PREFIX}_{name}_total", "counter", ", ".join(labels), about))
        return Counter(f"{PREFIX}_{name}", about, labels, registry=self.registry)

    def _gauge(self, name: str, about: str, labels: tuple[str, ...] = ()) -> Gauge:
        self.rows.append((f"{PREFIX}_{name}", "gauge", ", ".join(labels), about))
        return Gauge(f"{PREFIX}_{name}", about, labels, registry=self.registry)

    def _histogram(self, name: str, about: str) -> Histogram:
        self.rows.append((f"{PREFIX}_{name}", "histogram", "group", about))
        return Histogram(f"{PREFIX}_{name}", about, ("group",), buckets=SECONDS, registry=self.registry)

    def start(self, todo: int, total: int, cells: int = 0) -> None:
        """Take how much there is to do, as ``run_sweep`` announces it."""
        self.units_pending.set(todo)

    def observe(self, event: Event, unit: Unit | None) -> None:
        """Take one event."""
        group = "unknown" if unit is None else unit.group
        if isinstance(event, UnitDone):
            self._done(event, group)
        elif isinstance(event, UnitFailed):
            self.units_failed.labels(group).inc()
            self.units_pending.dec()
        elif isinstance(event, UnitRetried):
            self.units_retried.labels(group).inc()
        elif isinstance(event, UnitStarted):
            self.units_copied.labels(group).inc(int(event.copy))
        elif isinstance(event, PoolWaiting):
            self.waiting_seconds.set(event.seconds)
        elif isinstance(event, PoolDraining):
            self.draining.set(1)
        else:
            self._replica(event)

    def _done(self, event: UnitDone, group: str) -> None:
        receipt = event.receipt
        (self.units_failed if receipt.failed else self.units_done).labels(group).inc()
        self.units_pending.dec()
        self.cells.labels(group).inc(receipt.cells)
        self.cells_failed.labels(group).inc(receipt.failed)
        self.bytes_written.labels(group).inc(receipt.bytes)
        self.row_forwards.labels(group).inc(receipt.row_forwards)
        if receipt.cells:
            self.unit_seconds.labels(group).observe(event.seconds)
        if receipt.gpu_bytes > self._peaks.get(event.replica, 0):
            self._peaks[event.replica] = receipt.gpu_bytes
            self.gpu_peak.labels(str(event.replica)).set(receipt.gpu_bytes)

    def _replica(self, event: ReplicaStarted | ReplicaLost | ReplicaReleased) -> None:
        if isinstance(event, ReplicaStarted):
            self.replica_starts.inc()
            self.waiting_seconds.set(0)
            self._up.add(event.replica)
        else:
            (self.replica_losses if isinstance(event, ReplicaLost) else self.replica_releases).inc()
            self._up.discard(event.replica)
            # Numbers of replicas that come and go would otherwise pile up.
            if self._peaks.pop(event.replica, None) is not None:
                self.gpu_peak.remove(str(event.replica))
        self.replicas_up.set(len(self._up))


class MetricsServer:
    """Serves the metrics of a sweep over HTTP from a thread; use as a context manager.

    Parameters
    ----------
    port : 0 takes a free one, which ``port`` then tells. host : who may read: the address to listen at.

    Raises
    ------
    TelemetryError : the port is taken or not allowed, or the host is no address of this machine.
    """

    def __init__(self, telemetry: Telemetry, port: int, host: str = "127.0.0.1") -> None:
        if not 0 <= port <= 65535:
            raise TelemetryError(f"no such port: {port}. Use one from 1024 to 65535, or 0 for a free one.")
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=telemetry.registry)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise TelemetryError(
                f"metrics cannot be served at {host}:{port}: {reason}. Choose another --metrics-port, 0 for a free one."
            ) from error
        self.host, self.port = host, int(self._server.server_port)

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Where the metrics are read."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/metrics"
