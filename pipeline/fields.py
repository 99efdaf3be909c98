"""Metrics that are a field over the final latents: their dimensions, told from those of a cell by name alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

FIELD_DIMS = ("latent_frame", "latent_y", "latent_x")
"""Every dimension that a field can have, in this order; no axis of an experiment has such a name."""


def axes_of(dims: Iterable[Any]) -> tuple[Any, ...]:
    """Return the dimensions of an array that are not of a field."""
    return tuple(d for d in dims if d not in FIELD_DIMS)


def field_dims_of(dims: Iterable[Any]) -> tuple[Any, ...]:
    """Return the dimensions of an array that are of a field; none if its cells hold one number each."""
    return tuple(d for d in dims if d in FIELD_DIMS)


def field_shape(dims: Sequence[str], latent_shape: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of a field.

    Parameters
    ----------
    dims : of the field. latent_shape : (frames, height, width) of the latents.
    """
    sizes = dict(zip(FIELD_DIMS, latent_shape, strict=True))
    return tuple(sizes[d] for d in dims)


def require_field_dims(name: str, dims: Sequence[str]) -> None:
    """Refuse dimensions of a metric that no field has.

    Raises
    ------
    ValueError : one is unknown, or they are in another order.
    """
    if tuple(dims) != tuple(d for d in FIELD_DIMS if d in dims):
        raise ValueError(
            f"metric {name!r} has dimensions {tuple(dims)}. Give some of {', '.join(FIELD_DIMS)}, in this order."
        )
