"""Batch norms folded into weights: the same function in float, the batch's statistics in training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gradbits.nn.fold import fold, folded_output, update_statistics, why_not_foldable


def pair(affine: bool = True, momentum: float | None = 0.1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=affine, momentum=momentum)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        if affine:
            norm.weight.normal_()
            norm.bias.normal_()
    return conv, norm


@pytest.mark.parametrize("affine", [True, False])
def test_folded_weights_compute_both(affine):
    conv, norm = pair(affine)
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        want = norm.eval()(conv(x))
        got = torch.conv2d(x, *fold(norm, conv.weight, conv.bias))
    assert float((got - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
def test_training_is_that_of_the_batch_norm_where_nothing_is_quantized(affine, momentum):
    """Output, running statistics and every gradient, up to float rounding."""
    conv, norm = pair(affine, momentum)
    twin_conv, twin_norm = copy.deepcopy(conv), copy.deepcopy(norm)
    rng = torch.Generator().manual_seed(1)
    for _ in range(2):
        x = torch.randn(6, 3, 7, 7, generator=rng)
        y = folded_output(
            norm,
            conv.weight,
            conv.bias,
            lambda x=x: torch.conv2d(x, conv.weight),
            lambda w, b, x=x: torch.conv2d(x, w, b),
            True,
        )
        want = twin_norm(twin_conv(x))
        grad = torch.randn(y.shape, generator=rng)
        y.backward(grad)
        want.backward(grad)
    assert torch.allclose(y, want, atol=1e-5)
    for a, b in zip(norm.buffers(), twin_norm.buffers(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert torch.allclose(conv.weight.grad, twin_conv.weight.grad, atol=1e-4)
    for a, b in zip(norm.parameters(), twin_norm.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-4)


def test_a_bad_batch_moves_no_statistics():
    _, norm = pair()
    before = copy.deepcopy(norm.state_dict())
    update_statistics(norm, torch.full((5,), float("nan")), torch.ones(5), 10)
    update_statistics(norm, torch.zeros(5), torch.full((5,), float("inf")), 10)
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


@pytest.mark.parametrize("batch", [0, 1])
def test_the_smallest_batches(batch):
    conv, norm = pair()
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(batch, 3, 3, 3)
    y = folded_output(
        norm, conv.weight, None, lambda: torch.conv2d(x, conv.weight), lambda w, b: torch.conv2d(x, w, b), True
    )
    assert y.shape == (batch, 5, 1, 1)
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in (conv.weight, norm.weight, norm.bias))
    assert bool(batch) != torch.equal(norm.running_mean, before["running_mean"])


def test_what_cannot_be_folded():
    assert why_not_foldable(nn.BatchNorm2d(3)) is None
    assert "running statistics" in str(why_not_foldable(nn.BatchNorm2d(3, track_running_stats=False)))
    assert "GroupNorm" in str(why_not_foldable(nn.GroupNorm(1, 3)))
