"""What an attention knock-out costs at the size of a real video: ``python -m benchmarks.knockout_memory``.

21 latent frames of 1,560 tokens are an 81-frame Wan clip at 480 x 832. Plain attention and three knock-outs run
interleaved in one process on one thread; "causal_in_a_run" is the causal one as an intervention makes it, on top of the
ordinary result that the other rows of the batch keep. Printed as JSON and as a table: peak memory above the inputs, CPU
seconds (least of the rounds) and the ratio to plain attention, next to the size of the dense mask that is never built.

Memory is the high-water mark of the resident set over one call, reset before it through ``/proc/self/clear_refs``
(Linux), less the resident set before the call: it holds the result, copied keys and the kernels' scratch space alike.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from interventions.attention import AttentionTap, Edges, Layout, knocked_out


def knockouts(frames: int) -> dict[str, Edges]:
    """Return the knock-outs by name; the frame of "one_frame" is in the middle, so that the keys left are copied."""
    return {
        "causal": Edges("causal"),
        "local": Edges("local", window=1),
        "one_frame": Edges("from_frames", frames=(frames // 2,)),
    }


def resident(field: str) -> int:
    """Return a field of the process status in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    if found is None:
        raise OSError(f"/proc/self/status has no {field}: this benchmark needs Linux")
    return int(found[1]) * 1024


def measured(work: Callable[[], torch.Tensor]) -> tuple[float, int]:
    """Run once; return CPU seconds and the peak of resident bytes above what was there before."""
    ctypes.CDLL(None).malloc_trim(0)  # else the allocator serves the call from memory that counts already
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident("VmRSS")
    started = time.process_time()
    work()
    return time.process_time() - started, resident("VmHWM") - before


def attention_calls(args: argparse.Namespace) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the cases by name, on the same random inputs."""
    made = torch.Generator().manual_seed(0)
    shape = (args.rows, args.frames * args.tokens, args.heads, args.dim)
    q, k, v = (torch.randn(shape, generator=made).transpose(1, 2) for _ in range(3))
    layout = Layout(args.frames, args.tokens)
    calls: dict[str, Callable[[], torch.Tensor]] = {"plain": lambda: F.scaled_dot_product_attention(q, k, v)}
    for name, edge in knockouts(args.frames).items():
        calls[name] = lambda edge=edge: knocked_out(q, k, v, edge, layout)  # type: ignore[misc]

    def tapped() -> torch.Tensor:
        with AttentionTap() as tap:
            tap.arm({0: [Edges("causal")]}, args.rows, layout)
            out = F.scaled_dot_product_attention(q, k, v)
            tap.disarm()
        return out

    return {**calls, "causal_in_a_run": tapped}


def largest_error(frames: int, tokens: int) -> float:
    """Largest difference from attention under the dense mask, at a size where that mask is small."""
    q, k, v = (torch.randn(1, 2, frames * tokens, 64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    worst = 0.0
    for edge in knockouts(frames).values():
        mask = edge.allowed(frames).repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
        dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        worst = max(worst, float((knocked_out(q, k, v, edge, Layout(frames, tokens)) - dense).abs().max()))
    return worst


def main() -> None:
    """Measure every case ``rounds`` times, interleaved, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=21, help="latent frames")
    parser.add_argument("--tokens", type=int, default=1560, help="tokens of a frame")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64, help="channels of a head")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    calls = attention_calls(args)
    error = largest_error(args.frames, 20)  # first, so that the kernels are loaded before anything is measured
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    peaks: dict[str, list[int]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(args.rounds):
            for name, work in calls.items():
                took, peak = measured(work)
                seconds[name].append(took)
                peaks[name].append(peak)
    mib, length = 2.0**20, args.frames * args.tokens
    dense_mask = round(length**2 / mib, 1)
    cases = {
        name: {
            "peak_mib": round(max(peaks[name]) / mib, 1),
            "seconds": round(min(seconds[name]), 2),
            "time_ratio": round(min(seconds[name]) / min(seconds["plain"]), 2),
        }
        for name in calls
    }
    result = {
        "size": vars(args),
        "dense_mask_mib": dense_mask,
        "result_mib": round(args.rows * args.heads * length * args.dim * 4 / mib, 1),
        "largest_difference_from_dense_mask": error,
        "cases": cases,
    }
    print(json.dumps(result, indent=2))
    print(f"\n{'attention':16} {'peak MiB':>9} {'of the mask':>12} {'seconds':>8} {'x plain':>8}")
    for name, case in cases.items():
        share = case["peak_mib"] / dense_mask
        print(f"{name:16} {case['peak_mib']:9.1f} {share:12.1%} {case['seconds']:8.2f} {case['time_ratio']:8.2f}")


if __name__ == "__main__":
    main()
