"""Codes of weights are used again only while the weight is what it was, however it is changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.kernels.native import library
from gradbits.nn import kept_weights
from gradbits.quantizers.quantizer import Quantizer

NATIVE = pytest.mark.skipif(library.why_not() is not None, reason=f"no native kernels: {library.why_not()}")


def layer(recipe: str = "int8_dynamic", **options) -> nn.Linear:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 16))
    gb.quantize_(net, gb.recipe(recipe, **options).with_overrides({"keep_float": ()}))
    return net[0]


def counted(monkeypatch) -> list[torch.Size]:
    """Shapes of what is quantized from now on."""
    seen = []
    original = Quantizer.quantize_with_range

    def counting(self, x, **options):
        seen.append(x.shape)
        return original(self, x, **options)

    monkeypatch.setattr(Quantizer, "quantize_with_range", counting)
    return seen


@NATIVE
def test_a_weight_is_quantized_twice_and_then_not_again(monkeypatch):
    net, x = layer(), torch.randn(8, 24)
    seen = counted(monkeypatch)
    with torch.no_grad():
        outputs = [net(x) for _ in range(5)]
    assert seen.count(net.weight.shape) == 2
    assert all(torch.equal(y, outputs[0]) for y in outputs)


@NATIVE
def test_accumulation_and_then_a_step(monkeypatch):
    net = layer()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    seen = counted(monkeypatch)
    for _ in range(3):
        for _ in range(4):
            net(torch.randn(8, 24)).square().sum().backward()
        optimizer.step()
    assert seen.count(net.weight.shape) == 6


def _by_numpy(w: torch.Tensor) -> None:
    w.detach().numpy()[3, 5] += 1.0


CHANGES = {
    "in place": lambda net: net.weight.data.mul_(1.5),
    "one value by data": lambda net: net.weight.data[2, 3].add_(0.5),
    "numpy": lambda net: _by_numpy(net.weight),
    "no_grad": lambda net: net.weight.detach().zero_(),
    "trade places": lambda net: net.weight.data.copy_(net.weight.data.flip(0)),
    "set data": lambda net: setattr(net.weight, "data", net.weight.data * 2),
    "state dict": lambda net: net.load_state_dict({k: v + 0.25 for k, v in net.state_dict().items()}),
    "new parameter": lambda net: setattr(net, "weight", nn.Parameter(torch.randn(16, 24))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change):
    net, x = layer(), torch.randn(8, 24)
    with torch.no_grad():
        for _ in range(3):
            net(x)
    CHANGES[change](net)
    fresh = layer()
    fresh.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(net(x), fresh(x))


@NATIVE
def test_nothing_is_kept_in_plain_training():
    net = layer()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        net(torch.randn(8, 24)).sum().backward()
        optimizer.step()
    assert net.weight.__dict__[kept_weights._NOTE].codes is None


@NATIVE
def test_another_quantizer_has_other_codes():
    net, x = layer(), torch.randn(8, 24)
    with torch.no_grad():
        for _ in range(3):
            net(x)
        net.assignment.recipe = gb.recipe("int8_dynamic", bits=4).with_overrides({"keep_float": ()})
        y = net(x)
        assert torch.equal(y, copy.deepcopy(net)(x))
        fresh = layer(bits=4)
        assert torch.equal(y, fresh(x))


def test_stochastic_weights_are_drawn_anew():
    net, x = layer(), torch.randn(8, 24)
    recipe = net.assignment.recipe
    net.assignment.recipe = recipe.with_overrides({"output.weight.rounding": "stochastic"})
    with torch.no_grad():
        outputs = [net(x) for _ in range(4)]
    assert not torch.equal(outputs[2], outputs[3])


@NATIVE
def test_files_hold_no_codes(tmp_path):
    net, x = layer(), torch.randn(8, 24)
    with torch.no_grad():
        for _ in range(3):
            y = net(x)
    assert net.weight.__dict__[kept_weights._NOTE].codes is not None
    torch.save(net, tmp_path / "net.pt")
    twin = torch.load(tmp_path / "net.pt", weights_only=False)
    assert twin.weight.__dict__[kept_weights._NOTE].codes is None
    with torch.no_grad():
        assert torch.equal(twin(x), y)
        assert torch.equal(copy.deepcopy(net)(x), y)


@NATIVE
def test_what_changes_uncounted_is_not_kept_any_more():
    net, x = layer(), torch.randn(8, 24)
    with torch.no_grad():
        for _ in range(6):
            net(x)
            net.weight.data.add_(0.01)
    note = net.weight.__dict__[kept_weights._NOTE]
    assert not note.trusted
    assert note.codes is None
