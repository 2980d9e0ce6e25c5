"""Post-training quantization at many bit widths: grids, calibration, and that the weights stay as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError, DtypeError
from gradbits.nn.quantized import Quantized
from gradbits.observe import calibrate, evaluate_bits
from gradbits.observe.post_training import post_training, post_training_recipe


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def batches(count: int = 3) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(5, 2, 8, 8, generator=g) for _ in range(count)]


def distance(net: nn.Module):
    x = batches(1)[0]
    want = copy.deepcopy(net).eval()(x).detach()
    return lambda model: float((model(x) - want).norm() / want.norm())


@pytest.mark.parametrize("weights", ["symmetric", "affine"])
@pytest.mark.parametrize("activations", ["symmetric", "affine"])
def test_fewer_bits_are_worse_and_the_model_stays_as_it_is(weights, activations):
    net = network()
    before, mode = copy.deepcopy(net.state_dict()), net.training
    options = {"weights": weights, "activations": activations}
    found = evaluate_bits(net, distance(net), batches(), bits=(8, 6, 4, 3, (8, 4)), **options)
    assert found[8] < found[6] < found[4] < found[3]
    assert found[8] < 0.03
    assert found[6] < found[8, 4]
    assert net.training is mode
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(isinstance(m, Quantized) for m in net.modules())
    assert not net[0]._forward_pre_hooks


def test_each_number_of_bits_starts_from_the_float_weights():
    net = network()
    together = evaluate_bits(net, distance(net), batches(), bits=(8, 4))
    alone = evaluate_bits(net, distance(net), batches(), bits=(4,))
    assert together[4] == alone[4]


def test_the_range_is_that_of_the_batches_and_clips_beyond():
    net = nn.Sequential(nn.Linear(2, 1))
    ranges = calibrate(net, [torch.tensor([[0.0, 1.0]]), torch.tensor([[-3.0, 0.5]])])
    assert ranges == {"0": (-3.0, 1.0)}
    quantized = post_training(net, ranges, post_training_recipe(8, 8))
    state = quantized[0].state_of("output", "input")
    assert (float(state["low"]), float(state["high"])) == (-3.0, 1.0)
    inside, beyond = torch.tensor([[-3.0, 1.0]]), torch.tensor([[-30.0, 10.0]])
    assert torch.equal(quantized(inside), quantized(beyond))


def test_the_error_is_at_most_half_a_step():
    x = torch.linspace(-1.0, 2.0, 1001)
    recipe = post_training_recipe(4, 4)
    for q in (recipe.output.weight, recipe.output.input):
        codes = q.quantize(x, state=q.init_state())
        # where zero is moved onto the grid, values at one end clip by up to half a step more
        slack = 1.0 if q is recipe.output.input else 0.5
        assert float((codes.dequantize() - x).abs().max()) <= slack * float(codes.scale) * 1.001


def test_attention_products_are_quantized_too():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.product = gb.nn.Matmul()

        def forward(self, x):
            return self.product(x, x.mT)

    x = torch.randn(2, 3, 4)
    found = evaluate_bits(Net(), lambda m: float((m(x) - x @ x.mT).abs().max()), [x], bits=(8, 3))
    assert 0 < found[8] < found[3]


@pytest.mark.parametrize("bits", [(1,), (9,), (True,), ((8, 1),), ((8, 8, 8),), ()])
def test_bits_that_are_none(bits):
    net = network()
    with pytest.raises(ArgumentError, match="bits"):
        evaluate_bits(net, distance(net), batches(), bits=bits)


def test_refusals():
    net = network()
    with pytest.raises(ArgumentError, match="weights"):
        evaluate_bits(net, distance(net), batches(), weights="round")
    with pytest.raises(ArgumentError, match="batches"):
        evaluate_bits(net, distance(net), [])
    with pytest.raises(ArgumentError, match="batches"):
        calibrate(net, [torch.zeros(0, 2, 8, 8)])
    with pytest.raises(ArgumentError, match="not finite"):
        calibrate(net, [torch.full((1, 2, 8, 8), float("nan"))])
    gb.quantize_(net, "int8_dynamic")
    with pytest.raises(ArgumentError, match="is quantized"):
        calibrate(net, batches())


def test_batches_of_a_loader_are_pairs():
    net = network()
    pairs = [(x, torch.zeros(len(x))) for x in batches()]
    alone = evaluate_bits(net, distance(net), batches(), bits=(6,))
    assert evaluate_bits(net, distance(net), pairs, bits=(6,)) == alone
    assert evaluate_bits(net, distance(net), [list(pair) for pair in pairs], bits=(6,)) == alone
    # a function of one's own gets the whole batch
    assert calibrate(net, pairs, lambda model, pair: model(pair[0])) == calibrate(net, batches())


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"bits": 8}, "bits=8"),
        ({"bits": None}, "bits=None"),
        ({"evaluate": None}, "evaluate=None"),
        ({"evaluate": lambda model: None}, "evaluate: must return a number"),
        ({"evaluate": lambda model: torch.ones(2)}, "evaluate: must return a number"),
        ({"batches": torch.zeros(2, 2, 8, 8)}, "batches: must be a list"),
        ({"batches": 3}, "batches: must be a list"),
        ({"forward": 3}, "forward=3"),
    ],
)
def test_wrong_types_are_named(given, named):
    with pytest.raises(DtypeError, match=named):
        evaluate_bits(network(), **{"evaluate": lambda model: 1.0, "batches": batches(), "bits": (8,), **given})
