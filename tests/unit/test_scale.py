"""The page on scale: it holds what was measured, and what is computed from that is computed right."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from benchmarks import cluster, needs
from benchmarks.figures import Target
from benchmarks.needs import Measured, Run
from docs.make_scale import FIGURES, NODES, PAGE, PARTS, RUN, UNITS_S, Found, render

MEASURED = Measured(
    pool_ms=4.0,
    sweep_ms=0.25,
    most_units_a_second=500.0,
    driver_mib=400.0,
    units_mib=10.0,
    writes_a_metric=1.0,
    overhead_bytes=14.0,
    journal_bytes=250.0,
    segment_bytes=1_000_000,
    flush_s=2.0,
    beat_s=5.0,
    ask_s=5.0,
    nodes=64,
    gcs_cores=0.064,
    gcs_mib=128.0,
)
"""Figures that are easy to reckon with."""
LARGE = Run(gpus=1000, unit_s=10.0, metrics=3, experiments=6, cells=50, units=1_000_000)


@pytest.fixture
def found() -> Found:
    return Found.read(FIGURES)


class TestPage:
    def test_it_is_what_the_generator_makes_of_the_figures(self, found):
        text = PAGE.read_text(encoding="utf-8")
        assert render(text, found) == text

    def test_it_is_short(self):
        assert len(PAGE.read_text(encoding="utf-8").splitlines()) < 120

    def test_figures_on_the_reliability_page_are_these(self, found):
        text = " ".join((PAGE.parent / "reliability.md").read_text(encoding="utf-8").split())
        units = found.figures("million_units")
        assert f"1,000,000 units need {units['mib_above_start']} MiB of driver memory above start" in text
        assert f"and {units['seconds_to_see_that_nothing_is_left']:.0f} s to see that nothing is left" in text
        assert f"{units['journal_bytes_a_unit']} bytes a unit" in text

    def test_what_people_wrote_holds_no_figure(self):
        text = PAGE.read_text(encoding="utf-8")
        for name in PARTS:
            before, _, rest = text.partition(f"<!-- {name}: begin")
            text = before + rest.partition(f"<!-- {name}: end -->")[2]
        text = text.replace("1,000 GPUs", "").replace("1,000 processes", "").replace("S3", "")
        assert re.findall(r"\d+", text) == []

    def test_another_figure_is_another_page(self, found):
        text = PAGE.read_text(encoding="utf-8")
        figures = json.loads(json.dumps(found.benchmarks))
        figures["wide_pool"]["figures"]["one_by_one"]["driver_ms_a_unit"] *= 2
        changed = render(text, Found(found.machine, figures))
        differing = [name for name in PARTS if _part(text, name) != _part(changed, name)]
        assert differing == ["driver", "table", "limits"]

    def test_a_missed_target_is_shown(self, found):
        figures = json.loads(json.dumps(found.benchmarks))
        figures["pool_rate"]["targets"][0]["met"] = False
        assert "**FAIL**" in PARTS["targets"](Found(found.machine, figures))

    def test_every_benchmark_has_figures_and_each_target_of_the_issue_is_there(self, found):
        assert set(found.benchmarks) == set(cluster.BENCHMARKS)
        bounds = {
            (name, target["figure"], target["bound"], target["limit"])
            for name, result in found.benchmarks.items()
            for target in result["targets"]
        }
        assert bounds >= {
            ("million_units", "mib_above_start", "at most", 300),
            ("million_units", "units", "at least", 1_000_000),
            ("pool_rate", "window_2.units_a_second_median", "at least", 1000),
            ("many_nodes", "nodes_used", "at least", 64),
            ("many_nodes", "units_lost", "at most", 0),
        }

    def test_kept_verdicts_are_those_of_the_kept_figures(self, found):
        for result in found.benchmarks.values():
            for target in result["targets"]:
                bound = Target(**{key: target[key] for key in ("what", "figure", "bound", "limit")})
                assert bound.judge(result["figures"]) == target


def _part(text: str, name: str) -> str:
    return text.partition(f"<!-- {name}: begin")[2].partition(f"<!-- {name}: end -->")[0]


class TestNeeds:
    def test_units_of_ten_seconds_on_a_thousand_gpus(self):
        assert LARGE.units_a_second == 100
        # 1,000,000 units / 100 a second = 10,000 s.
        assert LARGE.hours == pytest.approx(10_000 / 3600)
        # 100 units x 4.25 ms.
        assert needs.driver_cores(LARGE, MEASURED) == pytest.approx(0.425)
        # 100 units x 3 metrics.
        assert needs.replica_puts(LARGE, MEASURED) == 300
        # 300 writes x (50 values of 4 bytes + 14).
        assert needs.replica_bytes(LARGE, MEASURED) == 300 * 214

    def test_units_of_ten_minutes_on_a_thousand_gpus(self):
        run = replace(LARGE, unit_s=600.0)
        assert run.units_a_second == pytest.approx(1.6667, abs=1e-4)
        # 600,000 s.
        assert run.hours == pytest.approx(166.67, abs=0.01)
        assert needs.driver_cores(run, MEASURED) == pytest.approx(0.00708, abs=1e-5)
        assert needs.replica_puts(run, MEASURED) == pytest.approx(5)

    def test_the_driver_asks_every_few_seconds_whatever_the_units_do(self):
        for unit_s in UNITS_S:
            run = replace(LARGE, unit_s=unit_s)
            # Seven groups and the journal every 2 s, and a heartbeat every 5 s.
            assert needs.driver_puts(run, MEASURED) == pytest.approx(4.2)
            # Half a megabyte of journal, and a megabyte of status, every 2 s.
            assert needs.driver_bytes(run, MEASURED) == 750_000
        assert needs.driver_lists(MEASURED) == pytest.approx(1.2)
        assert needs.driver_gets(MEASURED) == pytest.approx(1.4)

    def test_journal_and_start(self):
        assert needs.journal_bytes(LARGE, MEASURED) == 250_000_000
        # The root, six arrays of the baseline and eighteen of experiments, for each replica.
        assert needs.start_gets(LARGE) == 25_000

    def test_the_head_in_proportion(self):
        assert needs.gcs_cores(1000, MEASURED) == pytest.approx(1.0)
        assert needs.gcs_mib(1000, MEASURED) == pytest.approx(2000)
        assert needs.gcs_cores(64, MEASURED) == MEASURED.gcs_cores

    def test_the_shortest_unit(self):
        assert needs.shortest_unit_s(1000, MEASURED) == 2.0
        at_limit = replace(LARGE, unit_s=needs.shortest_unit_s(LARGE.gpus, MEASURED))
        assert at_limit.units_a_second == MEASURED.most_units_a_second

    @pytest.mark.parametrize("factor", [2, 10], ids=["double", "tenfold"])
    def test_what_grows_with_the_rate_of_units_grows_in_proportion(self, factor):
        faster = replace(LARGE, unit_s=LARGE.unit_s / factor)
        for need in (needs.driver_cores, needs.replica_puts, needs.replica_bytes):
            assert need(faster, MEASURED) == pytest.approx(factor * need(LARGE, MEASURED))

    def test_clips(self):
        # 6.9e15 and 1.15e18 operations at 5e14 a second.
        assert needs.clip_s("256 x 256 x 33") == pytest.approx(13.8)
        assert needs.clip_s("1024 x 1024 x 97") == pytest.approx(2300)


class TestMeasured:
    def test_constants_are_those_of_the_benchmarks(self):
        def unit(puts, sent, values):
            return {"unit": {"cells": {"requests": {"PUT": puts}, "bytes_sent": sent, "bytes_of_values": values}}}

        figures = {
            "wide_pool": {"one_by_one": {"driver_ms_a_unit": 5.0}, "in_heaps": {"units_a_second": 450.0}},
            "million_units": {"driver_ms_a_unit": 0.2, "mib_at_start": 440, "mib_above_start": 9},
            "many_nodes": {
                "nodes": 64,
                "cores_while_running": {"gcs": 0.05},
                "memory": {"gcs": {"mib_each": 70, "processes": 1}},
            },
            "store_requests": {
                "bucket": {
                    "units_of_1": unit(1.0, 37, 23),
                    "units_of_2": {**unit(2.0, 74, 46), "journal_bytes_a_unit": 252},
                },
                "constants": {
                    "journal_segment_bytes": 1_000_000,
                    "status_and_journal_every_s": 2.0,
                    "heartbeat_every_s": 5.0,
                    "stop_asked_every_s": 4.0,
                },
            },
        }
        measured = Measured.of({name: {"figures": value} for name, value in figures.items()})
        assert measured == replace(
            MEASURED,
            pool_ms=5.0,
            sweep_ms=0.2,
            most_units_a_second=450.0,
            driver_mib=440,
            units_mib=9,
            journal_bytes=252,
            ask_s=4.0,
            gcs_cores=0.05,
            gcs_mib=70,
        )

    def test_kept_figures_follow_the_law_that_the_formulas_assume(self, found):
        """One write for each array of a unit, and none else; one look-up for each array, once."""
        bucket = found.figures("store_requests")["bucket"]
        for metrics in (1, 2):
            unit = bucket[f"units_of_{metrics}"]["unit"]
            assert unit["cells"]["requests"] == {"PUT": metrics}
            assert unit["first_cells"]["requests"] == {"GET": metrics, "PUT": metrics}
            # The estimates of the one screened experiment come on top.
            assert unit["baseline"]["requests"] == {"PUT": 2 * metrics + 1}
            assert unit["screened"]["requests"] == {"GET": 1, "PUT": metrics}

    def test_the_driver_was_counted_to_ask_about_as_often_as_the_formulas_say(self, found):
        driver = found.figures("store_requests")["bucket"]["driver"]
        measured = Measured.of(found.benchmarks)
        run = replace(RUN, experiments=driver["groups"] - 1)
        for kind, expected in (
            ("PUT", needs.driver_puts(run, measured)),
            ("LIST", needs.driver_lists(measured)),
            ("GET", needs.driver_gets(measured)),
        ):
            assert driver["requests_a_second"][kind] == pytest.approx(expected, rel=0.3)

    def test_the_runs_of_the_page_are_those_that_were_asked_for(self):
        assert (RUN.gpus, UNITS_S, NODES[-1]) == (1000, (10.0, 60.0, 600.0), 1000)
