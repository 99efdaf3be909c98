"""The dashboard: what is drawn at a fixed width, in plain lines and on a page, whatever the store holds."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pipeline.causes import Cause
from pipeline.dashboard import cut, draw, duration, plain_lines, rate, size
from pipeline.status import Driver, GroupStatus, Snapshot
from pipeline.tally import ReplicaTally, Speed

NOW = 1000.0


def group(name="patch_map", done=5, pending=4, failed=1):
    units = done + pending + failed
    return GroupStatus(
        group=name, units=units, done=done, pending=pending, failed=failed,
        cells=units * 100, cells_done=done * 100, cells_pending=pending * 100,
    )  # fmt: skip


def replica(number, heard=990.0, **changes):
    found = ReplicaTally(replica=number, units=3, cells=30, seconds=10.0, last="patch_map 7", heard=heard, **changes)
    found.recent.append((30, 10.0))
    return found


SNAPSHOT = Snapshot(
    store="runs/demo.zarr",
    state="running",
    groups=(group("baseline", 2, 0, 0), group()),
    speed=Speed(units_per_s=0.5, cells_per_s=120.0, busy=3.9, span_s=301.0),
    left_s=4325.0,
    heard_s=3.0,
    driver=None,
    replicas=(replica(0, gpu_bytes=70_000_000_000), replica(1, losses=2)),
    replicas_seen=3,
    retries=4,
    losses=2,
    causes=(
        Cause(cause="ValueError: bad <n>", units=1, retries=3, example="ValueError: bad 7", where="patch_map 7"),
        Cause(cause="ActorDiedError", losses=2, example="ActorDiedError", where=""),
    ),
    bytes=12_300_000,
    row_forwards=98765,
    gpu_bytes=70_000_000_000,
    now=NOW,
)


def page(snapshot=SNAPSHOT, width=80, height=40, *, terminal=False):
    out = io.StringIO()
    Console(
        file=out, width=width, height=height, force_terminal=terminal, color_system="standard" if terminal else None
    ).print(draw(snapshot, height))
    return out.getvalue()


class TestPlainLines:
    def test_everything_is_told(self):
        assert list(plain_lines(SNAPSHOT)) == [
            "               group   units    done  pending  failed",
            "            baseline       2       2        0       0",
            "           patch_map      10       5        4       1",
            "",
            "runs/demo.zarr: running; last heard of 3 s ago",
            "     speed  30 units/min, 120 cells/s, 3.9 replicas busy in the last 5 min",
            " time left  about 1 h 12 min",
            "      work  12.3 MB written, 98,765 row forwards, GPU peak 70 GB",
            "  replicas  2 of 3 heard of lately; 2 losses, 4 retries of units",
            "failures by cause:",
            "  1 unit, 3 retries: ValueError: bad <n>",
            "      patch_map 7: ValueError: bad 7",
            "  2 losses: ActorDiedError",
        ]

    def test_new_store_has_little_to_tell(self):
        new = replace(SNAPSHOT, speed=None, left_s=None, causes=(), replicas=(), replicas_seen=0, gpu_bytes=0)
        text = "\n".join(plain_lines(new))
        assert "time left  unknown before the first unit" in text
        assert "speed" not in text
        assert "GPU" not in text
        assert "cause" not in text


STATES = [
    pytest.param({"state": "running"}, "running; last heard of 3 s ago", id="running"),
    pytest.param(
        {"state": "silent", "heard_s": 754.0},
        "nothing heard for 12 min: it has died, or its units take long",
        id="silent",
    ),
    pytest.param({"state": "stopped", "heard_s": 7.0}, "stopped 7 s ago with 4 units pending", id="stopped"),
    pytest.param({"state": "finished"}, "finished, 1 failed; last heard of 3 s ago", id="finished-with-failures"),
    pytest.param(
        {"state": "finished", "groups": (group(failed=0, pending=0),)},
        "finished; last heard of 3 s ago",
        id="finished",
    ),
]


class TestState:
    @pytest.mark.parametrize(("changes", "text"), STATES)
    def test_is_told_in_words(self, changes, text):
        changed = replace(SNAPSHOT, **changes)
        assert f"runs/demo.zarr: {text}" in list(plain_lines(changed))
        assert f"runs/demo.zarr  {text}" in page(changed)

    def test_dead_sweep_has_no_promise(self):
        told = "\n".join(plain_lines(replace(SNAPSHOT, state="silent")))
        assert "about 1 h 12 min, at the last speed, once it runs again" in told

    def test_finished_sweep_has_nothing_left(self):
        assert "time left" not in page(replace(SNAPSHOT, state="finished"))

    @pytest.mark.parametrize(("released", "words"), [(False, "heart beat"), (True, "gave the store back")])
    def test_driver_is_named(self, released, words):
        driver = Driver(holder="process 7 on node-1", heartbeat=NOW - 65, released=released)
        assert f"process 7 on node-1, {words} 1 min 5 s ago" in page(replace(SNAPSHOT, driver=driver))


class TestPage:
    @pytest.mark.parametrize("width", [60, 80, 140])
    def test_fills_the_width_and_no_more(self, width):
        lines = page(width=width).splitlines()
        assert max(map(len, lines)) <= width
        bars = [line for line in lines if "█" in line]
        assert len(bars) == 2
        assert all(len(line) == width for line in bars)

    def test_at_eighty_columns_it_is_this(self):
        assert [line.rstrip() for line in page().splitlines()[:5]] == [
            " runs/demo.zarr  running; last heard of 3 s ago",
            "",
            " group                                           units done  failed  cells done",
            " baseline   ███████████████████████████████████         2/2       0     200/200",
            " patch_map  ██████████████████xxx░░░░░░░░░░░░░░        5/10       1   500/1,000",
        ]

    def test_colours_only_on_a_terminal(self):
        assert "\x1b[" in page(terminal=True)
        assert "\x1b[" not in page()

    def test_causes_keep_their_example_and_counts(self):
        lines = [line.strip() for line in page().splitlines()]
        at = lines.index("failures by cause")
        assert lines[at + 1 : at + 4] == [
            "1 unit  ValueError: bad <n>",
            "3 retries  patch_map 7: ValueError: bad 7",
            "2 losses  ActorDiedError",
        ]

    def test_replicas_have_a_row_each(self):
        lines = page().splitlines()
        rows = [line.split() for line in lines[-2:]]
        assert rows[0] == ["0", "patch_map", "7", "3", "3", "70", "GB", "0", "10", "s", "ago"]
        assert rows[1] == ["1", "patch_map", "7", "3", "3", "-", "2", "10", "s", "ago"]

    def test_of_many_replicas_the_silent_ones_are_shown(self):
        many = tuple(replica(n, heard=NOW - n) for n in range(100))
        text = page(replace(SNAPSHOT, replicas=many, replicas_seen=100), height=60)
        shown = [line.split()[0] for line in text.splitlines() if "patch_map 7" in line and "ago" in line]
        assert shown == [str(n) for n in range(99, 87, -1)]
        assert "and 88 more, all heard of later" in text

    @pytest.mark.parametrize(("height", "replicas"), [(10, 0), (20, 0), (24, 4), (30, 10), (60, 12)], ids=str)
    def test_low_terminal_shows_fewer_replicas(self, height, replicas):
        many = tuple(replica(n) for n in range(100))
        lines = page(replace(SNAPSHOT, replicas=many), height=height).splitlines()
        assert sum("ago" in line and "patch_map 7" in line for line in lines) == replicas
        assert len(lines) <= max(20, height)
        assert any("failures by cause" in line for line in lines)

    def test_of_many_causes_the_worst_are_shown(self):
        causes = tuple(Cause(cause=f"Error{chr(97 + n)}", units=30 - n, example="x") for n in range(20))
        changed = replace(SNAPSHOT, causes=causes)
        for text in (page(changed), "\n".join(plain_lines(changed))):
            assert "Errorh" in text
            assert "Errori" not in text
            assert "and 12 more causes" in text

    def test_example_that_adds_nothing_is_its_unit_alone(self):
        cause = Cause(cause="boom", units=1, example="boom", where="map 1")
        lines = list(plain_lines(replace(SNAPSHOT, causes=(cause,))))
        assert lines[-2:] == ["  1 unit: boom", "      map 1"]

    @pytest.mark.parametrize(
        "text", ["[/bold] broken", "[red]not markup[/red]", "[link=http://x]y[/link]"], ids=["closing", "style", "link"]
    )
    def test_brackets_are_shown_as_they_are(self, text):
        cause = Cause(cause=text, units=1, example=text, where="map 1")
        assert page(replace(SNAPSHOT, causes=(cause,), store=text)).count(text) == 2
        assert "\n".join(plain_lines(replace(SNAPSHOT, causes=(cause,), store=text))).count(text) == 2


class TestBar:
    @given(st.integers(0, 300), st.lists(st.integers(0, 10**9), min_size=3, max_size=3))
    def test_parts_add_up_and_nothing_vanishes(self, width, counts):
        parts = cut(width, counts)
        assert sum(parts) == (width if sum(counts) else 0)
        assert min(parts) >= 0
        if width >= 3:
            assert [part > 0 for part in parts] == [count > 0 for count in counts]

    @pytest.mark.parametrize(
        ("counts", "parts"),
        [((1, 0, 0), [10, 0, 0]), ((1, 1, 0), [5, 5, 0]), ((999, 1, 0), [9, 1, 0]), ((0, 0, 0), [0, 0, 0])],
        ids=["all", "halves", "one-in-a-thousand", "none"],
    )
    def test_cut(self, counts, parts):
        assert cut(10, counts) == parts


class TestNumbers:
    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (61, "1 min 1 s"), (599, "9 min 59 s"), (754, "12 min"),
            (3599.7, "1 h 0 min"), (4325, "1 h 12 min"), (172799, "47 h 59 min"), (180000, "2 d 2 h"),
        ],
    )  # fmt: skip
    def test_duration(self, seconds, text):
        assert duration(seconds) == text

    @pytest.mark.parametrize(
        ("count", "text"),
        [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (12_300_000, "12.3 MB"), (10**17, "100 PB"),
         (10**19, "1e+04 PB")],
    )  # fmt: skip
    def test_size(self, count, text):
        assert size(count) == text

    @pytest.mark.parametrize(
        ("per_second", "text"),
        [(1234.5, "1,234 x/s"), (99.6, "100 x/s"), (2.34, "2.3 x/s"), (0.5, "30 x/min"), (1 / 600, "6 x/h"),
         (1e-5, "0.036 x/h"), (0.0, "0 x/h")],
    )  # fmt: skip
    def test_rate(self, per_second, text):
        assert rate(per_second, "x") == text
