"""Three bilinear products, and where each operand's scale goes, of any layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradbits.core.errors import ScaleAxisError
from gradbits.core.grain import Grain
from gradbits.core.qtensor import QTensor, Rotation
from gradbits.kernels.activations import activate
from gradbits.kernels.dispatch import Epilogue, Kernel, Request, choose, run
from gradbits.nn.headroom import beyond_float32, turned_back, wide
from gradbits.quantizers.known import note_width
from gradbits.recipes.recipe import LEGAL_AXIS, Recipe

LARGE = 1 << 15  # gradients of a layer's output that are large enough for an operation of our own
LARGEST = torch.finfo(torch.float32).max
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

    def with_ones(
        self, kernel: Kernel, product: str, role: str, codes: torch.Tensor, other: torch.Tensor
    ) -> torch.Tensor:
        """Return, in float32, the product of ``codes``, operand ``role``, with ones in the place of ``other``."""
        first, second = OPERANDS[product]
        plain = Epilogue(torch.ones((), device=codes.device))
        if role == first:
            return self.call(kernel, product, codes, self.ones(product, second, other), plain)
        return self.call(kernel, product, self.ones(product, first, other), codes, plain)

    def in_float(self, product: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return ``product`` in float."""
        raise NotImplementedError

    def grain(self, role: str, grain: Grain) -> Grain:
        """Return ``grain``, given for a weight [output channels, input channels], for this layer's own layout."""
        return grain

    @property
    def tokens(self) -> int:
        """Consecutive rows that make one sample."""
        return 1

    def own_axis(self, role: str, axis: int) -> int:
        """Translate an axis, 0 or 1, between the usual layout of ``role`` and this layer's; it is its own inverse."""
        return axis

    def result_axis(self, product: str, role: str) -> int:
        """Return the axis of the product's result that comes from the axis of ``role`` that is not summed over."""
        first = OPERANDS[product][0] == role
        return self.own_axis("weight", 0 if first else 1) if product == "grad_weight" else 0 if first else 1

    def features(self, weight: torch.Tensor) -> int:
        """Return how many input features one sum of ``output`` runs over at one position."""
        return weight.shape[1]

    def why_not(self, recipe: Recipe) -> str | None:
        """Return why this layer cannot follow ``recipe``, or None."""
        return None

    def bias_gradient(self, g: torch.Tensor, asked: bool = False) -> torch.Tensor:
        """Return the gradient of the bias; where it is ``asked`` for, note the largest magnitude of ``g`` too."""
        rows = g.movedim(1, -1)
        if g.device.type != "cpu" or g.dtype == torch.float64 or g.numel() < LARGE or not rows.is_contiguous():
            return g.sum(dim=tuple(i for i in range(g.dim()) if i != 1))
        widest = torch.empty(()) if asked else None
        sums = run("column_sums", Request("cpu"), "auto", rows.reshape(-1, rows.shape[-1]), widest)
        if widest is not None:
            note_width(g, widest)
        return sums

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
        keep: tuple[str, ...] = (),
        activation: str = "",
    ) -> torch.Tensor:
        r"""Return an integer product as floats.

        Operands of several digits give the sum of the products of their digits. A rotation T along an axis of the
        result is undone after the epilogue, :math:`(T^{-1} \hat a)\,b = T^{-1}(\hat a\,b)`; one that both operands
        share along the contracted axis cancels.

        Args:
            product: ``"output"``, ``"grad_input"`` or ``"grad_weight"``.
            a, b: its operands, in the order of ``OPERANDS``.
            bias: added last.
            dtype: of the result.
            compute: ``"integer"``, ``"simulate"`` or ``"auto"``; the result is the same, bit for bit.
            keep: operands whose rotation is left in the result.
            activation: applied last, before the cast; one of ``gradbits.kernels.activations.ACTIVATIONS``.

        Raises:
            ScaleAxisError: one operand alone is rotated along the contracted axis.
        """
        if _is_simple(a) and _is_simple(b):
            return self._digits_product(product, a, b, bias, dtype, compute, activation)
        sums, turned = [], self._rotations(product, a, b, keep)
        simple = a.rest is None and b.rest is None and not turned
        added = not simple or a.zero_value() is not None or b.zero_value() is not None
        huge = added and beyond_float32(a, b)
        if huge:
            a, b, simple = wide(a), wide(b), False
        for x in a.digits():
            for y in b.digits():
                if huge:
                    sums.append(self._wide_product(product, x, y, compute))
                else:
                    last = (bias, dtype, activation) if simple else (None, torch.float32, "")
                    sums.append(self._digits_product(product, x, y, *last[:2], compute, last[2]))
        if simple:
            return sums[0]
        total = sums[0]
        for part in sums[1:]:
            total += part
        for rotation in turned:
            total = turned_back(rotation, total) if huge else rotation.inverse(total)
        if bias is not None:
            total = total + self.bias_for_output(bias, total.dim()).float()
        return activate(total, activation).to(dtype)

    def _digits_product(
        self,
        product: str,
        a: QTensor,
        b: QTensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        compute: str,
        activation: str,
    ) -> torch.Tensor:
        """Return the product of one digit of each operand."""
        roles = OPERANDS[product]
        op, request = self.request(product, a.codes, b.codes)
        kernel = choose(op, request, compute)
        scale_a = self.to_output(product, roles[0], a.scale)
        scale_b = self.to_output(product, roles[1], b.scale)
        terms = self._zero_terms(kernel, product, a, b, scale_a, scale_b)
        shaped = None if bias is None else self.bias_for_output(bias, a.codes.dim())
        epilogue = Epilogue(_times(scale_a, scale_b), terms, shaped, dtype, activation)
        return self.call(kernel, product, a.codes, b.codes, epilogue)

    def _wide_product(self, product: str, a: QTensor, b: QTensor, compute: str) -> torch.Tensor:
        """Return the product of one digit of each operand in float64; scales and zero points are in float64 too."""
        op, request = self.request(product, a.codes, b.codes)
        kernel = choose(op, request, compute)
        scale_a, scale_b = (
            self.to_output(product, role, q.scale) for role, q in zip(OPERANDS[product], (a, b), strict=True)
        )
        plain = Epilogue(torch.ones((), device=a.codes.device))
        total = _times(scale_a, scale_b) * self.call(kernel, product, a.codes, b.codes, plain)
        for term in self._zero_terms(kernel, product, a, b, scale_a, scale_b):
            total = total + term
        return total

    def _rotations(self, product: str, a: QTensor, b: QTensor, keep: tuple[str, ...]) -> list[Rotation]:
        """Return the rotations of the operands that show in the result, along the axes of the result.

        Raises:
            ScaleAxisError: a rotation along the contracted axis that the other operand does not share.
        """
        shown: list[Rotation] = []
        contracted: list[Rotation | None] = []
        for role, q in zip(OPERANDS[product], (a, b), strict=True):
            if q.rotation is None:
                contracted.append(None)
            elif self.own_axis(role, q.rotation.axis) == LEGAL_AXIS[product, role]:
                contracted.append(None)
                if role not in keep:
                    shown.append(q.rotation.along(self.result_axis(product, role)))
            else:
                contracted.append(q.rotation.along(0))
        first, second = contracted
        if (first is not None or second is not None) and not (
            first is not None and second is not None and first.orthogonal and first == second
        ):
            role = OPERANDS[product][0 if first is not None else 1]
            raise ScaleAxisError(
                f"{product}.{role}: rotated along the axis that {product} sums over, and the other operand is not "
                "rotated the same way; legal are rotations along axes of the result and one orthogonal rotation of both"
            )
        return shown

    def _zero_terms(
        self, kernel: Kernel, product: str, a: QTensor, b: QTensor, scale_a: torch.Tensor, scale_b: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        r"""Return what the values of code 0 add: (s_a q_a + o_a)(s_b q_b + o_b) has three more products with ones."""
        roles = OPERANDS[product]
        offset_a, offset_b = a.zero_value(), b.zero_value()
        if offset_a is None and offset_b is None:
            return ()
        terms = []
        if offset_b is not None:
            offset_b = self.to_output(product, roles[1], offset_b)
            terms.append(_times(scale_a, offset_b) * self.with_ones(kernel, product, roles[0], a.codes, b.codes))
        if offset_a is not None:
            offset_a = self.to_output(product, roles[0], offset_a)
            terms.append(_times(offset_a, scale_b) * self.with_ones(kernel, product, roles[1], b.codes, a.codes))
        if offset_a is not None and offset_b is not None:
            ones_a = self.ones(product, roles[0], a.codes)
            terms.append(_times(offset_a, offset_b) * self.with_ones(kernel, product, roles[0], ones_a, b.codes))
        return tuple(terms)


def _is_simple(q: QTensor) -> bool:
    """Whether a value is its code times its scale."""
    return q.rest is None and q.rotation is None and q.zero_point is None and q.offset is None


def _times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return ``a * b`` without Inf: a sum of zero must stay zero where the scales are huge. NaN stays."""
    if a.dtype == b.dtype == torch.float32:
        if a.numel() == b.numel() == 1 and a.device.type == "cpu":
            value = float(a) * float(b)  # exact, so it is rounded once; tensor operations take three times as long
            return torch.full((), LARGEST if value > LARGEST else -LARGEST if value < -LARGEST else value)
        return (a * b).clamp_(-LARGEST, LARGEST)
    largest = torch.finfo(a.dtype).max
    return (a * b).clamp_(-largest, largest)


def ones_along(codes: torch.Tensor, axis: int) -> torch.Tensor:
    """Return ones like ``codes`` with one entry along ``axis``."""
    shape = list(codes.shape)
    shape[axis] = 1
    return torch.ones(shape, dtype=torch.int8, device=codes.device)
