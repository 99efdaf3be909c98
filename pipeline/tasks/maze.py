"""The maze task: walk to the goal that the prompt names; contrast pairs share maze and noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator

from interventions.record import RunInputs
from pipeline.samples import Sample
from pipeline.tasks import maze_world as world
from pipeline.tasks.maze_score import held_out_maze
from pipeline.tasks.task import Sampler, Task, register_task

if TYPE_CHECKING:
    from pipeline.models import ModelInfo

PROMPTS = ("red", "blue", "any")
MAX_PROMPT_TOKENS = 4
PIXEL_FRAMES = 4 * (world.FRAMES - 1) + 1
LATENTS_PER_CELL = 2
MOST = 10**9
"""Of mazes, of seeds, and number of the first maze: what the store can hold of them."""


@register_task("maze")
class MazeTask(Task):
    """Held-out 5x5 mazes with a red and a blue goal; a pair "red/any" contrasts those two prompts.

    The prompt "any" leaves the choice of the goal to the run, so it has to be made along the denoising steps;
    "red" and "blue" determine it.
    """

    summary: ClassVar[str] = "5x5 mazes, two goals; prompts red, blue (determined) and any (ambiguous)"

    name: Literal["maze"] = "maze"
    mazes: Annotated[int, Field(ge=1, le=MOST)] = 8
    pairs: Annotated[tuple[str, ...], Field(min_length=1)] = ("red/blue",)
    seeds: Annotated[int, Field(ge=1, le=MOST)] = 1
    first_maze: Annotated[int, Field(ge=0, le=MOST)] = 0
    balanced: Literal["yes", "no", "either"] = "either"

    @field_validator("pairs")
    @classmethod
    def _pairs_are_known(cls, pairs: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(pairs)) != len(pairs):
            raise ValueError(f"a pair is listed twice: {', '.join(pairs)}")
        for pair in pairs:
            clean, _, corrupted = pair.partition("/")
            if clean not in ("red", "blue") or corrupted not in PROMPTS or clean == corrupted:
                raise ValueError(
                    f"pair {pair!r} is not clean/corrupted with clean in red, blue and corrupted another of "
                    f"{', '.join(PROMPTS)}; for example red/blue or red/any"
                )
        return pairs

    def count(self) -> int:
        """Return mazes x pairs x seeds."""
        return self.mazes * self.seeds * len(self.pairs)

    def samples(self) -> list[Sample]:
        """Return mazes x pairs x seeds, pairs of one maze next to each other."""
        samples: list[Sample] = []
        for maze in range(self.first_maze, self.first_maze + self.mazes):
            for seed in range(self.seeds):
                for pair in self.pairs:
                    clean, _, corrupted = pair.partition("/")
                    samples.append(
                        Sample(
                            index=len(samples),
                            prompt=f"maze-{maze:05d}",
                            seed=seed,
                            pair=pair,
                            clean_prompt=clean,
                            corrupted_prompt=corrupted,
                            parameters={"maze": maze, "balanced": self.balanced},
                        )
                    )
        return samples

    def sets(self, model: ModelInfo) -> frozenset[str]:
        """Return the size, the first frame and the guidance."""
        return frozenset({"image", "height", "width", "num_frames", "guidance_scale"})

    def latent_shape(self, model: ModelInfo | None = None) -> tuple[int, int, int]:
        """Return the latent frames and two latents a cell."""
        return world.FRAMES, LATENTS_PER_CELL * world.SIZE, LATENTS_PER_CELL * world.SIZE

    def preview_size(self) -> tuple[int, int]:
        """Return one pixel a cell."""
        return world.SIZE, world.SIZE

    def inputs(self, pipe: Any, sample: Sample, sampler: Sampler) -> RunInputs:
        """Return first frame, prompt embeddings and CPU-drawn noise; noise depends on maze and seed alone."""
        import PIL.Image

        maze_index = int(sample.parameters["maze"])
        maze = held_out_maze(maze_index, str(sample.parameters["balanced"]))
        pixels = world.SIZE * world.PIXELS_PER_CELL
        device = pipe.transformer.device
        per_run = {"prompt_embeds": _embed(pipe, [sample.clean_prompt, sample.corrupted_prompt])}
        if sampler.guidance_scale > 1:
            per_run["negative_prompt_embeds"] = _embed(pipe, ["", ""])
        noise = np.random.default_rng([0x6E01, maze_index, sample.seed]).standard_normal(
            (1, 3, *self.latent_shape()), dtype=np.float32
        )
        per_run["latents"] = torch.from_numpy(noise).repeat(2, 1, 1, 1, 1).to(device)
        return RunInputs(
            shared={
                "image": PIL.Image.fromarray(world.draw(world.first_frame(maze))),
                "height": pixels,
                "width": pixels,
                "num_frames": PIXEL_FRAMES,
                "num_inference_steps": sampler.steps,
                "guidance_scale": sampler.guidance_scale,
                **sampler.arguments,
            },
            per_run=per_run,
            names=("clean", "corrupted"),
            seed=(maze_index, sample.seed),
        )

    def video(self, pipe: Any, latents: Any) -> NDArray[np.float32]:
        """Undo the codec's normalisation and average the latents of each cell: one pixel a cell."""
        config = pipe.vae.config
        mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
        pixels = latents.detach().to("cpu", torch.float32) * std + mean
        cells = torch.nn.functional.avg_pool3d(pixels, (1, LATENTS_PER_CELL, LATENTS_PER_CELL))
        video: NDArray[np.float32] = ((cells + 1) * 127.5).permute(0, 2, 3, 4, 1).numpy()
        return video


def _embed(pipe: Any, prompts: list[str]) -> torch.Tensor:
    embeds, _ = pipe.encode_prompt(
        prompts,
        do_classifier_free_guidance=False,
        max_sequence_length=MAX_PROMPT_TOKENS,
        device=pipe.transformer.device,
    )
    return embeds  # type: ignore[no-any-return]
