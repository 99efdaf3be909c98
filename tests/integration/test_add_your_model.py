"""The page on adding a model, executed: its code blocks run in order and print what the page shows."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from interventions.controls import run_controls
from interventions.engine import Engine
from interventions.families import family as families
from interventions.record import RunInputs
from interventions.solvers import UnsupportedSolverError, solver_of

PAGE = Path(__file__).parents[2] / "docs" / "add_your_model.md"
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:```text\n(?P<shown>.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def execute(page: str) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Run a page's code blocks in one namespace; return what each printed and what the page shows, and the names."""
    namespace: dict[str, Any] = {"__name__": "add_your_model"}
    outputs = []
    for found in BLOCK.finditer(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(found["code"], str(PAGE), "exec"), namespace)
        outputs.append((printed.getvalue(), found["shown"] or ""))
    return outputs, namespace


@pytest.fixture(scope="module")
def executed():
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", dict(families.FAMILIES))
        yield execute(PAGE.read_text())


def test_every_block_prints_what_the_page_shows(executed):
    outputs, _ = executed
    assert len(outputs) == 5
    for printed, shown in outputs:
        assert printed == shown
    assert sum(bool(shown) for _, shown in outputs) == 4


def test_controls_pass_on_the_example_of_the_page(executed):
    """What ``stepscope check`` runs: the family's own example, with guidance and without."""
    _, names = executed
    family = names["TINY_VIDEO"]
    assert families.family_of("TinyVideoPipeline") is family
    for guidance in (True, False):
        shared, per_run = family.example(names["pipe"], 2, guidance)
        inputs = RunInputs(shared=shared, per_run=per_run, names=("clean", "corrupted"), seed=(0,))
        assert all(control.passed for control in run_controls(names["engine"], inputs))


def test_inferred_family_of_the_page_computes_the_same(executed):
    _, names = executed
    family, by_hand = names["inference"].family, names["engine"]
    by_hand.release()
    engine = Engine(names["pipe"], family)
    try:
        assert engine.geometry(names["inputs"]) == by_hand.geometry(names["inputs"])
        final = engine.fork(engine.record(names["inputs"]), names["rows"]).final
    finally:
        engine.release()
        by_hand.solver.attach()
    torch.testing.assert_close(final, by_hand.fork(names["record"], names["rows"]).final)


def test_page_names_the_solvers_that_are_understood():
    with pytest.raises(UnsupportedSolverError) as refused:
        solver_of(type("NoScheduler", (), {})())
    known = set(re.findall(r"\w+Scheduler", str(refused.value).partition("Use one of")[2]))
    table = PAGE.read_text().partition("## Solvers")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert {name for line in rows for name in re.findall(r"`(\w+)`", line)} == known
    euler = next(line for line in rows if "`EulerDiscreteScheduler`" in line)
    assert euler.split("|")[2].strip() == ", ".join(solver_of(EulerDiscreteScheduler()).edits)
