"""Write the table of chaos trials in ``docs/reliability.md``: ``python -m docs.make_chaos_table``.

The numbers are those of ``python -m tests.chaos --trials 60 --out docs/chaos.json``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("reliability.md")
FACTS = Path(__file__).with_name("chaos.json")
BEGIN, END = "<!-- chaos -->", "<!-- /chaos -->"
_KINDS = {
    "inline": "made-up units in the driver's process",
    "ray": "made-up units on replicas over several local nodes",
    "model": "the tiny model in the driver's process",
}


def table(facts: Mapping[str, Any]) -> str:
    """Return the numbers of a run of the trials as a command, a table and what was broken."""
    minutes = round(facts["seconds"] / 60)
    kinds = "; ".join(f"{count} with {_KINDS[kind]}" for kind, count in facts["trials_by_kind"].items() if count)
    rows = [
        ("trials", facts["trials"], kinds),
        ("drivers started", facts["drivers"], f"{facts['verifications']:,} verifications"),
        ("blows to running sweeps", facts["kills_in_all"], _listed(facts["kills"])),
        ("faults inside units", facts["faults_in_all"], _listed(facts["faults"])),
        ("damage to stores at rest", facts["damage_in_all"], _damage(facts["damage"])),
        ("damaged units and arrays when verified", facts["damaged"], _found(facts)),
        ("units computed again", facts["recomputed"], ""),
        ("drivers refused beside a frozen one", facts["refused"], ""),
        ("deposed drivers that stopped by themselves", facts["taken_over"], ""),
        ("**units lost**", facts["lost"], ""),
        ("**units, arrays or metadata wrong in the end**", facts["wrong"], ""),
        ("**other promises broken**", len(facts["broken"]), "; ".join(facts["broken"])),
    ]
    command = f"python -m tests.chaos --trials {facts['trials']} --seed {facts['seed']} --out docs/chaos.json"
    return "\n".join(
        [
            f"`{command}`: {minutes} min on {facts['cores']} cores.",
            "",
            "| what | count | of which |",
            "|---|---|---|",
            *(f"| {what} | {count:,} | {_cell(more)} |" for what, count, more in rows),
        ]
    )


def _found(facts: Mapping[str, Any]) -> str:
    unchecked = facts["damaged"] - facts["found"] - facts["missed"]
    told = f"{facts['found']:,} found, {facts['missed']:,} missed, {unchecked:,} not checked yet and told"
    return f"{told}; {facts['false_alarms']:,} good ones undone"


def _damage(counts: Mapping[str, int]) -> str:
    """Count damage by what was hit and by how, as its names are a way and a target each."""
    ways, targets = Counter[str](), Counter[str]()
    for name, count in counts.items():
        way, _, target = name.partition(" ")
        ways[way] += count
        targets[target] += count
    return f"{_listed(targets)}; by {_listed(ways)}" if counts else ""


def _listed(counts: Mapping[str, int]) -> str:
    ranked = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
    return ", ".join(f"{what} {count:,}" for what, count in ranked)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def render(text: str, facts: Mapping[str, Any]) -> str:
    """Return a page with the part between its marks written anew.

    Raises
    ------
    ValueError : the page has no place for the table.
    """
    before, begin, rest = text.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no place for the table: {BEGIN} and {END} are not there. Add them.")
    return f"{before}{begin}{table(facts)}\n{end}{after}"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), json.loads(FACTS.read_text())), encoding="utf-8")
