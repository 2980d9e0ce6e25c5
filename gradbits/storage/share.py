"""Weight sharing while a model trains: the optimizer's parameter is the codebook, the layer sees its full weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from gradbits.core.errors import ArgumentError, NothingToQuantizeError
from gradbits.storage.config import CompressConfig
from gradbits.storage.sharing import Shared, WeightValues


class GatherCentroids(torch.autograd.Function):
    """``w_ij = C[I_ij]`` forwards, ``dL/dC_k = sum_ij dL/dw_ij [I_ij = k]`` backwards; index 0 is a constant zero."""

    @staticmethod
    def forward(codebook: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Return the weight, in the shape of ``index``."""
        table = torch.cat([codebook.new_zeros(1), codebook])
        return table.index_select(0, index.reshape(-1).int()).reshape(index.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        """Keep the index: the sum needs nothing else."""
        codebook, index = inputs
        ctx.save_for_backward(index)
        ctx.centroids = codebook.numel()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the sum of the gradients per centroid."""
        (index,) = ctx.saved_tensors
        gradient = gradients[0]
        # a centroid has up to millions of weights: summed in float64, so that the order of the sum does not show
        sums = torch.zeros(ctx.centroids + 1, dtype=torch.float64, device=gradient.device)
        sums = sums.index_add(0, index.reshape(-1).int(), gradient.reshape(-1).double())
        return sums[1:].to(gradient.dtype), None


class SharedWeight(nn.Module):
    """Parametrization that makes a weight from a codebook and a frozen index.

    Args:
        shared: codes and codebook of the weight.
    """

    index: torch.Tensor

    def __init__(self, shared: Shared) -> None:
        super().__init__()
        codes = torch.from_numpy(shared.codes.astype("int16")).reshape(shared.shape)
        self.register_buffer("index", codes.to(torch.uint8) if shared.codebook.numel() < 256 else codes)
        self._codebook: torch.Tensor | None = shared.codebook

    def forward(self, codebook: torch.Tensor) -> torch.Tensor:
        """Return the weight of which ``codebook`` holds the distinct values."""
        weight: torch.Tensor = GatherCentroids.apply(codebook, self.index)
        return weight

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the codebook, once: assigning to a shared weight is refused, because its clusters are frozen."""
        if self._codebook is None:
            raise ArgumentError("weight: is shared, so it cannot be assigned; call unshare_(model) first")
        codebook, self._codebook = self._codebook.to(weight.device), None
        return codebook


def shared_names(model: nn.Module) -> list[str]:
    """Return the names, as they were before ``share_``, of the parameters that are shared now.

    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> _ = share_(model)
    >>> shared_names(model)
    ['0.weight']
    """
    names = []
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for attribute, chain in module.parametrizations.items():
                if any(isinstance(one, SharedWeight) for one in chain):
                    names.append(f"{path}.{attribute}" if path else attribute)
    return names


def share_(model: nn.Module, config: CompressConfig | None = None) -> list[str]:
    """Share the weights of every layer among few centroids, in place, and return the names of the shared parameters.

    From then on ``model.parameters()`` holds the codebooks (``<layer>.parametrizations.<weight>.original``) in place of
    the weights: make the optimizer afterwards and train on. Zeros stay zeros. Any module is served, whatever its class.

    Args:
        model: floating-point parameters are shared as ``config`` says for their names and axes.
        config: bits per kind of layer and overrides; None means 8 bits for convolutions, 5 for linear layers.

    Raises:
        ArgumentError: a weight that holds NaN or Inf, or a weight that is tied to another or parametrized already.
        NothingToQuantizeError: nothing to share.

    >>> model = nn.Linear(64, 64)
    >>> share_(model), model.weight.unique().numel()
    (['weight'], 32)
    >>> [tuple(p.shape) for p in model.parameters()]
    [(64,), (32,)]

    References:
        S. Han, H. Mao, W. J. Dally, Deep Compression, arXiv 1510.00149, section 3.
    """
    config = config or CompressConfig()
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point() and parameter.numel() and config.bits(name, parameter.dim()) is not None:
            places.setdefault(id(parameter), []).append(name)
    chosen = []
    for names in places.values():
        if len(names) > 1:
            raise ArgumentError(f"{names[0]!r} and {names[1]!r} are one tied weight; give one an override of None bits")
        if "parametrizations." in names[0]:
            raise ArgumentError(f"{names[0]!r}: is parametrized already; share it before, or give it None bits")
        chosen.append(names[0])
    if not chosen:
        raise NothingToQuantizeError("model: has no weight that the configuration shares")
    for name in chosen:
        weight = model.get_parameter(name)
        bits = config.bits(name, weight.dim())
        assert bits is not None
        keep = 256 if config.keep_shared and not config.override(name)[0] else 0
        shared = WeightValues(weight, name).share(bits, init=config.init, seed=config.seed, keep=keep)
        _register(model, name, shared)
    return chosen


def unshare_(model: nn.Module) -> list[str]:
    """Turn shared weights back into ordinary parameters with the same values, in place, and return their names.

    >>> model = nn.Linear(64, 64)
    >>> _, names = share_(model), unshare_(model)
    >>> names, model.weight.shape, model.weight.unique().numel()
    (['weight'], torch.Size([64, 64]), 32)
    """
    names = shared_names(model)
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        _own_class(module)
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
    return names


def _own_class(module: nn.Module) -> None:
    # a deep copy has the class of its original, and removing a parametrization takes a property off the class
    old = type(module)
    content = {key: value for key, value in vars(old).items() if key not in {"__dict__", "__weakref__"}}
    module.__class__ = type(old.__name__, old.__bases__, content)


def load_shared_(model: nn.Module, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Share the layers of a fresh model as ``state`` has them, load ``state`` into it, and return the shared names.

    Args:
        model: as it was before ``share_``.
        state: ``state_dict()`` of a model after ``share_``.

    Raises:
        ArgumentError: ``state`` does not fit the model.

    >>> one, other = nn.Linear(8, 8), nn.Linear(8, 8)
    >>> _ = share_(one)
    >>> load_shared_(other, one.state_dict()), bool((one.weight == other.weight).all())
    (['weight'], True)
    """
    marker, end = "parametrizations.", ".original"
    names = []
    for key in state:
        before, found, attribute = key.rpartition(marker)
        if not found or not attribute.endswith(end):
            continue
        index = state.get(f"{before}{marker}{attribute[: -len(end)]}.0.index")
        if index is None:
            continue
        name = before + attribute[: -len(end)]
        try:
            shape = model.get_parameter(name).shape
        except AttributeError as error:
            raise ArgumentError(f"state: {name!r} is shared there, but the model has no such parameter") from error
        if index.shape != shape or int(index.max() if index.numel() else 0) > state[key].numel():
            raise ArgumentError(f"state: the index of {name!r} does not fit a weight of shape {list(shape)}")
        codes = index.reshape(-1).cpu().numpy().astype("uint16")
        _register(model, name, Shared(codes=codes, codebook=state[key].detach().cpu().clone(), shape=shape, exact=True))
        names.append(name)
    model.load_state_dict(state)
    return names


def _register(model: nn.Module, name: str, shared: Shared) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    device = module.get_parameter(attribute).device
    parametrize.register_parametrization(module, attribute, SharedWeight(shared).to(device))
