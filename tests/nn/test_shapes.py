"""Shapes, memory formats and degenerate inputs of every layer class: what PyTorch takes, the quantized layer takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError, DtypeError

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), [(5, 6), (6,), (0, 6), (2, 0, 6), (2, 3, 1, 6), (1, 6)]),
    "no features": (lambda: nn.Linear(4, 3), [(1, 4)]),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), [(2, 3, 7), (3, 7), (0, 3, 7), (1, 3, 1)]),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), [(2, 3, 5, 6), (3, 5, 6), (0, 3, 5, 6), (1, 3, 1, 1)]),
    "pointwise": (lambda: nn.Conv2d(3, 4, 1), [(2, 3, 5, 6), (0, 3, 5, 6), (1, 3, 1, 1)]),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), [(2, 4, 5, 6), (4, 5, 6), (0, 4, 3, 3)]),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), [(2, 2, 3, 4, 5), (2, 3, 4, 5), (0, 2, 3, 4, 5), (1, 2, 2, 2, 2)]),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), [(2, 3, 5), (3, 5), (0, 3, 5), (1, 3, 1)]),
    "transposed2d": (lambda: nn.ConvTranspose2d(3, 4, 2, stride=2), [(2, 3, 4, 5), (3, 4, 5), (0, 3, 4, 5)]),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), [(1, 2, 2, 3, 2), (2, 2, 3, 2)]),
}
CASES = [(name, shape) for name, (_, shapes) in LAYERS.items() for shape in shapes]


def check(layer: nn.Module, *inputs: torch.Tensor, tolerance: float = 0.1, **options) -> torch.Tensor:
    """Compare with the float layer: shape, strides, values and gradients."""
    results = []
    for quantized in (False, True):
        if quantized:
            gb.quantize_(layer, "int8_dynamic", strict=True)
        given = [x.detach().requires_grad_() for x in inputs]
        y = layer(*given, **options)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        results.append([y, *torch.autograd.grad(y, [*given, *layer.parameters()], g)])
    for want, got in zip(*results, strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        assert float((got - want).detach().norm()) <= tolerance * float(want.detach().norm())
    want, got = results[0][0], results[1][0]
    assert got.is_contiguous() or not want.is_contiguous()  # a caller's view goes on working
    return got


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_shapes(name, shape):
    torch.manual_seed(0)
    check(LAYERS[name][0](), torch.randn(shape))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((3, 4), (4, 5)),
        ((2, 3, 4), (4, 5)),
        ((3, 4), (2, 4, 5)),
        ((2, 1, 3, 4), (6, 4, 5)),
        ((2, 3, 4), (2, 4, 1)),
        ((1, 1, 1), (1, 1, 1)),
        ((0, 3, 4), (0, 4, 5)),
        ((2, 0, 4), (2, 4, 5)),
        ((2, 3, 0), (2, 0, 5)),
        ((0, 3), (3, 0)),
        ((4,), (4, 5)),
        ((3, 4), (4,)),
        ((4,), (4,)),
        ((2, 3, 4), (4,)),
    ],
)
def test_matrix_products(a, b):
    torch.manual_seed(0)
    check(gb.nn.Matmul(), torch.randn(a), torch.randn(b))


@pytest.mark.parametrize("features", [(0, 3), (3, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_linear_without_features(features):
    check(nn.Linear(*features), torch.randn(2, features[0]))


def test_transposed_with_an_output_size():
    torch.manual_seed(0)
    for size in ([9, 10], [10, 9]):
        check(nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), torch.randn(2, 3, 5, 5), output_size=size)


@pytest.mark.parametrize("name", ["conv2d", "depthwise", "pointwise", "transposed2d", "conv3d"])
def test_memory_formats(name):
    torch.manual_seed(0)
    shape = LAYERS[name][1][0]
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = torch.randn(shape)
    y = check(LAYERS[name][0](), x)
    assert y.is_contiguous()
    y.view(y.shape[0], -1)  # code that flattens by view goes on working
    y = check(LAYERS[name][0](), x.contiguous(memory_format=last))
    assert y.is_contiguous(memory_format=last)
    if name in ("conv2d", "conv3d"):  # for kernels or channels of size one the two formats are the same memory
        y = check(LAYERS[name][0]().to(memory_format=last), x)
        assert y.is_contiguous(memory_format=last)
    check(LAYERS[name][0](), x.transpose(-1, -2).contiguous().transpose(-1, -2))
    check(LAYERS[name][0](), torch.cat([x, x], -1)[..., ::2])


def test_the_same_codes_in_every_memory_format():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 6)
    gb.quantize_(layer, "int8_dynamic")
    assert torch.equal(layer(x), layer(x.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", 2])
def test_padding_modes(mode, padding):
    torch.manual_seed(0)
    check(nn.Conv1d(2, 3, 5, padding=padding, padding_mode=mode), torch.randn(2, 2, 7))
    check(nn.Conv2d(2, 3, 3, padding=padding, padding_mode=mode, dilation=2), torch.randn(2, 2, 7, 8))


def test_gradients_that_arrive_expanded_or_sliced():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4), torch.randn(5, 6)
    layer(x).sum().backward()  # an expanded gradient of ones
    want = layer.weight.grad.clone()
    layer.zero_grad()
    gb.quantize_(layer, "int8_dynamic")
    layer(x).sum().backward()
    assert torch.allclose(layer.weight.grad, want, atol=0.05)
    layer.zero_grad()
    layer(x)[:, ::2].sum().backward()
    assert torch.allclose(layer.weight.grad[::2], want[::2], atol=0.05)
    assert not layer.weight.grad[1::2].any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_inputs_that_are_not_real_numbers(dtype):
    layer = nn.Linear(3, 3)
    gb.quantize_(layer, "int8_dynamic")
    with pytest.raises(DtypeError, match=str(dtype)):
        layer(torch.ones(2, 3).to(dtype))


REFUSED = {
    "features": (lambda: nn.Linear(3, 3), (2, 4)),
    "no axes": (lambda: nn.Linear(1, 3), ()),
    "channels": (lambda: nn.Conv2d(2, 3, 3), (1, 3, 5, 5)),
    "fewer channels": (lambda: nn.Conv2d(4, 4, 3, groups=2), (1, 2, 5, 5)),
    "too few axes": (lambda: nn.Conv2d(2, 3, 1), (2, 5)),
    "too many axes": (lambda: nn.Conv1d(2, 3, 1), (1, 1, 2, 5)),
    "too small": (lambda: nn.Conv2d(2, 3, 3), (1, 2, 2, 5)),
    "dilated beyond": (lambda: nn.Conv2d(2, 3, 3, dilation=3, padding=1), (1, 2, 4, 9)),
    "transposed channels": (lambda: nn.ConvTranspose2d(2, 3, 3), (1, 3, 5, 5)),
    "transposed to nothing": (lambda: nn.ConvTranspose1d(2, 3, 1, padding=2), (1, 2, 3)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_shapes_that_pytorch_refuses_are_refused(name):
    make, shape = REFUSED[name]
    layer, x = make(), torch.randn(shape)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        layer(x)
    gb.quantize_(layer, "int8_dynamic")
    with pytest.raises(ArgumentError, match=r"input: .*layer ''"):
        layer(x)


@pytest.mark.parametrize(("a", "b"), [((2, 3), (4, 5)), ((3,), (4,)), ((), (4,)), ((4,), ()), ((2, 3, 4), (3, 4, 5))])
def test_matrices_that_do_not_fit(a, b):
    layer = gb.nn.Matmul()
    gb.quantize_(layer, "int8_dynamic")
    with pytest.raises((ArgumentError, RuntimeError), match=r"shapes|axes|broadcast"):
        layer(torch.randn(a), torch.randn(b))


ONE_HUGE = [(1e30, 1, 1), (1, 1e30, 1), (1, 1, 1e30), (1e30, 1, 1e-30), (1e-30, 1e-30, 1e-30)]
BEYOND = [(1e30, 1e30, 1), (1e30, 1, 1e30)]  # with offsets the parts of such a product may be Inf - Inf, as in float


@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [("int8_dynamic", s) for s in ONE_HUGE + BEYOND] + [("statquant_ptq", s) for s in ONE_HUGE],
)
def test_extremes_never_turn_into_nan(recipe, sizes):
    """Operands at the ends of float32's range; a result may overflow where the true one does, a zero stays zero."""
    torch.manual_seed(0)
    layer, x, g = nn.Linear(4, 3, bias=False), torch.rand(5, 4) + 0.1, torch.rand(5, 3) + 0.1
    with torch.no_grad():
        layer.weight.abs_().mul_(sizes[1])
        layer.weight[1] = 0.0
    x, g = x * sizes[0], g * sizes[2]
    x[2], g[:, 0] = 0.0, 0.0
    results = []
    for quantized in (False, True):
        if quantized:
            gb.quantize_(layer, recipe)
        given = x.clone().requires_grad_()
        y = layer(given)
        results.append([y.detach(), *torch.autograd.grad(y, [given, layer.weight], g)])
    for want, got in zip(*results, strict=True):
        assert not bool(got.isnan().any())
        if bool(torch.isfinite(want).all()):
            assert bool(torch.isfinite(got).all())
            assert float((got - want).double().norm()) <= 0.05 * float(want.double().norm()) + 1e-37
