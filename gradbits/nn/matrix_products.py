"""The products of linear layers and of products of two activations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gradbits.core.grain import PerChannel
from gradbits.kernels.dispatch import Epilogue, Kernel, Request, run
from gradbits.kernels.sums import MOST
from gradbits.nn.bilinear import Bilinear, ones_along
from gradbits.recipes.recipe import LEGAL_AXIS, Recipe


@dataclass(frozen=True)
class LinearProducts(Bilinear):
    """input [N, I], weight [O, I], gradient [N, O].

    Args:
        sequence: sizes of the axes between the samples and the features, which are flattened into the rows.
    """

    sequence: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return math.prod(self.sequence)

    def request(self, product: str, a: torch.Tensor, b: torch.Tensor) -> tuple[str, Request]:
        terms = a.shape[0] if product == "grad_weight" else a.shape[1]
        return "matmul", Request(a.device.type, terms=terms)

    def call(self, kernel: Kernel, product: str, a: torch.Tensor, b: torch.Tensor, e: Epilogue) -> torch.Tensor:
        if product == "output":
            return kernel.run(a, b.t(), e)
        return kernel.run(a.t() if product == "grad_weight" else a, b, e)

    def to_output(self, product: str, role: str, value: torch.Tensor) -> torch.Tensor:
        turned = (product, role) in (("output", "weight"), ("grad_weight", "gradient"))
        return value.t() if turned else value

    def ones(self, product: str, role: str, codes: torch.Tensor) -> torch.Tensor:
        first = (product, role) in (("output", "input"), ("output", "weight"), ("grad_input", "gradient"))
        return ones_along(codes, 0 if first else 1)

    def with_ones(
        self, kernel: Kernel, product: str, role: str, codes: torch.Tensor, other: torch.Tensor
    ) -> torch.Tensor:
        axis = 1 - LEGAL_AXIS[product, role]
        if kernel.backend == "simulate" or codes.shape[axis] > MOST:
            return super().with_ones(kernel, product, role, codes, other)
        sums = run("sum_codes", Request(codes.device.type), "auto", codes, axis)
        return self.to_output(product, role, sums.float())

    def in_float(self, product: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if product == "output":
            return F.linear(a, b)
        return a.t() @ b if product == "grad_weight" else a @ b


@dataclass(frozen=True)
class MatmulProducts(Bilinear):
    """input [B, M, K], weight [B, K, N], gradient [B, M, N]; ``output`` = input · weight."""

    def request(self, product: str, a: torch.Tensor, b: torch.Tensor) -> tuple[str, Request]:
        terms = a.shape[1] if product == "grad_weight" else a.shape[2]
        return "matmul", Request(a.device.type, terms=terms)

    def call(self, kernel: Kernel, product: str, a: torch.Tensor, b: torch.Tensor, e: Epilogue) -> torch.Tensor:
        if product == "grad_weight":  # inputᵀ · gradient
            return kernel.run(b.mT, a, e)
        return kernel.run(a, b.mT if product == "grad_input" else b, e)

    def to_output(self, product: str, role: str, value: torch.Tensor) -> torch.Tensor:
        return value

    def ones(self, product: str, role: str, codes: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(codes)

    def in_float(self, product: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if product == "grad_weight":
            return b.mT @ a
        return a @ (b.mT if product == "grad_input" else b)

    def why_not(self, recipe: Recipe) -> str | None:
        for product, role, q in recipe.operands():
            if q.rotation is not None:
                return f"{product}.{role} is rotated, which would mix the matrices of a batch of attention products"
            if isinstance(q.grain, PerChannel) and q.grain.axis != 0:
                return f"{product}.{role} has a scale per channel, which attention products do not have"
            if role == "weight" and isinstance(q.grain, PerChannel):
                return f"{product}.weight has a scale per output channel; here it is an activation"
        return None
