"""Gradients to measure codecs on: of a model's first step, or drawn."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from gradbits.core.checks import check_integer
from gradbits.core.errors import ArgumentError
from gradbits.train.datasets import load_data
from gradbits.train.models import TEXT_MODELS, build_model
from gradbits.train.tasks import make_task

_STRETCH = 512  # drawn values that share a magnitude
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """One gradient.

    Args:
        values: flat float32.
        sizes: elements of every parameter, in order.
        origin: where it is from, in words.
        compute: seconds of one forward and backward pass; 0 where there is no model.
    """

    values: torch.Tensor
    sizes: tuple[int, ...]
    origin: str
    compute: float


def of_model(name: str, data: str | None = None, batch_size: int = 128, seed: int = 0) -> Gradients:
    """Return the gradient of a model's first step, and the median time of three.

    Args:
        name: a built-in model, or ``package.module:factory`` as for ``gradbits train``.
        data: a data set; None: ``pydoc`` for text models, else ``digits``.
        batch_size: samples of the batch.
        seed: of the initial weights and the batch.

    Raises:
        ArgumentError: no such model or data set.
    """
    torch.manual_seed(seed)
    data = data or ("pydoc" if name in TEXT_MODELS else "digits")
    task = make_task(load_data(data), batch_size)
    model, batch = build_model(name, task.model_arguments()), task.batch(seed, 0)
    times = []
    for _ in range(4):
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        F.cross_entropy(model(batch.inputs).flatten(0, -2), batch.targets).backward()
        times.append(time.perf_counter() - started)
    found = [p.grad.reshape(-1).float() for p in model.parameters() if p.grad is not None]
    return Gradients(
        values=torch.cat(found),
        sizes=tuple(g.numel() for g in found),
        origin=f"{name} on {data}, batch {batch_size}, first step",
        compute=sorted(times[1:])[1],
    )


def drawn(count: int, seed: int = 0) -> Gradients:
    """Return ``count`` normal values whose magnitude changes log-normally from stretch to stretch of 512.

    >>> drawn(1000).sizes
    (1000,)
    """
    check_integer(count, "numel", 1)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator)
    scales = torch.randn(-(-count // _STRETCH), generator=generator).exp_()
    for part, scale in zip(values.split(_STRETCH), scales.tolist(), strict=True):
        part *= scale
    origin = f"{count} drawn values, normal with log-normal magnitudes"
    return Gradients(values=values, sizes=(count,), origin=origin, compute=0.0)


def parse_count(text: str, name: str = "numel") -> int:
    """Return the whole number that ``text`` says.

    Raises:
        ArgumentError: it says none.

    >>> parse_count("25M"), parse_count("1_000"), parse_count("2.5k")
    (25000000, 1000, 2500)
    """
    digits = text.strip().lower().replace("_", "")
    unit = digits[-1:] if digits[-1:] in _UNITS and digits else ""
    try:
        value = float(digits.removesuffix(unit)) * _UNITS[unit]
        count = int(value)
    except (ValueError, OverflowError):
        count = 0
        value = -1.0
    if value != count or count < 1:
        raise ArgumentError(f"{name}={text!r}: must be a number of at least 1, as 25M, 100k or 1000000")
    return count
