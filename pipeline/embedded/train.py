"""Train the embedded maze model: ``python -m pipeline.embedded.train`` (flow matching on generated mazes).

Every batch is generated from its step number, so a run is defined by ``--seed`` and ``--steps`` and an
interrupted run continues from its last checkpoint with the batches it would have seen. The shipped weights
are those of the defaults; they took about an hour on two shared cores (``training.json`` has the figure).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from pipeline.embedded import build
from pipeline.tasks import maze_world as world

BATCH = 64
PEAK_LR = 2e-3
WARMUP = 100
EMA_DECAY = 0.998
SIGMA_SPREAD = 1.2
AMBIGUOUS_SHARE = 0.5
"""Share of rows with the prompt "any" (or none): the ambiguous problem is the hard one."""
DROP_PROMPT = 0.1


def training_batch(step: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Generate the videos and prompt numbers of one step.

    Returns
    -------
    latents : normalised latents (BATCH, 3, FRAMES, 2 SIZE, 2 SIZE).
    prompts : index into ``build.PROMPTS``; ``len(PROMPTS)`` is the empty prompt.
    """
    rng = np.random.default_rng([seed, step])
    videos, prompts = [], []
    for _ in range(BATCH):
        maze = world.generate(int(rng.integers(2**40)), split="train")
        goal: world.Goal = "red" if rng.random() < 0.5 else "blue"
        videos.append(world.solution(maze, goal))
        ambiguous = rng.random() < AMBIGUOUS_SHARE
        prompt = 2 if ambiguous else ("red", "blue").index(goal)
        prompts.append(len(build.PROMPTS) if rng.random() < DROP_PROMPT else prompt)
    pixels = torch.from_numpy(world.PALETTE[np.stack(videos)]).float() / 127.5 - 1
    mean, std = torch.tensor(build.LATENTS_MEAN), torch.tensor(build.LATENTS_STD)
    latents = ((pixels - mean) / std).permute(0, 4, 1, 2, 3)
    return latents.repeat_interleave(2, -1).repeat_interleave(2, -2), torch.tensor(prompts)


def sample_sigmas(generator: torch.Generator) -> torch.Tensor:
    """Draw one noise level a row: logit-normal, then the scheduler's shift."""
    u = torch.sigmoid(SIGMA_SPREAD * torch.randn(BATCH, generator=generator))
    return build.TRAIN_SHIFT * u / (1 + (build.TRAIN_SHIFT - 1) * u)


def flow_matching_loss(
    transformer: Any, latents: torch.Tensor, embeds: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Mean squared error of the velocity ``eps - x0`` on frames 1 and later; frame 0 is given clean at time 0."""
    sigma = sample_sigmas(generator).view(-1, 1, 1, 1, 1)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = torch.cat([latents[:, :, :1], ((1 - sigma) * latents + sigma * noise)[:, :, 1:]], dim=2)
    timestep = 1000 * sigma.view(-1, 1, 1).expand(-1, world.FRAMES, world.SIZE**2).clone()
    timestep[:, 0] = 0
    velocity = transformer(
        hidden_states=noisy, timestep=timestep.flatten(1), encoder_hidden_states=embeds, return_dict=False
    )[0]
    return F.mse_loss(velocity[:, :, 1:], (noise - latents)[:, :, 1:])


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def make_optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    inner = {n for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    return [
        torch.optim.Muon(
            [p for n, p in model.named_parameters() if n in inner],
            lr=PEAK_LR,
            weight_decay=0.01,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [p for n, p in model.named_parameters() if n not in inner], lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0
        ),
    ]


def train(steps: int, seed: int, work: Path, compile_model: bool, checkpoint_every: int = 250) -> dict[str, Any]:
    """Train, checkpoint into ``work`` and return the record of the run (seed, steps, wall seconds, losses)."""
    pipe = build.build_pipeline(seed)
    model = pipe.transformer.train().requires_grad_(True)
    embeds = build.encode_prompts(pipe, [*build.PROMPTS, ""])
    optimizers = make_optimizers(model)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    identity = [steps, seed, BATCH]
    first, wall, losses = _restore(work, identity, model, optimizers, ema)
    forward = torch.compile(model) if compile_model else model
    started = time.monotonic() - wall
    for step in range(first, steps):
        latents, prompts = training_batch(step, seed)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        loss = flow_matching_loss(forward, latents, embeds[prompts], generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, p in model.named_parameters():
                ema[name].lerp_(p, 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            wall = time.monotonic() - started
            print(f"step {step + 1} of {steps}: loss {np.mean(losses[-50:]):.4f}, {wall:.0f} s", flush=True)
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            _checkpoint(work, identity, step + 1, time.monotonic() - started, losses, model, optimizers, ema)
    model.load_state_dict(ema, strict=False)
    build.save_pipeline(pipe, work / "pipeline")
    record = {
        "seed": seed,
        "steps": steps,
        "batch": BATCH,
        "wall_seconds": round(time.monotonic() - started),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "final_loss": round(float(np.mean(losses[-100:])), 5),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    (work / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def _checkpoint(
    work: Path,
    identity: list[int],
    step: int,
    wall: float,
    losses: list[float],
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    ema: dict[str, torch.Tensor],
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    state = {
        "identity": identity,
        "step": step,
        "wall": wall,
        "losses": losses,
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "ema": ema,
    }
    partial = work / "checkpoint.pt.partial"
    torch.save(state, partial)
    partial.replace(work / "checkpoint.pt")


def _restore(
    work: Path,
    identity: list[int],
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    ema: dict[str, torch.Tensor],
) -> tuple[int, float, list[float]]:
    path = work / "checkpoint.pt"
    if not path.exists():
        return 0, 0.0, []
    state = torch.load(path, weights_only=True)
    if state["identity"] != identity:
        raise SystemExit(
            f"{path} belongs to a run of steps, seed, batch {state['identity']}, asked are {identity}. "
            "Give another --work folder."
        )
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    ema.update(state["ema"])
    return state["step"], state["wall"], state["losses"]


def main() -> None:
    """Run the command line of the training script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/maze_training"), help="checkpoints and result")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = train(args.steps, args.seed, args.work, compile_model=not args.no_compile)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
