"""Watching: once, as JSON, or live until nothing is pending, with the writing between two looks."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from pipeline.watch import show
from tests.journal_fixture import START, append, done, failed, write_store


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "run.zarr", {"map": (2, 2)}, samples=1)


class Writer:
    """Stands for the sweep in another process: writes one unit in every pause."""

    def __init__(self, store, *entries):
        self.store, self.entries, self.pauses = store, list(entries), []

    def __call__(self, seconds):
        self.pauses.append(seconds)
        assert self.entries, "nothing is left to write, and still it watches"
        append(self.store, self.entries.pop(0))


def console(*, terminal, **changes):
    return Console(file=io.StringIO(), force_terminal=terminal, width=80, height=30, **changes)


UNITS = (done("baseline", 0, 1), done("map", 0, 2))


class TestLive:
    def test_ends_by_itself_when_all_is_done(self, store):
        screen, writer = console(terminal=True), Writer(store, *UNITS)
        shown = show(store, live=True, every=3.5, console=screen, pause=writer)
        assert (shown.state, shown.total("done"), shown.total("failed")) == ("finished", 2, 0)
        assert writer.pauses == [3.5, 3.5]
        text = screen.file.getvalue()
        assert all(f"{n}/1" in text for n in (0, 1))

    def test_ends_when_the_rest_has_failed(self, store):
        writer = Writer(store, done("baseline", 0), failed("map", 0, "boom"))
        shown = show(store, live=True, console=console(terminal=True), pause=writer)
        assert (shown.state, shown.total("failed")) == ("finished", 1)

    def test_finished_store_is_not_waited_for(self, store):
        append(store, *UNITS)
        assert show(store, live=True, console=console(terminal=True), pause=Writer(store)).state == "finished"

    def test_last_page_stays_after_the_screen_is_given_back(self, store):
        screen = console(terminal=True)
        show(store, live=True, console=screen, pause=Writer(store, *UNITS))
        after = screen.file.getvalue().rpartition("\x1b[?1049l")[2]
        assert "finished" in after
        assert "1/1" in after

    def test_interrupt_gives_the_screen_back_and_keeps_the_page(self, store):
        def interrupt(seconds):
            raise KeyboardInterrupt

        screen = console(terminal=True)
        with pytest.raises(KeyboardInterrupt):
            show(store, live=True, console=screen, pause=interrupt)
        text = screen.file.getvalue()
        assert text.count("\x1b[?1049h") == text.count("\x1b[?1049l") == 1
        assert "units done" in text.rpartition("\x1b[?1049l")[2]

    @pytest.mark.parametrize(
        "kind", [{"terminal": False}, {"terminal": True, "_environ": {"TERM": "dumb"}}], ids=["pipe", "dumb-terminal"]
    )
    def test_elsewhere_it_is_shown_once_in_plain_lines(self, store, kind, capsys):
        show(store, live=True, console=console(**kind), pause=Writer(store))
        out = capsys.readouterr().out
        assert out.splitlines()[0].split() == ["group", "units", "done", "pending", "failed"]
        assert "\x1b" not in out

    def test_dead_sweep_is_watched_on_and_says_so(self, store, capsys):
        append(store, done("baseline", 0))
        writer = Writer(store, done("map", 0))
        screen = console(terminal=True)
        assert START > 0
        show(store, live=True, console=screen, pause=writer)
        assert len(writer.pauses) == 1


class TestJson:
    def test_once_it_is_one_object(self, store, capsys):
        append(store, done("baseline", 0))
        show(store, as_json=True, pause=Writer(store))
        told = json.loads(capsys.readouterr().out)
        assert [g["done"] for g in told["groups"]] == [1, 0]

    def test_live_it_is_a_line_at_every_look(self, store, capsys):
        show(store, live=True, as_json=True, console=console(terminal=True), pause=Writer(store, *UNITS))
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [[g["done"] for g in line["groups"]] for line in lines] == [[0, 0], [1, 0], [1, 1]]
        assert lines[-1]["state"] == "finished"
