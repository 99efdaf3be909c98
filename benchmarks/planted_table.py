"""Find every planted mechanism by patching, with the engine: ``python -m benchmarks.planted_table``.

Prints, per planted model, where the effect of a patch is and how far it stands above everything else.
"""

from __future__ import annotations

import json
from itertools import product

import torch

from interventions.engine import Engine
from interventions.families.family import family_of
from interventions.kinds.patch import Patch
from interventions.record import RunInputs
from pipeline.embedded.planted import PLANTED
from pipeline.embedded.planted.base import BLOCKS, Planted

STEPS = 6


def measure(planted: Planted) -> dict[str, object]:
    """Return the effects of noising patches of the planted component at every step and block."""
    pipe = planted.build(0)
    shared, per_run = planted.arguments(pipe, STEPS, 3.0 if planted.branch is not None else 1.0)
    engine = Engine(pipe, family_of(type(pipe).__name__))
    record = engine.record(RunInputs(shared=shared, per_run=per_run, names=("clean", "corrupted"), seed=(0,)))
    sites = list(product(range(STEPS), range(BLOCKS)))
    cells = [Patch(direction="noising", step=s, layer=b, component=planted.component) for s, b in sites]
    # A self-patch in the same batch is the reference, so that rounding is the same.
    final = engine.fork(record, [Patch(direction="self", step=0, layer=0), *cells]).final.double()
    effects = {site: float((row - final[0]).norm()) for site, row in zip(sites, final[1:], strict=True)}
    truth = planted.truth(planted.component, STEPS)
    inside = [effects[s] for s in sites if s in truth]
    outside = [effects[s] for s in sites if s not in truth]
    ordered = sum((a > b) + 0.5 * (a == b) for a in inside for b in outside)
    return {
        "model": planted.name,
        "mechanism": planted.mechanism,
        "component": planted.component,
        "planted_sites": len(inside),
        "other_sites": len(outside),
        "auc": ordered / (len(inside) * len(outside)),
        "smallest_planted": min(inside),
        "largest_other": max(outside),
    }


def main() -> None:
    """Print JSON, then a table."""
    torch.set_num_threads(1)
    rows = [measure(planted) for planted in PLANTED.values()]
    print(json.dumps(rows, indent=2))
    print(f"{'model':<14} {'sites':>6} {'of':>4} {'AUC':>6} {'smallest planted':>17} {'largest other':>14}")
    for row in rows:
        total = int(str(row["planted_sites"])) + int(str(row["other_sites"]))
        print(
            f"{row['model']:<14} {row['planted_sites']:>6} {total:>4} {row['auc']:>6.3f} "
            f"{row['smallest_planted']:>17.3g} {row['largest_other']:>14.3g}"
        )


if __name__ == "__main__":
    main()
