"""All that is claimed of large sweeps, measured: ``python -m benchmarks.cluster --out docs/scale.json``.

The exit code is 1 if a target is missed or a benchmark fails; whatever a benchmark has started is gone once it has
ended.
"""

from __future__ import annotations

import sys

from benchmarks import runner

BENCHMARKS = ("pool_rate", "million_units", "store_requests", "wide_pool", "many_nodes")

if __name__ == "__main__":
    sys.exit(runner.main(__doc__, BENCHMARKS, "scale.json"))
