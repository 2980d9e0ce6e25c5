r"""The curves of GELU and its gradient, as rational functions that every backend evaluates alike.

.. math:: \mathrm{gelu}(x) = x\,(\tfrac12 + c(x)), \qquad \mathrm{gelu}'(x) = \tfrac12 + c'(x), \qquad
    c(x) \approx x\,\frac{P(x^2)}{Q(x^2)} \text{ for } |x| < e, \quad \pm\tfrac12 \text{ beyond}

c and c' are odd. ``benchmarks/gelu_curves.py`` fits them; their error, rounding included, is below 3e-7.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Curve:
    """One odd curve.

    Args:
        top: coefficients of P, the lowest power first.
        bottom: coefficients of Q.
        end: where it has reached one half.
    """

    top: tuple[float, ...]
    bottom: tuple[float, ...]
    end: float

    def share(self, x: torch.Tensor) -> torch.Tensor:
        """Return one half plus the curve at float32 ``x``; every operation rounds once, in this order.

        >>> CURVES["none"][0].share(torch.tensor([0.0, -9.0, 9.0])).tolist()
        [0.5, 0.0, 1.0]
        """
        v = x.clamp(-self.end, self.end)
        t = v * v
        a, b = torch.full_like(t, self.top[-1]), torch.full_like(t, self.bottom[-1])
        for coefficient in self.top[-2::-1]:
            a = a * t + coefficient
        for coefficient in self.bottom[-2::-1]:
            b = b * t + coefficient
        c = v * a / b
        return 0.5 + torch.where(x <= -self.end, -0.5, torch.where(x >= self.end, 0.5, c))


# (GELU, its gradient) by the approximation that torch.nn.GELU names
CURVES = {
    "none": (
        Curve(
            (0.39894229, 0.032647602, 0.0047950871, 0.00016919151, 8.3799923e-06, 5.1786792e-08, -7.2767535e-11),
            (1.0, 0.24850217, 0.02843631, 0.0019273561, 8.1418926e-05, 1.9728784e-06),
            5.5,
        ),
        Curve(
            (0.79788494, -0.033600535, 0.014182952, -1.5330261e-05, 3.3113549e-05, 1.0716812e-07, 3.4745604e-10),
            (1.0, 0.2912254, 0.039840784, 0.0033352398, 0.00017816745, 7.3314686e-06),
            5.5,
        ),
    ),
    "tanh": (
        Curve(
            (0.39894229, 0.028635679, 0.0033756315, 0.000112722, 5.5013488e-06, 2.5029739e-10, 7.3866822e-11),
            (1.0, 0.23927099, 0.022964938, 0.0011271886, 6.508363e-05, 7.3551979e-07),
            5.25,
        ),
        Curve(
            (0.797885, -0.049316261, 0.013339646, -0.00029119308, 2.8346452e-05, -9.2441198e-08, 1.2761554e-09),
            (1.0, 0.27317891, 0.031503741, 0.0017068756, 0.0001111194, 4.1722315e-06),
            5.25,
        ),
    ),
}
