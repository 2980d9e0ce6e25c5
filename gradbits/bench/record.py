"""What a benchmark leaves behind: where it ran, what was measured, as JSON values and as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gradbits.core.files import write_atomically
from gradbits.kernels import machine
from gradbits.kernels.native import describe


def surroundings(command: str, *, clock: str, repeats: int, allocator: str) -> dict[str, Any]:
    """Return where and how a benchmark runs, as JSON values.

    Args:
        command: the command line that repeats it.
        clock: ``"wall"`` or ``"cpu"``.
        repeats: rounds.
        allocator: what the C allocator was told, in words.
    """
    return {
        "command": command,
        "torch": torch.__version__,
        "processor": machine.processor_name(),
        "instruction_sets": machine.instruction_sets(),
        "native_kernels": describe(),
        "compiler": machine.compiler() is not None,
        "threads": torch.get_num_threads(),
        "clock": clock,
        "repeats": repeats,
        "allocator": allocator,
    }


def save_record(path: Path, where: Mapping[str, Any], **parts: Any) -> None:
    """Write a benchmark as a JSON file.

    Args:
        path: the file to make.
        where: what ``surroundings`` returned.
        parts: what was measured.

    Raises:
        GradbitsError: the file cannot be written.
    """
    text = json.dumps({**where, **parts}, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def head_lines(where: Mapping[str, Any], peaks: Mapping[str, float] | None = None) -> Sequence[str]:
    """Return the lines above the tables: the command, what ran it, and the machine's measured limits."""
    sets = ", ".join(where["instruction_sets"])
    what = {"wall": "wall clock", "cpu": "processor time"}[where["clock"]]
    lines = [
        where["command"],
        f"{where['processor']} ({sets}), {where['threads']} thread(s); torch {where['torch']}; "
        f"native kernels: {where['native_kernels']}",
        f"{what}, medians of {where['repeats']} interleaved rounds; C allocator: {where['allocator']}",
    ]
    if peaks:
        limits = ", ".join(f"{name} {peaks[name] / 1e9:.0f} G/s" for name in ("fp32", "bf16", "int8") if name in peaks)
        lines.append(f"measured limits of this machine: {limits}, copy {peaks['memory'] / 1e9:.1f} GB/s")
    return lines
