"""A quantizer: grain + range rule + grid + rounding + estimator, as one frozen spec."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gradbits.core.checks import check_choice, check_float_tensor, check_instance
from gradbits.core.errors import ArgumentError
from gradbits.core.grain import Grain, PerBlock, PerChannel, PerTensor, as_grain
from gradbits.core.noise import NoiseKey, draw_seed
from gradbits.core.qtensor import QTensor, Rotation
from gradbits.core.spec import Spec
from gradbits.kernels.dispatch import Request, run
from gradbits.kernels.quantize import CodeMap, Noise
from gradbits.quantizers.estimators import STE, StraightThrough
from gradbits.quantizers.grids import Grid, GridValues, Symmetric
from gradbits.quantizers.known import alias
from gradbits.quantizers.ranges import AbsMax, RangeRule, State
from gradbits.quantizers.rotation import RotationRule


@dataclass(frozen=True, kw_only=True)
class Quantizer(Spec):
    r"""How one operand becomes integers.

    .. math:: q = \mathrm{clamp}(\mathrm{round}(x/s + v) + Z), \qquad \hat{x} = s\,(q - Z)

    Args:
        grid: the representable values, ``Symmetric`` or ``Affine``.
        grain: what shares one scale; a grain or its short name.
        range: how the range is chosen.
        rounding: ``"nearest"`` (half to even) or ``"stochastic"`` (unbiased inside the range).
        estimator: how a gradient passes back.
        rotation: an invertible map that is applied before the grid, or None.
        rows: what a row is to a scale or rotation that goes by rows: ``"token"``, each row of the matrix that a linear
            layer multiplies, or ``"sample"``, all tokens of a sequence together; for images both are the sample.

    >>> x = torch.tensor([[0.1, -1.0], [2.0, 0.3]])
    >>> Quantizer(grid=Symmetric(bits=4), grain="row").quantize(x).codes.tolist()
    [[1, -7], [7, 1]]
    """

    grid: Grid = Symmetric()
    grain: Grain = PerTensor()
    range: RangeRule = AbsMax()
    rounding: str = "nearest"
    estimator: STE = STE()
    rotation: RotationRule | None = None
    rows: str = "token"

    def __post_init__(self) -> None:
        if isinstance(self.grain, str):
            object.__setattr__(self, "grain", as_grain(self.grain))
        for name, kind in {"grid": Grid, "grain": Grain, "range": RangeRule, "estimator": STE}.items():
            check_instance(getattr(self, name), name, kind)
        check_instance(self.rotation, "rotation", RotationRule, None)
        check_choice(self.rounding, "rounding", ("nearest", "stochastic"))
        check_choice(self.rows, "rows", ("token", "sample"))

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.grid.bits

    @property
    def is_stochastic(self) -> bool:
        """Whether quantizing draws noise."""
        return self.rounding == "stochastic"

    def init_state(self, groups: int = 1) -> State:
        """Return the state that one layer keeps for this quantizer; empty where it remembers nothing."""
        turned = {} if self.rotation is None else self.rotation.init_state()
        return {**self.range.init_state(groups), **turned}

    def quantize(
        self,
        x: torch.Tensor,
        *,
        noise: Noise = None,
        state: State | None = None,
        update: bool = True,
        compute: str = "auto",
        tokens: int = 1,
    ) -> QTensor:
        """Return ``x`` as integers.

        Args:
            x: values of any shape; fp16, bf16 and fp64 are computed in float32.
            noise: for stochastic rounding, a noise key or the noise itself; drawn from PyTorch's generator if None.
            state: what ``init_state`` returned; needed by a rule that remembers. Never changed by a non-finite ``x``.
            update: whether ``state`` may change.
            compute: which kernel quantizes; all give the same codes.
            tokens: consecutive rows of ``x`` that make one sample, for ``rows="sample"``.

        Raises:
            DtypeError: ``x`` is not a floating-point tensor.
            ArgumentError: the rule remembers, and no state was given.
        """
        q, _, _ = self.quantize_with_range(x, noise=noise, state=state, update=update, compute=compute, tokens=tokens)
        return q

    def quantize_with_range(
        self,
        x: torch.Tensor,
        *,
        noise: Noise = None,
        state: State | None = None,
        update: bool = True,
        compute: str = "auto",
        tokens: int = 1,
        axis: int | None = None,
    ) -> tuple[QTensor, torch.Tensor, torch.Tensor]:
        """Return ``quantize(x)`` and the range (low, high) it used, in the grain's scale shape.

        Args:
            x, noise, state, update, compute, tokens: as for ``quantize``.
            axis: the axis that the rotation mixes, where the layout of ``x`` is not the usual one.
        """
        check_float_tensor(x, "x")
        if state is None:
            if self.init_state(1):
                what = self.rotation if self.rotation is not None and self.rotation.init_state() else self.range
                raise ArgumentError(f"state=None: {type(what).__name__} remembers; pass init_state()")
            state = {}
        shape, dtype = x.shape, x.dtype
        x = alias(x) if x.requires_grad else x
        grouped = tokens > 1 and self.rows == "sample" and self._goes_by_rows and x.dim() > 1
        if grouped:
            x = x.reshape(shape[0] // tokens, tokens, *shape[1:]).flatten(1)
            noise = noise.reshape(x.shape) if isinstance(noise, torch.Tensor) else noise
        rotation: Rotation | None = None
        if self.rotation is not None:
            x, rotation = self.rotation.apply(x, self.rotation.axis if axis is None else axis, self.bits, state)
        if not self.is_stochastic:
            noise = None
        elif noise is None:
            noise = NoiseKey.of(draw_seed())
        if self.asks_magnitude and type(self.grid) is Symmetric and x.numel():
            return self._quantize_symmetric(x, noise, compute, self.range.width(self.grid, x, state, update))
        low, high = self.range.limits_on(self.grid, x, self.grain, state, update)
        q = self._digits(x, self.range.rescale(self.grid.place(low, high), state), noise, compute)
        if grouped:
            q, low, high = _ungroup(q, low, high, shape, tokens)
            rotation = None if rotation is None else rotation.of_group(tokens)
        return replace(q, dtype=dtype, rotation=rotation), low, high

    @property
    def asks_magnitude(self) -> bool:
        """Whether it wants to know the largest magnitude of the whole tensor as it is given."""
        return self.rotation is None and self.range.by_magnitude and type(self.grain) is PerTensor

    @property
    def is_plain(self) -> bool:
        """Whether its range is the largest magnitude of the whole tensor as it is given."""
        return (
            self.rotation is None
            and type(self.range) is AbsMax
            and type(self.grid) is Symmetric
            and type(self.grain) is PerTensor
        )

    def _quantize_symmetric(
        self, x: torch.Tensor, noise: Noise, compute: str, width: torch.Tensor | None
    ) -> tuple[QTensor, torch.Tensor, torch.Tensor]:
        """Quantize by one symmetric range of width c, or by the largest magnitude: the most frequent case."""
        found = torch.empty(3, *(1,) * x.dim(), device=x.device)
        compute = "auto" if compute == "simulate" else compute
        codes = run("quantize_symmetric", Request(x.device.type), compute, x, self.grid.levels[1], noise, found, width)
        scale, low, high = found.unbind(0)
        q = QTensor(codes=codes, scale=scale, bits=self.bits, shape=x.shape, grain=self.grain, dtype=x.dtype)
        return q, low, high

    @property
    def _goes_by_rows(self) -> bool:
        by_row = isinstance(self.grain, PerChannel) and self.grain.axis == 0
        return by_row or (self.rotation is not None and self.rotation.axis == 0)

    def _digits(self, x: torch.Tensor, placed: GridValues, noise: Noise, compute: str) -> QTensor:
        """Return the codes of ``x``; where the grid has several digits, each takes what the ones above it left."""
        last = placed.rest is None
        q = QTensor(
            codes=_codes(x, placed.code_map, self.grain, noise if last else None, compute),
            scale=placed.scale,
            bits=self.bits,
            shape=x.shape,
            grain=self.grain,
            dtype=x.dtype,
            zero_point=placed.zero_point,
            offset=placed.offset,
        )
        if placed.rest is None:
            return q
        left = x.float() - q.dequantize(torch.float32)
        return replace(q, rest=self._digits(left, placed.rest, noise, compute))

    def fake_quantize(
        self, x: torch.Tensor, *, noise: Noise = None, state: State | None = None, update: bool = True
    ) -> torch.Tensor:
        """Return ``quantize(x).dequantize()``; gradients pass back by the estimator.

        >>> x = torch.tensor([0.3, -1.0], requires_grad=True)
        >>> Quantizer(grid=Symmetric(bits=2)).fake_quantize(x).sum().backward(); x.grad.tolist()
        [1.0, 1.0]
        """
        q, low, high = self.quantize_with_range(x, noise=noise, state=state, update=update)
        expand = self.grain.expand
        turned = x if q.rotation is None else q.rotation.forward(x)
        mask = self.estimator.mask(turned.detach(), expand(low, x.shape), expand(high, x.shape))
        out: torch.Tensor = StraightThrough.apply(turned, replace(q, rotation=None).dequantize(), mask)
        return out if q.rotation is None else q.rotation.inverse(out).to(x.dtype)


def _ungroup(
    q: QTensor, low: torch.Tensor, high: torch.Tensor, shape: torch.Size, tokens: int
) -> tuple[QTensor, torch.Tensor, torch.Tensor]:
    """Return codes and ranges of samples as those of their tokens."""

    def spread(value: torch.Tensor) -> torch.Tensor:
        return value.repeat_interleave(tokens, dim=0) if value.shape[0] > 1 else value

    rest = None if q.rest is None else _ungroup(q.rest, low, high, shape, tokens)[0]
    q = replace(
        q,
        codes=q.codes.reshape(shape),
        scale=spread(q.scale),
        shape=shape,
        zero_point=None if q.zero_point is None else spread(q.zero_point),
        offset=None if q.offset is None else spread(q.offset),
        rest=rest,
    )
    return q, spread(low), spread(high)


def _codes(x: torch.Tensor, code_map: CodeMap, grain: Grain, noise: Noise, compute: str) -> torch.Tensor:
    request = Request(x.device.type)
    if not isinstance(grain, PerBlock):
        return run("quantize", request, "auto" if compute == "simulate" else compute, x, code_map, noise)
    blocks = grain.split(x) if x.numel() else x.reshape(0, grain.size)
    if isinstance(noise, torch.Tensor):
        flat = noise.reshape(-1)
        noise = torch.cat([flat, flat.new_zeros(blocks.numel() - flat.numel())]).view(blocks.shape)
    per_block = CodeMap(
        code_map.inverse.view(-1, 1),
        code_map.low,
        code_map.high,
        None if code_map.shift is None else code_map.shift.view(-1, 1),
        None if code_map.zero is None else code_map.zero.view(-1, 1),
    )
    codes = run("quantize", request, "auto" if compute == "simulate" else compute, blocks, per_block, noise)
    return codes.reshape(-1)[: x.numel()].reshape(x.shape)
