"""Times of several contestants that take turns, so that a busier or slower machine is unfair to none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

# wall is what a user waits for; processor time of one thread is robust where other programs run
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def interleaved(
    runs: Mapping[str, Callable[[], object]], repeats: int, clock: str = "wall"
) -> dict[str, tuple[float, ...]]:
    """Return each contestant's times in milliseconds.

    Args:
        runs: what runs, by name; each was run before.
        repeats: rounds; every round runs each once and begins with another one.
        clock: ``"wall"`` or ``"cpu"``, the process's processor time (of all threads together).

    >>> times = interleaved({"nothing": lambda: None}, repeats=3)
    >>> len(times["nothing"])
    3
    """
    now, order = CLOCKS[clock], list(runs)
    times: dict[str, list[float]] = {name: [] for name in order}
    for turn in range(repeats):
        for offset in range(len(order)):
            name = order[(turn + offset) % len(order)]
            started = now()
            runs[name]()
            times[name].append(1e3 * (now() - started))
    return {name: tuple(each) for name, each in times.items()}
