"""The straight-through estimator in closed form."""

from __future__ import annotations

import pytest
import torch

from gradbits.core.grain import PerBlock, PerChannel, PerTensor
from gradbits.quantizers.estimators import STE
from gradbits.quantizers.grids import Affine, Symmetric
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import EMA, AbsMax


def gradient(q: Quantizer, x: torch.Tensor, g: torch.Tensor, state) -> torch.Tensor:
    x = x.clone().requires_grad_()
    out = q.fake_quantize(x, state=state, update=False)
    assert out.dtype == x.dtype
    out.backward(g)
    return x.grad


@pytest.mark.parametrize("grain", [PerTensor(), PerChannel(axis=1), PerBlock(size=4)])
@pytest.mark.parametrize("grid", [Symmetric(bits=3), Affine(bits=4)])
def test_plain_passes_everything(grain, grid):
    x, g = torch.randn(5, 6), torch.randn(5, 6)
    assert torch.equal(gradient(Quantizer(grain=grain, grid=grid), x, g, None), g)


def test_clipped_passes_inside_the_range_ends_included():
    q = Quantizer(range=EMA(of=AbsMax()), estimator=STE(clip=True))
    state = q.init_state()
    state["low"].fill_(-1.0)
    state["high"].fill_(1.0)
    x = torch.tensor([-1.5, -1.0, -0.2, 0.0, 1.0, 1.0001])
    assert gradient(q, x, torch.arange(1.0, 7.0), state).tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 0.0]


def test_half_precision_gradients_keep_their_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = torch.randn(4, dtype=dtype)
        assert gradient(Quantizer(), x, torch.ones(4, dtype=dtype), None).dtype == dtype
