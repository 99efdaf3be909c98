"""The engine beside the bare denoiser on a model of real size: ``python -m benchmarks.gpu_efficiency``.

A Wan 2.1 of 1.3 billion random parameters, or ``--shape tiny``, at the tokens of a clip of 81 frames in 480p. Patches
are forked from a recorded pair and what they give is written into a Zarr array; the same denoiser forwards run bare,
with as many rows, in turn. Needs torch, diffusers, nnsight and zarr, and neither Ray nor weights. Printed as JSON:
seconds and peak memory of both, with and without what rows share. Absolute times are told with the device.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import zarr

from benchmarks.bare import BareDenoiser
from benchmarks.figures import Bench, Target
from interventions import kinds as _kinds  # noqa: F401  (registers every kind)
from interventions.base import KINDS, Intervention
from interventions.engine import Engine
from interventions.families.wan import WAN
from interventions.record import Record, RunInputs

TARGETS = (
    Target(
        what="seconds of the same forwards of the bare denoiser over those of the engine",
        figure="as_shipped.engine_efficiency",
        bound="at least",
        limit=0.97,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Wan denoiser and the latents that it is given: (frames, height, width)."""

    layers: int
    heads: int
    head_size: int
    ffn: int
    text: int
    latents: tuple[int, int, int]
    text_tokens: int = 512


SHAPES = {
    "wan-1.3b-480p": Shape(layers=30, heads=12, head_size=128, ffn=8960, text=4096, latents=(21, 60, 104)),
    "tiny": Shape(layers=3, heads=2, head_size=12, ffn=32, text=16, latents=(3, 4, 4), text_tokens=8),
}


def pipeline(shape: Shape, device: str, dtype: torch.dtype) -> Any:
    """Return a Wan pipeline with random weights and neither text encoder nor VAE."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    with torch.device(device):
        denoiser = WanTransformer3DModel(
            num_layers=shape.layers,
            num_attention_heads=shape.heads,
            attention_head_dim=shape.head_size,
            ffn_dim=shape.ffn,
            text_dim=shape.text,
        )
    for name, parameter in denoiser.named_parameters():
        # As ``from_pretrained`` loads it.
        if not any(part in name for part in denoiser._keep_in_fp32_modules):
            parameter.data = parameter.data.to(dtype)
    denoiser.eval()
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs_of(shape: Shape, steps: int, device: str, dtype: torch.dtype) -> RunInputs:
    """Return a pair that shares its noise and differs in its prompt."""
    draw = torch.Generator().manual_seed(0)
    frames, height, width = shape.latents
    noise = torch.randn(1, 16, *shape.latents, generator=draw).repeat(2, 1, 1, 1, 1)
    prompts = torch.randn(2, shape.text_tokens, shape.text, generator=draw)
    return RunInputs(
        shared={
            "height": height * 8,
            "width": width * 8,
            "num_frames": 4 * (frames - 1) + 1,
            "num_inference_steps": steps,
            "guidance_scale": 1.0,
        },
        per_run={"latents": noise.to(device), "prompt_embeds": prompts.to(device, dtype)},
        names=("clean", "corrupted"),
        seed=(0,),
    )


def timed(device: str, what: Callable[[], Any]) -> tuple[float, int]:
    """Return the seconds and the peak bytes of GPU memory that something takes."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    what()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began, torch.cuda.max_memory_allocated() if on_gpu else 0


def forked(engine: Engine, record: Record, rows: list[Intervention], out: Any) -> None:
    """Fork patches and write the root mean square of what each of them changes."""
    final = engine.fork(record, rows).final
    changed = (final.float() - record.final[1].float()).square().flatten(1).mean(1).sqrt()
    out[:] = changed.cpu().numpy()


def measure(shape: Shape, *, steps: int, rows: int, rounds: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Fork and run bare in turn, from the first step and from the middle one.

    Parameters
    ----------
    rows : of one forward, patches of blocks spread evenly.
    """
    pipe, inputs = pipeline(shape, device, dtype), inputs_of(shape, steps, device, dtype)
    bare, engine = BareDenoiser(pipe, inputs), Engine(pipe, WAN)
    record = engine.record(inputs)
    seconds: dict[str, float] = {"as_shipped": 0.0, "without_sharing": 0.0, "bare": 0.0}
    peaks = dict.fromkeys(seconds, 0)
    patch = KINDS["patch"]
    with tempfile.TemporaryDirectory() as folder:
        out = zarr.create_array(folder, shape=(rows,), dtype="float32")
        for step in (0, steps // 2) * rounds:
            cells = [patch(step=step, layer=i * shape.layers // rows, component="ffn") for i in range(rows)]

            def alone(step: int = step) -> None:
                # The donor's capture is one forward of both recorded runs.
                bare.forwards(2, 1)
                bare.forwards(rows, steps - step)

            for name in seconds:
                engine.shares = name == "as_shipped"
                took, peak = timed(
                    device, alone if name == "bare" else lambda cells=cells: forked(engine, record, cells, out)
                )
                seconds[name] += took
                peaks[name] = max(peaks[name], peak)
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    frames, height, width = shape.latents
    told: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "parameters": parameters,
        "tokens": frames * (height // 2) * (width // 2),
        "rows": rows,
        "steps": steps,
        "seconds_a_row_forward": round(seconds["bare"] / (rounds * ((2 * steps - steps // 2) * rows + 4)), 4),
    }
    for name in ("as_shipped", "without_sharing"):
        told[name] = {
            "engine_efficiency": round(seconds["bare"] / seconds[name], 3),
            "peak_over_bare": round(peaks[name] / peaks["bare"], 3) if peaks["bare"] else None,
        }
    return told


def main() -> int:
    """Measure and print."""
    bench = Bench(__doc__)
    bench.parser.add_argument("--shape", choices=SHAPES, default="wan-1.3b-480p")
    bench.parser.add_argument("--steps", type=int, default=6)
    bench.parser.add_argument("--rows", type=int, default=2)
    bench.parser.add_argument("--rounds", type=int, default=2)
    args = bench.parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures = measure(
        SHAPES[args.shape],
        steps=args.steps,
        rows=args.rows,
        rounds=args.rounds,
        device=device,
        dtype=torch.bfloat16 if device == "cuda" else torch.float32,
    )
    return bench.conclude(args, figures, TARGETS)


if __name__ == "__main__":
    sys.exit(main())
