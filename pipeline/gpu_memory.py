"""Peak GPU memory of this process, on the most used of its GPUs; nothing where CUDA is not in use."""

from __future__ import annotations

import torch


def reset_peak() -> None:
    """Begin a new measurement; what is allocated now counts from the start."""
    for device in _devices():
        torch.cuda.reset_peak_memory_stats(device)


def peak() -> int:
    """Return the most bytes that were allocated on one GPU since ``reset_peak``; 0 without GPU."""
    return max((torch.cuda.max_memory_allocated(device) for device in _devices()), default=0)


def _devices() -> range:
    # Asking for memory would start CUDA, in a replica that does not use it.
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
