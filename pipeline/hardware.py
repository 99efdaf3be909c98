"""What a model computes on, by name; equal names promise equal bits."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def hardware_of(device: Any) -> str:
    """Name what a device, given as one of torch or by its kind, computes on."""
    device = torch.device(device)
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def kind_of(device: str) -> str:
    """Return the kind of device that a config's ``model.device`` means here: "cpu" or "cuda"."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> str:
    """Name what else the speed of a machine depends on: the model of its processor, and how many it has."""
    model = platform.processor()
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        model = found[1] if found else model
    return f"{os.cpu_count()} x {model}"
