"""Chaos trials of every kind, and products with a planted mistake that they must convict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("ray")

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(600)

FORGETS = """
# A resumed driver takes a unit for done that never ran.
from pipeline.ledger import Ledger
pending = Ledger.pending
Ledger.pending = lambda self, numbers: (unit for unit in pending(self, numbers) if unit.id != 7)
"""
DRIFTS = """
# A unit's values depend on how often the sweep was started.
import os, tests.synthetic as synthetic
values = synthetic.sample_values
synthetic.sample_values = lambda group, name, sample, shape: (
    values(group, name, sample, shape) + (sample == 1 and group == "noise" and os.getpid() % 1000)
).astype("float32")
"""
BLIND = """
# Verification looks at nothing that units wrote.
import importlib
verification = importlib.import_module("pipeline.store.verify")
verification._Verification._check_units = lambda self, group, receipts: None
"""
UNGUARDED = """
# A driver does not mind another one.
from pipeline.store.lease import Lease
Lease._await_death = lambda self, claim: None
"""


@pytest.fixture
def ground():
    """A folder with a short name: Ray's sockets lie below it, and their names may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="c", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def chaos(*arguments: object, planted: str = "", out: Path) -> tuple[int, dict, str]:
    """Run trials in a process of their own; returns the exit code, the tally, and what was printed."""
    # The harness comes first: it keeps libraries from starting threads, of which forks are no copies.
    code = f"import sys\nfrom tests.chaos.__main__ import main\n{planted}\nsys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments), "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(out.parent)},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert out.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(out.read_text()), done.stdout + done.stderr


@pytest.mark.parametrize(("kind", "trials"), [("inline", 3), ("model", 2), ("ray", 3)])
def test_nothing_is_lost_or_wrong(kind, trials, ground):
    code, tally, text = chaos("--trials", trials, "--kinds", kind, "--seed", 1, out=ground / "tally.json")
    assert code == 0, text
    assert tally["trials"] == tally["trials_by_kind"][kind] == trials
    assert (tally["lost"], tally["wrong"], tally["missed"], tally["broken"]) == (0, 0, 0, [])
    assert tally["drivers"] > trials
    assert tally["kills_in_all"] + tally["faults_in_all"] + tally["damage_in_all"] >= trials
    assert not list(ground.glob("chaos-*")), "what a clean run leaves behind"


@pytest.mark.parametrize(
    ("planted", "count"),
    [
        pytest.param(FORGETS, "lost", id="forgets"),
        pytest.param(DRIFTS, "wrong", id="drifts"),
        pytest.param(BLIND, "missed", id="blind"),
        pytest.param(UNGUARDED, "broken", id="unguarded"),
    ],
)
def test_a_planted_mistake_is_convicted(planted, count, ground):
    code, tally, text = chaos("--trials", 2, "--kinds", "inline", planted=planted, out=ground / "tally.json")
    assert code == 1, text
    assert tally[count], tally
    assert "One alone, in full: --only N" in text
