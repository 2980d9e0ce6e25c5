"""LogGrid: powers of two below the largest magnitude, rounded to nearest (the update grid of Quantized Adam, GQEF)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gradbits.core.checks import check_integer
from gradbits.core.errors import CorruptDataError
from gradbits.core.packing import symbol_bytes
from gradbits.kernels.dispatch import Request, run
from gradbits.kernels.quantize import Noise
from gradbits.wire.codec import Codec, Payload, State, check_payload, check_values, restore


@dataclass(frozen=True, kw_only=True)
class LogGrid(Codec):
    r"""Round every value to the nearest of zero and :math:`\pm 2^{-j}` times the largest magnitude.

    .. math:: Q_g(u) = \|u\|_\infty\cdot\mathrm{nearest}(u/\|u\|_\infty,\ G), \qquad
              G = \{0\} \cup \{\pm 2^{-j} : j = 0 \ldots k_g\}

    Ties go to the larger magnitude. Deterministic, so biased; the largest value is exact and no other is lost by more
    than its magnitude, so :math:`\|u - Q_g(u)\| \le \sqrt{1 - 1/d}\,\|u\|`: error feedback makes up for it.

    Args:
        k: :math:`k_g`, 0 (ternary) to 14; a value takes :math:`\lceil\log_2(2k_g + 3)\rceil` bits.

    Raises:
        ArgumentError: an option outside its range.

    References:
        Chen et al., Quantized Adam with Error Feedback, arXiv:2004.14180. The grid is the one commonly ascribed to it.

    >>> codec = LogGrid(k=1)
    >>> codec.decode(codec.encode(torch.tensor([2.0, -0.9, 0.4, 1.5]))).tolist()
    [2.0, -1.0, 0.0, 2.0]
    """

    k: int = 2

    def __post_init__(self) -> None:
        check_integer(self.k, "k", 0, 14)

    @property
    def name(self) -> str:
        return "log_grid"

    @property
    def unbiased(self) -> bool:
        return False

    @property
    def bits(self) -> int:
        """Bits of a value."""
        return _bits(self.k)

    def encode(self, x: torch.Tensor, key: Noise = None, state: State | None = None) -> Payload:
        flat = check_values(x)
        magnitude = flat.abs()
        scale = magnitude.max() if flat.numel() else flat.new_zeros(())
        # index i stands for 2^-(k + 1 - i), 0 for zero; a value at a boundary goes up
        powers = _powers(self.k)
        edges = [powers[0] / 2, *(0.75 * power for power in powers[1:])]
        relative = magnitude / scale if scale > 0 else magnitude
        index = torch.bucketize(relative, flat.new_tensor(edges), right=True)
        symbols = torch.where((flat < 0) & (index > 0), index + self.k + 1, index).to(torch.uint8)
        codes = run("pack_symbols", Request(flat.device.type), "auto", symbols, self.bits)
        parts = {"codes": codes, "grid": torch.stack([scale, scale.new_tensor(self.k)])}
        return Payload(codec=self.name, shape=x.shape, dtype=x.dtype, bits=self.bits, parts=parts)

    def decode(self, payload: Payload) -> torch.Tensor:
        count = check_payload(payload, self.name, least_bits=2, most_bits=5)
        codes = payload.part("codes", torch.uint8, symbol_bytes(payload.bits, count))
        grid = payload.part("grid", torch.float32, 2)
        scale, k = grid.tolist()
        if not (0 <= scale < math.inf and k in range(15) and payload.bits == _bits(int(k))):
            raise CorruptDataError(f"payload: scale {scale}, k {k} and {payload.bits} bits are not possible")
        symbols = run("unpack_symbols", Request(codes.device.type), "auto", codes, payload.bits, count)
        powers = _powers(int(k))
        if bool((symbols > 2 * len(powers)).any()):
            raise CorruptDataError(f"payload: a symbol that a grid of k={k:g} does not have")
        table = grid.new_tensor([0.0, *powers, *(-power for power in powers)])
        return restore(table[symbols.long()] * grid[0], payload)


def _bits(k: int) -> int:
    return math.ceil(math.log2(2 * k + 3))


def _powers(k: int) -> list[float]:
    return [2.0 ** -(k + 1 - i) for i in range(1, k + 2)]
