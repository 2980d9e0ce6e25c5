"""Backward products over sampled rows: what was not drawn is not computed."""

from __future__ import annotations

import torch

from gradbits.core.noise import NoiseKey
from gradbits.core.qtensor import QTensor
from gradbits.nn.bilinear import Bilinear
from gradbits.quantizers.leverage import Leverage, draw


def sampled_product(
    products: Bilinear,
    product: str,
    gradient: QTensor,
    other: QTensor,
    shape: torch.Size,
    *,
    rule: Leverage,
    noise: NoiseKey,
    compute: str = "auto",
    keep: tuple[str, ...] = (),
) -> torch.Tensor:
    """Return an unbiased estimate of a backward product from a part of the gradient's rows, in float32.

    Args:
        products: the layer's products.
        product: ``"grad_input"`` or ``"grad_weight"``.
        gradient, other: its operands.
        shape: of the result.
        rule: how probabilities follow from the rows' scores.
        noise: which rows are drawn.
        compute: ``"integer"``, ``"simulate"`` or ``"auto"``.
        keep: operands whose rotation is left in the result.
    """
    by_row = product == "grad_input"
    digits = gradient.digits()
    p = rule.probabilities(rule.scores(digits, None if by_row else other), few=not by_row)
    kept = draw(p, noise)
    add = add_rows if by_row else add_groups
    total = add(products, digits, other, p, kept, shape, compute=compute, keep=keep)
    if by_row and gradient.rotation is not None and gradient.rotation.axis == 0:
        total = gradient.rotation.inverse(total)  # the rows that were drawn are those of the rotated gradient
    return total


def add_rows(
    products: Bilinear,
    digits: tuple[QTensor, ...],
    other: QTensor,
    p: torch.Tensor,
    kept: torch.Tensor,
    shape: torch.Size,
    *,
    compute: str = "auto",
    keep: tuple[str, ...] = (),
) -> torch.Tensor:
    """Return ``grad_input`` from the kept rows of all digits; 1/p is a scale of each row of the result."""
    total = torch.zeros(shape, dtype=torch.float32, device=other.scale.device)
    for digit, chance, mine in zip(digits, p.chunk(len(digits)), kept.chunk(len(digits)), strict=True):
        rows = mine.nonzero().flatten()
        if rows.numel():
            factor = (1.0 / chance[rows]).float()
            part = products.product("grad_input", digit.select(rows, factor), other, compute=compute, keep=keep)
            total.index_add_(0, rows, part)
    return total


def add_groups(
    products: Bilinear,
    digits: tuple[QTensor, ...],
    other: QTensor,
    p: torch.Tensor,
    kept: torch.Tensor,
    shape: torch.Size,
    *,
    compute: str = "auto",
    keep: tuple[str, ...] = (),
) -> torch.Tensor:
    """Return ``grad_weight`` from the kept rows of all digits; the rows of one p are one integer product times 1/p."""
    total = torch.zeros(shape, dtype=torch.float32, device=other.scale.device)
    for digit, chance, mine in zip(digits, p.chunk(len(digits)), kept.chunk(len(digits)), strict=True):
        rows = mine.nonzero().flatten()
        if not rows.numel():
            continue
        values, group = torch.unique(chance[rows], return_inverse=True)
        order = torch.argsort(group, stable=True)
        sizes = torch.bincount(group, minlength=values.numel()).tolist()
        for value, members in zip(values.tolist(), rows[order].split(sizes), strict=True):
            part = digit.select(members, 1.0 / value)
            total += products.product("grad_weight", part, other.select(members), compute=compute, keep=keep)
    return total
