"""A quantizer: grain + range rule + grid + rounding + estimator, as one frozen spec."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradbits.core.checks import check_choice, check_float_tensor
from gradbits.core.errors import ArgumentError
from gradbits.core.grain import Grain, PerBlock, PerTensor
from gradbits.core.noise import NoiseKey, draw_seed
from gradbits.core.qtensor import QTensor
from gradbits.core.spec import Spec
from gradbits.kernels.dispatch import Request, run
from gradbits.kernels.quantize import CodeMap, Noise
from gradbits.quantizers.estimators import STE, StraightThrough
from gradbits.quantizers.grids import Grid, Symmetric
from gradbits.quantizers.ranges import AbsMax, RangeRule, State


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

    >>> x = torch.tensor([[0.1, -1.0], [2.0, 0.3]])
    >>> Quantizer(grid=Symmetric(bits=4), grain="row").quantize(x).codes.tolist()
    [[1, -7], [7, 1]]
    """

    grid: Grid = Symmetric()
    grain: Grain = PerTensor()
    range: RangeRule = AbsMax()
    rounding: str = "nearest"
    estimator: STE = STE()

    def __post_init__(self) -> None:
        if isinstance(self.grain, str):
            from gradbits.core.grain import as_grain

            object.__setattr__(self, "grain", as_grain(self.grain))
        check_choice(self.rounding, "rounding", ("nearest", "stochastic"))

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
        return self.range.init_state(groups)

    def quantize(
        self,
        x: torch.Tensor,
        *,
        noise: Noise = None,
        state: State | None = None,
        update: bool = True,
        compute: str = "auto",
    ) -> QTensor:
        """Return ``x`` as integers.

        Args:
            x: values of any shape; fp16, bf16 and fp64 are computed in float32.
            noise: for stochastic rounding, a noise key or the noise itself; drawn from PyTorch's generator if None.
            state: what ``init_state`` returned; needed by a rule that remembers. Never changed by a non-finite ``x``.
            update: whether ``state`` may change.
            compute: which kernel quantizes; all give the same codes.

        Raises:
            DtypeError: ``x`` is not a floating-point tensor.
            ArgumentError: the rule remembers, and no state was given.
        """
        q, _, _ = self.quantize_with_range(x, noise=noise, state=state, update=update, compute=compute)
        return q

    def quantize_with_range(
        self,
        x: torch.Tensor,
        *,
        noise: Noise = None,
        state: State | None = None,
        update: bool = True,
        compute: str = "auto",
    ) -> tuple[QTensor, torch.Tensor, torch.Tensor]:
        """Return ``quantize(x)`` and the range (low, high) it used, in the grain's scale shape."""
        check_float_tensor(x, "x")
        if state is None:
            if self.range.init_state(1):
                raise ArgumentError(f"state=None: {type(self.range).__name__} remembers; pass init_state()")
            state = {}
        x = x.detach()
        low, high = self.range.limits(x, self.grain, state, update)
        placed = self.grid.place(low, high)
        if self.is_stochastic and noise is None:
            noise = NoiseKey.of(draw_seed())
        if not self.is_stochastic:
            noise = None
        codes = _codes(x, placed.code_map, self.grain, noise, compute)
        q = QTensor(
            codes=codes,
            scale=placed.scale,
            bits=self.bits,
            shape=x.shape,
            grain=self.grain,
            dtype=x.dtype,
            zero_point=placed.zero_point,
            offset=placed.offset,
        )
        return q, low, high

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
        mask = self.estimator.mask(x.detach(), expand(low, x.shape), expand(high, x.shape))
        out: torch.Tensor = StraightThrough.apply(x, q.dequantize(), mask)
        return out


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
