"""What the values of a unit add up to: the digest that its receipt carries, and its cells without a value."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGEST_CHARACTERS = 32


def digest_of(values: Mapping[str, NDArray[Any]]) -> str:
    """Return a digest of named arrays: 32 hexadecimal characters of the SHA-256 of names, shapes and bytes.

    The same on every machine and in any order of the mapping; every bit counts, those of NaN included.

    Parameters
    ----------
    values : arrays by their path in the store, such as "baseline/solved".
    """
    sha = hashlib.sha256()
    for name in sorted(values):
        array = np.asarray(values[name])
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        sha.update(f"{name} {array.dtype.kind}{array.dtype.itemsize} {array.shape}\n".encode())
        sha.update(little.tobytes())
    return sha.hexdigest()[:DIGEST_CHARACTERS]


def count_failed(values: Mapping[str, NDArray[np.float32]], axes: int | None = None) -> int:
    """Count cells in which any metric is NaN; per-step arrays of the baseline are not cells.

    Parameters
    ----------
    axes : leading dimensions that tell cells apart; what follows is one cell's field. All of them by default.
    """
    per_cell: Sequence[NDArray[np.bool_]] = [
        np.asarray(np.isnan(v).any(axis=tuple(range(v.ndim if axes is None else axes, v.ndim))))
        for k, v in values.items()
        if not k.endswith("_by_step")
    ]
    return int(np.logical_or.reduce(per_cell).sum()) if per_cell else 0
