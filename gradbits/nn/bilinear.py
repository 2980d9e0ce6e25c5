"""What Linear, convolutions and Matmul have in common: three bilinear products, and where each operand's scale goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gradbits.core.grain import Grain, PerChannel, PerTensor
from gradbits.core.qtensor import QTensor
from gradbits.kernels.dispatch import Epilogue, Kernel, Request, choose
from gradbits.kernels.geometry import ConvGeometry, terms_of
from gradbits.recipes.recipe import Recipe

OPERANDS = {
    "output": ("input", "weight"),
    "grad_input": ("gradient", "weight"),
    "grad_weight": ("gradient", "input"),
}


@dataclass(frozen=True)
class Bilinear:
    """One layer's products; the base of ``LinearProducts``, ``ConvProducts`` and ``MatmulProducts``."""

    def request(self, product: str, a: torch.Tensor, b: torch.Tensor) -> tuple[str, Request]:
        """Return the kernel operation of ``product`` and what its kernel must know."""
        raise NotImplementedError

    def call(self, kernel: Kernel, product: str, a: torch.Tensor, b: torch.Tensor, e: Epilogue) -> torch.Tensor:
        """Run ``kernel`` on codes of ``product``'s operands."""
        raise NotImplementedError

    def to_output(self, product: str, role: str, value: torch.Tensor) -> torch.Tensor:
        """Return an operand's scale (in its scale shape) so that it broadcasts against the product's result."""
        raise NotImplementedError

    def ones(self, product: str, role: str, codes: torch.Tensor) -> torch.Tensor:
        """Return codes of all ones that stand for ``role`` in a zero point's correction, as small as broadcasts."""
        raise NotImplementedError

    def in_float(self, product: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return ``product`` in float."""
        raise NotImplementedError

    def grain(self, role: str, grain: Grain) -> Grain:
        """Return ``grain``, given for a weight [output channels, input channels], for this layer's own layout."""
        return grain

    def why_not(self, recipe: Recipe) -> str | None:
        """Return why this layer cannot follow ``recipe``, or None."""
        return None

    def bias_gradient(self, g: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the bias."""
        return g.sum(dim=tuple(i for i in range(g.dim()) if i != 1))

    def bias_for_output(self, bias: torch.Tensor, dim: int) -> torch.Tensor:
        """Return the bias so that it broadcasts against an output of ``dim`` axes."""
        return bias.view(1, -1, *(1,) * (dim - 2))

    def product(
        self,
        product: str,
        a: QTensor,
        b: QTensor,
        *,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        compute: str = "auto",
    ) -> torch.Tensor:
        """Return an integer product as floats.

        Args:
            product: ``"output"``, ``"grad_input"`` or ``"grad_weight"``.
            a, b: its operands, in the order of ``OPERANDS``.
            bias: added last.
            dtype: of the result.
            compute: ``"integer"``, ``"simulate"`` or ``"auto"``; the result is the same, bit for bit.
        """
        roles = OPERANDS[product]
        op, request = self.request(product, a.codes, b.codes)
        kernel = choose(op, request, compute)
        scale_a = self.to_output(product, roles[0], a.scale)
        scale_b = self.to_output(product, roles[1], b.scale)
        terms = self._zero_terms(kernel, product, a, b, scale_a, scale_b)
        shaped = None if bias is None else self.bias_for_output(bias, a.codes.dim())
        return self.call(kernel, product, a.codes, b.codes, Epilogue(scale_a * scale_b, terms, shaped, dtype))

    def _zero_terms(
        self, kernel: Kernel, product: str, a: QTensor, b: QTensor, scale_a: torch.Tensor, scale_b: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        r"""Return what the values of code 0 add: (s_a q_a + o_a)(s_b q_b + o_b) has three more products with ones."""
        roles = OPERANDS[product]
        offset_a, offset_b = a.zero_value(), b.zero_value()
        plain = Epilogue(torch.ones((), device=a.codes.device))
        ones_a = self.ones(product, roles[0], a.codes)
        ones_b = self.ones(product, roles[1], b.codes)
        terms = []
        if offset_b is not None:
            offset_b = self.to_output(product, roles[1], offset_b)
            terms.append(scale_a * offset_b * self.call(kernel, product, a.codes, ones_b, plain))
        if offset_a is not None:
            offset_a = self.to_output(product, roles[0], offset_a)
            terms.append(offset_a * scale_b * self.call(kernel, product, ones_a, b.codes, plain))
        if offset_a is not None and offset_b is not None:
            terms.append(offset_a * offset_b * self.call(kernel, product, ones_a, ones_b, plain))
        return tuple(terms)


def _ones(codes: torch.Tensor, axis: int) -> torch.Tensor:
    """Return ones like ``codes`` with one entry along ``axis``."""
    shape = list(codes.shape)
    shape[axis] = 1
    return torch.ones(shape, dtype=torch.int8, device=codes.device)


@dataclass(frozen=True)
class LinearProducts(Bilinear):
    """input [N, I], weight [O, I], gradient [N, O]."""

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
        return _ones(codes, 0 if first else 1)

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
            if isinstance(q.grain, PerChannel) and q.grain.axis != 0:
                return f"{product}.{role} has a scale per channel, which attention products do not have"
            if role == "weight" and isinstance(q.grain, PerChannel):
                return f"{product}.weight has a scale per output channel; here it is an activation"
        return None


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
        op = f"conv_{self._plain(product)}"
        g = self.geometry
        terms = terms_of(op, g, a.shape[0], b.shape)
        return op, Request(a.device.type, terms, g.spatial, g.groups, max(g.stride))

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
            return _ones(codes, 1 - axis if self.transposed else axis)
        return _ones(codes, 1 if product == "grad_weight" else 0)

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
