"""What pages with measured parts share: the figures of a file, the table of targets, and the writing of a page."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WIDTH = 124


@dataclass(frozen=True)
class Found:
    """The results of all benchmarks."""

    machine: dict[str, Any]
    benchmarks: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Found:
        """Read them from the file that ``benchmarks.runner`` writes."""
        told = json.loads(path.read_text(encoding="utf-8"))
        return cls(told["machine"], told["benchmarks"])

    def figures(self, name: str) -> dict[str, Any]:
        """Return the figures of a benchmark."""
        found: dict[str, Any] = self.benchmarks[name]["figures"]
        return found


def targets(found: Found) -> str:
    """Return every target with its figure and the load of the machine meanwhile."""
    machine = found.machine
    rows = [
        (
            f"`{name}`",
            target["what"],
            f"{target['bound']} {target['limit']:,}",
            f"{target['value']:,}",
            "pass" if target["met"] else "**FAIL**",
            f"{result['load_before'][0]:g}, {result['load_after'][0]:g}",
        )
        for name, result in found.benchmarks.items()
        for target in result["targets"]
    ]
    minutes = sum(result["seconds"] for result in found.benchmarks.values()) / 60
    return table(("benchmark", "figure", "target", "measured", "", "load before, after"), rows) + prose(
        f"On {machine['cores']} cores and {machine['memory_gib']} GiB that other work shared: the load is the",
        "mean number",
        f"of processes that wanted a core, over a minute. Python {machine['python']}, Ray {machine['ray']}, Zarr",
        f"{machine['zarr']}; {minutes:.0f} minutes in all.",
    )


def prose(*lines: str) -> str:
    """Return words as a paragraph of its own."""
    return "\n\n" + textwrap.fill(" ".join(lines), WIDTH, break_long_words=False, break_on_hyphens=False)


def point(*lines: str) -> str:
    """Return words as a point of a list."""
    return textwrap.indent(prose(*lines).strip(), "  ").replace("  ", "- ", 1)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def written(text: str, parts: Mapping[str, Callable[[Found], str]], found: Found, command: str) -> str:
    """Return a page with the parts between its marks written anew.

    Parameters
    ----------
    command : that makes the figures, as the marks name it.
    """
    for name, make in parts.items():
        begin, end = f"<!-- {name}: begin, written by `{command}` -->", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{make(found)}\n{end}{rest.partition(end)[2]}"
    return text
