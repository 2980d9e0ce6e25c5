r"""Error feedback: what a codec loses is added to the next gradient.

.. math:: u_t = \gamma\,g_t + \beta\,e_t, \qquad \hat u_t = \mathrm{decode}(\mathrm{encode}(u_t)), \qquad
          e_{t+1} = u_t - \hat u_t
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gradbits.core.checks import check_instance, check_number
from gradbits.core.errors import ArgumentError, NonFiniteError
from gradbits.kernels.quantize import Noise
from gradbits.wire.codec import Codec, Payload, State, check_values
from gradbits.wire.wrapper import Wrapper

RESIDUAL = "residual"


@dataclass(frozen=True, kw_only=True)
class ErrorFeedback(Wrapper):
    r"""A codec that remembers what it lost, in ``state["residual"]``, float32 in the shape of the tensor.

    .. math:: u_t = \gamma\,g_t + \beta\,e_t, \qquad e_{t+1} = u_t - \hat u_t

    With :math:`\beta = 1` nothing is lost for good: :math:`\sum_t \hat u_t + e_{T+1} = \gamma\sum_t g_t`. Both factors
    apply from the first step on. An unbiased codec gains nothing by it and its noise would pile up; a biased one needs
    it.

    Args:
        codec: the codec whose error is fed back; the other entries of the state are its own.
        beta: how much of the residual is kept, in [0, 1].
        gamma: factor of the gradient, above 0; decoded tensors are multiples of it.

    References:
        Seide et al., 1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training of
        Speech DNNs, Interspeech 2014; Karimireddy et al., Error Feedback Fixes SignSGD and other Gradient Compression
        Schemes, ICML 2019, arXiv:1901.09847.

    >>> from gradbits.wire.methods.qsgd import QSGD
    >>> codec, state = ErrorFeedback(codec=QSGD(bits=2)), {}
    >>> x = torch.tensor([1.0, 0.1])
    >>> sent = codec.decode(codec.encode(x, state=state))
    >>> torch.allclose(sent + state["residual"], x)
    True
    """

    beta: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_instance(self.codec, "codec", Codec)
        if isinstance(self.codec, ErrorFeedback):
            raise ArgumentError(f"codec={self.codec!r}: has error feedback already")
        check_number(self.beta, "beta", 0.0, 1.0)
        check_number(self.gamma, "gamma", 0.0, open_low=True)

    @property
    def wants_feedback(self) -> bool:
        return False

    @property
    def has_codes(self) -> bool:
        return self.codec.has_codes

    def encode(self, x: torch.Tensor, key: Noise = None, state: State | None = None) -> Payload:
        state = {} if state is None else state
        values = self.compensate(x, state)
        inner = {name: value for name, value in state.items() if name != RESIDUAL}
        payload = replace(self.codec.encode(values, key, inner or None), dtype=x.dtype)
        lost = values - self.codec.decode(payload).to(torch.float32)  # what receivers get, rounded to x's dtype
        if not bool(torch.isfinite(lost).all()):
            raise NonFiniteError("x: what is lost is not finite in float32; the residual is as it was")
        state[RESIDUAL] = lost
        return payload

    def compensate(self, x: torch.Tensor, state: State) -> torch.Tensor:
        """Return ``gamma * x + beta * residual`` in float32; the state is left as it is.

        Raises:
            ArgumentError: the residual has another shape than ``x``.
            NonFiniteError: ``x`` or the sum is not finite.
        """
        values = check_values(x).reshape(x.shape)
        if self.gamma != 1.0:
            values = values * self.gamma
        residual = state.get(RESIDUAL)
        if residual is not None:
            if residual.shape != x.shape:
                raise ArgumentError(f"x: shape {list(x.shape)}; its residual has shape {list(residual.shape)}")
            values = values + self.beta * residual.to(values.device, torch.float32)
        return check_values(values).reshape(x.shape)

    def decode(self, payload: Payload) -> torch.Tensor:
        return self.codec.decode(payload)

    def decode_into(self, payload: Payload, out: torch.Tensor, *, add: bool = False) -> None:
        self.codec.decode_into(payload, out, add=add)
