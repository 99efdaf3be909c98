"""The bare side of ``benchmarks.memory``: diffusers alone runs a pipeline once, and says what it needed at its peak.

``python -m benchmarks.memory_bare FOLDER DEVICE``: there are ``call.json``, ``rows.safetensors``, maybe ``image.png``.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

# Only the embedded model's own part of this package: diffusers loads classes that are imported already.
import pipeline.embedded.codec  # noqa: F401


def run(folder: Path, device: str) -> int:
    """Load, run and decode as the folder says; return the peak of this process in bytes, or of its GPU."""
    torch.set_num_threads(1)
    told = json.loads((folder / "call.json").read_text(encoding="utf-8"))
    pipe = DiffusionPipeline.from_pretrained(told["model"], dtype=torch.float32, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    call = {**told["call"], **{name: rows.to(device) for name, rows in load_file(folder / "rows.safetensors").items()}}
    if (folder / "image.png").exists():
        import PIL.Image

        call["image"] = PIL.Image.open(folder / "image.png").convert("RGB")
    pipe(**call, output_type="np")
    return peak_of_process("self") if device == "cpu" else torch.cuda.max_memory_allocated()


def peak_of_process(number: int | str) -> int:
    """Return the high-water mark of a process's resident memory in bytes.

    Raises
    ------
    OSError : there is no such process, or no such figure here.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{number}/status").read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/{number}/status has no VmHWM: this benchmark needs Linux.")
    return int(found[1]) * 1024


if __name__ == "__main__":
    print(run(Path(sys.argv[1]), sys.argv[2]))
