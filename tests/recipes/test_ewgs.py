"""The recipes ewgs and lsq in layers: what is multiplied, when things start, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError, DtypeError
from gradbits.core.grain import PerTensor
from gradbits.core.qtensor import QTensor
from gradbits.nn.quantized import Quantized
from gradbits.quantizers.lsq import learned_step_quantize


def layer(name: str = "ewgs", bias: bool = True, **options) -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=bias)
    gb.quantize_(conv, gb.recipe(name, **{"keep_float": (), **options}), strict=True)
    return conv


def operand(conv: nn.Module, role: str, x: torch.Tensor) -> QTensor:
    return getattr(conv.assignment.recipe.output, role).quantize(x, state=conv.state_of("output", role), update=False)


@pytest.mark.parametrize("bits", range(1, 9))
def test_products_are_of_integers_and_padding_is_zero(bits):
    conv, x = layer(weight_bits=bits, activation_bits=bits), torch.rand(2, 3, 5, 5)
    y = conv(x)
    a, w = operand(conv, "input", x), operand(conv, "weight", conv.weight.detach())
    assert a.codes.dtype == w.codes.dtype == torch.int8
    assert int(a.codes.max()) - int(a.codes.min()) <= (1 << bits) - 1
    want = nn.functional.conv2d(a.dequantize().double(), w.dequantize().double(), conv.bias.double(), padding=1)
    assert torch.allclose(y.double(), want, rtol=1e-5, atol=1e-5)
    factor = float(conv.quantizers.output_weight_output_scale.detach())
    if bits == 1:
        assert set((w.dequantize() / factor).unique().tolist()) == {-1.0, 1.0}
        assert w.pack().codes.numel() * 4 >= w.codes.numel()
    assert float(w.dequantize().abs().max()) <= factor * 1.00001


def test_the_first_batch_gives_the_output_its_size():
    for bias in (False, True):
        conv, x = layer(bias=bias), torch.rand(4, 3, 6, 6)
        want = nn.functional.conv2d(x, conv.weight, None, padding=1).abs().mean()
        y = conv(x) - (conv.bias.view(1, -1, 1, 1) if bias else 0.0)
        assert float(y.detach().abs().mean()) == pytest.approx(float(want.detach()), rel=1e-4)


def test_an_evaluation_before_training_leaves_the_layer_unstarted():
    conv, x = layer(), torch.rand(4, 3, 6, 6)
    before = copy.deepcopy(conv.state_dict())
    y = conv.eval()(x)
    assert all(torch.equal(value, before[name]) for name, value in conv.state_dict().items())
    assert torch.equal(conv.train()(x), y)
    assert int(conv.quantizers.output_weight_scaled) == 1


def test_a_bad_first_batch_starts_nothing():
    conv, x = layer(), torch.rand(4, 3, 6, 6)
    conv(torch.full_like(x, float("nan")))
    conv(torch.zeros_like(x))
    assert int(conv.quantizers.output_input_started) == 0
    assert int(conv.quantizers.output_weight_scaled) == 0
    conv(x)
    assert int(conv.quantizers.output_weight_scaled) == 1


def test_bias_inside_is_scaled_with_the_product_and_learns_with_it():
    conv, x = layer(bias_inside=True), torch.rand(4, 3, 6, 6)
    y = conv(x)
    y.square().sum().backward()
    factor = conv.quantizers.output_weight_output_scale
    plain = layer()
    plain.load_state_dict(conv.state_dict())
    inside = y - (plain.eval()(x) - plain.bias.view(1, -1, 1, 1))
    assert torch.allclose(inside, (factor * conv.bias).view(1, -1, 1, 1).expand_as(inside), atol=1e-5)
    assert torch.allclose(conv.bias.grad, 2 * y.detach().sum((0, 2, 3)) * float(factor.detach()), rtol=1e-4)


def test_delta_zero_is_the_straight_through_estimator_bit_for_bit():
    grads = []
    for delta in (0.0, 0.0, 0.5):
        conv, x = layer(delta=delta), torch.rand(4, 3, 6, 6).requires_grad_()
        torch.manual_seed(1)
        conv(x).square().sum().backward()
        grads.append([x.grad.abs().sum(), conv.weight.grad])
    assert torch.equal(grads[0][1], grads[1][1])
    assert not torch.equal(grads[0][1], grads[2][1])


def test_recipes_say_what_the_loop_must_do():
    assert gb.recipe("ewgs", delta=0.0).hessian is None
    assert gb.recipe("ewgs", delta=1e-3).output.weight.range.delta == 1e-3
    rule = gb.recipe("ewgs", period=10, samples=256, official_behaviour=True).hessian
    assert (rule.period, rule.samples, rule.probes, rule.official_behaviour) == (10, 256, 50, True)
    plain = gb.recipe("ewgs").with_overrides({"hessian": "null", "weight.bits": "1"})
    assert plain.hessian is None
    assert plain.output.weight.bits == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ewgs", {"weight_bits": 0}),
        ("ewgs", {"activation_bits": 9}),
        ("ewgs", {"weight_bits": True}),
        ("ewgs", {"delta": -0.1}),
        ("ewgs", {"delta": float("nan")}),
        ("ewgs", {"period": 0}),
        ("ewgs", {"batches": 0}),
        ("ewgs", {"probes": 0}),
        ("ewgs", {"quantizer_rate": -1.0}),
        ("lsq", {"weight_bits": 1}),
        ("lsq", {"activation_bits": 9}),
        ("lsq", {"quantizer_rate": float("inf")}),
    ],
)
def test_options_that_are_none(name, options):
    with pytest.raises(ArgumentError):
        gb.recipe(name, **options)


def test_options_of_a_wrong_type():
    for options in ({"per_channel": 1}, {"signed_activations": 0}):
        with pytest.raises(DtypeError):
            gb.recipe("lsq", **options)
    with pytest.raises(DtypeError):
        gb.recipe("ewgs", delta="small")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_activations_are_unsigned_and_reach_all_levels(bits):
    conv = layer("lsq", weight_bits=bits, activation_bits=bits)
    x = torch.rand(8, 3, 6, 6)
    conv(x)
    conv.quantizers.output_input_step.data.fill_(1.0 / ((1 << bits) - 1))
    q = operand(conv, "input", torch.linspace(-0.2, 1.2, 4001).view(1, 1, 1, -1))
    assert q.codes.unique().numel() == 1 << bits
    assert float(q.dequantize().min()) == 0.0
    assert float(q.dequantize().max()) == pytest.approx(1.0)


def test_lsq_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    conv, x = layer("lsq", bias=False), torch.rand(8, 3, 6, 6).requires_grad_()
    y = conv(x)
    g = torch.randn_like(y)
    y.backward(g)
    a, w = x.detach().clone().requires_grad_(), conv.weight.detach().clone().requires_grad_()
    steps = [p.detach().clone().requires_grad_() for p in conv.quantizers.parameters()]
    by_name = dict(zip(dict(conv.quantizers.named_parameters()), steps, strict=True))
    qa = learned_step_quantize(a, by_name["output_input_step"], (0, 15), PerTensor())
    qw = learned_step_quantize(w, by_name["output_weight_step"], (-8, 7), PerTensor())
    nn.functional.conv2d(qa, qw, padding=1).backward(g)
    assert torch.allclose(x.grad, a.grad, rtol=1e-4, atol=1e-5)
    assert torch.allclose(conv.weight.grad, w.grad, rtol=1e-4, atol=1e-4)
    for name, step in by_name.items():
        assert torch.allclose(conv.quantizers.get_parameter(name).grad, step.grad, rtol=1e-3, atol=1e-4), name


def test_a_model_keeps_its_first_convolution_and_its_classifier():
    for name in ("ewgs", "lsq"):
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(32, 8), nn.Linear(8, 2))
        gb.quantize_(net, name)
        assert [n for n, m in net.named_modules() if isinstance(m, Quantized)] == ["1", "3"]
