"""The page on reliability: one form for every mechanism, tests and defaults that exist, figures that were measured."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

from cluster.dispatch import _PACES_NEEDED
from cluster.options import MAX_BACKOFF_S, PoolOptions
from cluster.ray_pool import _NOTICE_S, _SHORT_S
from cluster.work import _ERROR_CHARACTERS
from docs import make_chaos_table
from docs.make_chaos_table import BEGIN, END, FACTS, PAGE, render, table
from pipeline.commands.jobs import AFTER_DRAIN_S
from pipeline.config import RunConfig
from pipeline.ledger import FLUSH_SECONDS
from pipeline.stopping import ASK_SECONDS
from pipeline.store.lease import BEAT_SECONDS, TTL_SECONDS
from tests.chaos.tally import Tally
from tests.unit.test_mutated_configs import MUTANTS

ROOT = Path(__file__).parents[2]
TEXT = PAGE.read_text(encoding="utf-8")
PARTS = ("Guaranteed", "Not guaranteed", "Figures", "Tests")
MECHANISMS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, flags=re.MULTILINE | re.DOTALL))
each_mechanism = pytest.mark.parametrize("heading", MECHANISMS)


def parts_of(heading: str) -> dict[str, str]:
    """Return the paragraphs of a mechanism by their label, on one line each."""
    found = re.split(r"^\*\*([A-Z][a-z ]+)\.\*\* ", MECHANISMS[heading], flags=re.MULTILINE)
    return {label: " ".join(text.split()) for label, text in zip(found[1::2], found[2::2], strict=True)}


@cache
def defined_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def missing(text: str) -> list[str]:
    """Return the tests in a list that are not in the file named before them, and the files that are not there."""
    file, wrong = "", []
    for name in re.findall(r"`((?:tests/[\w/]+\.py)|(?:test_\w+))`", text):
        if name.endswith(".py"):
            file = name
            wrong += [] if (ROOT / file).is_file() else [file]
        elif not file or not (ROOT / file).is_file() or name not in defined_in(file):
            wrong.append(f"{file}: {name}")
    return wrong


def test_every_mechanism_has_a_heading():
    assert len(MECHANISMS) >= 19


@each_mechanism
def test_says_what_is_guaranteed_what_is_not_and_what_shows_it(heading):
    labels = list(parts_of(heading))
    assert labels == [label for label in PARTS if label != "Figures" or label in labels]
    assert all(len(text) > 30 for text in parts_of(heading).values())


@each_mechanism
def test_named_tests_are_in_the_named_files(heading):
    shown = parts_of(heading)["Tests"]
    assert missing(shown) == []
    assert len(re.findall(r"`test_\w+`", shown)) >= 1
    assert len(re.findall(r"`tests/[\w/]+\.py`", shown)) >= 1


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("`tests/unit/test_docs_reliability.py`: `test_every_mechanism_has_a_heading`", []),
        ("`tests/unit/test_docs_reliability.py`: `test_gone`", ["tests/unit/test_docs_reliability.py: test_gone"]),
        ("`tests/unit/gone.py`: `test_x`", ["tests/unit/gone.py", "tests/unit/gone.py: test_x"]),
        ("`tests/unit/test_docs.py`: `test_search_sees`", ["tests/unit/test_docs.py: test_search_sees"]),
        ("`test_without_a_file`", [": test_without_a_file"]),
    ],
    ids=["there", "test-is-gone", "file-is-gone", "in-another-file", "no-file"],
)
def test_search_sees(text, wrong):
    assert missing(text) == wrong


def test_nothing_outside_of_the_lists_names_a_test_that_is_not_there():
    everywhere = {name for file in (ROOT / "tests").rglob("*.py") for name in defined_in(str(file.relative_to(ROOT)))}
    assert set(re.findall(r"`(test_\w+)`", TEXT)) <= everywhere


def test_defaults_are_those_of_the_config():
    told = re.findall(r"`run\.(\w+)` \(([\d.]+)\)", " ".join(TEXT.split()))
    assert len(told) >= 8
    for name, value in told:
        assert RunConfig.model_fields[name].default == float(value), name


@pytest.mark.parametrize(
    ("sentence", "value"),
    [
        ("rewrites it every {:g} s", BEAT_SECONDS),
        ("has not changed for {:g} s", TTL_SECONDS),
        ("is heard within about {:g} s", ASK_SECONDS),
        ("looked for every {:g} s", _NOTICE_S),
        ("starts again after {:g} s", PoolOptions().backoff_s),
        ("and so on, {:g} s at most", MAX_BACKOFF_S),
        ("cut to {:g} characters", _ERROR_CHARACTERS),
        ("`test_damage_is_planned_or_refused` ({:,} mutants)", MUTANTS),
    ],
)
def test_numbers_are_those_of_the_code(sentence, value):
    assert sentence.format(value) in " ".join(TEXT.split())


def test_numbers_in_words_are_those_of_the_code():
    """The page says: two seconds, five units, a minute, 20 ms."""
    assert (FLUSH_SECONDS, _PACES_NEEDED, AFTER_DRAIN_S, _SHORT_S) == (2, 5, 60, 0.02)


class TestChaos:
    """The table of the trials."""

    @pytest.fixture
    def facts(self):
        return json.loads(FACTS.read_text())

    def test_page_is_what_the_command_makes_of_the_numbers(self, facts):
        assert render(TEXT, facts) == TEXT, "docs/chaos.json has changed: python -m docs.make_chaos_table"

    def test_numbers_are_those_of_enough_trials_that_lost_nothing(self, facts):
        assert facts["trials"] >= 50
        assert (facts["lost"], facts["wrong"], facts["missed"]) == (0, 0, 0)
        assert facts["broken"] == []

    def test_numbers_add_up(self, facts):
        for name in ("kills", "faults", "damage"):
            assert facts[f"{name}_in_all"] == sum(facts[name].values()) > 0
        assert facts["trials"] == sum(facts["trials_by_kind"].values())
        assert facts["found"] + facts["missed"] <= facts["damaged"]

    def test_whatever_the_trials_come_to_is_shown(self):
        tally = Tally(trials=3, drivers=1234, lost=5, wrong=6, broken=["a driver | ended\nwith 7"])
        tally.damage.update({"flip data": 3, "flip status": 1, "delete data": 2})
        tally.damaged, tally.found, tally.missed, tally.false_alarms = 20, 15, 2, 1
        tally.kills.update({"driver killed": 2, "replica killed": 9})
        facts = {"seed": 4, "seconds": 185, "cores": 2, "trials_by_kind": {"inline": 2, "ray": 0, "model": 1}}
        shown = table({**facts, **tally.as_dict()})
        assert shown.startswith(
            "`python -m tests.chaos --trials 3 --seed 4 --out docs/chaos.json`: 3 min on 2 cores.\n\n| what |"
        )
        for row in (
            "| drivers started | 1,234 | 0 verifications |",
            "| blows to running sweeps | 11 | replica killed 9, driver killed 2 |",
            "| damage to stores at rest | 6 | data 5, status 1; by flip 4, delete 2 |",
            "| **units lost** | 5 |  |",
            "| **units, arrays or metadata wrong in the end** | 6 |  |",
            "| **other promises broken** | 1 | a driver \\| ended with 7 |",
        ):
            assert row in shown.splitlines()
        assert "| 20 | 15 found, 2 missed, 3 not checked yet and told; 1 good ones undone |" in shown
        assert "several local nodes" not in shown

    def test_what_is_between_the_marks_is_replaced_and_nothing_else(self, facts):
        page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
        once = render(page, facts)
        assert once == f"before\n{BEGIN}\n{table(facts)}\n{END}\nafter\n"
        assert render(once, facts) == once

    @pytest.mark.parametrize("page", ["no marks", f"{BEGIN}\nno end", f"no begin {END}"])
    def test_page_without_a_place_is_refused(self, facts, page):
        with pytest.raises(ValueError, match="no place for the table"):
            render(page, facts)

    def test_it_lies_beside_the_page(self):
        assert make_chaos_table.PAGE.parent == make_chaos_table.FACTS.parent == ROOT / "docs"
