"""A work and its contestants: who does it, who cannot and why, and how long each takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gradbits.bench.timing import interleaved
from gradbits.core.errors import GradbitsError

WARMUPS = 2  # runs before the clock: compilers compile, learned ranges settle


class UnavailableError(GradbitsError, RuntimeError):
    """A contestant cannot take part here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A contestant that can start.

    Args:
        run: does the work once.
        output: returns what is compared with the first contestant's, or None where nothing is.
    """

    run: Callable[[], object]
    output: Callable[[], torch.Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to do a work.

    Args:
        name: its name in tables.
        build: makes it ready; may raise ``UnavailableError``.
        peak: which limit of the machine it runs against: ``"fp32"``, ``"bf16"``, ``"int8"`` or ``"memory"``.
        ours: whether it is gradbits; whatever a peer raises leaves only the peer out.
    """

    name: str
    build: Callable[[], Ready]
    peak: str
    ours: bool = False


@dataclass(frozen=True, kw_only=True)
class Work:
    """Something to do in several ways.

    Args:
        name: shown above its table.
        contestants: who does it; outputs are compared with those of the first.
        amount: operations of one run, or bytes where ``moves`` is set.
        references: label -> contestants, the fastest of which the others are compared with.
        moves: whether ``amount`` counts bytes.
        must, aim: label -> ratio that the best of ours shall reach.
    """

    name: str
    contestants: tuple[Contestant, ...]
    amount: float
    references: dict[str, tuple[str, ...]]
    moves: bool = False
    must: dict[str, float] | None = None
    aim: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one contestant needed.

    Args:
        name, peak, ours: as in ``Contestant``.
        times: milliseconds of each run; empty where it could not take part.
        error: relative error of its output against the first contestant's, or None.
        note: why it did not take part, or what is wrong with it.
    """

    name: str
    peak: str
    ours: bool
    times: tuple[float, ...] = ()
    error: float | None = None
    note: str = ""

    @property
    def median(self) -> float | None:
        """The median time in milliseconds, or None where it did not take part."""
        return statistics.median(self.times) if self.times else None


def compete(
    work: Work, repeats: int, clock: str = "wall", tell: Callable[[str], None] = lambda text: None
) -> list[Measured]:
    """Return what each contestant of a work needed, in their order.

    Args:
        work: what to do.
        repeats: rounds.
        clock: ``"wall"`` or ``"cpu"``.
        tell: called with what is being done.
    """
    ready: dict[str, Ready] = {}
    notes: dict[str, str] = {}
    for contestant in work.contestants:
        tell(f"{work.name}: {contestant.name}")
        try:
            candidate = contestant.build()
            for _ in range(WARMUPS):
                candidate.run()
            ready[contestant.name] = candidate
        except UnavailableError as error:
            notes[contestant.name] = str(error)
        except Exception as error:
            if contestant.ours:
                raise
            notes[contestant.name] = f"{type(error).__name__}: {_first_line(error)}"
    tell(f"{work.name}: {repeats} rounds")
    times = interleaved({name: each.run for name, each in ready.items()}, repeats, clock)
    errors = _errors(ready)
    return [
        Measured(
            name=c.name,
            peak=c.peak,
            ours=c.ours,
            times=times.get(c.name, ()),
            error=errors.get(c.name),
            note=notes.get(c.name, "no-op: its output equals that of fp32" if errors.get(c.name) == 0.0 else ""),
        )
        for c in work.contestants
    ]


def _errors(ready: dict[str, Ready]) -> dict[str, float]:
    """Return the relative error of each output against the first one's."""
    outputs = {name: each.output() for name, each in ready.items() if each.output is not None}
    if not outputs:
        return {}
    first, reference = next(iter(outputs.items()))
    exact = reference.double()
    scale = exact.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return {n: float((y.double() - exact).norm() / scale) for n, y in outputs.items() if n != first}


def ratios(work: Work, measured: list[Measured]) -> dict[str, dict[str, float]]:
    """Return how many times faster each contestant is than each reference: name -> label -> ratio."""
    medians = {m.name: m.median for m in measured if m.median is not None}
    found: dict[str, dict[str, float]] = {name: {} for name in medians}
    for label, names in work.references.items():
        best = min((medians[n] for n in names if n in medians), default=None)
        for name, own in medians.items():
            if best is not None and own > 0:
                found[name][label] = best / own
    return found


def best_of_ours(measured: list[Measured]) -> Measured | None:
    """Return the fastest of gradbits' own contestants, or None where none took part."""
    mine = [m for m in measured if m.ours and m.times]
    return min(mine, key=lambda m: statistics.median(m.times), default=None)


def as_dict(work: Work, measured: list[Measured], peaks: dict[str, float]) -> dict[str, Any]:
    """Return the outcome of a work as JSON values.

    Args:
        work: what was done.
        measured: what each contestant needed.
        peaks: limits of the machine, operations or bytes a second.
    """
    compared = ratios(work, measured)
    rows = []
    for m in measured:
        rate = None if m.median is None else 1e3 * work.amount / m.median
        peak = peaks.get(m.peak)
        rows.append(
            {
                "name": m.name,
                "median_ms": m.median,
                "times_ms": list(m.times),
                "per_second": rate,
                "of_peak": None if rate is None or not peak else rate / peak,
                "faster_than": compared.get(m.name, {}),
                "error": m.error,
                "note": m.note,
            }
        )
    best = best_of_ours(measured)
    return {
        "work": work.name,
        "amount": work.amount,
        "unit": "bytes" if work.moves else "operations",
        "contestants": rows,
        "best": None if best is None else {"name": best.name, "faster_than": compared[best.name]},
        "must": work.must,
        "aim": work.aim,
    }


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:160]
