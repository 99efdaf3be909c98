"""Which errors mean that memory has run out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.memory_errors import is_out_of_memory, reason, release

CPU = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
GPU = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB."


def raised(error, cause=None, context=None):
    error.__cause__, error.__context__ = cause, context
    return error


class TestWhich:
    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError(GPU),
            MemoryError(),
            RuntimeError(CPU),
            RuntimeError("CUDA error: out of memory"),
            raised(ValueError("trace failed"), cause=torch.OutOfMemoryError(GPU)),
            raised(KeyError("x"), context=raised(ValueError("y"), context=MemoryError())),
        ],
        ids=["torch's", "python's", "CPU allocator's", "CUDA's", "wrapped", "twice wrapped"],
    )
    def test_memory(self, error):
        assert is_out_of_memory(error)

    @pytest.mark.parametrize(
        "error",
        [RuntimeError("shape mismatch"), ValueError(GPU), OSError(28, "No space left on device"), KeyboardInterrupt()],
        ids=["another", "only quoted", "disk", "interrupt"],
    )
    def test_not_memory(self, error):
        assert not is_out_of_memory(error)

    def test_real_allocations_that_cannot_be(self):
        with pytest.raises(RuntimeError) as of_torch:
            torch.empty(2**55, dtype=torch.uint8)
        with pytest.raises(MemoryError) as of_numpy:
            np.empty(2**60, dtype=np.uint8)
        assert is_out_of_memory(of_torch.value)
        assert is_out_of_memory(of_numpy.value)

    def test_a_circle_of_causes_ends(self):
        one, other = ValueError("a"), ValueError("b")
        one.__cause__, other.__cause__ = other, one
        assert not is_out_of_memory(one)


class TestReason:
    @pytest.mark.parametrize(
        ("error", "text"),
        [
            (torch.OutOfMemoryError(GPU), "CUDA out of memory"),
            (MemoryError(), "MemoryError"),
            (raised(ValueError("no"), cause=RuntimeError("x\n  out of memory")), "x out of memory"),
        ],
        ids=["first sentence", "no text", "the cause's"],
    )
    def test_is_short(self, error, text):
        assert reason(error) == text

    def test_is_cut(self):
        assert len(reason(RuntimeError("out of memory " + "x" * 999))) == 200


def test_release_collects_what_only_circles_hold():
    class Node:
        alive = 0

        def __init__(self):
            self.me = self
            Node.alive += 1

        def __del__(self):
            Node.alive -= 1

    Node()
    release()
    assert Node.alive == 0
