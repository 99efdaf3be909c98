"""A Ray of this machine for a benchmark: as many CPUs as told, a small object store, no dashboard."""

from __future__ import annotations

import logging
import os


def start(cpus: int) -> None:
    """Start Ray and connect to it; ``ray.shutdown`` ends it."""
    # Read when Ray is imported: without it, `uv run` uploads the working directory.
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    import ray

    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=100 * 2**20,
    )
