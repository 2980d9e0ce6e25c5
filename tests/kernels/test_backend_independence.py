"""A training step gives the same numbers whatever computes it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.kernels import dispatch
from gradbits.kernels.native import library


@pytest.fixture
def switch(monkeypatch):
    """A function that sets GRADBITS_NATIVE and makes everybody ask again; what was chosen before comes back."""

    def forget():
        for cached in (library.library, dispatch.kernel_table, dispatch.choose):
            cached.cache_clear()

    def to(value):
        monkeypatch.setenv(library.SWITCH, value)
        forget()

    yield to
    monkeypatch.undo()
    forget()


NETS = {
    "pointwise": (lambda: (nn.Conv2d(8, 16, 1), nn.Conv2d(16, 24, 1)), (4, 8, 12, 12)),
    "square": (lambda: (nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 24, 3, stride=2)), (4, 8, 12, 12)),
    "depthwise": (lambda: (nn.Conv2d(8, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24)), (4, 8, 12, 12)),
    "merged": (lambda: (nn.Conv2d(8, 16, 3, groups=2), nn.Conv2d(16, 24, 3, groups=4)), (4, 8, 12, 12)),
    "transposed": (lambda: (nn.Conv2d(8, 16, 3), nn.ConvTranspose2d(16, 24, 3)), (4, 8, 12, 12)),
    "line": (lambda: (nn.Conv1d(8, 16, 3), nn.Conv1d(16, 24, 3)), (4, 8, 40)),
    "volume": (lambda: (nn.Conv3d(8, 16, 3), nn.Conv3d(16, 24, 1)), (2, 8, 5, 6, 7)),
}


def gradients(kind, last, last_gradient):
    """The gradients of one step; operands channels-last or not."""
    layers, shape = NETS[kind]
    torch.manual_seed(0)
    net = nn.Sequential(*layers())
    wanted = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape), torch.contiguous_format)
    order = wanted if last else torch.contiguous_format
    if len(shape) > 3:
        net.to(memory_format=order)
    gb.quantize_(net, "int8_dynamic")
    x = torch.randn(shape).contiguous(memory_format=order).requires_grad_()
    y = net(x)
    y.backward(torch.randn(y.shape).contiguous(memory_format=wanted if last_gradient else torch.contiguous_format))
    return [y.detach(), x.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("last_gradient", [False, True])
@pytest.mark.parametrize("kind", NETS)
def test_gradients_do_not_depend_on_the_backend(kind, last, last_gradient, switch):
    """Rounding noise follows memory, so results must lie in the same order too."""
    switch("1")
    if library.why_not() is not None:
        pytest.skip(f"native library not built: {library.why_not()}")
    native = gradients(kind, last, last_gradient)
    switch("0")
    for got, want in zip(gradients(kind, last, last_gradient), native, strict=True):
        assert torch.equal(got, want)
