"""Measured scaling factors: Hutchinson's estimator, what a measurement leaves alone, when it happens."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError, DtypeError
from gradbits.nn.twice import twice_differentiable
from gradbits.optim.hessian import hutchinson, measure_deltas_, rademacher
from gradbits.recipes.learning import HessianScaling


def quadratic(hessian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(hessian.shape[0], requires_grad=True)
    (grad,) = torch.autograd.grad(0.5 * x @ hessian @ x, x, create_graph=True)
    return grad, x


def test_hutchinson_is_unbiased_with_the_known_variance():
    torch.manual_seed(0)
    a = torch.randn(8, 8)
    h = a + a.T
    grad, x = quadratic(h)
    draws = 4000
    samples = torch.tensor([hutchinson(grad, x, probes=1).mean for _ in range(draws)], dtype=torch.float64)
    variance = 2.0 * float(h.square().sum() - h.diagonal().square().sum())
    # both z-tests fail a right estimator with a probability below 1e-5
    assert abs(float(samples.mean()) - float(h.trace())) < 4.5 * math.sqrt(variance / draws)
    assert float(samples.var()) == pytest.approx(variance, rel=0.15)


def test_a_diagonal_hessian_needs_one_probe():
    grad, x = quadratic(torch.diag(torch.tensor([1.0, -3.0, 0.5])))
    trace = hutchinson(grad, x, probes=1)
    assert trace.mean == pytest.approx(-1.5, rel=1e-6)
    assert trace.probes == 1


def test_a_negative_trace_ends_the_official_loop_at_once():
    torch.manual_seed(0)
    a = torch.randn(6, 6)
    grad, x = quadratic(-(a @ a.T) - torch.eye(6))
    assert hutchinson(grad, x, tolerance=1e-9, probes=20).probes == 20
    # with |mean| in the numerator and a negative sum below it, the second probe ends it whatever it says
    assert hutchinson(grad, x, tolerance=1e-9, probes=20, official_behaviour=True).probes == 2


def test_the_first_probe_never_ends_it():
    grad, x = quadratic(torch.zeros(3, 3))
    assert hutchinson(grad, x).probes == 2


def test_a_linear_loss_has_no_curvature():
    x = torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad((2 * x).sum(), x, create_graph=True)
    assert hutchinson(grad, x).mean == 0.0


def network(**options) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    gb.quantize_(net, gb.recipe("ewgs", **{"keep_float": ("last_linear",), **options}))
    x, y = torch.randn(12, 2, 4, 4), torch.arange(12) % 3
    net(x)
    return net, x, y


def loss_of(net, x, y, factor=1.0):
    return lambda: factor * nn.functional.cross_entropy(net(x), y)


def test_a_measurement_leaves_everything_but_delta_alone():
    net, x, y = network()
    net(x).sum().backward()
    before = copy.deepcopy(net.state_dict())
    grads = [p.grad.clone() for p in net.parameters()]
    rng = torch.get_rng_state()
    found = measure_deltas_(net, [loss_of(net, x, y)] * 3, draw=rademacher(torch.Generator().manual_seed(1)))
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    for name, value in net.state_dict().items():
        assert name.endswith("delta") or torch.equal(value, before[name]), name
    assert set(found) == {(layer, role) for layer in ("0", "3") for role in ("input", "weight")}
    assert any(value > 0 for value in found.values())
    for (layer, role), value in found.items():
        assert float(net.get_submodule(layer).state_of("output", role)["delta"]) == value
    assert not any(m.assignment.seen for m in net.modules() if isinstance(m, gb.nn.quantized.Quantized))


def test_statistics_are_restored_when_a_loss_raises():
    net, x, _ = network()
    before = copy.deepcopy(net.state_dict())

    def broken():
        net(x)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        measure_deltas_(net, [broken])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net(x).sum().backward()  # in integers again


def test_the_size_of_the_loss_does_not_matter():
    results = []
    for factor in (1.0, 1e4):
        net, x, y = network()
        draw = rademacher(torch.Generator().manual_seed(1))
        results.append(measure_deltas_(net, [loss_of(net, x, y, factor)] * 2, draw=draw))
    for key, value in results[0].items():
        assert results[1][key] == pytest.approx(value, rel=1e-3, abs=1e-7)


def test_a_dead_layer_keeps_its_delta():
    net, x, y = network()
    net[3].state_of("output", "weight")["delta"].fill_(0.25)
    found = measure_deltas_(net, [lambda: nn.functional.cross_entropy(net(x), y) * 0.0])
    assert found["3", "weight"] == 0.25


def test_measuring_needs_something_to_measure():
    net, x, y = network()
    with pytest.raises(ArgumentError, match="at least one batch"):
        measure_deltas_(net, [])
    with pytest.raises(ArgumentError, match="scalar"):
        measure_deltas_(net, [lambda: net(x)])
    fixed, *_ = network(delta=0.1)
    for model in (fixed, nn.Linear(2, 2)):
        with pytest.raises(ArgumentError, match="measures"):
            measure_deltas_(model, [loss_of(net, x, y)])
    with pytest.raises(DtypeError, match="model"):
        measure_deltas_(3, [])


@pytest.mark.parametrize(
    "options",
    [{"period": 0}, {"batches": 0}, {"probes": 0}, {"samples": -1}, {"tolerance": -1.0}, {"tolerance": math.nan}],
)
def test_rules_that_are_none(options):
    (name,) = options
    with pytest.raises(ArgumentError, match=name):
        HessianScaling(**options)


def test_the_schedule_skips_the_start_and_the_end():
    net, x, y = network(period=2)
    asked: list[int] = []

    def losses(step):
        asked.append(step)
        return [loss_of(net, x, y)] * 3

    schedule = gb.optim.DeltaSchedule(net, losses, steps_per_epoch=3, total=18)
    for step in range(1, 19):
        schedule.after_step(step)
    assert asked == [6, 12]
    first = dict(schedule.latest)
    schedule.after_step(12)
    assert schedule.latest == first  # the probes are those of the step
    assert schedule.state_dict() == {}


def test_quantized_layers_still_refuse_second_derivatives_elsewhere():
    net, x, y = network()
    with twice_differentiable(net):
        pass
    with pytest.raises(gb.core.errors.DoubleBackwardError):
        torch.autograd.grad(loss_of(net, x, y)(), net[3].weight, create_graph=True)


def test_the_float_path_computes_what_the_layer_computes():
    for recipe in ("int8_dynamic", "lsq", "ewgs", "int4_transformer"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3))
        gb.quantize_(net, gb.recipe(recipe).with_overrides({"keep_float": ()}))
        x = torch.randn(5, 4, 6, 6)
        want = net(x).detach()
        net.eval()
        with twice_differentiable(net) as seen:
            got = net(x)
        net.train()
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max())), recipe
        assert len(seen) == 6


def test_a_schedule_is_checked_before_the_first_step():
    net, *_ = network()
    for losses in (5, None, "x", [torch.ones(())]):
        with pytest.raises(DtypeError, match=r"losses=.*function of the step"):
            gb.optim.DeltaSchedule(net, losses, steps_per_epoch=3)
    for losses in (lambda: 1.0, lambda step, count: 1.0):
        with pytest.raises(ArgumentError, match=r"losses: .*cannot be called with a step"):
            gb.optim.DeltaSchedule(net, losses, steps_per_epoch=3)
    with pytest.raises(DtypeError, match="model"):
        gb.optim.DeltaSchedule("x", lambda step: [], steps_per_epoch=3)
    for total, error in ((0, ArgumentError), ("x", DtypeError)):
        with pytest.raises(error, match="total"):
            gb.optim.DeltaSchedule(net, lambda step: [], steps_per_epoch=3, total=total)


def test_steps_count_from_one():
    net, x, y = network()
    schedule = gb.optim.DeltaSchedule(net, lambda step: [loss_of(net, x, y)], steps_per_epoch=1)
    for step, error in ((0, ArgumentError), (-3, ArgumentError), ("x", DtypeError), (1.0, DtypeError)):
        with pytest.raises(error, match="step="):
            schedule.after_step(step)
    assert schedule.latest == {}


@pytest.mark.parametrize("given", [1.0, torch.tensor(1.0), torch.ones(3), [torch.tensor(1.0)], ["x"]])
def test_losses_are_functions(given):
    net, *_ = network()
    with pytest.raises(DtypeError, match="losses: must give functions"):
        gb.optim.DeltaSchedule(net, lambda step: given, steps_per_epoch=1).after_step(1)
