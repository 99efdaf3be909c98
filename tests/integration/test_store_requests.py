"""What the benchmark of requests counts is what was asked: by a client of the bucket, and by a real sweep."""

from __future__ import annotations

import os

import pytest

from benchmarks import counted, store_requests
from benchmarks.counted import DRIVER, REPLICA, Tally
from benchmarks.store_requests import EXPERIMENTS, METRICS, config, counted_place
from pipeline.plan import make_plan
from pipeline.store import locate

pytest.importorskip("moto.server")


class TestBucket:
    def test_each_request_is_counted_once_with_its_bytes(self):
        tally = Tally()
        with counted.bucket(tally) as url:
            place = locate(f"{url}/run.zarr")
            place.write("map/c/0", b"12345")
            with tally.replica():
                place.write("map/c/1", b"123")
                assert place.read("map/c/1") == b"123"
                # The driver's heartbeat, meanwhile.
                place.write("lease/000001.json", b"{}")
                assert place.list("lease") == ["lease/000001.json"]
            assert place.list() == ["lease/000001.json", "map/c/0", "map/c/1"]
            assert place.exists("map/c/0")
            assert place.read("nothing") is None
        assert tally.of(DRIVER) == {"GET": 1, "HEAD": 1, "LIST": 2, "PUT": 2}
        assert tally.of(REPLICA) == {"GET": 1, "PUT": 1}
        assert dict(tally.sent) == {DRIVER: 7, REPLICA: 3}

    def test_buckets_are_apart_and_the_environment_is_as_before(self, monkeypatch):
        monkeypatch.setenv("AWS_REGION", "eu-north-1")
        monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
        for _ in range(2):
            with counted.bucket(Tally()) as url:
                assert os.environ["AWS_REGION"] == "us-east-1"
                place = locate(f"{url}/run.zarr")
                assert place.list() == []
                place.write("a", b"1")
        assert os.environ["AWS_REGION"] == "eu-north-1"
        assert "AWS_ENDPOINT_URL" not in os.environ


@pytest.fixture(scope="module", params=store_requests.PLACES)
def found(request):
    plan, tally = make_plan(config(METRICS, 1, ("map",))), Tally()
    with counted_place(request.param, tally) as place:
        told = store_requests.units(plan, place, tally)
        # Nothing was written behind the back of the tally.
        chunks = [key for key in locate(place).list("map/goal_evidence") if "/c/" in key]
    return request.param, plan, told, chunks


class TestUnits:
    def test_every_unit_writes_each_array_once(self, found):
        kind, plan, told, chunks = found
        writes = "PUT" if kind == "bucket" else "rename"
        assert told["metrics"] == 2
        for name in ("first_cells", "cells"):
            assert told["unit"][name]["requests"][writes] == 2
        assert told["unit"]["first_baseline"]["requests"][writes] == 4
        counts = [told["unit"][name]["units"] for name in ("first_baseline", "first_cells", "cells")]
        assert counts == [1, 1, plan.group_units("map") - 1]
        assert len(chunks) == plan.group_units("map")

    def test_only_the_first_unit_of_a_group_reads(self, found):
        kind, _, told, _ = found
        reads = "GET" if kind == "bucket" else "open to read"
        assert told["unit"]["first_cells"]["requests"][reads] == 2
        assert reads not in told["unit"]["cells"]["requests"]


@pytest.mark.parametrize("kind", store_requests.PLACES)
def test_the_driver_alone_is_counted_while_units_write_nothing(kind):
    plan, tally = make_plan(config(METRICS, 1, ("map",))), Tally()
    with counted_place(kind, tally) as place:
        told = store_requests.driver(plan, place, tally, unit_s=0.0)
    assert tally.of(REPLICA) == {}
    assert told["groups"] == 2
    assert sum(told["create_and_open"].values()) > 10


def test_the_sweep_has_a_screened_experiment():
    plan = make_plan(config(METRICS, 1))
    assert [grid.experiment.name for grid in plan.screened] == ["screened"]
    assert set(plan.by_name) == set(EXPERIMENTS)
