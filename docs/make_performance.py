"""Write the measured parts of ``docs/performance.md`` from its JSON: ``python -m docs.make_performance``.

The JSON is what ``make bench`` found; no benchmark runs here. Whatever on the page holds a figure is made here, so that
the page cannot say what was not found.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from docs.measured import Found, prose, targets, written
from docs.measured import table as table_of

PAGE = Path(__file__).with_name("performance.md")
FIGURES = Path(__file__).with_name("performance.json")


def cells(found: Found) -> str:
    """Return what a cell takes both ways, and what would bound it without sharing."""
    figures = found.figures("naive_ratio")
    rows = []
    for case in figures.values():
        loop, ours = case["seconds_a_cell"]["naive"], case["seconds_a_cell"]["stepscope"]
        alone, batched = _bare(case)
        rows.append(
            (
                str(case["threads"]),
                f"{1000 * loop:.0f}",
                f"{1000 * ours:.1f}",
                f"**{case['naive_ratio']:g}**",
                f"{alone:g}, {batched:g}",
                f"{_bound(case):.1f}",
            )
        )
    head = (
        "threads",
        "loop, ms a cell",
        "stepscope, ms a cell",
        "ratio",
        f"bare denoiser, ms a row: alone, {_most_rows(figures)} rows",
        "ratio by replay and batching alone",
    )
    case = figures["all_cores"]
    return table_of(head, rows) + prose(
        f"Cells compared: {case['cells']['naive']} by the loop, {case['cells']['stepscope']} by stepscope; their",
        f"metrics differ by {case['largest_difference']:g} at most. The last column is what the bare denoiser allows",
        "without sharing: a cell of a map over all steps computes half of them, each as a row of a full forward.",
        "On a processor such a row costs not much less than one alone, as the table shows; that is what bounds the",
        "ratio, and it grows with the cores, which a forward of one row cannot use.",
    )


def _bare(case: dict[str, Any]) -> tuple[float, float]:
    (_, alone), (_, batched) = sorted(case["bare_ms_a_row"].items(), key=lambda item: int(item[0]))
    return alone, batched


def _most_rows(figures: dict[str, Any]) -> int:
    return max(map(int, figures["all_cores"]["bare_ms_a_row"]))


def _bound(case: dict[str, Any]) -> float:
    alone, batched = _bare(case)
    # All steps of the loop for one row alone, over the mean number of those left in a full forward.
    return 2 * case["steps"] / (case["steps"] + 1) * alone / batched


def efficiency(found: Found) -> str:
    """Return the efficiency of the engine, group by group."""
    figures = found.figures("engine_efficiency")
    rows = [(f"`{name}`", f"{value:g}") for name, value in figures["by_group"].items()]
    rows.append(("**all**", f"**{figures['engine_efficiency']:g}**"))
    return table_of(("units of", "bare / sweep"), rows) + prose(
        f"{figures['row_forwards']:,} row-forwards on {figures['threads']} thread:",
        f"{figures['seconds']['sweep']:g} s in the sweep, {figures['seconds']['bare']:g} s bare.",
    )


def scaling(found: Found) -> str:
    """Return what more replicas give."""
    figures = found.figures("scaling")
    rows = []
    for name, words in (
        ("two_replicas", "embedded model, row-forwards a second: 1 and 2 replicas of one thread"),
        ("eight_simulated", "a denoiser that is waited for, units a second: 1 and 8 replicas"),
    ):
        few, many = figures[name]["rates"].values()
        rows.append((words, _range(few), _range(many), f"**{figures[name]['speedup']:g}**"))
    return table_of(("", "one", "more", "ratio of medians"), rows)


def _range(rates: list[float]) -> str:
    return f"{min(rates):.3g} to {max(rates):.3g}"


def store(found: Found) -> str:
    """Return the shares of writing and measuring, and the speed of the aggregation."""
    shares, effects = found.figures("store_share"), found.figures("effects")
    names = {"demo": "the demo's metrics", "demo_with_fields": "the same and two fields"}
    rows = [
        (words, f"{100 * shares[key]['write_share']:.2g} %", f"{100 * shares[key]['measure_share']:.2g} %")
        for key, words in names.items()
    ]
    sizes = [
        (
            f"{size['gb']:.3g} GB",
            f"{size['numpy']['processor']:.3g}",
            f"{size['dask']['processor']:.3g}",
            f"{size['speed']:.2g}",
            f"{size['peak_mb']:,} MB",
        )
        for size in effects["sizes"].values()
    ]
    return (
        table_of(("a unit with", "writing", "decoding and metrics"), rows)
        + "\n\n"
        + table_of(("decoded", "numpy loop, s", "effects, s", "speed", "peak of effects"), sizes)
        + prose(f"Seconds a GB of the largest store are {effects['linear']:g} of those of the smallest.")
    )


def memory(found: Found) -> str:
    """Return both peaks."""
    figures = found.figures("memory")
    return prose(
        f"{figures['replica_mib']:,.0f} MiB over {figures['bare_mib']:,.0f} MiB: **{figures['memory_ratio']:g}**, with",
        f"{figures['rows_per_forward']} rows of a forward, on {figures['device']}.",
    ).strip()


def precision(found: Found) -> str:
    """Return the runs of both designs."""
    figures = found.figures("precision")
    runs, forwards = figures["runs"], figures["row_forwards"]
    rows = [
        (words, f"{what['fixed']:,}", f"{what['rounds']:,}", f"**{what['ratio']:g}**")
        for words, what in (("runs", runs), ("row-forwards", forwards))
    ]
    stopped = ", ".join(f"{count} after {n}" for n, count in figures["problems_in_rounds"]["cells"].items())
    return table_of(("", "every cell equally often", "in rounds", "ratio"), rows) + prose(
        f"The demo's experiments with {figures['problems']} mazes, {figures['samples']} samples and {figures['steps']}",
        f"steps; {figures['cells_of_a_sample']} cells, {figures['cells_that_matter']} of them matter, half-width",
        f"{figures['half_width']:g} of `{figures['metric']}`. Cells stopped: {stopped} problems.",
    )


def wall(found: Found) -> str:
    """Return predicted and true times."""
    figures = found.figures("wall_time")
    names = {"reduced": "a reduced demo", "demo": "the demo"}
    rows = [
        (
            words,
            f"{figures[key]['predicted_s']:.0f}",
            f"{figures[key]['actual_s']:.0f}",
            f"{100 * figures[key]['error']:.0f} %",
        )
        for key, words in names.items()
    ]
    return table_of(("sweep", "predicted, s", "taken, s", "error"), rows)


PARTS = {
    "targets": targets,
    "cells": cells,
    "efficiency": efficiency,
    "scaling": scaling,
    "store": store,
    "memory": memory,
    "precision": precision,
    "wall": wall,
}


def render(text: str, found: Found) -> str:
    """Return the page with the parts between its marks written anew; a part whose figures are missing says so."""
    return written(text, {name: _or_missing(make) for name, make in PARTS.items()}, found, "make bench")


def _or_missing(make: Callable[[Found], str]) -> Callable[[Found], str]:
    def part(found: Found) -> str:
        try:
            return make(found)
        except KeyError as error:
            return f"`{error.args[0]}` has not been measured: `make bench`."

    return part


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), Found.read(FIGURES)), encoding="utf-8")
