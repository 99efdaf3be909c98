"""Pipelines under an engine with a recorded pair, on which the kinds are compared with plain hooks."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from interventions import kinds  # noqa: F401  (registers every kind)
from interventions.base import Intervention
from interventions.engine import Engine
from interventions.families.family import family_of
from interventions.record import Record, RunInputs
from pipeline.embedded.build import build_pipeline
from pipeline.tasks.maze import MazeTask
from pipeline.tasks.task import Sampler
from tests.reference.hooks import Loop

STEPS = 4
CLEAN, CORRUPTED = 0, 1
FAMILIES = ("wan", "wan22_a14b", "ltx", "cogvideox", "hunyuan_video")
"""Two calls a step and a multistep solver; two experts; one call; text in the sequence; two block lists."""
PROMPT = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")


@dataclass(frozen=True)
class Case:
    """A pipeline hosted by an engine, and its recorded pair; the runs differ in noise and in both prompts."""

    name: str
    engine: Engine
    record: Record

    @property
    def pipe(self) -> Any:
        return self.engine.pipe

    @property
    def one_step(self) -> bool:
        """Whether the solver keeps no history."""
        return "swap" in self.record.geometry.edits

    def fork(self, *rows: Intervention) -> torch.Tensor:
        return self.engine.fork(self.record, rows, others=lambda ref: self.record).final

    def blocks(self, step: int) -> list[Any]:
        denoiser = getattr(self.pipe, self.record.geometry.denoiser(step))
        return [denoiser.get_submodule(a.path) for a in self.engine.family.addresses(denoiser.config)]

    def row(self, branch: str, run: int) -> int:
        call = self.record.geometry.calls[self.record.geometry.call_of(branch)]
        return 2 * call.index(branch) + run

    def bare(self) -> torch.Tensor:
        """Run the pipeline itself, under whatever plain hooks are on it."""
        return self.engine.bare(self.record.inputs)


def different(per_run: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the corrupted run other noise and another negative prompt, so that nothing is shared by accident."""
    changed = dict(per_run)
    for name in ("latents", "negative_prompt_embeds", "negative_pooled_prompt_embeds"):
        if name in per_run:
            drawn = torch.randn(per_run[name][0].shape, generator=torch.Generator().manual_seed(11))
            changed[name] = torch.stack([per_run[name][0], drawn.to(per_run[name])])
    return changed


def maze() -> tuple[Engine, RunInputs]:
    pipe = build_pipeline(7, num_layers=3)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p.add_(0.15 * torch.randn(p.shape, generator=generator))
    task = MazeTask(mazes=1)
    return (
        Engine(pipe, family_of("WanImageToVideoPipeline")),
        task.inputs(pipe, task.samples()[0], Sampler(steps=STEPS, guidance_scale=3.0)),
    )


def tiny(name: str) -> tuple[Engine, RunInputs]:
    module = importlib.import_module(f"tests.families.{name}")
    pipe = module.build()
    shared, per_run = module.arguments(pipe, steps=STEPS, guidance=True)
    engine = Engine(pipe, family_of(type(pipe).__name__))
    return engine, RunInputs(shared=shared, per_run=per_run, names=("clean", "corrupted"), seed=(0,))


def case_of(name: str) -> Case:
    """Host the maze pipeline or one of ``FAMILIES`` and record its pair."""
    torch.set_num_threads(1)
    engine, inputs = maze() if name == "maze" else tiny(name)
    inputs = replace(inputs, per_run=different(dict(inputs.per_run)))
    return Case(name, engine, engine.record(inputs))


def loop_of(case: Case) -> Loop:
    return Loop(case.pipe, case.record.inputs, case.record.geometry)


def assert_near(found: torch.Tensor, expected: torch.Tensor, limit: float = 2e-5) -> None:
    scale = float(expected.abs().max())
    assert torch.isfinite(found).all()
    assert float((found - expected).abs().max()) / scale < limit


def assert_moved(found: torch.Tensor, recorded: torch.Tensor, least: float = 1e-3) -> None:
    assert float((found - recorded).abs().max()) / float(recorded.abs().max()) > least


@contextmanager
def now(case: Case) -> Iterator[Callable[[], tuple[int, tuple[str, ...]]]]:
    """Give the step and the branches of the denoiser call at hand, counted with plain hooks."""
    seen: list[None] = []
    calls = case.record.geometry.calls
    with ExitStack() as stack:
        for name in case.record.geometry.denoisers:
            handle = getattr(case.pipe, name).register_forward_pre_hook(lambda module, args: seen.append(None))
            stack.callback(handle.remove)
        yield lambda: ((len(seen) - 1) // len(calls), calls[(len(seen) - 1) % len(calls)])
