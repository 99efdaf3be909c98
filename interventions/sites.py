"""Where an intervention acts: the coordinates of a run, its geometry, and the points an engine can edit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Component = Literal["residual", "update", "attn1", "attn2", "ffn"]
Branch = Literal["cond", "uncond"]
RunName = Literal["clean", "corrupted"]

COMPONENTS: tuple[Component, ...] = ("attn1", "attn2", "ffn", "update", "residual")
"""Components of a block in the order in which one forward reaches them."""
RUNS: tuple[RunName, ...] = ("clean", "corrupted")


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The extent of every coordinate of a run, known before any forward.

    Attributes
    ----------
    steps : solver steps of a run.
    blocks : transformer blocks of the denoiser.
    frames : latent frames; the first ``given_frames`` of them are conditioning and never denoised.
    height, width : tokens along each side of one frame.
    branches : guidance branches that the denoiser computes in a step, in call order.
    components : components of a block that the family can address.
    """

    steps: int
    blocks: int
    frames: int
    given_frames: int
    height: int
    width: int
    branches: tuple[Branch, ...] = ("cond",)
    components: tuple[Component, ...] = COMPONENTS

    @property
    def tokens_per_frame(self) -> int:
        """Tokens that one latent frame occupies, a contiguous slice of the sequence."""
        return self.height * self.width

    @property
    def generated_frames(self) -> tuple[int, ...]:
        """Indices of the latent frames that the model generates."""
        return tuple(range(self.given_frames, self.frames))

    def require(self, site: Site) -> None:
        """Check that a site exists.

        Raises
        ------
        ValueError : the model or the run has no such site; the message says what there is.
        """
        if not (
            0 <= site.step < self.steps
            and 0 <= site.block < self.blocks
            and site.branch in self.branches
            and site.component in self.components
        ):
            raise ValueError(
                f"no such site: {site}. There are steps 0 to {self.steps - 1}, blocks 0 to {self.blocks - 1}, "
                f"branches {', '.join(self.branches)} and components {', '.join(self.components)}."
            )

    def indices(self, coordinate: str) -> tuple[int, ...]:
        """Return every legal index along ``step``, ``layer`` or ``frame``.

        Raises
        ------
        KeyError : ``coordinate`` is not one of the three.
        """
        return {
            "step": tuple(range(self.steps)),
            "layer": tuple(range(self.blocks)),
            "frame": self.generated_frames,
        }[coordinate]


@dataclass(frozen=True, slots=True, order=True)
class LatentsAt:
    """The latents that enter solver step ``step``; ``step`` equal to the number of steps means the final latents."""

    step: int


@dataclass(frozen=True, slots=True, order=True)
class PredictionAt:
    """The guided prediction that the solver receives at ``step``."""

    step: int


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One activation of the denoiser: a component of a block, in one branch of one step."""

    step: int
    branch: Branch
    block: int
    component: Component


Point = LatentsAt | PredictionAt | Site


def in_forward_order(sites: Iterable[Site], branches: tuple[Branch, ...]) -> list[Site]:
    """Sort sites by the order in which a run reaches them: step, branch, block, component."""
    return sorted(sites, key=lambda s: (s.step, branches.index(s.branch), s.block, COMPONENTS.index(s.component)))
