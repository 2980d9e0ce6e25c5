"""Learned steps: the gradient, the start, what must not touch them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.core.grain import PerChannel, PerTensor
from gradbits.quantizers.grids import Symmetric, TwosComplement
from gradbits.quantizers.lsq import LSQ, LearnedStep, MeanStep, initial_step, learned_step_quantize, step_gradient
from gradbits.quantizers.quantizer import Quantizer

QUANTIZER = Quantizer(grid=TwosComplement(bits=4), range=LearnedStep(), estimator=LSQ())


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.floats(0.01, 3.0), st.integers(0, 1000))
def test_gradient_matches_the_formula(bits, step, seed):
    g = torch.Generator().manual_seed(seed)
    x, grad = torch.randn(7, 5, generator=g), torch.randn(7, 5, generator=g)
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    grad_x, grad_s = step_gradient(x, torch.tensor([[step]]), grad, (lowest, highest), PerTensor())
    total = 0.0
    for value, slope, out in zip(x.flatten(), grad.flatten(), grad_x.flatten(), strict=True):
        v = float(value / torch.tensor(step))
        if v < lowest:
            total += lowest * float(slope)
        elif v > highest:
            total += highest * float(slope)
        else:
            total += (round(v) - v) * float(slope)
        assert float(out) == (float(slope) if lowest <= v <= highest else 0.0)
    assert float(grad_s) == pytest.approx(total / math.sqrt(35 * highest), rel=1e-3, abs=1e-4)


def test_gradient_is_the_derivative_where_there_is_one():
    """Saturated values follow the step exactly: finite differences of the quantized value."""
    x = torch.tensor([20.0, -30.0, 50.0])
    levels, step = (-8, 7), 0.5
    grad = torch.tensor([1.0, 2.0, -1.0])
    _, found = step_gradient(x, torch.tensor([step]), grad, levels, PerTensor())
    value = [(torch.clamp(torch.round(x / s), *levels) * s * grad).sum() for s in (step - 1e-3, step + 1e-3)]
    difference = float(value[1] - value[0]) / 2e-3
    assert float(found) * math.sqrt(3 * 7) == pytest.approx(difference, rel=1e-3)


def test_per_channel_steps():
    x, grad = torch.randn(6, 4), torch.randn(6, 4)
    steps = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    _, together = step_gradient(x, steps, grad, (-8, 7), PerChannel(axis=1))
    for c in range(4):
        _, alone = step_gradient(x[:, c], steps[0, c : c + 1], grad[:, c], (-8, 7), PerTensor())
        # n is that of the whole tensor
        assert float(together[0, c]) == pytest.approx(float(alone) / 2.0, rel=1e-4)


def test_autograd_function_trains_a_step():
    torch.manual_seed(0)
    x = torch.randn(4000)
    step = torch.tensor([0.02], requires_grad=True)
    opt = torch.optim.Adam([step], lr=0.01)
    for _ in range(150):
        loss = (learned_step_quantize(x, step, (-8, 7), PerTensor()) - x).square().sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
    # the best uniform 4-bit step for a normal distribution is 0.335 (Max, 1960)
    assert step.item() == pytest.approx(0.335, abs=0.03)


def test_first_batch_starts_the_step():
    state = QUANTIZER.init_state()
    x = torch.randn(64)
    q = QUANTIZER.quantize(x, state=state)
    expected = 2 * float(x.abs().mean()) / math.sqrt(7)
    assert float(q.scale) == pytest.approx(expected, rel=1e-6)
    assert float(state["step"]) == float(q.scale)
    assert int(state["started"]) == 1
    assert float(QUANTIZER.quantize(100 * x, state=state).scale) == float(q.scale)
    assert int(q.codes.min()) >= -8
    assert int(QUANTIZER.quantize(-100 * x.abs(), state=state).codes.min()) == -8


def test_bad_batches_do_not_start_it():
    for bad in (torch.zeros(8), torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.inf]), torch.empty(0)):
        state = QUANTIZER.init_state()
        q = QUANTIZER.quantize(bad, state=state)
        assert int(state["started"]) == 0
        assert float(state["step"]) == 1.0
        if bad.numel() and not bool(torch.isfinite(bad).all()):
            assert bool(torch.isnan(q.dequantize()).all())
        else:
            assert bool((q.dequantize() == 0).all())


def test_nan_after_the_start_shows_and_leaves_the_step():
    state = QUANTIZER.init_state()
    QUANTIZER.quantize(torch.randn(16), state=state)
    before = state["step"].clone()
    assert bool(torch.isnan(QUANTIZER.quantize(torch.tensor([1.0, math.nan]), state=state).scale).all())
    assert torch.equal(state["step"], before)
    x = torch.ones(4)
    grad = torch.tensor([1.0, math.nan, 1.0, 1.0])
    _, learned = LSQ().backward(x, grad, QUANTIZER.grid, PerTensor(), state)
    assert float(learned["step"]) == 0.0
    state, grain = {"step": torch.ones(2)}, PerChannel(axis=0)
    grad = torch.tensor([[1.0, math.nan], [1.0, 1.0]])
    x = torch.full((2, 2), 0.3)
    assert bool(LSQ().backward(x, torch.ones(2, 2), QUANTIZER.grid, grain, state)[1]["step"].all())
    assert not LSQ().backward(x, grad, QUANTIZER.grid, grain, state)[1]["step"].any()  # no channel learns from it


def test_a_negative_step_counts_by_its_size():
    x, grad = torch.randn(32), torch.randn(32)
    states = [{"step": torch.tensor([s]), "started": torch.ones(1, dtype=torch.int64)} for s in (0.3, -0.3)]
    codes = [QUANTIZER.quantize(x, state=s).codes for s in states]
    assert torch.equal(*codes)
    grads = [LSQ().backward(x, grad, QUANTIZER.grid, PerTensor(), s)[1]["step"] for s in states]
    assert torch.equal(grads[0], -grads[1])


def test_evaluation_before_training_leaves_it_unstarted():
    state = QUANTIZER.init_state()
    x = torch.randn(32)
    scale = QUANTIZER.quantize(x, state=state, update=False).scale
    assert float(scale) == pytest.approx(2 * float(x.abs().mean()) / math.sqrt(7))
    assert int(state["started"]) == 0


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_tiny_and_huge(factor):
    x = torch.randn(64) * factor
    q = Quantizer(grid=TwosComplement(bits=4), range=MeanStep()).quantize(x)
    error = (q.dequantize().double() - x.double()).norm() / x.double().norm()
    assert float(error) < 0.35
    assert float(initial_step(torch.zeros(3), 7, PerTensor())) == 0.0


def test_symmetric_grid_works_too():
    state = QUANTIZER.init_state()
    quantizer = Quantizer(grid=Symmetric(bits=4), range=LearnedStep(), estimator=LSQ())
    q = quantizer.quantize(torch.randn(500), state=state)
    assert int(quantizer.quantize(torch.full((3,), -50.0), state=state).codes.min()) == -7
    assert float(q.scale) == pytest.approx(float(state["step"]), rel=1e-6)
