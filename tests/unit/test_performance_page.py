"""The page on speed: it holds what was measured, every claim has its target, and nothing else has a figure."""

from __future__ import annotations

import importlib
import json
import re

import pytest

from benchmarks import throughput
from benchmarks.figures import Target
from docs.make_performance import FIGURES, PAGE, PARTS, render
from docs.measured import Found


@pytest.fixture
def found() -> Found:
    return Found.read(FIGURES)


def part(text: str, name: str) -> str:
    begin, end = f"<!-- {name}: begin, written by `make bench` -->", f"<!-- {name}: end -->"
    return text.partition(begin)[2].partition(end)[0]


def test_it_is_what_the_generator_makes_of_the_figures(found):
    text = PAGE.read_text(encoding="utf-8")
    assert render(text, found) == text, "docs/performance.json has changed: python -m docs.make_performance"
    assert all(part(text, name).strip() for name in PARTS)


CLAIMS = {
    ("naive_ratio", "all_cores.naive_ratio", "at least", 8),
    ("naive_ratio", "all_cores.largest_difference", "at most", 1e-5),
    ("engine_efficiency", "engine_efficiency", "at least", 0.9),
    ("scaling", "two_replicas.speedup", "at least", 1.85),
    ("scaling", "eight_simulated.speedup", "at least", 7.6),
    ("store_share", "demo.write_share", "at most", 0.03),
    ("effects", "speed", "at least", 0.5),
    ("effects", "peak_mb", "at most", 1000),
    ("memory", "memory_ratio", "at most", 1.3),
    ("precision", "runs.ratio", "at least", 3),
    ("wall_time", "demo.error", "at most", 0.25),
}


def test_each_claim_is_a_target_of_its_benchmark():
    for name, figure, bound, limit in CLAIMS:
        targets = importlib.import_module(f"benchmarks.{name}").TARGETS
        assert (figure, bound, limit) in {(target.figure, target.bound, target.limit) for target in targets}
    assert {name for name, *_ in CLAIMS} == set(throughput.BENCHMARKS)


def test_what_was_not_measured_is_said_to_be_so(found):
    assert set(found.benchmarks) <= set(throughput.BENCHMARKS)
    text = render(PAGE.read_text(encoding="utf-8"), Found(found.machine, {}))
    assert part(text, "memory").strip() == "`memory` has not been measured: `make bench`."
    for name in set(throughput.BENCHMARKS) - set(found.benchmarks):
        assert f"`{name}` has not been measured" in PAGE.read_text(encoding="utf-8")


def test_kept_verdicts_are_those_of_the_kept_figures(found):
    for result in found.benchmarks.values():
        for target in result["targets"]:
            bound = Target(**{key: target[key] for key in ("what", "figure", "bound", "limit")})
            assert bound.judge(result["figures"]) == target


@pytest.mark.parametrize(
    ("benchmark", "path", "changed"),
    [
        ("naive_ratio", ("one_thread", "naive_ratio"), "cells"),
        ("engine_efficiency", ("engine_efficiency",), "efficiency"),
        ("scaling", ("two_replicas", "speedup"), "scaling"),
        ("store_share", ("demo", "write_share"), "store"),
        ("effects", ("linear",), "store"),
        ("memory", ("memory_ratio",), "memory"),
        ("precision", ("runs", "ratio"), "precision"),
        ("wall_time", ("demo", "predicted_s"), "wall"),
    ],
)
def test_another_figure_is_another_page(found, benchmark, path, changed):
    text = PAGE.read_text(encoding="utf-8")
    if part(text, changed).strip().endswith("has not been measured: `make bench`."):
        pytest.skip(f"{changed} has not been measured")
    figures = json.loads(json.dumps(found.benchmarks))
    *places, last = path
    node = figures[benchmark]["figures"]
    for place in places:
        node = node[place]
    node[last] = 2 * node[last] + 1
    other = render(text, Found(found.machine, figures))
    assert [name for name in PARTS if part(text, name) != part(other, name)] == [changed]


def test_what_people_wrote_holds_no_measured_figure():
    text = PAGE.read_text(encoding="utf-8")
    for name in PARTS:
        before, _, rest = text.partition(f"<!-- {name}: begin")
        text = before + rest.partition(f"<!-- {name}: end -->")[2]
    for known in ("1e-5", "batch 1", "1.3 billion", "480p", "Above 1", "excludes 0"):
        assert known in text
        text = text.replace(known, "")
    assert re.findall(r"\d+", re.sub(r"`[^`]*`", "", text)) == []


def test_each_way_to_be_fast_names_a_test_that_is_there():
    named = re.findall(r"`(tests/[a-z_/]+\.py)`", PAGE.read_text(encoding="utf-8"))
    assert len(named) >= 7
    assert [path for path in named if not (PAGE.parents[1] / path).is_file()] == []
