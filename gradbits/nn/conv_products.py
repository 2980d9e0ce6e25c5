"""The three products of convolutions, plain and transposed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from gradbits.core.grain import Grain, PerChannel, PerTensor
from gradbits.kernels.dispatch import Epilogue, Kernel, Request
from gradbits.kernels.geometry import ConvGeometry, Ints, patch_bytes, terms_of
from gradbits.kernels.sums import MOST, conv_with_ones
from gradbits.nn.bilinear import OPERANDS, Bilinear, ones_along
from gradbits.recipes.recipe import Recipe


@dataclass(frozen=True)
class ConvProducts(Bilinear):
    """input [N, Ci, *], weight [Co, Ci/groups, *], gradient [N, Co, *]; transposed: the roles of the ends swap.

    Args:
        geometry: of the convolution; of a transposed one, of the convolution whose ``grad_input`` it is.
        transposed: whether the layer is a transposed convolution.
    """

    geometry: ConvGeometry
    transposed: bool = False

    def request(self, product: str, a: torch.Tensor, b: torch.Tensor) -> tuple[str, Request]:
        return _request(f"conv_{self._plain(product)}", a.device.type, self.geometry, a.shape[0], b.shape)

    def _plain(self, product: str) -> str:
        """Return which product of the plain convolution this is."""
        swapped = {"output": "grad_input", "grad_input": "output", "grad_weight": "grad_weight"}
        return swapped[product] if self.transposed else product

    def call(self, kernel: Kernel, product: str, a: torch.Tensor, b: torch.Tensor, e: Epilogue) -> torch.Tensor:
        if self.transposed and product == "grad_weight":
            a, b = b, a
        return kernel.run(a, b, self.geometry, e)

    def to_output(self, product: str, role: str, value: torch.Tensor) -> torch.Tensor:
        if self.transposed:
            turned = (product, role) in (("grad_input", "weight"), ("grad_weight", "input"))
        else:
            turned = (product, role) in (("output", "weight"), ("grad_weight", "gradient"))
        return value.transpose(0, 1) if turned else value

    def ones(self, product: str, role: str, codes: torch.Tensor) -> torch.Tensor:
        if self.geometry.groups > 1:  # one entry would have to stand for every group
            return torch.ones_like(codes)
        if role == "weight":  # its output axis: where the scale may vary
            axis = 0 if product == "output" else 1
            return ones_along(codes, 1 - axis if self.transposed else axis)
        return ones_along(codes, 1 if product == "grad_weight" else 0)

    def with_ones(
        self, kernel: Kernel, product: str, role: str, codes: torch.Tensor, other: torch.Tensor
    ) -> torch.Tensor:
        operands = (codes, other) if role == OPERANDS[product][0] else (other, codes)
        op, request = self.request(product, *operands)
        swapped = {"input": "gradient", "gradient": "input"}
        plain = swapped.get(role, role) if self.transposed else role
        few = request.terms <= MOST and request.groups == 1
        if plain == "weight" or kernel.backend == "simulate" or not few:
            return super().with_ones(kernel, product, role, codes, other)
        return conv_with_ones(op, plain, codes, self.geometry)

    def in_float(self, product: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        g, plain = self.geometry, self._plain(product)
        zeros = (0,) * g.spatial
        if plain == "output":
            return torch.convolution(a, b, None, g.stride, g.padding, g.dilation, False, zeros, g.groups)
        if self.transposed and plain == "grad_weight":
            a, b = b, a
        mask = (plain == "grad_input", plain == "grad_weight", False)
        if plain == "grad_input":
            x, w = a.new_empty(a.shape[0], b.shape[1] * g.groups, *g.input_size), b
        else:
            x, w = b, a.new_empty(a.shape[1], b.shape[1] // g.groups, *g.kernel_size)
        grads = torch.ops.aten.convolution_backward(
            a, x, w, None, g.stride, g.padding, g.dilation, False, zeros, g.groups, mask
        )
        result: torch.Tensor = grads[0] if plain == "grad_input" else grads[1]
        return result

    def own_axis(self, role: str, axis: int) -> int:
        return 1 - axis if self.transposed and role == "weight" else axis

    def features(self, weight: torch.Tensor) -> int:
        return weight.shape[0] // self.geometry.groups if self.transposed else weight.shape[1]

    def grain(self, role: str, grain: Grain) -> Grain:
        if self.transposed and role == "weight" and isinstance(grain, PerChannel):
            return PerChannel(axis=1 - grain.axis)
        return grain

    def why_not(self, recipe: Recipe) -> str | None:
        if self.geometry.groups == 1:
            return None
        across: tuple[tuple[str, str], ...] = (("grad_input", "weight"), ("grad_weight", "input"))
        if self.transposed:
            across = (("output", "weight"), ("grad_input", "weight"), ("grad_weight", "gradient"))
        for product, role, q in recipe.operands():
            if (product, role) in across and not isinstance(q.grain, PerTensor):
                return f"{product}.{role} has a scale per channel, which runs across the groups of this convolution"
        return None


@lru_cache(maxsize=1024)
def conv_products(
    stride: Ints, padding: Ints, dilation: Ints, groups: int, input_size: Ints, kernel_size: Ints, transposed: bool
) -> ConvProducts:
    """Return the products of a layer; the same object for the same arguments, which keeps what it has worked out."""
    return ConvProducts(ConvGeometry(stride, padding, dilation, groups, input_size, kernel_size), transposed)


@lru_cache(maxsize=4096)
def _request(op: str, device: str, g: ConvGeometry, batch: int, b_shape: torch.Size) -> tuple[str, Request]:
    size = None if op == "conv_grad_weight" else patch_bytes(op, g, batch, b_shape)
    return op, Request(device, terms_of(op, g, batch, b_shape), g.spatial, g.groups, size)
