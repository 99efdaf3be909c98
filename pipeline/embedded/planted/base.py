"""What a planted model is: its mechanism as data, how it is built, and the two runs that differ by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch

from interventions.sites import Branch, Component
from pipeline.embedded.build import MAX_PROMPT_TOKENS, build_text_encoder, build_tokenizer
from pipeline.embedded.codec import GridCodec
from pipeline.embedded.planted import wiring

BLOCKS, FRAMES, SIDE = 5, 5, 2
"""Transformer blocks, latent frames, and tokens along each side of a frame."""
LAST_SIGMA = 0.1
"""Noise level that enters the last step. Levels are spaced evenly down to it, so that the effects of all steps are of
one size, and float32 rounding at one is small to all others."""
TEXT_TOKENS = 6
CLEAREST = 0.08
"""Smallest size of the window gate (1 in the middle of the window) at which a step counts as in or out."""

TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": wiring.HEADS,
    "attention_head_dim": wiring.HEAD_DIM,
    "in_channels": wiring.CHANNELS,
    "out_channels": wiring.CHANNELS,
    "text_dim": wiring.TEXT_DIM,
    "freq_dim": wiring.FREQ_DIM,
    "ffn_dim": 128,
    "num_layers": BLOCKS,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One place where information moves: a component of some blocks, for all frames and heads or for some.

    Attributes
    ----------
    component : the component whose output carries the information.
    blocks : every block where it does.
    frames : latent frames whose tokens receive it, None for all.
    heads : heads that carry it, None for all.
    """

    component: Component
    blocks: tuple[int, ...]
    frames: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted:
    """A tiny Wan pipeline with a mechanism known by construction, and the sites where it is.

    Only the prompt differs between the clean and the corrupted run. The difference is in the activations of the hops
    and nowhere else: writing one run's activation over the other's changes the final latents at the sites that
    ``truth`` lists, and at no other beyond float32 rounding. Where the mechanism does not act, the component of the
    last hop is exactly 0, so that zeroing it, or cutting its attention, changes nothing at all either.

    Attributes
    ----------
    name : its key in ``PLANTED``.
    mechanism : one line of what it does.
    hops : where information moves, in the order in which it does; the last one is what the model was planted for.
    source_frame : latent frame that the last hop takes information from, None for the prompt.
    window : noise levels (low, high) at which the gate is open, None for all.
    branch : guidance branch that the prompt matters in, None for both.
    boundary_ratio : noise level below which the second expert runs, and the mechanism acts; None for one expert.
    """

    name: str
    mechanism: str
    hops: tuple[Hop, ...]
    wire: Callable[[Any, Planted], None]
    source_frame: int | None = None
    window: tuple[float, float] | None = None
    branch: Branch | None = None
    boundary_ratio: float | None = None

    @property
    def component(self) -> Component:
        """Component of the last hop."""
        return self.hops[-1].component

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks of the last hop."""
        return self.hops[-1].blocks

    @property
    def frames(self) -> tuple[int, ...]:
        """Latent frames that the mechanism reaches, the only ones in which the final latents of both runs differ."""
        return self.hops[-1].frames or tuple(range(FRAMES))

    @property
    def heads(self) -> tuple[int, ...]:
        """Heads of the last hop."""
        return self.hops[-1].heads or tuple(range(wiring.HEADS))

    @property
    def expert(self) -> Literal["transformer", "transformer_2"]:
        """Attribute of the pipeline that holds the denoiser with the mechanism."""
        return "transformer" if self.boundary_ratio is None else "transformer_2"

    def steps(self, count: int) -> tuple[int, ...]:
        """Return the steps, of a run of ``count``, at which the mechanism acts.

        Raises
        ------
        ValueError : a step is so near an edge of the window that its gate is neither clearly open nor closed.
        """
        sigmas = schedule(count)
        if self.boundary_ratio is not None:
            return tuple(i for i, sigma in enumerate(sigmas) if sigma < self.boundary_ratio)
        if self.window is None:
            return tuple(range(count))
        gates = [wiring.window_gate(sigma, self.window) for sigma in sigmas]
        unclear = [f"{sigma:.3f}" for sigma, gate in zip(sigmas, gates, strict=True) if abs(gate) < CLEAREST]
        if unclear:
            raise ValueError(
                f"{self.name}: with {count} steps, sigma {', '.join(unclear)} is too near an edge of the window "
                f"{self.window}, whose gate is half open there. Choose another number of steps."
            )
        return tuple(i for i, gate in enumerate(gates) if gate > 0)

    def truth(self, component: Component, count: int) -> frozenset[tuple[int, int]]:
        """Return the (step, block) pairs where patching ``component`` between the runs changes the final latents.

        A block's ``update`` has what any of its components has; its ``residual`` all that entered at it or before.
        """
        if component == "residual":
            blocks = set(range(min(b for hop in self.hops for b in hop.blocks), BLOCKS))
        else:
            blocks = {b for hop in self.hops if component in (hop.component, "update") for b in hop.blocks}
        return frozenset((step, block) for step in self.steps(count) for block in blocks)

    def build(self, seed: int, *, null: bool = False) -> Any:
        """Build the pipeline; ``null`` leaves the mechanism out, so that both runs are the same.

        Parameters
        ----------
        seed : seeds all weights; the mechanism is the same for all seeds. The global generator is left as it was.
        """
        from diffusers import WanPipeline

        with torch.random.fork_rng(devices=()), torch.no_grad():
            text_encoder = build_text_encoder(seed)
            torch.manual_seed(seed)
            experts = [self._expert(acts=not null and self.boundary_ratio is None)]
            if self.boundary_ratio is not None:
                experts.append(self._expert(acts=not null))
        return WanPipeline(
            tokenizer=build_tokenizer(),
            text_encoder=text_encoder,
            vae=GridCodec(),
            scheduler=_scheduler(),
            transformer=experts[0],
            transformer_2=experts[1] if len(experts) > 1 else None,
            boundary_ratio=self.boundary_ratio,
        )

    def _expert(self, *, acts: bool) -> Any:
        from diffusers import WanTransformer3DModel

        transformer = WanTransformer3DModel(**TRANSFORMER_CONFIG)
        wiring.confine(transformer)
        self.wire(transformer, self)
        if not acts:
            for hop in self.hops:
                for block in hop.blocks:
                    wiring.silence(getattr(transformer.blocks[block], hop.component).to_out[0])
        return transformer.eval().requires_grad_(False)

    def arguments(
        self, pipe: Any, steps: int, guidance: float = 1.0, *, seed: int = 0
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Return the arguments of the clean and the corrupted run: those they share, and those with a row for each.

        Both runs have the same latents (2, 3, FRAMES, 2 SIDE, 2 SIDE). Their ``prompt_embeds``, (2, TEXT_TOKENS,
        TEXT_DIM), have opposite codes and are else equal. So have ``negative_prompt_embeds``, which exist with
        guidance, where the mechanism is of one branch; else they are equal.

        Raises
        ------
        ValueError : the steps do not fit the window, or the mechanism is of one branch and there is no guidance.
        """
        self.steps(steps)
        if self.branch is not None and guidance <= 1:
            raise ValueError(f"{self.name}: it acts in one guidance branch; give guidance above 1, not {guidance}.")
        generator = torch.Generator().manual_seed(seed)
        scale = pipe.vae_scale_factor_spatial
        shared = {
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "num_frames": (FRAMES - 1) * pipe.vae_scale_factor_temporal + 1,
            "height": 2 * SIDE * scale,
            "width": 2 * SIDE * scale,
            "max_sequence_length": MAX_PROMPT_TOKENS,
        }
        latents = torch.randn(1, wiring.CHANNELS, FRAMES, 2 * SIDE, 2 * SIDE, generator=generator)
        if self.source_frame is not None:
            _tag(latents, (self.source_frame,), column=0)
            _tag(latents, self.frames, column=1)
        per_run = {"latents": latents.repeat(2, 1, 1, 1, 1), "prompt_embeds": _prompts(generator, opens=True)}
        if guidance > 1:
            # A closed gate must find tokens without a code, unless it is the branch that closes it.
            negative = _prompts(generator, opens=self.branch is None)
            per_run["negative_prompt_embeds"] = negative[:1].repeat(2, 1, 1) if self.branch is None else negative
        if self.branch == "uncond":
            names = ("prompt_embeds", "negative_prompt_embeds")
            per_run |= {name: per_run[other] for name, other in zip(names, reversed(names), strict=True)}
        return shared, per_run


def schedule(count: int) -> tuple[float, ...]:
    """Return the noise level entering each of ``count`` steps."""
    scheduler = _scheduler()
    scheduler.set_timesteps(count)
    return tuple(scheduler.sigmas[:-1].tolist())


def _scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift_terminal=LAST_SIGMA)


def _tag(latents: torch.Tensor, frames: tuple[int, ...], *, column: int) -> None:
    latents[:, wiring.TAGS, :, 0::2, column::2] = -1
    latents[:, wiring.TAGS, list(frames), 0::2, column::2] = 1


def _prompts(generator: torch.Generator, *, opens: bool) -> torch.Tensor:
    """Draw a prompt and its opposite: half of the tokens with a code, half without, in roles that open a gate or not.

    Returns (2, TEXT_TOKENS, TEXT_DIM).
    """
    prompts = torch.randn(1, TEXT_TOKENS, wiring.TEXT_DIM, generator=generator).repeat(2, 1, 1)
    coded = slice(0, TEXT_TOKENS // 2)
    prompts[:, coded.stop :, wiring.CODE] = 0
    prompts[1, :, wiring.CODE] *= -1
    prompts[:, :, wiring.ROLE] = -1 if opens else 1
    prompts[:, coded, wiring.ROLE] *= -1
    return prompts


_PLANTED: dict[str, Planted] = {}
PLANTED: Mapping[str, Planted] = MappingProxyType(_PLANTED)
"""Every planted model by name."""


def register(planted: Planted) -> Planted:
    """Add a planted model to ``PLANTED``."""
    _PLANTED[planted.name] = planted
    return planted
