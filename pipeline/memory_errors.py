"""Errors that mean that memory has run out, whoever raised them, and getting back what the failed work held."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch

_TEXTS = ("can't allocate memory", "out of memory", "cannot allocate memory")
"""Of plain ``RuntimeError``: the allocator of the CPU, and CUDA where it is not the allocator that fails."""


SMALLER = "Use a device with more memory, model.dtype bfloat16, or model.device_map balanced over several GPUs."


class MemoryExhaustedError(RuntimeError):
    """A unit that does not fit the memory and cannot be made smaller; the message says what to change."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that memory has run out."""
    return any(_says_so(each) for each in _chain(error))


def reason(error: BaseException) -> str:
    """Return what the error that memory has run out says, its first sentence."""
    found = next((each for each in _chain(error) if _says_so(each)), error)
    text = " ".join(str(found).split()) or type(found).__name__
    return text.split(". ")[0].rstrip(".")[:200]


def release() -> None:
    """Give back what failed work has left: call it when nothing refers to its error any more."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _says_so(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _TEXTS)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__
