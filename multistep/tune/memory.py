"""How much memory the device has: a constant of the machine, so that what is decided by it repeats."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


def device_memory(device: str) -> float:
    """Bytes in all, whoever uses them now: of the GPU, or of the container, or of the machine. Infinity where nobody says."""
    if device.startswith("cuda"):
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not on every system
        total = float("inf")
    try:
        limit = _LIMIT.read_text(encoding="utf-8").strip()
    except OSError:
        limit = ""
    return min(total, float(limit)) if limit.isdigit() else total
