"""Random weights at a scale at which every part of a tiny network matters, zero-initialised parts included."""

from __future__ import annotations

import torch


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Redraw every parameter from a seeded generator and return the module in fp32 and eval mode.

    Matrices and kernels keep the variance of their input, norm scales stay around 1, biases and modulation tables are
    large enough to be seen.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("weight") and parameter.ndim > 1:
                noise = noise / parameter[0].numel() ** 0.5
            elif name.endswith("weight"):
                noise = 1 + 0.3 * noise
            else:
                noise = 0.4 * noise
            parameter.copy_(noise)
    return module.float().eval().requires_grad_(False)


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Draw a standard normal tensor from a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
