"""Metrics: what a scraper reads over HTTP after a made-up stream of events, and where it can be read."""

from __future__ import annotations

import socket
import urllib.request

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from cluster.events import (
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
from pipeline.replica import Receipt
from pipeline.telemetry import MetricsServer, Telemetry, TelemetryError

MAP, SWAP = (Unit(id=n, group=group, index=0, sample=0) for n, group in enumerate(("map", "swap")))


def done(unit=MAP, replica=0, seconds=2.0, **changes):
    numbers = {"cells": 10, "failed": 0, "bytes": 400, "row_forwards": 30, "seconds": seconds, "gpu_bytes": 0}
    receipt = Receipt(**{**numbers, **changes})
    return UnitDone(unit=unit.id, replica=replica, attempt=1, seconds=seconds, receipt=receipt), unit


def scrape(url):
    """Read the metrics as a scraper does: samples by name and labels."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/plain")
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {(s.name, *sorted(s.labels.values())): s.value for f in families for s in f.samples}


def scraped(*events, todo=0):
    telemetry = Telemetry()
    telemetry.start(todo, todo)
    for event, unit in events:
        telemetry.observe(event, unit)
    with MetricsServer(telemetry, 0) as server:
        return scrape(server.url)


def of(values, name):
    return {key[1:]: value for key, value in values.items() if key[0] == f"stepscope_{name}"}


class TestUnits:
    def test_counts_by_group(self):
        values = scraped(done(), done(), done(SWAP, cells=3, bytes=7, row_forwards=9), todo=5)
        assert of(values, "units_done_total") == {("map",): 2, ("swap",): 1}
        assert of(values, "cells_total") == {("map",): 20, ("swap",): 3}
        assert of(values, "written_bytes_total") == {("map",): 800, ("swap",): 7}
        assert of(values, "row_forwards_total") == {("map",): 60, ("swap",): 9}
        assert of(values, "units_pending") == {(): 2}

    def test_unit_with_cells_that_are_not_finite_has_failed(self):
        values = scraped(done(failed=4), todo=1)
        assert of(values, "units_failed_total") == {("map",): 1}
        assert of(values, "cells_failed_total") == {("map",): 4}
        assert of(values, "units_done_total") == {}
        assert of(values, "units_pending") == {(): 0}

    def test_unit_that_is_given_up_has_failed(self):
        retry = UnitRetried(unit=0, replica=0, attempt=1, error="x"), MAP
        values = scraped(retry, retry, (UnitFailed(unit=0, attempts=3, error="x"), MAP), todo=2)
        assert of(values, "units_retried_total") == {("map",): 2}
        assert of(values, "units_failed_total") == {("map",): 1}
        assert of(values, "units_pending") == {(): 1}

    def test_seconds_are_a_histogram(self):
        values = scraped(done(seconds=0.05), done(seconds=2.0), done(seconds=9000.0))
        buckets = of(values, "unit_seconds_bucket")
        # Labels are sorted by value: the bound comes before the name of the group.
        assert (buckets["0.1", "map"], buckets["3.0", "map"], buckets["7200.0", "map"]) == (1, 2, 2)
        assert buckets["+Inf", "map"] == 3
        assert of(values, "unit_seconds_sum") == {("map",): 9002.05}

    def test_copies_are_counted_and_first_starts_are_not(self):
        start = UnitStarted(unit=0, replica=0, attempt=1)
        copy = UnitStarted(unit=0, replica=1, attempt=1, copy=True)
        assert of(scraped((start, MAP), (copy, MAP)), "units_copied_total") == {("map",): 1}

    def test_event_of_a_unit_that_is_not_known_is_counted_too(self):
        event, _ = done()
        assert of(scraped((event, None)), "units_done_total") == {("unknown",): 1}


class TestReplicas:
    @given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["start", "lose", "release"])), max_size=30))
    def test_those_up_are_those_that_started_last(self, steps):
        make = {
            "start": lambda r: ReplicaStarted(replica=r),
            "lose": lambda r: ReplicaLost(replica=r, error="x"),
            "release": lambda r: ReplicaReleased(replica=r, reason="idle"),
        }
        telemetry = Telemetry()
        for replica, what in steps:
            telemetry.observe(make[what](replica), None)
        up = sum(what == "start" for what in dict(steps).values())
        read = telemetry.registry.get_sample_value
        assert read("stepscope_replicas_up") == up
        for name, what in (("starts", "start"), ("losses", "lose"), ("releases", "release")):
            assert read(f"stepscope_replica_{name}_total") == sum(w == what for _, w in steps)

    def test_memory_is_the_peak_of_each_replica(self):
        values = scraped(done(gpu_bytes=5), done(gpu_bytes=9), done(gpu_bytes=7), done(replica=1, gpu_bytes=3))
        assert of(values, "replica_gpu_peak_bytes") == {("0",): 9, ("1",): 3}

    def test_no_gpu_is_no_series(self):
        assert of(scraped(done()), "replica_gpu_peak_bytes") == {}

    @pytest.mark.parametrize(
        "end", [ReplicaLost(replica=0, error="x"), ReplicaReleased(replica=0, reason="x")], ids=["lost", "released"]
    )
    def test_replica_that_is_gone_has_no_series(self, end):
        values = scraped(done(gpu_bytes=5), (end, None), done(replica=1, gpu_bytes=3))
        assert of(values, "replica_gpu_peak_bytes") == {("1",): 3}

    def test_replica_that_comes_back_is_measured_anew(self):
        values = scraped(done(gpu_bytes=9), (ReplicaLost(replica=0, error="x"), None), done(gpu_bytes=4))
        assert of(values, "replica_gpu_peak_bytes") == {("0",): 4}


class TestPool:
    def test_waiting_ends_with_a_replica(self):
        waiting = PoolWaiting(seconds=40.0, reason="no node"), None
        assert of(scraped(waiting), "pool_waiting_seconds") == {(): 40}
        assert of(scraped(waiting, (ReplicaStarted(replica=0), None)), "pool_waiting_seconds") == {(): 0}

    def test_draining(self):
        assert of(scraped(), "pool_draining") == {(): 0}
        assert of(scraped((PoolDraining(units=3, limit_s=60), None)), "pool_draining") == {(): 1}


class TestServing:
    def test_two_sweeps_of_one_process_do_not_mix(self):
        first, second = Telemetry(), Telemetry()
        first.observe(*done())
        with MetricsServer(first, 0) as a, MetricsServer(second, 0) as b:
            assert a.port != b.port
            assert of(scrape(a.url), "units_done_total") == {("map",): 1}
            assert of(scrape(b.url), "units_done_total") == {}

    def test_values_are_those_of_now(self):
        telemetry = Telemetry()
        with MetricsServer(telemetry, 0) as server:
            for count in (1, 2):
                telemetry.observe(*done())
                assert of(scrape(server.url), "units_done_total") == {("map",): count}

    def test_this_machine_alone_is_the_default(self):
        with MetricsServer(Telemetry(), 0) as server:
            assert server.url == f"http://127.0.0.1:{server.port}/metrics"
            assert server._server.server_address[0] == "127.0.0.1"

    def test_end_frees_the_port(self):
        with MetricsServer(Telemetry(), 0) as server:
            port = server.port
        with MetricsServer(Telemetry(), port) as server:
            assert scrape(server.url)

    def test_error_inside_frees_the_port_too(self):
        with pytest.raises(RuntimeError), MetricsServer(Telemetry(), 0) as server:
            raise RuntimeError("the sweep broke")
        MetricsServer(Telemetry(), server.port).__exit__(None, None, None)

    def test_port_in_use_is_one_sentence(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(
                TelemetryError,
                match=rf"^metrics cannot be served at 127\.0\.0\.1:{port}: Address already in use\. "
                r"Choose another --metrics-port, 0 for a free one\.$",
            ):
                MetricsServer(Telemetry(), port)

    @pytest.mark.parametrize("port", [-1, 65536, 10**9])
    def test_port_that_does_not_exist(self, port):
        with pytest.raises(TelemetryError, match=rf"^no such port: {port}\. Use one from 1024 to 65535"):
            MetricsServer(Telemetry(), port)

    @pytest.mark.parametrize("host", ["203.0.113.7", "no such host", "256.1.1.1"], ids=["foreign", "words", "typo"])
    def test_host_that_is_not_this_machine(self, host):
        with pytest.raises(TelemetryError, match=r"^metrics cannot be served at .*:0: .*\. Choose another"):
            MetricsServer(Telemetry(), 0, host)

    def test_other_host(self):
        with MetricsServer(Telemetry(), 0, "0.0.0.0") as server:
            assert scrape(f"http://127.0.0.1:{server.port}/metrics")


def test_rows_are_the_metrics_that_exist():
    telemetry = Telemetry()
    for event, unit in [
        done(gpu_bytes=1, failed=1), done(), (UnitStarted(unit=0, replica=0, attempt=1), MAP),
        (UnitRetried(unit=0, replica=0, attempt=1, error=""), MAP),
    ]:  # fmt: skip
        telemetry.observe(event, unit)
    exist = {}
    for family in telemetry.registry.collect():
        samples = [s for s in family.samples if not s.name.endswith("_created")]
        labels = {", ".join(sorted(k for k in s.labels if k != "le")) for s in samples}
        assert len(labels) == 1, family.name
        name = f"{family.name}_total" if family.type == "counter" else family.name
        exist[name] = (family.type, labels.pop(), family.documentation)
    assert {name: (kind, labels, about) for name, kind, labels, about in telemetry.rows} == exist
