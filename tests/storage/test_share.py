"""Shared weights inside ordinary training: the optimizer sees codebooks, gradients are summed per centroid."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradbits.core.errors import ArgumentError, NothingToQuantizeError
from gradbits.storage import CompressConfig, compress_tensor, load_shared_, prune_, share_, unshare_
from gradbits.storage.share import GatherCentroids, shared_names


class OtherLinear(nn.Linear):
    """A subclass with a forward of its own, as quantized layers are."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight * 2, self.bias)


class OtherConv(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, self.weight + 0.0, self.bias)


class Own(nn.Module):
    """Not a layer of PyTorch at all."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(12, 30))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.table


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OtherConv(1, 6, 3), nn.ReLU(), nn.Flatten(), OtherLinear(96, 12), nn.ReLU(), Own())


def test_gather_and_its_gradient() -> None:
    codebook = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 1, 3], [3, 2, 1]], dtype=torch.uint8)
    assert torch.autograd.gradcheck(lambda book: GatherCentroids.apply(book, index), codebook)
    assert torch.autograd.gradgradcheck(lambda book: GatherCentroids.apply(book, index) ** 2, codebook)
    weight = GatherCentroids.apply(codebook, index)
    assert weight.tolist() == [[0, 1, 3], [3, -2, 1]]
    weight.backward(torch.tensor([[9.0, 1, 2], [4, 8, 16]], dtype=torch.float64))
    assert codebook.grad.tolist() == [17, 8, 6]


def test_any_layer_is_shared_and_trains() -> None:
    net = build()
    prune_(net, sparsity=0.5)
    plain = copy.deepcopy(net)
    names = share_(net, CompressConfig(conv_bits=3, linear_bits=4))
    assert names == shared_names(net) == ["0.weight", "3.weight", "5.table"]
    assert isinstance(net[0], OtherConv)
    assert isinstance(net[3], OtherLinear)
    x = torch.randn(8, 1, 6, 6)
    unshared = copy.deepcopy(net)
    unshare_(unshared)
    assert torch.equal(net(x), unshared(x))

    for model in (net, unshared):
        model(x).square().mean().backward()
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = net.get_submodule(path)
        chain = module.parametrizations[attribute]
        whole = unshared.get_parameter(name).grad.reshape(-1).double()
        index = chain[0].index.reshape(-1).long()
        expected = torch.zeros(chain.original.numel() + 1, dtype=torch.float64).index_add_(0, index, whole)[1:]
        torch.testing.assert_close(chain.original.grad.double(), expected)
        # invariant: over all centroids the gradient is that of all kept weights
        torch.testing.assert_close(chain.original.grad.double().sum(), whole[index > 0].sum())

    sizes = {name: net.get_submodule(name.rpartition(".")[0]) for name in names}
    assert sizes["0.weight"].parametrizations.weight.original.shape == (8,)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    before = {name: layer.parametrizations[name.rpartition(".")[2]].original.clone() for name, layer in sizes.items()}
    losses = []
    for _ in range(20):
        loss = net(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for name, layer in sizes.items():
            weight = getattr(layer, name.rpartition(".")[2])
            assert weight[weight != 0].unique().numel() <= (8 if name == "0.weight" else 16)
            assert (weight[plain.get_parameter(name) == 0] == 0).all()
    assert losses[-1] < losses[0]
    for name, layer in sizes.items():
        assert not torch.equal(before[name], layer.parametrizations[name.rpartition(".")[2]].original)


def test_unshared_weights_are_plain_parameters_and_compress_without_loss() -> None:
    net = build()
    share_(net)
    weight = net[3].weight.detach().clone()
    assert unshare_(net) == ["0.weight", "3.weight", "5.table"]
    assert shared_names(net) == []
    assert set(net.state_dict()) == set(build().state_dict())
    assert isinstance(net[3].weight, nn.Parameter)
    assert torch.equal(net[3].weight, weight)
    _, report = compress_tensor("3.weight", net[3].weight)
    assert (report.max_error, report.coding[:6]) == (0.0, "shared")
    net(torch.randn(2, 1, 6, 6)).sum().backward()
    assert net[3].weight.grad.shape == net[3].weight.shape


def test_resume_of_shared_training() -> None:
    net = build()
    prune_(net, sparsity=0.9)
    share_(net, CompressConfig(linear_bits=3))
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    again = build()
    assert load_shared_(again, torch.load(file, weights_only=True)) == shared_names(net)
    x = torch.randn(3, 1, 6, 6)
    assert torch.equal(net(x), again(x))
    assert [p.shape for p in net.parameters()] == [p.shape for p in again.parameters()]
    with pytest.raises(ArgumentError, match="no such parameter"):
        load_shared_(nn.Sequential(nn.ReLU()), net.state_dict())
    with pytest.raises(ArgumentError, match="does not fit"):
        load_shared_(nn.Sequential(nn.Conv2d(1, 5, 3)), net.state_dict())


def test_codebooks_of_every_size_and_dtype() -> None:
    for bits in (1, 7, 8, 9):
        layer = nn.Linear(64, 64).bfloat16()
        share_(layer, CompressConfig(linear_bits=bits))
        assert layer.weight.dtype == torch.bfloat16
        assert layer.parametrizations.weight.original.numel() <= 1 << bits
        layer(torch.randn(4, 64, dtype=torch.bfloat16)).sum().backward()
        assert layer.parametrizations.weight.original.grad.isfinite().all()


def test_what_cannot_be_shared_is_named() -> None:
    tied = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(ArgumentError, match="are one tied weight"):
        share_(tied)
    assert share_(nn.Sequential(tied, nn.Linear(3, 3)), CompressConfig(overrides=(("0.*", None),))) == ["1.weight"]
    with pytest.raises(NothingToQuantizeError):
        share_(nn.BatchNorm1d(4))
    layer = nn.Linear(4, 4)
    share_(layer)
    with pytest.raises(NothingToQuantizeError):
        share_(layer)
    with pytest.raises(ArgumentError, match="parametrized already"):
        share_(layer, CompressConfig(overrides=(("*", 3),)))
    with pytest.raises(ArgumentError, match="cannot be assigned"):
        layer.weight = torch.zeros(4, 4)
    bad = nn.Linear(4, 4)
    with torch.no_grad():
        bad.weight[0, 0] = float("inf")
    with pytest.raises(ArgumentError, match="NaN or Inf"):
        share_(bad)
