"""Write the measured and computed parts of ``docs/scale.md`` from ``docs/scale.json``: ``python -m docs.make_scale``.

The JSON is what ``make bench-cluster`` found; no benchmark runs here. Whatever on the page holds a figure is made here,
so that the page cannot say what was not found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks import needs
from benchmarks.needs import Measured, Run
from docs.measured import Found, point, prose, targets, written
from docs.measured import table as table_of

PAGE = Path(__file__).with_name("scale.md")
FIGURES = Path(__file__).with_name("scale.json")
RUN = Run(gpus=1000, unit_s=60.0, metrics=3, experiments=6, cells=50, units=1_000_000)
UNITS_S = (10.0, 60.0, 600.0)
NODES = (125, 1000)
_PLACES = ("bucket", "folder")
_OF_NODE = ("raylet", "dashboard agent", "runtime env agent")
_UNITS = {
    "cells": "cells of an experiment",
    "first_cells": "the first of an experiment in a replica",
    "screened": "cells of a screened experiment",
    "baseline": "baseline",
}


def driver(found: Found) -> str:
    """Return what the driver takes."""
    million, rate, wide = (found.figures(name) for name in ("million_units", "pool_rate", "wide_pool"))
    nodes = found.figures("many_nodes")
    busy = nodes["cores_while_running"]
    alone = f"in this process, {million['units']:,} units that do nothing"
    rows: list[tuple[str, float, float]] = [(alone, million["units_a_second"], million["driver_ms_a_unit"])]
    for key, case in rate.items():
        if key.startswith("window_"):
            what = f"2 replicas, {key.removeprefix('window_')} units in the window of each, that do nothing"
            rows.append((what, case["units_a_second_median"], case["driver_ms_a_unit"]))
    what = f"{nodes['nodes']} replicas on {nodes['nodes']} nodes, units of a few seconds"
    rows.append((what, busy["units_a_second"], 1000 * busy["driver"] / busy["units_a_second"]))
    for case in (wide["one_by_one"], wide["in_heaps"]):
        what = f"{wide['replicas']:,} replicas, units of {case['unit_s']:g} s"
        rows.append((what, case["units_a_second"], case["driver_ms_a_unit"]))
    shown = [(what, f"{units:,.0f}", f"{ms:.2g}") for what, units, ms in rows]
    return table_of(("sweep", "units a second", "driver, ms of a core a unit"), shown) + prose(
        f"Memory: {million['mib_at_start']} MiB once libraries are loaded, and at most",
        f"{million['mib_above_start']} MiB",
        f"more while {million['units']:,} units are planned, driven and resumed. Planning them takes",
        f"{million['seconds_to_plan']:g} s, finding in the journal that none is left",
        f"{million['seconds_to_see_that_nothing_is_left']:.0f} s.",
    )


def requests(found: Found) -> str:
    """Return what was asked of a store."""
    store = found.figures("store_requests")
    columns = [(place, metrics) for place in _PLACES for metrics in (1, 2)]
    rows = [
        (words, *(_asked(store[place][f"units_of_{n}"]["unit"][kind]["requests"]) for place, n in columns))
        for kind, words in _UNITS.items()
    ]
    bucket, folder = (store[place]["driver"] for place in _PLACES)
    every = store["constants"]
    names = (f"{place}, {metrics} metric{'s' * (metrics > 1)}" for place, metrics in columns)
    return table_of(("one unit", *names), rows) + prose(
        f"The driver, with {bucket['groups'] - 1} experiments and a baseline, asks a bucket for",
        f"{_asked(bucket['requests_a_second'])} a second, and a folder for {_asked(folder['requests_a_second'])}, at",
        f"{bucket['units_a_second']:.0f} units a second. It writes status and journal every",
        f"{every['status_and_journal_every_s']:g} s and a heartbeat every {every['heartbeat_every_s']:g} s,",
        "and looks every",
        f"{every['stop_asked_every_s']:g} s whether it is to stop, however fast units end. A unit has",
        f"{store['bucket']['units_of_2']['journal_bytes_a_unit']} bytes in the journal. Creating and opening the store",
        f"took {sum(bucket['create_and_open'].values())} requests.",
    )


def table(found: Found) -> str:
    """Return the needs of runs with units of several lengths, each with its formula and the measured constants."""
    m = Measured.of(found.benchmarks)
    runs = [replace(RUN, unit_s=seconds) for seconds in UNITS_S]
    flush, beat, ask = f"{m.flush_s:g} s", f"{m.beat_s:g} s", f"{m.ask_s:g} s"
    per_put = f"{needs.VALUE_BYTES} B + {m.overhead_bytes:g} B"
    half = f"half of {_bytes(m.segment_bytes)} of journal"
    lines: list[tuple[str, str, Callable[[Run], str]]] = [
        ("units a second", "GPUs / seconds of a unit", lambda run: f"{run.units_a_second:.3g}"),
        ("hours in all", "units / units a second", lambda run: f"{run.hours:.3g}"),
        (
            "driver, cores",
            f"units a second x ({m.pool_ms:g} ms in the pool + {m.sweep_ms:g} ms)",
            lambda run: f"{needs.driver_cores(run, m):.2g}",
        ),
        (
            "replicas, PUT a second",
            f"units a second x metrics x {m.writes_a_metric:g}",
            lambda run: f"{needs.replica_puts(run, m):.3g}",
        ),
        (
            "replicas, sent a second",
            f"PUT x (cells x {per_put})",
            lambda run: _bytes(needs.replica_bytes(run, m)),
        ),
        (
            "driver, PUT a second",
            f"(baseline + experiments + journal) / {flush} + 1 / {beat}",
            lambda run: f"{needs.driver_puts(run, m):.2g}",
        ),
        ("driver, LIST a second", f"2 / {flush} + 1 / {beat}", lambda run: f"{needs.driver_lists(m):.2g}"),
        ("driver, GET a second", f"LIST + 1 / {ask}", lambda run: f"{needs.driver_gets(m):.2g}"),
        (
            "driver, sent a second, at most",
            f"({half} + units of the sweep x 1 B) / {flush}",
            lambda run: _bytes(needs.driver_bytes(run, m)),
        ),
        ("journal at the end", f"units x {m.journal_bytes:g} B", lambda run: _bytes(needs.journal_bytes(run, m))),
        (
            "GET at the start, at most",
            "GPUs x (1 + metrics x (experiments + 2))",
            lambda run: f"{needs.start_gets(run):,}",
        ),
    ]
    rows = [(what, formula, *(say(run) for run in runs)) for what, formula, say in lines]
    clips = ", ".join(f"{needs.clip_s(size):,.0f} s at {size}" for size in needs.CLIPS)
    return (
        prose(
            f"{RUN.gpus:,} GPUs with a replica each, a bucket, {RUN.metrics} metrics, {RUN.experiments} experiments,",
            f"{RUN.units:,} units of {RUN.cells} cells:",
        ).lstrip()
        + "\n\n"
        + table_of(("need", "formula", *(f"units of {seconds:g} s" for seconds in UNITS_S)), rows)
        + prose(
            "For scale: one clip of a model of 14 billion parameters, 50 steps of two calls, takes a GPU that sustains",
            f"{needs.SUSTAINED / 1e12:.0f} TFLOP/s {clips} (height x width x frames; computed, not measured).",
            f"Memory of the driver: {m.driver_mib:g} + {m.units_mib:g} MiB, as measured.",
        )
    )


def head(found: Found) -> str:
    """Return what the head of a cluster takes, measured and in proportion."""
    nodes, measured = found.figures("many_nodes"), Measured.of(found.benchmarks)
    each = {kind: f"{kind} {size['mib_each']} MiB" for kind, size in nodes["memory"].items()}
    of_head = ", ".join(text for kind, text in each.items() if kind not in (*_OF_NODE, "worker"))
    rows = [(f"{nodes['nodes']} nodes, measured", f"{measured.gcs_cores:.2g}", f"{measured.gcs_mib:,}")]
    for count in NODES:
        what = f"{count:,} nodes of {RUN.gpus // count} GPU{'s' * (RUN.gpus > count)}, in proportion"
        rows.append((what, f"{needs.gcs_cores(count, measured):.2g}", f"{needs.gcs_mib(count, measured):,.0f}"))
    idle = " and ".join(
        f"{stage['gcs_cores']:.2g} cores and {stage['gcs_mib']} MiB with {stage['nodes']}" for stage in nodes["stages"]
    )
    return table_of(("GCS while units run", "cores", "MiB"), rows) + prose(
        f"Idle, it took {idle} nodes. The head has, in memory that no other process shares: {of_head}. Every",
        "node, the head",
        f"too, has: {', '.join(each[kind] for kind in _OF_NODE)}. A replica without a model: {each['worker']}.",
        f"All {nodes['nodes']} nodes were up after {nodes['stages'][-1]['seconds_to_start']:.0f} s, their",
        "replicas after",
        f"{nodes['seconds_to_start_the_replicas']:.0f} s more; {nodes['nodes_killed']} nodes were killed in",
        "the middle;",
        f"{nodes['units_done']:,} of {nodes['units']:,} units were done, {nodes['units_retried']} of them at a",
        "second attempt.",
    )


def limits(found: Found) -> str:
    """Return where the limit is."""
    measured = Measured.of(found.benchmarks)
    shortest = needs.shortest_unit_s(RUN.gpus, measured)
    puts = needs.replica_puts(replace(RUN, unit_s=shortest), measured)
    full = 1000 / (measured.pool_ms + measured.sweep_ms)
    return "\n".join(
        point(*lines)
        for lines in (
            (
                f"**The driver** comes first. It fed {measured.most_units_a_second:.0f} units a second to",
                f"{RUN.gpus:,} replicas, so units shorter than {shortest:.2g} s leave GPUs waiting. Answered",
                f"one by one, a core would be full at {full:.0f} a second, units of {RUN.gpus / full:.2g} s.",
                "Larger units (`unit_cells`) help; the price is that more is computed again when a node dies.",
            ),
            (
                f"**The bucket** gets {puts:,.0f} writes a second at that pace, and",
                f"{RUN.units * RUN.metrics:,} objects from",
                f"{RUN.units:,} units: requests, not bytes, are what it costs. All lie below one prefix.",
            ),
            (
                f"**The journal** of {RUN.units:,} units, {_bytes(needs.journal_bytes(RUN, measured))}, is",
                "read whole by each",
                "resume.",
            ),
        )
    )


def _asked(counts: dict[str, float]) -> str:
    return ", ".join(f"{n:.2g} {kind}" for kind, n in counts.items())


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


PARTS = {
    "targets": targets,
    "driver": driver,
    "requests": requests,
    "table": table,
    "head": head,
    "limits": limits,
}


def render(text: str, found: Found) -> str:
    """Return the page with the parts between its marks written anew."""
    return written(text, PARTS, found, "make bench-cluster")


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), Found.read(FIGURES)), encoding="utf-8")
