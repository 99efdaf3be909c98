"""What a benchmark hands over: its figures, the targets that they must meet, and how busy the machine was."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A bound on one figure.

    Attributes
    ----------
    what : the figure in words. figure : its path in the figures, keys joined by dots. limit : met when it is reached.
    """

    what: str
    figure: str
    bound: Literal["at least", "at most"]
    limit: float

    def judge(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Return the target as plain data, with the figure and whether it meets the target.

        Raises
        ------
        KeyError : there is no such figure.
        """
        value: Any = figures
        for key in self.figure.split("."):
            value = value[key]
        met = value >= self.limit if self.bound == "at least" else value <= self.limit
        return {**asdict(self), "value": value, "met": bool(met)}


class Bench:
    """One benchmark from its command line to its result.

    Parameters
    ----------
    description : for ``--help``. Further options are added to ``parser``.
    """

    def __init__(self, description: str | None) -> None:
        self.parser = argparse.ArgumentParser(description=description)
        self.parser.add_argument("--json", type=Path, help="also write the result into this file")
        self._began, self._load = time.perf_counter(), os.getloadavg()

    def conclude(self, args: argparse.Namespace, figures: Mapping[str, Any], targets: Sequence[Target] = ()) -> int:
        """Print figures and targets; return the exit code, 1 if a target is missed."""
        judged = [target.judge(figures) for target in targets]
        result = {
            "figures": dict(figures),
            "targets": judged,
            "seconds": round(time.perf_counter() - self._began),
            "load_before": [round(n, 1) for n in self._load],
            "load_after": [round(n, 1) for n in os.getloadavg()],
        }
        print(json.dumps(result["figures"], indent=2))
        for line in map(sentence, judged):
            print(line)
        loads = (" ".join(f"{n:g}" for n in result[name]) for name in ("load_before", "load_after"))
        print("load of the machine over 1, 5 and 15 minutes: {} before, {} after".format(*loads), flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(result), encoding="utf-8")
        return 0 if all(target["met"] for target in judged) else 1


def sentence(judged: Mapping[str, Any]) -> str:
    """Return a judged target as a line to print."""
    verdict = "pass" if judged["met"] else "FAIL"
    return f"{verdict}: {judged['what']}: {judged['value']:,}, target {judged['bound']} {judged['limit']:,}"
