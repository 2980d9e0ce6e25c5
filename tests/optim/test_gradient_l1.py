"""Gradient L1 regularization: closed forms, what it leaves alone, what it refuses."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradbits as gb
from gradbits.core.errors import ArgumentError, DoubleBackwardError, DtypeError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(10, 2, 8, 8, generator=g), torch.arange(10) % 3


def test_double_backward_of_a_linear_model_is_the_closed_form():
    torch.manual_seed(0)
    x, y = torch.randn(5, dtype=torch.float64), 0.3
    net = nn.Linear(5, 1, bias=False).double()
    loss = 0.5 * (net(x) - y).square().sum()
    term = gb.gradient_l1(loss, net, weight=1.0)
    residual = float((net.weight.detach() @ x)[0] - y)
    assert term.item() == pytest.approx(abs(residual) * float(x.abs().sum()), rel=1e-5)
    term.backward()
    want = torch.sign(torch.tensor(residual)).double() * x.abs().sum() * x
    assert torch.allclose(net.weight.grad[0], want, rtol=1e-5)


def test_the_gradient_of_the_term_is_that_of_finite_differences():
    net, (x, y) = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), batch()
    x = x[:, 0, 0, :6].double()

    def term():
        with gb.record_activations(net) as seen:
            loss = F.cross_entropy(net(x), y)
        return gb.gradient_l1(loss, net, weight=0.7, activation=0.4, recorded=seen)

    grads = torch.autograd.grad(term(), list(net.parameters()))
    torch.manual_seed(3)
    for p, grad in zip(net.parameters(), grads, strict=True):
        direction, h = torch.randn_like(p), 1e-4
        with torch.no_grad():
            p += h * direction
            up = float(_value(term))
            p -= 2 * h * direction
            down = float(_value(term))
            p += h * direction
        assert (up - down) / (2 * h) == pytest.approx(float((grad * direction).sum()), rel=5e-2, abs=2e-3)


def _value(term) -> torch.Tensor:
    with torch.enable_grad():
        return term().detach()


def test_duality_of_the_norms():
    g = torch.randn(6, dtype=torch.float64)
    best = max(float(torch.tensor(n, dtype=torch.float64) @ g) for n in itertools.product((-0.1, 0.1), repeat=6))
    assert best == pytest.approx(0.1 * float(g.abs().sum()), rel=1e-12)


def test_the_norm_bounds_what_rounding_does_to_the_loss():
    """First order: the worst sign perturbation raises the loss by D/2 times the norm, the better the smaller D is."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    x = torch.randn(4, 3, dtype=torch.float64)

    def loss():
        return net(x).square().mean()

    norm = gb.gradient_l1(loss(), net, weight=1.0).item()
    base, ratios = loss().item(), []
    for step in (1e-1, 1e-3):
        worst = 0.0
        for signs in itertools.product((-1.0, 1.0), repeat=8):
            moved, moves = torch.tensor(signs, dtype=torch.float64), copy.deepcopy(net)
            with torch.no_grad():
                moves[0].weight += step / 2 * moved[:6].view(2, 3)
                moves[2].weight += step / 2 * moved[6:].view(1, 2)
                worst = max(worst, moves(x).square().mean().item() - base)
        ratios.append(worst / (step / 2 * norm))
    assert abs(ratios[1] - 1.0) < 0.01 < abs(ratios[0] - 1.0)


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"weight": 0.1, "step": 3, "start": 3}])
def test_off_is_plain_training_bit_for_bit(options):
    plain, other = network(), network()
    x, y = batch()
    loss = F.cross_entropy(plain(x), y)
    loss.backward()
    theirs = F.cross_entropy(other(x), y)
    term = gb.gradient_l1(theirs, other, **options)
    assert term.item() == 0.0
    assert not term.requires_grad
    total = theirs + term
    assert torch.equal(total, loss)
    total.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


def test_schedule():
    net, (x, y) = network(), batch()
    loss = F.cross_entropy(net(x), y)
    plain = gb.gradient_l1(loss, net, weight=0.1).item()

    def at(step, **options):
        return gb.gradient_l1(loss, net, weight=0.1, step=step, **options).item() / plain

    assert [round(at(s, start=2, warmup=4), 4) for s in (2, 3, 4, 6, 9)] == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert [round(at(s, start=1, every=3), 4) for s in (1, 2, 3, 4, 5)] == [0.0, 3.0, 0.0, 0.0, 3.0]


def test_it_is_homogeneous_and_never_negative():
    net, (x, y) = network(), batch()
    with gb.record_activations(net) as seen:
        loss = F.cross_entropy(net(x), y)
    terms = [gb.gradient_l1(c * loss, net, weight=0.1, activation=0.1, recorded=seen).item() for c in (1.0, -3.0, 0.0)]
    assert terms[0] > 0
    assert terms[1] == pytest.approx(3 * terms[0], rel=1e-5)
    assert terms[2] == 0.0


def test_per_element_divides_by_the_size_of_each_layer():
    net, (x, y) = network(), batch()
    loss = F.cross_entropy(net(x), y)
    want = 0.0
    for layer in (net[0], net[4], net[7]):
        (grad,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
        want += float(grad.abs().mean())
    assert gb.gradient_l1(loss, net, weight=1.0, per_element=True).item() == pytest.approx(want, rel=1e-5)


def test_what_is_recorded_are_inputs_that_need_a_gradient():
    net, (x, _) = network(), batch()
    with gb.record_activations(net) as seen:
        net(x)
    assert [name for name, _ in seen] == ["4", "7"]  # the first layer's input is the batch itself
    with gb.record_activations(net, layers=["7"]) as seen:
        net(x)
    assert [name for name, _ in seen] == ["7"]
    net(x)
    assert len(seen) == 1


def test_batch_norm_counts_the_batch_once_and_takes_part():
    net, plain, (x, y) = network(), network(), batch()
    F.cross_entropy(plain(x), y).backward()
    loss = F.cross_entropy(net(x), y)
    (loss + gb.gradient_l1(loss, net, weight=0.1)).backward()
    assert torch.equal(net[1].running_mean, plain[1].running_mean)
    assert int(net[1].num_batches_tracked) == 1
    assert not torch.equal(net[1].weight.grad, plain[1].weight.grad)


def test_training_with_it_lowers_the_norm():
    x, y = batch()
    norms = {}
    for weight in (0.0, 0.05):
        net = network()
        opt = torch.optim.SGD(net.parameters(), lr=0.05)
        for _ in range(30):
            loss = F.cross_entropy(net(x), y)
            opt.zero_grad()
            (loss + gb.gradient_l1(loss, net, weight=weight)).backward()
            opt.step()
        loss = F.cross_entropy(net(x), y)
        norms[weight] = gb.gradient_l1(loss, net, weight=1.0).item()
    assert norms[0.05] < 0.8 * norms[0.0]


def test_autocast():
    net, (x, y) = network(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(net(x).float(), y)
        term = gb.gradient_l1(loss, net, weight=0.1)
    assert term.dtype == torch.float32
    (loss + term).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in net.parameters())
    other = network()
    want = gb.gradient_l1(F.cross_entropy(other(x), y), other, weight=0.1)
    assert term.item() == pytest.approx(want.item(), rel=0.1)


@pytest.mark.parametrize("name", ["weight", "activation"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_coefficients_that_are_none(name, value):
    net, (x, y) = network(), batch()
    with pytest.raises(ArgumentError, match=name):
        gb.gradient_l1(F.cross_entropy(net(x), y), net, **{name: value})


def test_refusals():
    net, (x, y) = network(), batch()
    loss = F.cross_entropy(net(x), y)
    with pytest.raises(ArgumentError, match="scalar"):
        gb.gradient_l1(net(x), net)
    with pytest.raises(ArgumentError, match="no gradient"):
        gb.gradient_l1(loss.detach(), net)
    with pytest.raises(DtypeError, match="loss"):
        gb.gradient_l1(0.5, net)
    with pytest.raises(DtypeError, match="model"):
        gb.gradient_l1(loss, [net])
    with pytest.raises(ArgumentError, match="recorded"):
        gb.gradient_l1(loss, net, activation=0.1)
    with pytest.raises(ArgumentError, match="no such linear layer"):
        gb.gradient_l1(loss, net, layers=["nothing"])
    with pytest.raises(ArgumentError, match="no such linear layer"):
        gb.gradient_l1(loss, nn.ReLU())
    with pytest.raises(DtypeError, match="sequence"):
        gb.gradient_l1(loss, net, layers="7")
    for name, value in (("start", -1), ("warmup", -1), ("every", 0), ("step", 0)):
        with pytest.raises(ArgumentError, match=name):
            gb.gradient_l1(loss, net, **{"step": 1, name: value})


def test_layers_without_a_part_in_the_loss_are_named():
    net, (x, y) = network(), batch()
    net.add_module("unused", nn.Linear(3, 3))
    loss = F.cross_entropy(net[:8](x), y)
    with pytest.raises(ArgumentError, match="'unused' has no part"):
        gb.gradient_l1(loss, net)
    assert gb.gradient_l1(loss, net, layers=["[047]"]).item() > 0
    net[0].weight.requires_grad_(False)
    with pytest.raises(ArgumentError, match="'0': its weight is frozen"):
        gb.gradient_l1(loss, net)


def test_quantized_models_are_refused():
    net, (x, y) = network(), batch()
    gb.quantize_(net, "int8_dynamic")
    loss = F.cross_entropy(net(x), y)
    with pytest.raises(DoubleBackwardError, match="'0' is quantized"):
        gb.gradient_l1(loss, net)


SCRIPT = '''
import os, sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
import gradbits as gb


def work(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    ddp = DDP(net)
    torch.manual_seed(rank)
    for _ in range(2):
        x = torch.randn(6, 4)
        with gb.record_activations(ddp) as seen:
            loss = ddp(x).square().mean()
        net.zero_grad()
        (loss + gb.gradient_l1(loss, ddp, weight=0.1, activation=0.1, recorded=seen)).backward()
        got = [p.grad.clone() for p in net.parameters()]
        with gb.record_activations(net) as seen:
            loss = net(x).square().mean()
        total = loss + gb.gradient_l1(loss, net, weight=0.1, activation=0.1, recorded=seen)
        for own, mean in zip(torch.autograd.grad(total, list(net.parameters())), got):
            dist.all_reduce(own)
            assert torch.allclose(own / 2, mean, rtol=1e-5, atol=1e-7)
    dist.barrier()
    open(f"{path}.{rank}", "w").close()
    os._exit(0)


if __name__ == "__main__":
    mp.spawn(work, args=(sys.argv[1],), nprocs=2)
'''


def test_data_parallel(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "rendezvous")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p.suffix for p in tmp_path.glob("rendezvous.*")} == {".0", ".1"}


def test_what_is_recorded_is_checked():
    net, (x, y) = network(), batch()
    for recorded in ("x", [x], [("0", 1.0)], [(x, "0")], {"0": x}):
        with pytest.raises(DtypeError, match=r"recorded.*record_activations"):
            gb.gradient_l1(F.cross_entropy(net(x), y), net, activation=0.1, recorded=recorded)
    with pytest.raises(ArgumentError, match="requires no gradient"):
        gb.gradient_l1(F.cross_entropy(net(x), y), net, activation=0.1, recorded=[("0", x)])


def test_it_comes_before_backward():
    net, (x, y) = network(), batch()
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    with pytest.raises(ArgumentError, match="loss: went through backward"):
        gb.gradient_l1(loss, net)
