"""Activation checkpointing: the same gradients bit for bit, and no state that moves twice."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradbits as gb

X = torch.randn(6, 12, generator=torch.Generator().manual_seed(2))
RECIPES = {
    **{name: gb.recipe(name) for name in gb.recipes()},
    "running ranges": gb.recipe("unified_int8", activation_range="ema"),
    "own draws": gb.recipe("int8_dynamic", share_gradient=False, rows="row"),
}


class Net(nn.Module):
    """Three blocks with dropout, and a head outside of the checkpointed part."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 12), nn.GELU(), nn.Dropout(0.2), nn.Linear(12, 12)) for _ in range(3)
        )
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor, mode: str) -> torch.Tensor:
        for block in self.blocks:
            again = mode == "reentrant"
            x = x + (block(x) if mode == "off" else checkpoint(block, x, use_reentrant=again))
        return self.head(x)


def steps(net: nn.Module, mode: str, count: int = 3) -> list[list[torch.Tensor]]:
    torch.manual_seed(5)
    opt, found = torch.optim.SGD(net.parameters(), lr=0.05), []
    for step in range(count):
        x = (X * (1 + step)).requires_grad_()
        opt.zero_grad()
        net(x, mode).square().mean().backward()
        found.append([x.grad.clone(), *(p.grad.clone() for p in net.parameters()), *(b.clone() for b in net.buffers())])
        opt.step()
    return found


@pytest.mark.parametrize("mode", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", RECIPES)
def test_gradients_and_states_are_those_of_the_plain_run(name, mode):
    torch.manual_seed(0)
    net = Net()
    recipe = RECIPES[name].with_overrides({"keep_float": ()})
    # the whole model depends on a text, so it has no graph; its parts have one each
    for part in [net] if recipe.qat is None else [*net.blocks, nn.Sequential(net.head)]:
        gb.quantize_(part, recipe)
    twin = copy.deepcopy(net)
    for got, want in zip(steps(net, mode), steps(twin, "off"), strict=True):
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def test_the_noise_differs_between_steps():
    torch.manual_seed(0)
    net = Net()
    gb.quantize_(net, "int8_dynamic")
    net.eval()  # no dropout: only rounding noise is left
    x = X.clone().requires_grad_()
    a, b = (torch.autograd.grad(net(x, "not reentrant").sum(), x)[0] for _ in range(2))
    assert not torch.equal(a, b)
