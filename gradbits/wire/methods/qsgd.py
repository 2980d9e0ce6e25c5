"""QSGD: stochastic rounding to equally spaced levels (GQ, gradient quantization, in the survey literature)."""

from __future__ import annotations

from dataclasses import dataclass

from gradbits.wire.bucketed import LevelCodec


@dataclass(frozen=True, kw_only=True)
class QSGD(LevelCodec):
    r"""Round every value stochastically to equally spaced levels of its bucket's norm.

    .. math:: Q_s(v_i) = \|v\|_2\cdot\mathrm{sgn}(v_i)\cdot\xi_i, \qquad
              \xi_i = \frac{l + [u_i < s|v_i|/\|v\|_2 - l]}{s}, \quad l = \lfloor s|v_i|/\|v\|_2 \rfloor

    With the layout ``"magnitude"`` :math:`s = 2^{b-1} - 1`; with ``"signed"`` the levels are :math:`2^b` equally spaced
    numbers from -1 to 1, none of them 0. The variance is at most :math:`\min(B/s^2, \sqrt B/s)\,\|v\|_2^2`.

    Args:
        bits: b, 2 to 8 (1 with ``layout="signed"``: only -1 and 1).
        bucket: B, values per norm.
        norm: ``"l2"``, or ``"linf"`` for the variant that its authors and others call QSGDinf.
        layout: ``"magnitude"``, the paper's, which keeps zeros, or ``"signed"``.

    Raises:
        ArgumentError: an option outside its range.

    References:
        Alistarh et al., QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding, NIPS 2017,
        arXiv:1610.02132.

    >>> import torch
    >>> codec = QSGD(bits=4, bucket=512)
    >>> _ = torch.manual_seed(0)
    >>> payload = codec.encode(torch.randn(1000))
    >>> payload.nbytes, codec.decode(payload).shape
    (516, torch.Size([1000]))
    """

    bits: int = 4
    bucket: int = 512
    layout: str = "magnitude"

    @property
    def name(self) -> str:
        return "qsgd"

    @property
    def multiplier(self) -> float:
        return 0.0
