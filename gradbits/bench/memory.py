"""What ``gradbits bench memory`` measures: bytes that stay between the forward and the backward pass."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from gradbits.bench.allocator import allocated_bytes
from gradbits.bench.peers import AROUND, FP32, Variant
from gradbits.bench.steps import SHRINK, SUBJECTS
from gradbits.bench.table import aligned
from gradbits.nn import pack_activations
from gradbits.observe.memory import saved_bytes

MODELS = ("resnet18", "gpt", "resnet20")
BITS = (8, 4, 2)
MUST, AIM = {8: 0.32, 4: 0.20}, {8: 0.26, 4: 0.14}


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What one forward pass keeps.

    Args:
        variant: how the model is computed.
        bits: of ``pack_activations``, or None without it.
        saved: bytes that autograd saved; what is shared counts once, parameters and buffers do not.
        allocated: bytes by which the C allocator's account grew, gradient graph and all; None where it has no account.
        share: ``saved`` divided by that of fp32 without packing.
    """

    variant: str
    bits: int | None
    saved: int
    allocated: int | None
    share: float


def memory_work(
    name: str, recipes: Sequence[str], *, quick: bool = False, tell: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Return what the forward pass of a model keeps, as JSON values.

    Args:
        name: one of ``MODELS``.
        recipes: measured beside fp32 and bf16 autocast, each alone and within it.
        quick: an eighth of the batch.
        tell: called with what is being done.
    """
    subject = SUBJECTS[name]
    batch = max(1, subject.batch // SHRINK) if quick else subject.batch
    torch.manual_seed(0)
    model, inputs = subject.model(), subject.inputs(batch)
    ways = [Variant(name=FP32), Variant(name="bf16 eager", autocast=True)]
    for recipe in recipes:
        ways += [Variant(name=recipe, recipe=recipe), Variant(name=recipe + AROUND, recipe=recipe, autocast=True)]
    rows: list[Kept] = []
    for variant in ways:
        ready = variant.prepare(model)
        for bits in (None, *BITS):
            tell(f"{name}: {variant.name}, {'as it is' if bits is None else f'{bits} bits'}")
            saved, allocated = _kept(ready, inputs, variant, bits)
            share = saved / rows[0].saved if rows else 1.0
            rows.append(Kept(variant=variant.name, bits=bits, saved=saved, allocated=allocated, share=share))
    return {
        "work": subject.label.format(batch=batch),
        "rows": [vars(row) for row in rows],
        "must": MUST,
        "aim": AIM,
    }


def _kept(model: Any, inputs: torch.Tensor, variant: Variant, bits: int | None) -> tuple[int, int | None]:
    """Return the bytes that autograd saves in one forward pass, and those that the allocator has given out for it."""

    def loss() -> torch.Tensor:
        with variant.around():
            logits = model(inputs).flatten(0, -2)
            targets = torch.zeros(logits.shape[0], dtype=torch.int64)
            return F.cross_entropy(logits.float(), targets)

    loss()  # ranges settle
    if bits is None:
        saved = saved_bytes(model, loss)
    else:
        with pack_activations(bits=bits) as packed:
            loss()
        saved = packed.tally.after
    gc.collect()
    before = allocated_bytes()
    with contextlib.nullcontext() if bits is None else pack_activations(bits=bits):
        kept = loss()
    after = allocated_bytes()
    del kept
    return saved, None if before is None or after is None else after - before


def memory_table(outcome: dict[str, Any]) -> str:
    """Return the table of one model: a line a variant, a column for each number of bits."""
    head = ("saved for backward", "as it is", *(f"{bits} bits" for bits in BITS))
    lines, real = [head], [("allocated", *head[1:])]
    rows = outcome["rows"]
    whole = rows[0]["allocated"]
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        lines.append((name, *(f"{row['saved'] / 1e6:.1f} MB {row['share']:.3f}" for row in own)))
        if whole:
            real.append((name, *(f"{row['allocated'] / 1e6:.1f} MB {row['allocated'] / whole:.3f}" for row in own)))
    wanted = ("must / aim", "", *(_wanted(outcome, bits) for bits in BITS))
    parts = [outcome["work"], aligned([*lines, wanted])]
    return "\n".join(parts + (["", aligned(real)] if whole else []))


def _wanted(outcome: dict[str, Any], bits: int) -> str:
    return f"{outcome['must'][bits]:.2f} / {outcome['aim'][bits]:.2f}" if bits in outcome["must"] else ""
