"""Binary and noisy neurons for conditional computation, and how gradients get through them."""

from __future__ import annotations

import torch
from torch import nn

from gradbits.core.checks import check_choice, check_float_tensor, check_instance, check_number
from gradbits.core.errors import ArgumentError
from gradbits.quantizers.estimators import STE, StraightThrough

FIRES = ("threshold", "sigmoid", "hard_sigmoid")
NOISES = ("gaussian", "logistic")


def firing_probability(a: torch.Tensor, fires: str) -> torch.Tensor:
    r"""Return :math:`\sigma(a)`, or the hard sigmoid :math:`\mathrm{clip}((a+1)/2, 0, 1)`, in float32 or wider.

    >>> firing_probability(torch.tensor([-2.0, 0.5]), "hard_sigmoid").tolist()
    [0.0, 0.75]
    """
    wide = a if a.dtype == torch.float64 else a.float()
    return torch.sigmoid(wide) if fires == "sigmoid" else ((wide + 1.0) / 2.0).clamp(0.0, 1.0)


def bernoulli(probability: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Return 1 with the given probability and 0 otherwise, in its dtype; NaN stays NaN.

    Raises:
        ArgumentError: a probability outside [0, 1].
    """
    check_float_tensor(probability, "probability")
    if bool(((probability < 0) | (probability > 1)).any()):
        raise ArgumentError("probability: must be in [0, 1]")
    drawn = torch.rand(probability.shape, dtype=probability.dtype, device=probability.device, generator=generator)
    return torch.where(torch.isnan(probability), probability, (drawn < probability).to(probability.dtype))


class BinaryNeuron(nn.Module):
    r"""A layer of units that are 0 or 1, through which gradients pass by an estimator.

    .. math:: h = 1[a > 0], \quad\text{or in training}\quad h \sim \mathrm{Bernoulli}(\sigma(a))

    In evaluation stochastic units do what is likelier, h = 1[a > 0]. A unit at exactly 0 does not fire.

    Args:
        fires: ``"threshold"``, or the probability of firing in training: ``"sigmoid"`` or ``"hard_sigmoid"``.
        estimator: of the straight-through family: ``STE``, ``ClippedSTE``, ``SigmoidSTE``, ``HardSigmoidSTE``.
        generator: of the random numbers; PyTorch's default one if None.

    References:
        Bengio, Léonard, Courville, Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
        Computation, 2013, arXiv:1308.3432.

    >>> a = torch.tensor([-0.5, 0.5], requires_grad=True)
    >>> h = BinaryNeuron()(a); h.sum().backward(); h.tolist(), a.grad.tolist()
    ([0.0, 1.0], [1.0, 1.0])
    """

    def __init__(
        self, fires: str = "threshold", estimator: STE | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.fires = check_choice(fires, "fires", FIRES)
        self.estimator: STE = check_instance(STE() if estimator is None else estimator, "estimator", STE)
        if self.estimator.learns:
            raise ArgumentError(f"estimator={estimator}: learns a range, which a neuron has not")
        self.generator = generator

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        """Return 0 or 1 for each pre-activation, in its dtype."""
        check_float_tensor(a, "a")
        values = a.detach()
        if self.fires == "threshold" or not self.training:
            h = torch.where(torch.isnan(values), values, (values > 0).to(values.dtype))
        else:
            h = bernoulli(firing_probability(values, self.fires), self.generator)
        edge = values.new_full((), torch.inf)
        out: torch.Tensor = StraightThrough.apply(a, h, self.estimator.mask(values, -edge, edge))
        return out

    def extra_repr(self) -> str:
        """Return what the module's printed form says of it."""
        return f"fires={self.fires!r}, estimator={self.estimator}"


class StochasticTimesSmooth(nn.Module):
    r"""Units that are 0 or the root of their probability (stochastic times smooth): their mean is the probability.

    .. math:: p = \sigma(a), \quad b \sim \mathrm{Bernoulli}(\sqrt p), \quad h = b\,\sqrt p, \quad
              \frac{\partial h}{\partial a} = b\,\sqrt p\,\frac{1 - p}{2}

    In evaluation h = p, the mean.

    Args:
        generator: of the random numbers; PyTorch's default one if None.

    References:
        Bengio, Léonard, Courville, 2013, arXiv:1308.3432.

    >>> _ = torch.manual_seed(0)
    >>> StochasticTimesSmooth()(torch.zeros(20_000)).mean().item() > 0.49
    True
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        """Return the units' outputs in the dtype of ``a``."""
        check_float_tensor(a, "a")
        wide = a if a.dtype == torch.float64 else a.float()
        if not self.training:
            return torch.sigmoid(wide).to(a.dtype)
        root = torch.exp(0.5 * nn.functional.logsigmoid(wide))  # a root of sigma has no derivative where sigma is 0
        return (bernoulli(root.detach().clamp(max=1.0), self.generator) * root).to(a.dtype)


class NoisyRectifier(nn.Module):
    r"""A rectifier that sees noise in training, :math:`h = \max(0, a + z)`, with its ordinary derivative.

    With logistic noise :math:`P(h > 0) = \sigma(a)` and :math:`E[h] = \log(1 + e^a)`. In evaluation z = 0.

    Args:
        noise: ``"gaussian"`` or ``"logistic"``.
        scale: standard deviation of the Gaussian, or scale of the logistic distribution.
        generator: of the random numbers; PyTorch's default one if None.

    References:
        Bengio, Léonard, Courville, 2013, arXiv:1308.3432.

    >>> NoisyRectifier(scale=0.0)(torch.tensor([-1.0, 2.0])).tolist()
    [0.0, 2.0]
    """

    def __init__(self, noise: str = "gaussian", scale: float = 1.0, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.noise = check_choice(noise, "noise", NOISES)
        self.scale = check_number(scale, "scale", 0.0)
        self.generator = generator

    def forward(self, a: torch.Tensor) -> torch.Tensor:
        """Return the units' outputs."""
        check_float_tensor(a, "a")
        if not self.training:
            return torch.relu(a)
        draw = torch.randn if self.noise == "gaussian" else torch.rand
        dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
        z = draw(a.shape, generator=self.generator, dtype=dtype, device=a.device)
        if self.noise == "logistic":
            z = torch.logit(z, eps=1e-7)
        return torch.relu(a + (self.scale * z).to(a.dtype))

    def extra_repr(self) -> str:
        """Return what the module's printed form says of it."""
        return f"noise={self.noise!r}, scale={self.scale}"
