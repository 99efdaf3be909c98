"""What a config may pass on to a pipeline's call, and what the engine and the task pass themselves."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from interventions.solvers import UnsupportedSolverError, check_step_arguments, solver_of
from pipeline.experiment import Problem, unknown
from pipeline.models import ModelInfo

RESERVED = frozenset(
    {
        "latents",
        "generator",
        "output_type",
        "return_dict",
        "num_inference_steps",
        "num_videos_per_prompt",
        "num_images_per_prompt",
        "timesteps",
        "sigmas",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
        # Of encoding and decoding, which happen outside of the call.
        "max_sequence_length",
        "clean_caption",
        "mask_feature",
        "use_resolution_binning",
        "decode_timestep",
        "decode_noise_scale",
        "decode_chunk_size",
    }
)
"""Arguments of a pipeline's call that belong to the engine."""


def argument_problems(model: ModelInfo, arguments: Mapping[str, Any], own: Collection[str]) -> list[Problem]:
    """Return what is wrong with ``sampler.arguments``: names that the call lacks or that are not theirs to set.

    Parameters
    ----------
    own : names that the task sets.
    """
    import diffusers

    if not arguments:
        return []
    pipeline = getattr(diffusers, model.pipeline_config["_class_name"], None)
    if pipeline is None:
        return []
    parameters = set(inspect.signature(pipeline.__call__).parameters) - {"self"}
    taken = RESERVED | set(own) | {name for name in parameters if "prompt" in name or "image" in name}
    free = sorted(name for name in parameters - taken if not name.endswith("kwargs"))
    found: list[Problem] = []
    for name in arguments:
        if name in taken:
            found.append((_at(name), f"{name} is not for a config to set; it may be any of {', '.join(free)}"))
        elif name not in parameters:
            found.append((_at(name), unknown("argument", name, free)))
    try:
        check_step_arguments(solver_of(model.scheduler()), arguments)
    except UnsupportedSolverError as error:
        found.append((("sampler", "arguments"), str(error)))
    return found


def _at(name: str) -> tuple[str, ...]:
    return "sampler", "arguments", name
