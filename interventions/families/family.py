"""What a model family declares about itself, and the table of families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from interventions.sites import COMPONENTS, Branch, Component, Geometry


class UnknownFamilyError(ValueError):
    """No family adapter declares the pipeline class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The few facts about a pipeline that the engine cannot read off it.

    Attributes
    ----------
    name : how configs and stores call the family.
    pipelines : names of the diffusers pipeline classes it covers.
    denoiser : attribute of the pipeline that holds the denoiser.
    blocks : path of the block list inside the denoiser.
    submodules : path inside a block of each component that is a module of its own.
    given_frames : latent frames that are conditioning, from the pipeline's own config.
    branches : guidance branches a step computes, one denoiser call each, from the guidance scale.
    """

    name: str
    pipelines: tuple[str, ...]
    denoiser: str
    blocks: str
    submodules: Mapping[Component, str]
    given_frames: Callable[[Mapping[str, Any]], int]
    branches: Callable[[float], tuple[Branch, ...]]

    @property
    def components(self) -> tuple[Component, ...]:
        """Components that can be addressed, in the order in which a forward reaches them."""
        return tuple(c for c in COMPONENTS if c in self.submodules or c in ("update", "residual"))

    def geometry(
        self,
        pipeline_config: Mapping[str, Any],
        denoiser_config: Mapping[str, Any],
        *,
        steps: int,
        guidance_scale: float,
        latent_shape: tuple[int, int, int],
    ) -> Geometry:
        """Return the extent of a run.

        Parameters
        ----------
        pipeline_config, denoiser_config : contents of ``model_index.json`` and of the denoiser's ``config.json``.
        steps : solver steps. guidance_scale : as given to the pipeline.
        latent_shape : (frames, height, width) of the latents.
        """
        patch_t, patch_h, patch_w = denoiser_config["patch_size"]
        frames, height, width = latent_shape
        return Geometry(
            steps=steps,
            blocks=int(denoiser_config["num_layers"]),
            frames=frames // patch_t,
            given_frames=self.given_frames(pipeline_config),
            height=height // patch_h,
            width=width // patch_w,
            branches=self.branches(guidance_scale),
            components=self.components,
        )


FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Add a family to the table.

    Raises
    ------
    ValueError : the name is taken.
    """
    if family.name in FAMILIES:
        raise ValueError(f"family {family.name!r} is registered twice")
    FAMILIES[family.name] = family
    return family


def family_of(pipeline_class: str) -> Family:
    """Return the family that covers a diffusers pipeline class.

    Raises
    ------
    UnknownFamilyError : none does; the message lists the classes that are covered.
    """
    for family in FAMILIES.values():
        if pipeline_class in family.pipelines:
            return family
    known = ", ".join(sorted(p for f in FAMILIES.values() for p in f.pipelines))
    raise UnknownFamilyError(f"no family adapter covers pipeline class {pipeline_class}. Covered: {known}.")
