"""What tracing makes of forwards that change values in place, or that differ between training and evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError, GraphError
from gradbits.nn.graph import plan_of

X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions around a forward that is given."""

    def __init__(self, body: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = body
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.head, self.relu, self.drop = nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> Any:
        """Return what the body returns."""
        return self.body(self, x)


def relu_module(s: Any, x: torch.Tensor) -> torch.Tensor:
    y = s.a(x)
    return s.head(s.c(s.relu(y)) + y)


def relu_function(s: Any, x: torch.Tensor) -> torch.Tensor:
    y = s.a(x)
    return s.head(s.c(F.relu(y, inplace=True)) + y)


def add_method(s: Any, x: torch.Tensor) -> torch.Tensor:
    a = s.a(x)
    b = a.add_(s.b(x))
    return s.head(b + a)


def add_operator(s: Any, x: torch.Tensor) -> torch.Tensor:
    a = s.a(x)
    b = a
    b += s.b(x)
    return s.head(a)


def changed_twice(s: Any, x: torch.Tensor) -> torch.Tensor:
    a = s.a(x)
    before = s.c(a)
    a.relu_()
    b = a
    b += before
    s.relu(b)
    return s.head(a)


def multiplied(s: Any, x: torch.Tensor) -> torch.Tensor:
    a = s.a(x)
    a.mul_(0.5)
    b = a
    b *= 3
    b -= 1
    return s.head(a)


BODIES = [relu_module, relu_function, add_method, add_operator, changed_twice, multiplied]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_later_users_read_what_an_in_place_operation_wrote(body):
    net = Net(body)
    plain = copy.deepcopy(net).eval()
    with torch.no_grad():
        want = plain(X)
    gb.quantize_(net, "qat_int8")
    for _ in range(3):
        net(X).square().sum().backward()
        assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in net.parameters())
    with torch.no_grad():
        trained, evaluated = net(X), net.eval()(X)
    for got in (trained, evaluated):
        assert float((got - want).norm() / want.norm()) < 0.05
    if body is not multiplied:
        assert torch.equal(gb.convert_(net)(X), evaluated)


def test_activations_in_place_are_still_one_step_with_their_layer():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
    gb.quantize_(net, "qat_int8")
    assert [step.kind for step in plan_of(net).steps.values()] == ["input", "layer", "layer", "output"]


def through_a_view(s: Any, x: torch.Tensor) -> torch.Tensor:
    a = s.a(x)
    a[:, :2].mul_(2.0)
    return s.head(a)


def of_a_view(s: Any, x: torch.Tensor) -> torch.Tensor:
    a = s.a(x)
    b = a.flatten(1)
    s.relu(a)
    return s.head(a) + b.sum()


def into_out(s: Any, x: torch.Tensor) -> torch.Tensor:
    a, b = s.a(x), s.b(x)
    torch.add(a, b, out=a)
    return s.head(a)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (through_a_view, "mul_ changes .*head reads"),
        (of_a_view, r"'relu' \(ReLU\) changes"),
        (into_out, "writes into out="),
    ],
)
def test_changes_that_cannot_be_followed_are_refused_before_anything_changes(body, named):
    net = Net(body)
    with pytest.raises(GraphError, match=named):
        gb.quantize_(net, "qat_int8")
    assert type(net.a) is nn.Conv2d


def test_sizes_are_no_values():
    def body(s: Any, x: torch.Tensor) -> torch.Tensor:
        a = s.c(s.a(x))
        n = a.shape[2]
        n += 0
        return s.head(F.relu(a, inplace=True).view(a.size(0), a.size(1), n, 6))

    net = Net(body)
    gb.quantize_(net, "qat_int8")
    net(X)
    want = net.eval()(X).detach()
    assert torch.equal(gb.convert_(net)(X), want)


class Dropping(nn.Module):
    def __init__(self, float_step: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.head, self.float_step = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), float_step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop half of the values in training."""
        x = F.gelu(self.a(x)) if self.float_step else self.a(x)
        return self.head(F.dropout(x, 0.5, self.training))


@pytest.mark.parametrize("float_step", [False, True])
@pytest.mark.parametrize("mode", [False, True])
def test_dropout_follows_the_present_mode_whatever_it_was_when_quantized(mode, float_step):
    net = nn.Sequential(Dropping(float_step)).train(mode)
    gb.quantize_(net, "qat_int8")
    assert net.training == mode
    for each in (net, copy.deepcopy(net)):
        each.train()
        assert not torch.equal(each(X), each(X))
        each[0].training = False  # a part that is frozen
        with torch.no_grad():
            y = each(X)
            assert float((each(X) - y).norm()) < 0.05 * float(y.norm())
        each.eval()
        assert torch.equal(each(X), each(X))


def test_dropout_that_never_stops_has_no_integer_form():
    net = Net(lambda s, x: s.head(F.dropout(s.a(x), 0.5)))
    gb.quantize_(net, "qat_int8")
    net(X)
    assert not torch.equal(net.eval()(X), net(X))
    with pytest.raises(GraphError, match="dropout drops values in evaluation too"):
        gb.convert_(net)


def test_batch_norm_as_a_function_normalises_with_the_batch_in_training():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("var", torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.batch_norm(self.a(x), self.mean, self.var, training=self.training, momentum=1.0)

    net = Functional().eval()
    gb.quantize_(net, "qat_int8")
    net.train()
    y = net(X * 5).detach()
    assert torch.allclose(y.mean((0, 2, 3)), torch.zeros(4), atol=1e-5)
    assert not torch.equal(net.var, torch.ones(4))
    assert float((net.eval()(X * 5).detach() - y).abs().max()) < 0.05


def test_a_branch_that_differs_in_training_is_refused():
    net = Net(lambda s, x: (s.head(s.a(x)), x) if s.training else s.head(s.a(x)))
    with pytest.raises(GraphError, match=r"other steps in training \(returns .*self\.training decide about numbers"):
        gb.quantize_(net, "qat_int8")
    assert type(net.a) is nn.Conv2d


def test_a_batch_norm_over_another_axis_than_the_outputs_is_not_folded():
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    gb.quantize_(net, "qat_int8")
    rows = torch.randn(16, 5, 4)
    with pytest.raises(GraphError, match=r"layer '1' \(BatchNorm1d\) normalises axis 1.*layer '0'"):
        net(rows)
    net(rows[:, 0])
    want = net.eval()(rows[:, 0]).detach()
    for call in (net, gb.convert_(copy.deepcopy(net))):
        assert torch.equal(call(rows[:, 0]), want)
        with pytest.raises((GraphError, ArgumentError), match=r"(normalises axis 1|must have 2 axes and 4 features)"):
            call(rows)


def test_a_batch_norm_of_another_size_stays_in_float():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(5, 2))
    plain, rows = copy.deepcopy(net), torch.randn(64, 3, 4)
    gb.quantize_(net, "qat_int8")
    with torch.no_grad():
        want = plain(rows)
        assert float((net(rows) - want).norm() / want.norm()) < 0.05
