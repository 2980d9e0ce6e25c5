"""What this machine has, as far as kernels care."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "vaes")


def instruction_sets() -> list[str]:
    """Return which of ``INSTRUCTION_SETS`` the processor has; empty where the system does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    return [name for name in INSTRUCTION_SETS if name in flags]


def processor_name() -> str:
    """Return the processor's name, or its architecture where the system does not say."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return os.uname().machine if hasattr(os, "uname") else "unknown"


def compiler() -> str | None:
    """Return the path of a C++ compiler, or None."""
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def devices() -> list[str]:
    """Return the devices that PyTorch can use, by name; initialises the driver of those it has.

    >>> devices()[0]
    'cpu'
    """
    found = ["cpu"]
    if torch.cuda.is_available():
        found += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return found
