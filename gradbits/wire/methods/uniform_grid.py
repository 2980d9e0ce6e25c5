"""UniformGrid: equal steps, rounded to nearest (the weight grid of Quantized Adam, GQEF)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gradbits.core.checks import check_integer, check_number
from gradbits.core.errors import CorruptDataError
from gradbits.core.packing import symbol_bytes
from gradbits.kernels.dispatch import Request, run
from gradbits.kernels.quantize import Noise
from gradbits.wire.codec import Codec, Payload, State, check_payload, check_values, restore


@dataclass(frozen=True, kw_only=True)
class UniformGrid(Codec):
    r"""Round every value to the nearest multiple of :math:`c\,2^{-k_x}`, clipped to :math:`[-c, c]`.

    .. math:: Q_x(x) = c\cdot\mathrm{nearest}(x/c,\ \{-1, \ldots, -2^{-k_x}, 0, 2^{-k_x}, \ldots, 1\})

    Rounding is half to even. The error is at most :math:`c\,2^{-k_x-1}` for :math:`|x| \le c`, and what is larger is
    clipped. Deterministic, so biased.

    Args:
        k: :math:`k_x`, 0 to 14; a value takes :math:`k_x + 2` bits up to 8, and 16 beyond.
        clip_range: c; None takes the largest magnitude of each tensor, so that nothing is clipped. 0.5 is the range
            that is ascribed to the paper; it suits weights that stay below it only.

    Raises:
        ArgumentError: an option outside its range.

    References:
        Chen et al., Quantized Adam with Error Feedback, arXiv:2004.14180. The grid is the one commonly ascribed to it.

    >>> codec = UniformGrid(k=1, clip_range=0.5)
    >>> codec.decode(codec.encode(torch.tensor([0.1, 0.2, -0.3, 0.9]))).tolist()
    [0.0, 0.25, -0.25, 0.5]
    """

    k: int = 6
    clip_range: float | None = None

    def __post_init__(self) -> None:
        check_integer(self.k, "k", 0, 14)
        if self.clip_range is not None:
            check_number(self.clip_range, "clip_range", 0.0, open_low=True)

    @property
    def name(self) -> str:
        return "uniform_grid"

    @property
    def unbiased(self) -> bool:
        return False

    @property
    def has_codes(self) -> bool:
        return self.k <= 6  # wider ones are not symbols

    @property
    def bits(self) -> int:
        """Bits of a packed symbol; codes beyond 8 bits take two symbols of 8."""
        return min(self.k + 2, 8)

    def encode(self, x: torch.Tensor, key: Noise = None, state: State | None = None) -> Payload:
        flat, steps = check_values(x), 1 << self.k
        clip = flat.new_tensor(self.clip_range or 0.0)
        if self.clip_range is None and flat.numel():
            clip = flat.abs().max()
        # in float64, so that a value on the grid is found again whatever the range is
        units = flat.double() * (steps / clip.double()) if clip > 0 else flat.double() * 0
        whole = units.round_().clamp_(-steps, steps).add_(steps).to(torch.int32)
        if self.k + 2 <= 8:
            codes = run("pack_symbols", Request(flat.device.type), "auto", whole.to(torch.uint8), self.bits)
        else:
            codes = torch.stack([whole & 0xFF, whole >> 8], dim=-1).to(torch.uint8).reshape(-1)
        parts = {"codes": codes, "grid": torch.stack([clip, clip.new_tensor(self.k)])}
        return Payload(codec=self.name, shape=x.shape, dtype=x.dtype, bits=self.bits, parts=parts)

    def decode(self, payload: Payload) -> torch.Tensor:
        count = check_payload(payload, self.name, least_bits=2)
        grid = payload.part("grid", torch.float32, 2)
        clip, k = grid.tolist()
        if not (0 <= clip < math.inf and k in range(15) and payload.bits == min(int(k) + 2, 8)):
            raise CorruptDataError(f"payload: range {clip}, k {k} and {payload.bits} bits are not possible")
        steps, wide = 1 << int(k), k > 6
        codes = payload.part("codes", torch.uint8, 2 * count if wide else symbol_bytes(payload.bits, count))
        if wide:
            pairs = codes.view(count, 2).to(torch.int32)
            symbols = pairs[:, 0] | pairs[:, 1] << 8
        else:
            symbols = run("unpack_symbols", Request(codes.device.type), "auto", codes, payload.bits, count).int()
        if bool((symbols > 2 * steps).any()):
            raise CorruptDataError(f"payload: a symbol that a grid of k={k:g} does not have")
        return restore(((symbols - steps).double() * (clip / steps)).float(), payload)
