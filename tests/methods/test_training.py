"""What every recipe promises of a whole training: it learns, goes on where it was, and takes float checkpoints."""

from __future__ import annotations

import io
from functools import cache

import torch
import torch.nn.functional as F
from table import Method, each_method, same
from torch import nn

import gradbits as gb
from gradbits.nn.quantized import Quantized

STEPS = 25


class Net(nn.Module):
    """A convolution, attention-like product and linear layers: something of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.product = gb.nn.Matmul()
        self.hidden, self.head = nn.Linear(64, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = x.flatten(2)
        x = x + self.product((x @ x.mT).softmax(-1), x)
        return self.head(F.relu(self.hidden(x[..., :8].flatten(1))))


@cache
def data() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(32) % 4
    prototypes = torch.randn(4, 1, 8, 8, generator=rng)
    return prototypes[y] + 0.3 * torch.randn(32, 1, 8, 8, generator=rng), y


def network(method: Method) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    net = Net()
    gb.quantize_(net, gb.recipe(method.name, **method.options))
    opt = torch.optim.SGD(net.parameters(), lr=method.rate, momentum=0.9)
    gb.optim.attach_companion_(opt, net)
    return net, opt


def step(net: nn.Module, opt: torch.optim.Optimizer) -> float:
    x, y = data()
    loss = F.cross_entropy(net(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    return float(loss.detach())


@each_method
def test_a_small_network_learns(method):
    net, opt = network(method)
    losses = [step(net, opt) for _ in range(STEPS)]
    assert losses[-1] < method.loss * losses[0]
    assert any(isinstance(m, Quantized) for m in net.modules())


@each_method
def test_a_resumed_run_is_bit_identical(method):
    net, opt = network(method)
    for _ in range(3):
        step(net, opt)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "opt": opt.state_dict(), "rng": torch.get_rng_state()}, file)
    losses = [step(net, opt) for _ in range(2)]
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh, fresh_opt = network(method)
    fresh.load_state_dict(saved["net"], strict=True)
    fresh_opt.load_state_dict(saved["opt"])
    torch.set_rng_state(saved["rng"])
    assert [step(fresh, fresh_opt) for _ in range(2)] == losses
    assert same(dict(fresh.state_dict()), dict(net.state_dict()))


@each_method
def test_a_float_checkpoint_loads_strictly(method):
    float_net = Net()
    net, _ = network(method)
    result = net.load_state_dict(float_net.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for name, value in float_net.named_parameters():
        assert torch.equal(net.get_parameter(name), value)
