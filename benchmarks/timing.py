"""Interleaved timing for the benchmarks: medians of processor time, so that other programs disturb little."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from gradbits.kernels import dispatch, machine
from gradbits.kernels.native import describe, library


def medians(
    contestants: Mapping[str, Callable[[], object]], repeats: int, before: Callable[[str], None] | None = None
) -> dict[str, float]:
    """Return the median milliseconds of each contestant.

    Args:
        contestants: what runs, by name; one round runs every one of them once.
        repeats: rounds.
        before: called with the name before each run, outside the time.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, run in contestants.items():
            if before is not None:
                before(name)
            started = time.process_time()
            run()
            if turn:  # the first round only warms up
                times[name].append(1e3 * (time.process_time() - started))
    return {name: statistics.median(each) for name, each in times.items()}


def use_native(on: bool) -> None:
    """Switch the native kernels on or off for what follows."""
    os.environ[library.SWITCH] = "1" if on else "0"
    library.library.cache_clear()
    dispatch.kernel_table.cache_clear()
    dispatch.choose.cache_clear()
    for op in ("quantize", "matmul", "conv_output", "conv_grad_weight"):
        dispatch.choose(op, dispatch.Request("cpu"))  # loads what there is to load


def header(command: str) -> str:
    """Return the first lines of a log: the command, and what ran it."""
    sets = ", ".join(machine.instruction_sets())
    return (
        f"{command}\ntorch {torch.__version__}, {torch.get_num_threads()} thread(s) ({sets}); native: {describe()}\n"
        "processor time, medians of interleaved rounds; the machine was shared with other programs\n"
    )
