"""Write the measured parts of ``docs/performance.md`` from its JSON: ``python -m docs.make_performance``.

The JSON is what ``make bench`` found; no benchmark runs here. Whatever on the page holds a figure is made here, so that
the page cannot say what was not found.
"""

from __future__ import annotations

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


PARTS = {"targets": targets, "cells": cells, "efficiency": efficiency, "scaling": scaling}


def render(text: str, found: Found) -> str:
    """Return the page with the parts between its marks written anew."""
    return written(text, PARTS, found, "make bench")


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), Found.read(FIGURES)), encoding="utf-8")
