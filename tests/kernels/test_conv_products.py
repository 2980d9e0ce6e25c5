"""Convolutions of integers: every backend gives the exact sums, over random geometries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gradbits.kernels import onednn
from gradbits.kernels.dispatch import Epilogue, Kernel, Request, kernel_table
from gradbits.kernels.geometry import ConvGeometry, grad_input_phases, terms_of
from gradbits.kernels.native import convolutions, library

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
OPS = ("conv_output", "conv_grad_input", "conv_grad_weight")


@dataclass(frozen=True)
class Case:
    """A convolution problem: geometry, batch and channels per group."""

    geometry: ConvGeometry
    batch: int
    ci: int
    co: int
    seed: int = 0
    scale: str = "tensor"
    bias: bool = False
    dtype: torch.dtype = torch.float32

    def codes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        g = self.geometry
        rng = torch.Generator().manual_seed(self.seed)
        shapes = (
            (self.batch, self.ci * g.groups, *g.input_size),
            (self.co * g.groups, self.ci, *g.kernel_size),
            (self.batch, self.co * g.groups, *g.output_size),
        )
        x, w, grad = (torch.randint(-128, 128, s, generator=rng).to(torch.int8) for s in shapes)
        return x, w, grad

    def operands(self, op: str) -> tuple[torch.Tensor, torch.Tensor]:
        x, w, grad = self.codes()
        return {"conv_output": (x, w), "conv_grad_input": (grad, w), "conv_grad_weight": (grad, x)}[op]

    def exact(self, op: str) -> torch.Tensor:
        """The sums by PyTorch's own convolution and autograd in float64."""
        g = self.geometry
        x, w, grad = (t.double() for t in self.codes())
        x.requires_grad_()
        w.requires_grad_()
        y = CONV[g.spatial](x, w, None, g.stride, g.padding, g.dilation, g.groups)
        if op == "conv_output":
            return y.detach()
        gx, gw = torch.autograd.grad(y, (x, w), grad)
        return gx if op == "conv_grad_input" else gw

    def epilogue(self, result: torch.Tensor) -> Epilogue:
        rng = torch.Generator().manual_seed(self.seed + 1)
        axis = {"tensor": None, "row": 0, "channel": 1}[self.scale]
        shape = [n if i == axis else 1 for i, n in enumerate(result.shape)]
        channels = [n if i == 1 else 1 for i, n in enumerate(result.shape)]
        bias = torch.randn(channels, generator=rng) if self.bias else None
        return Epilogue(torch.rand(shape, generator=rng) + 0.01, bias=bias, dtype=self.dtype)


@st.composite
def cases(draw, dims: tuple[int, ...] = (1, 2, 3)) -> Case:
    spatial = draw(st.sampled_from(dims))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(spatial))

    small = spatial == 3
    kernel, stride, dilation = each(1, 2 if small else 4), each(1, 3), each(1, 2 if small else 3)
    padding = each(0, 2 if small else 5)  # may cover the whole kernel
    size = tuple(
        max(1, d * (k - 1) + 1 - 2 * p) + draw(st.integers(0, 3 if small else 7))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    )
    channels = [(1, 1, 1), (1, 3, 4), (1, 8, 2), (2, 2, 3), (4, 1, 1), (3, 1, 2), (5, 4, 1)]
    groups, ci, co = draw(st.sampled_from(channels))
    return Case(
        ConvGeometry(stride, padding, dilation, groups, size, kernel),
        draw(st.integers(0, 3)),
        ci,
        co,
        draw(st.integers(0, 1000)),
        draw(st.sampled_from(("tensor", "row", "channel"))),
        draw(st.booleans()),
        draw(st.sampled_from((torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64))),
    )


def usable(op: str, case: Case) -> list[Kernel]:
    """Every kernel that can run the case, whether or not it would be the fastest."""
    g = case.geometry
    terms = terms_of(op, g, case.batch, torch.Size((case.co * g.groups, case.ci)))
    request = Request("cpu", terms, g.spatial, g.groups)
    return [k for k in kernel_table()[op] if k.why_not(request) is None]


def turned(x: torch.Tensor) -> torch.Tensor:
    """The same values, channels-last in memory."""
    rows = x.movedim(1, -1).contiguous()
    return rows.view(-1).view(rows.shape).movedim(-1, 1)


def check(op: str, case: Case) -> None:
    exact = case.exact(op)
    plain, epilogue = Epilogue(torch.ones(())), case.epilogue(exact)
    want = epilogue.apply_(exact.clone())
    for kernel in usable(op, case):
        a, b = case.operands(op)
        assert torch.equal(kernel.run(a, b, case.geometry, plain), exact.float()), kernel.backend
        got = kernel.run(a, b, case.geometry, epilogue)
        assert got.dtype == case.dtype
        assert got.shape == want.shape
        assert torch.equal(got, want), kernel.backend
        # operands in other memory orders give the same, in the order that the rule says
        for orders in product((False, True), repeat=2):
            operands = [turned(t) if on else t for t, on in zip((a, b), orders, strict=True)]
            got = kernel.run(*operands, case.geometry, epilogue)
            assert torch.equal(got, want), (kernel.backend, orders)
            last = any(not t.is_contiguous() for t in operands)
            strides = (turned(want) if last else want.contiguous()).stride()
            assert got.stride() == strides or not got.numel(), (kernel.backend, orders)


POINTWISE = Case(ConvGeometry((1, 1), (0, 0), (1, 1), 1, (5, 6), (1, 1)), 2, 8, 16)
DEPTHWISE = Case(ConvGeometry((2, 1), (1, 1), (1, 1), 24, (6, 7), (3, 3)), 2, 1, 1)
MERGED = Case(ConvGeometry((1, 1), (1, 1), (1, 1), 6, (4, 5), (3, 3)), 2, 2, 3)
ONE_PIXEL = Case(ConvGeometry((1, 1), (0, 0), (1, 1), 1, (3, 3), (3, 3)), 2, 4, 5)
ONE_CHANNEL = Case(ConvGeometry((1, 1), (1, 1), (1, 1), 1, (4, 4), (3, 3)), 2, 1, 1)
LINE = Case(ConvGeometry((2,), (1,), (1,), 1, (9,), (3,)), 2, 4, 5)
VOLUME = Case(ConvGeometry((1, 2, 1), (1, 0, 1), (1, 1, 1), 1, (4, 5, 3), (3, 2, 3)), 2, 4, 5)
COVERED = Case(ConvGeometry((1, 1), (3, 3), (1, 1), 1, (5, 5), (2, 2)), 2, 3, 4)  # padding covers the whole kernel
NARROW = Case(ConvGeometry((1, 1), (0, 0), (1, 1), 1, (5, 3), (3, 3)), 2, 16, 8, scale="channel", bias=True)
SKIPPED = Case(ConvGeometry((3, 2), (0, 1), (1, 2), 2, (8, 7), (2, 2)), 2, 2, 3)  # stride beyond the kernel
EMPTY = Case(ConvGeometry((1, 1), (1, 1), (1, 1), 1, (4, 4), (3, 3)), 0, 3, 4)


@pytest.mark.parametrize("op", OPS)
@settings(max_examples=40, deadline=None)
@given(case=cases())
@example(case=COVERED)
@example(case=NARROW)
@example(case=SKIPPED)
@example(case=EMPTY)
@example(case=POINTWISE)
@example(case=DEPTHWISE)
@example(case=MERGED)
@example(case=ONE_PIXEL)
@example(case=ONE_CHANNEL)
@example(case=LINE)
@example(case=VOLUME)
def test_every_backend_is_exact(op, case):
    check(op, case)


@pytest.mark.parametrize("op", ["conv_output", "conv_grad_input"])
def test_onednn_is_among_them(op):
    reason = onednn.unavailable()
    if reason is not None:
        pytest.skip(reason)
    assert "onednn" in {k.backend for k in usable(op, COVERED)}
    assert {"torch", "simulate"} <= {k.backend for k in usable(op, COVERED)}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("channels", [(64, 64, 1), (33, 17, 1), (1, 1, 96), (4, 8, 24)])
def test_larger_channels_and_depthwise(op, channels):
    ci, co, groups = channels
    geometry = ConvGeometry((2, 1), (1, 1), (1, 1), groups, (9, 8), (3, 3))
    check(op, Case(geometry, 2, ci, co, scale="channel", bias=op == "conv_output"))


@pytest.mark.parametrize("op", OPS)
def test_the_largest_codes(op):
    case = Case(ConvGeometry((1, 1), (1, 1), (1, 1), 1, (16, 16), (3, 3)), 4, 128, 32)
    a, b = (torch.full_like(t, 127) for t in case.operands(op))
    kernels = usable(op, case)
    want = next(k for k in kernels if k.backend == "simulate").run(a, b, case.geometry, Epilogue(torch.ones(())))
    assert float(want.max()) >= 127 * 127 * 9 * 32
    for kernel in kernels:
        assert torch.equal(kernel.run(a, b, case.geometry, Epilogue(torch.ones(()))), want), kernel.backend


def test_grad_weight_sums_beyond_int32():
    geometry = ConvGeometry((1,), (0,), (1,), 1, (100_000,), (1,))
    ones = torch.full((2, 1, 100_000), 127, dtype=torch.int8)
    kernels = [k for k in kernel_table()["conv_grad_weight"] if k.why_not(Request("cpu", 200_000, 1, 1)) is None]
    assert {k.backend for k in kernels} >= {"torch", "simulate"}
    for kernel in kernels:
        got = kernel.run(ones, ones, geometry, Epilogue(torch.ones((), dtype=torch.float32)))
        assert got.item() == torch.tensor(127 * 127 * 200_000).float().item(), kernel.backend


def test_output_sums_beyond_int32():
    geometry = ConvGeometry((1,), (0,), (1,), 1, (2,), (2,))
    x = torch.full((1, 100_000, 2), 127, dtype=torch.int8)
    request = Request("cpu", 200_000, 1, 1)
    ran, want = set(), torch.tensor(127 * 127 * 200_000).float().item()
    for kernel in kernel_table()["conv_output"]:
        if kernel.why_not(request) is None:
            assert kernel.run(x, x, geometry, Epilogue(torch.ones(()))).item() == want
            ran.add(kernel.backend)
    assert ran >= {"torch", "simulate"}
    assert "onednn" not in ran  # its unsigned bytes overflow earlier


@settings(max_examples=60, deadline=None)
@given(cases(dims=(1, 2)))
def test_phases_meet_every_position_once(case):
    g = case.geometry
    seen = torch.zeros(g.input_size, dtype=torch.int64)
    products = 0
    for phase in grad_input_phases(g):
        seen[phase.positions] += 1
        taps = math.prod(len(range(k)[t]) for k, t in zip(g.kernel_size, phase.taps, strict=True))
        products += taps * seen[phase.positions].numel()
    assert int(seen.max()) <= 1
    assert products <= math.prod(g.input_size) * math.prod(g.kernel_size)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", [POINTWISE, DEPTHWISE, MERGED, LINE, VOLUME])
def test_native_falls_back_in_the_same_order(op, case):
    """An epilogue of many terms goes through the torch kernels."""
    if library.why_not() is not None:
        pytest.skip(f"native library not built: {library.why_not()}")
    a, b = case.operands(op)
    one = torch.ones(())
    for operands in product((a, turned(a)), (b, turned(b))):
        want = getattr(convolutions, op)(*operands, case.geometry, Epilogue(one))
        got = getattr(convolutions, op)(*operands, case.geometry, Epilogue(one, terms=(0 * one,) * 9))
        assert torch.equal(got, want)
        assert got.stride() == want.stride()
