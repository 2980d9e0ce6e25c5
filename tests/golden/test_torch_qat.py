"""Fake quantization, observers and the nudged range against PyTorch's own, for every case the file holds.

The histogram observer searches for a range in its own way and has no counterpart here.
"""

from __future__ import annotations

import re

import pytest
import torch

from gradbits.core.grain import Grain, PerChannel, PerTensor
from gradbits.kernels.fixed_point import Multiplier, high_multiply, requantize
from gradbits.kernels.reference import int_product
from gradbits.quantizers.fake import fake_quantize
from gradbits.quantizers.fake_learned import fake_quantize_learned
from gradbits.quantizers.grids import Affine, Grid, Symmetric
from gradbits.quantizers.ranges import EMA, MinMax, RangeRule

EPS = torch.finfo(torch.float32).eps  # PyTorch's observers make no scale smaller than this


@pytest.fixture(scope="module")
def data(golden):
    return golden("torch_qat.npz")


def found(data, pattern: str) -> list[re.Match[str]]:
    """The keys that match a pattern; a file without any is an error, not a pass."""
    matches = [m for key in sorted(data) if (m := re.fullmatch(pattern, key))]
    assert matches, f"the file holds no case {pattern}"
    return matches


def forward_and_gradient(x, grad_out, *grid, axis=None):
    x = x.clone().requires_grad_()
    out = fake_quantize(x, *grid, axis=axis)
    out.backward(grad_out)
    return out.detach(), x.grad


def test_fake_quantize_per_tensor(data):
    for case in found(data, r"(fq/s([\d.e-]+)_z(-?\d+)_q(-?\d+)_(-?\d+))/out"):
        name, scale, zero, low, high = case.groups()
        got = forward_and_gradient(data["fq/x"], data["fq/grad_out"], float(scale), int(zero), int(low), int(high))
        assert torch.equal(got[0], data[f"{name}/out"]), name
        assert torch.equal(got[1], data[f"{name}/grad_x"]), name


def test_fake_quantize_per_channel(data):
    for case in found(data, r"(fqc/q(-?\d+)_(-?\d+))/out"):
        name, low, high = case.groups()
        grid = (data["fqc/scale"], data["fqc/zero"], int(low), int(high))
        got = forward_and_gradient(data["fq/x"], data["fq/grad_out"], *grid, axis=1)
        assert torch.equal(got[0], data[f"{name}/out"]), name
        assert torch.equal(got[1], data[f"{name}/grad_x"]), name


def test_ties_go_to_the_even_code(data):
    x = data["fq_ties/x"]
    assert bool((x.frac().abs() == 0.5).any())
    for case in found(data, r"fq_ties/out_s(\d+)_z(\d+)"):
        low, high = int(data[case[0]].min()), int(data[case[0]].max())
        got = fake_quantize(x, float(case[1]), int(case[2]), low, high)
        assert torch.equal(got, data[case[0]])


def parts_of(name: str) -> tuple[RangeRule, Grid, Grain]:
    """The range rule, grid and grain that an observer's name asks for."""
    moving = re.match(r"movavg([\d.]+)_", name)
    channel = re.match(r"perchan(\d+)_", name)
    bits = 4 if "4bit" in name else 7 if name.endswith("reduce") else 8
    rule: RangeRule = EMA(decay=1.0 - float(moving[1]), of=MinMax()) if moving else MinMax()
    grid: Grid = Symmetric(bits=bits) if "_sym_" in name else Affine(bits=bits, zero="nudge")
    return rule, grid, PerChannel(axis=int(channel[1])) if channel else PerTensor()


def test_observers(data):
    names = [m[1] for m in found(data, r"obs/(\w[\w.]*)/scale") if not m[1].startswith("hist")]
    assert names
    for name in names:
        rule, grid, grain = parts_of(name)
        want = {k: data[f"obs/{name}/{k}"] for k in ("scale", "zero_point", "min_val", "max_val")}
        groups = want["scale"].shape[1]
        state = rule.init_state(groups)
        low = high = None
        for step, batch in enumerate(data["obs/seq"]):
            now = rule.limits(batch, grain, state, True)
            if low is None or state:  # a moving average remembers by itself
                low, high = now
            else:  # PyTorch's plain observers keep the extremes of all batches; our MinMax looks at one
                low, high = torch.minimum(low, now[0]), torch.maximum(high, now[1])
            assert torch.allclose(low.flatten(), want["min_val"][step].flatten(), rtol=1e-5, atol=1e-7), name
            assert torch.allclose(high.flatten(), want["max_val"][step].flatten(), rtol=1e-5, atol=1e-7), name
            placed = grid.place(low, high)
            scale = placed.scale.flatten()
            assert bool((want["scale"][step] > EPS).all())
            if isinstance(grid, Symmetric):
                # by design: 127 steps a side and no code -128; PyTorch spreads 255 steps over both sides
                ratio = 127.5 / 127
                assert torch.allclose(scale, want["scale"][step] * ratio, rtol=1e-6), name
                assert placed.zero_point is None
                assert not want["zero_point"][step].any(), name
            else:
                assert torch.allclose(scale, want["scale"][step], rtol=1e-5), name
                half = 1 << (grid.bits - 1)
                zero = placed.zero_point.flatten() + half  # our codes are signed, PyTorch's start at 0
                assert torch.equal(zero.int(), want["zero_point"][step]), name


def test_a_tiny_range_keeps_its_scale():
    """By design: PyTorch's observers raise a scale to 1.2e-7 and lose everything smaller, ours do not."""
    x = torch.tensor([-1e-12, 3e-12])
    low, high = MinMax().limits(x, PerTensor(), {}, True)
    scale = Affine(bits=8, zero="nudge").place(low, high).scale
    assert 0 < scale.item() < EPS


def test_nudged_range(data):
    (case,) = found(data, r"nudge/table_min_max_bits_scale_zp_nudgedmin_nudgedmax")
    for low, high, bits, scale, zero, nudged_low, nudged_high in data[case[0]].tolist():
        placed = Affine(bits=int(bits), zero="nudge").place(torch.tensor([low]).float(), torch.tensor([high]).float())
        rank = placed.zero_point.item() + (1 << (int(bits) - 1))
        ours = placed.scale.item()
        assert rank == zero, (low, high, bits)
        assert ours == pytest.approx(scale, rel=1e-6)
        steps = (1 << int(bits)) - 1
        assert -rank * ours == pytest.approx(nudged_low, rel=1e-6, abs=1e-9)
        assert (steps - rank) * ours == pytest.approx(nudged_high, rel=1e-6, abs=1e-9)


def test_requantization(data):
    m = Multiplier.of(data["requant/M"].double())
    assert torch.equal(m.m0, data["requant/M0_q31"].long())
    assert torch.equal(m.shift, data["requant/shift"].long())
    sums, m = data["requant/acc"].long(), m.view(-1, 1)
    assert torch.equal(high_multiply(sums, m.m0), data["requant/srdhm"].long())
    assert torch.equal(requantize(sums, m, "double"), data["requant/out_gemmlowp"].long())
    assert torch.equal(requantize(sums, m), data["requant/out_single_rounding_half_away"].long())


def test_integer_only_layers(data):
    for case in found(data, r"(intlinear/\d+)/acc_i32"):
        at = {k: data[f"{case[1]}/{k}"] for k in ("qx", "qw", "zx", "zw", "zo", "bias_i32", "scales_x_w_o")}
        x, w, zx, zw = (at[k].int() for k in ("qx", "qw", "zx", "zw"))
        # unsigned codes as signed ones, and the identity that takes the zero points out of the integer product
        product = int_product((x - 128).to(torch.int8), (w - 128).to(torch.int8).t())
        x0, w0 = zx - 128, zw - 128
        sums = product - x0 * (w - 128).sum(1) - w0 * (x - 128).sum(1, keepdim=True) + x.shape[1] * x0 * w0
        sums = sums + at["bias_i32"].int()
        assert torch.equal(sums.int(), data[case[0]].int()), case[1]
        sx, sw, so = at["scales_x_w_o"].double()
        m = Multiplier.of(sx * sw / so)
        assert int(m.m0) == int(data[f"{case[1]}/M0_q31"])
        assert int(m.shift) == int(data[f"{case[1]}/shift"])
        codes = requantize(sums, m) + at["zo"].long()
        assert torch.equal(codes.clamp(0, 255), data[f"{case[1]}/out_u8"].long()), case[1]
        assert torch.equal(codes.clamp(int(at["zo"]), 255), data[f"{case[1]}/out_relu_u8"].long()), case[1]


def learned(x, grad_out, scale, zero, low, high, axis, factor):
    x, scale, zero = (t.clone().float().requires_grad_() for t in (x, scale, zero))
    out = fake_quantize_learned(x, scale, zero, low, high, axis=axis, factor=factor)
    out.backward(grad_out)
    return {"out": out.detach(), "grad_x": x.grad, "grad_scale": scale.grad, "grad_zero": zero.grad}


def test_learned_scale_and_zero_point(data):
    number = r"(-?[\d.e-]+)"
    for case in found(data, rf"(fq/s{number}_z(-?\d+)_q(-?\d+)_(-?\d+)/(learn_\w+))/out"):
        name, scale, zero, low, high, kind = case.groups()
        factor = float(data[f"{name}/grad_factor"]) if f"{name}/grad_factor" in data else 1.0
        assert kind == "learn_g1" or factor != 1.0
        x, grad_out = data["fq/x"], data["fq/grad_out"]
        start = (torch.tensor([float(scale)]), torch.tensor([float(zero)]))
        got = learned(x, grad_out, *start, int(low), int(high), None, factor)
        for key, value in got.items():
            want = data[f"{name}/{key}"].reshape(value.shape)
            assert torch.allclose(value, want, rtol=1e-4, atol=1e-4 * float(want.abs().max())), (name, key)


def test_learned_scale_and_zero_point_per_channel(data):
    for case in found(data, r"(fqc/q(-?\d+)_(-?\d+)/learn)/out"):
        name, low, high = case.groups()
        x, grad_out, start = data["fq/x"], data["fq/grad_out"], (data["fqc/scale"], data["fqc/zero"])
        factor = float(data[f"{name}/grad_factor"]) if f"{name}/grad_factor" in data else 1.0
        got = learned(x, grad_out, *start, int(low), int(high), 1, factor)
        for key, value in got.items():
            want = data[f"{name}/{key}"].reshape(value.shape)
            assert torch.allclose(value, want, rtol=1e-4, atol=1e-4 * float(want.abs().max())), (name, key)
