"""The prompts task: contrast pairs of prompts on any diffusers video checkpoint whose family is covered."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from interventions.families.family import FAMILIES, Family, family_of
from interventions.families.pixels import Pixels
from interventions.record import RunInputs
from interventions.streams import from_canonical
from pipeline.samples import Sample
from pipeline.tasks.task import Sampler, Task, register_task
from pipeline.yaml_source import Loc

if TYPE_CHECKING:
    from pipeline.models import ModelInfo

PREVIEW_SIDE = 128
"""Pixels of the longer side of a preview: film strips of whole videos at every step would outweigh the results."""
SEED = 0x9E12
"""Keeps this task's noise apart from any other's."""


def _is_image(text: str) -> str:
    from PIL import Image, UnidentifiedImageError

    path = os.path.expanduser(text)
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        # A pipe or a device may never end.
        raise ValueError(f"image {text} is no file; use a PNG")
    try:
        with Image.open(path) as image:
            image.load()
    except Image.DecompressionBombError:
        raise ValueError(f"image {text} is too large to be opened safely") from None
    except UnidentifiedImageError:
        raise ValueError(f"{text} is not an image that can be read; use a PNG") from None
    except (OSError, SyntaxError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"image {text} cannot be read: {reason}") from None
    return text


ImageFile = Annotated[str, AfterValidator(_is_image)]


class Pair(BaseModel):
    """Two prompts, the image both runs start from if the model takes one, and the kind of contrast."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clean: str
    corrupted: str
    image: ImageFile | None = None
    kind: str = "prompts"

    @model_validator(mode="after")
    def _prompts_differ(self) -> Pair:
        if self.clean.split() == self.corrupted.split():
            raise ValueError(f"clean and corrupted are the same prompt: {self.clean!r}")
        return self


@register_task("prompts")
class PromptsTask(Task):
    """Contrast pairs of prompts; both runs of a pair share noise, size, image and negative prompt."""

    summary: ClassVar[str] = "pairs of prompts on any covered video checkpoint; metrics of latents, no truth"

    name: Literal["prompts"] = "prompts"
    pairs: Annotated[tuple[Pair, ...], Field(min_length=1)]
    seeds: Annotated[int, Field(ge=1, le=10**9)] = 1
    frames: Annotated[int, Field(ge=1, le=10_000)] = 81
    height: Annotated[int, Field(ge=1, le=16_384)] = 480
    width: Annotated[int, Field(ge=1, le=16_384)] = 832
    negative: str | None = None
    image: ImageFile | None = None
    decode: bool = True

    @field_validator("pairs")
    @classmethod
    def _pairs_differ(cls, pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
        if len(set(pairs)) != len(pairs):
            raise ValueError("a pair is listed twice; for more noise on one pair use seeds")
        return pairs

    @property
    def decodes(self) -> bool:
        """Whether latents are decoded at all."""
        return self.decode

    @property
    def size(self) -> tuple[int, int, int]:
        """Return (frames, height, width) in pixels."""
        return self.frames, self.height, self.width

    def identity(self) -> dict[str, Any]:
        """Return the settings, with what the images hold in place of where they are."""
        data = self.model_dump(mode="json")
        for entry in (data, *data["pairs"]):
            if entry["image"] is not None:
                file = Path(os.path.expanduser(entry["image"]))
                entry["image"] = f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
        return data

    def sets(self, model: ModelInfo) -> frozenset[str]:
        """Return the size and the guidance, as the family's pipeline calls them."""
        family = _family(model)
        size = family.pixels.size(*self.size) if family.pixels else {}
        return frozenset({*size, *family.guided(1.0)})

    def problems(self, model: ModelInfo, sampler: Sampler) -> list[tuple[Loc, str]]:
        """Return why these prompts cannot run on a model: family, missing parts, image, size."""
        family = _family(model)
        pixels = family.pixels
        if pixels is None or family.encode is None:
            covered = ", ".join(sorted(f.name for f in FAMILIES.values() if f.pixels and f.encode))
            return [(("task", "name"), f"prompts does not cover family {family.name}; it covers {covered}")]
        needed = ("vae", *(part for part in model.pipeline_config if part.startswith(("tokenizer", "text_encoder"))))
        if missing := [part for part in needed if not model.has(part)]:
            return [(("model", "id"), f"prompts needs {', '.join(missing)}, which this checkpoint does not have")]
        found = self._image_problems(model, pixels) + self._size_problems(model, family, pixels)
        if self.decode and not pixels.decodes:
            found.append((("task", "decode"), f"family {family.name} declares no decoder; set decode: false"))
        return found

    def _image_problems(self, model: ModelInfo, pixels: Pixels) -> list[tuple[Loc, str]]:
        takes, pipeline = pixels.image(model.pipeline_config), model.pipeline_config["_class_name"]
        if not takes and self.image is not None:
            return [(("task", "image"), f"{pipeline} takes no image; leave it out")]
        return [
            (("task", "pairs", i), f"{pipeline} starts from an image; give image here or for all pairs at once")
            if takes
            else (("task", "pairs", i, "image"), f"{pipeline} takes no image; leave it out")
            for i, pair in enumerate(self.pairs)
            if takes != ((pair.image or self.image) is not None)
        ]

    def _size_problems(self, model: ModelInfo, family: Family, pixels: Pixels) -> list[tuple[Loc, str]]:
        grid = pixels.grid(model.component("vae"), family.patch(model.denoiser_config))
        found: list[tuple[Loc, str]] = []
        only = pixels.only_frames(model.denoiser_config)
        if only is not None and self.frames != only:
            found.append((("task", "frames"), f"this model makes {only} frames, got {self.frames}"))
        for name, value, (offset, step) in zip(("frames", "height", "width"), self.size, grid, strict=True):
            if (value - offset) % step or value < offset + step:
                below = offset + max(1, (value - offset) // step) * step
                nearest = " or ".join(str(v) for v in (below, below + step) if v != value)
                rule = f"a multiple of {step}" if not offset else f"one of {offset + step}, {offset + 2 * step}, ..."
                text = f"{name} must be {rule} to fill whole tokens of this {model.pipeline_config['_class_name']}"
                found.append((("task", name), f"{text}, got {value}; the nearest is {nearest}"))
        return found

    def count(self) -> int:
        """Return pairs x seeds."""
        return len(self.pairs) * self.seeds

    def samples(self) -> list[Sample]:
        """Return pairs x seeds, seeds of one pair next to each other."""
        return [
            Sample(
                index=i * self.seeds + seed,
                prompt=f"pair-{i:03d}",
                seed=seed,
                pair=pair.kind,
                clean_prompt=pair.clean,
                corrupted_prompt=pair.corrupted,
                parameters={"pair": i},
            )
            for i, pair in enumerate(self.pairs)
            for seed in range(self.seeds)
        ]

    def latent_shape(self, model: ModelInfo) -> tuple[int, int, int]:
        """Return what the VAE makes of the size."""
        pixels = _family(model).pixels
        assert pixels is not None
        return pixels.extent(model.component("vae"), self.size)

    def preview_size(self) -> tuple[int, int]:
        """Return the size scaled down to at most ``PREVIEW_SIDE``."""
        scale = min(1.0, PREVIEW_SIDE / max(self.height, self.width))
        return max(1, round(self.height * scale)), max(1, round(self.width * scale))

    @torch.no_grad()
    def inputs(self, pipe: Any, sample: Sample, sampler: Sampler) -> RunInputs:
        """Return encoded prompts and CPU-drawn noise; the noise depends on pair and seed alone."""
        family = family_of(type(pipe).__name__)
        pixels = family.pixels
        assert pixels is not None
        assert family.encode is not None
        shared = {
            **pixels.size(*self.size),
            "num_inference_steps": sampler.steps,
            **family.guided(sampler.guidance_scale),
            **sampler.arguments,
        }
        if pixels.set_guidance is not None:
            pixels.set_guidance(pipe, sampler.guidance_scale)
        guided = family.guider(pipe) if family.guider else family.guidance(shared)
        prompts = [sample.clean_prompt, sample.corrupted_prompt]
        pair = int(sample.parameters["pair"])
        if (image := self._image(pair)) is not None:
            shared["image"] = image
        noise = from_canonical(self._noise(pipe, pixels, pair, sample.seed), family.latent_layout)
        latents = pixels.latents(pipe, noise.to(pipe._execution_device))
        encoded = family.encode(pipe, prompts, guided, self.negative)
        if all(torch.equal(rows[0], rows[1]) for rows in encoded.values()):
            # Their difference would be rounding noise, and a recovery between them a map of it.
            raise ValueError(
                f"pair {pair}: the text encoder makes the same of both prompts, {prompts[0]!r} and {prompts[1]!r}; "
                "they differ only in what it leaves out or cuts off"
            )
        return RunInputs(
            shared=shared,
            per_run={
                "latents": latents.repeat(2, *[1] * (latents.ndim - 1)),
                **encoded,
            },
            names=("clean", "corrupted"),
            seed=(pair, sample.seed),
        )

    def _image(self, pair: int) -> Any:
        from PIL import Image

        path = self.pairs[pair].image or self.image
        if path is None:
            return None
        with Image.open(os.path.expanduser(path)) as image:
            return image.convert("RGB")

    def _noise(self, pipe: Any, pixels: Pixels, pair: int, seed: int) -> torch.Tensor:
        denoiser = next(d for name in ("transformer", "transformer_2") if (d := getattr(pipe, name, None)) is not None)
        shape = (1, pixels.channels(denoiser.config), *pixels.extent(pipe.vae.config, self.size))
        return torch.from_numpy(np.random.default_rng([SEED, pair, seed]).standard_normal(shape, dtype=np.float32))

    @torch.no_grad()
    def video(self, pipe: Any, latents: Any) -> NDArray[np.float32]:
        """Decode as the pipeline's own call does, row by row: a VAE needs more memory than a denoiser's row."""
        pixels = family_of(type(pipe).__name__).pixels
        assert pixels is not None
        decoded = (pixels.decode(pipe, latents[i : i + 1]) for i in range(len(latents)))
        rows = [pipe.video_processor.postprocess_video(video, output_type="np") for video in decoded]
        return 255.0 * np.concatenate(rows).astype(np.float32)

    def preview(self, pipe: Any, latents: Any, frames: int) -> NDArray[np.float32]:
        """Decode, keep so many frames evenly spaced, first and last included, and average them down."""
        video = self.video(pipe, latents)
        kept = np.linspace(0, video.shape[1] - 1, frames).round().astype(int)
        small = torch.from_numpy(video[:, kept]).permute(0, 1, 4, 2, 3).flatten(0, 1)
        small = torch.nn.functional.interpolate(small, size=self.preview_size(), mode="area")
        result: NDArray[np.float32] = small.unflatten(0, (len(video), frames)).permute(0, 1, 3, 4, 2).numpy()
        return result


def _family(model: ModelInfo) -> Family:
    return FAMILIES[model.family]
