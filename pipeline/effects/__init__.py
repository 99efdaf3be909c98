"""Causal effects of a finished or unfinished sweep: estimates with intervals, from the store into the store."""

from pipeline.effects.maps import compute_effects as compute_effects
from pipeline.effects.maps import open_effects as open_effects

__all__ = ["compute_effects", "open_effects"]
