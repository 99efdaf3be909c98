"""All that is claimed of speed and memory, measured: ``python -m benchmarks.throughput --out docs/performance.json``.

The exit code is 1 if a target is missed or a benchmark fails.
"""

from __future__ import annotations

import sys

from benchmarks import runner

BENCHMARKS = (
    "naive_ratio",
    "engine_efficiency",
    "scaling",
    "store_share",
    "effects",
    "memory",
    "precision",
    "wall_time",
)

if __name__ == "__main__":
    sys.exit(runner.main(__doc__, BENCHMARKS, "performance.json"))
