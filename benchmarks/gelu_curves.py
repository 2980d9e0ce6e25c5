"""Fit the curves of GELU and of its gradient: prints the coefficients of gradbits/kernels/gelu.py and their error.

    python benchmarks/gelu_curves.py

Needs nothing but numpy. The fit is a least-squares one of x P(x²) - c(x) Q(x²), again and again with weights that grow
where the error is large, until it is nearly the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Curve = Callable[[np.ndarray], np.ndarray]
TOP, BOTTOM, ROUNDS = 7, 6, 150
K, CUBIC = math.sqrt(2.0 / math.pi), 0.044715
_erf = np.vectorize(math.erf)


def erf(x: np.ndarray) -> np.ndarray:
    """Return Φ(x) - 1/2."""
    return 0.5 * _erf(x / math.sqrt(2.0))


def erf_gradient(x: np.ndarray) -> np.ndarray:
    """Return the derivative of x Φ(x), less 1/2."""
    return erf(x) + x * np.exp(-x * x / 2.0) / math.sqrt(2.0 * math.pi)


def tanh(x: np.ndarray) -> np.ndarray:
    """Return half the tanh that approximates 2 Φ(x) - 1."""
    return 0.5 * np.tanh(K * (x + CUBIC * x**3))


def tanh_gradient(x: np.ndarray) -> np.ndarray:
    """Return the derivative of x (1/2 + tanh(x)), less 1/2."""
    t = 2.0 * tanh(x)
    return 0.5 * t + 0.5 * x * (1.0 - t * t) * K * (1.0 + 3.0 * CUBIC * x * x)


def fit(curve: Curve, end: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the coefficients of P and Q, that of Q's constant being 1."""
    x = np.sort(np.concatenate([end * np.sin(np.linspace(0, np.pi / 2, 4001))[1:], np.linspace(end / 4000, end, 4000)]))
    t, y, z = (x / end) ** 2, curve(x), x / end
    weight, q = np.ones_like(x), np.ones_like(x)
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    powers = t[:, None] ** np.arange(TOP)
    for turn in range(ROUNDS):
        columns = np.concatenate([z[:, None] * powers, -y[:, None] * powers[:, 1:BOTTOM]], 1)
        scale = np.sqrt(weight) / np.abs(q)
        found, *_ = np.linalg.lstsq(columns * scale[:, None], y * scale, rcond=None)
        top, bottom = found[:TOP], np.concatenate([[1.0], found[TOP:]])
        q = powers[:, :BOTTOM] @ bottom
        error = np.abs(z * (powers @ top) / q - y)
        if (q > 0).all() and (best is None or error.max() < best[0]):
            best = (float(error.max()), top, bottom)
        if turn > 5:
            weight = weight * (error / error.max() + 1e-3)
            weight /= weight.max()
    assert best is not None
    return best[1] / end ** (2 * np.arange(TOP) + 1), best[2] / end ** (2 * np.arange(BOTTOM))


def rounded_error(curve: Curve, end: float, top: np.ndarray, bottom: np.ndarray) -> float:
    """Return the largest error where every operation rounds to float32."""
    x = np.linspace(-end, end, 400_001).astype(np.float32)
    t = x * x
    a, b = (np.full_like(x, c[-1].astype(np.float32)) for c in (top, bottom))
    for c in top[-2::-1].astype(np.float32):
        a = a * t + c
    for c in bottom[-2::-1].astype(np.float32):
        b = b * t + c
    exact = np.sign(x) * curve(np.abs(x.astype(np.float64)))
    return float(np.abs((x * a / b).astype(np.float64) - exact).max())


def main() -> None:
    """Fit and print."""
    for curve, end in ((erf, 5.5), (erf_gradient, 5.5), (tanh, 5.25), (tanh_gradient, 5.25)):
        top, bottom = fit(curve, end)
        print(f"{curve.__name__}, up to {end}: largest error in float32 {rounded_error(curve, end, top, bottom):.2e}")
        for name, numbers in (("P", top), ("Q", bottom)):
            print(f"  {name}: {', '.join(f'{v:.8g}' for v in numbers)}")


if __name__ == "__main__":
    main()
