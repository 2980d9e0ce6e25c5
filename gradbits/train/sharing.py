"""Weight sharing as a companion of a training: clusters found once, their centroids trained to the end."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from gradbits.core.checks import check_bits, check_integer
from gradbits.core.errors import ArgumentError
from gradbits.storage.prune import prunable
from gradbits.storage.sharing import WeightValues

SHARE_BITS = (1, 8)  # of a codebook; up to 256 values are recognised as shared when the model is compressed
QUANTIZER_STATES = "*quantizers.*"  # names of what quantizers remember: no weights, whatever their shape


class Clusters:
    """Which weights of one tensor have one value: 0 is an exact zero, i the i-th centroid.

    Args:
        codes: int16, in the shape of the tensor.
    """

    def __init__(self, codes: torch.Tensor) -> None:
        self.codes = codes
        self._flat = codes.reshape(-1).int()
        self._counts = torch.bincount(self._flat)
        places = torch.arange(self._flat.numel(), device=codes.device)
        self._first = places.new_zeros(self._counts.numel()).scatter_reduce_(
            0, self._flat.long(), places, "amin", include_self=False
        )

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return ``values`` with each one replaced by the mean over its cluster; 0 where the weight is zero."""
        # summed in float64, so that the order of the sum does not show
        sums = torch.zeros(self._counts.numel(), dtype=torch.float64, device=values.device)
        sums = sums.index_add(0, self._flat, values.reshape(-1).double())
        return self._spread((sums / self._counts.clamp_min(1)).to(values.dtype))

    def project(self, values: torch.Tensor) -> torch.Tensor:
        """Return ``values`` with each one replaced by the first of its cluster; 0 where the weight is zero."""
        return self._spread(values.reshape(-1)[self._first])

    def _spread(self, table: torch.Tensor) -> torch.Tensor:
        if table.numel():
            table[0] = 0.0
        return table.index_select(0, self._flat).view(self.codes.shape)


class ShareSchedule:
    r"""Shares the weights of every layer among few centroids after step t, then trains the centroids.

    .. math:: \bar g_{ij} = \frac{1}{n_k} \sum_{I_{pq} = k} \frac{\partial L}{\partial w_{pq}}, \qquad k = I_{ij}

    The weights remain the parameters of the model and of the optimizer, so names, shapes and states stay what they
    were. At step t each weight becomes the centroid of its cluster (k-means), and the optimizer's state its mean over
    the cluster. From then on each weight has the gradient of its centroid divided by the count n_k of its weights:
    the orthogonal projection of the gradient, for which the learning rate of unshared weights fits. An optimizer that
    treats elements alike (SGD, Adam, AdamW) then moves all weights of a cluster as the one parameter that they are.
    Weights that are zero at step t stay zero.

    Args:
        model: its floats of two axes or more are shared, each tensor with a codebook of its own.
        optimizer: of these parameters.
        bits: b; a codebook has at most 2^b values.
        begin: t, counted as in ``after_step``; a tensor that holds NaN or Inf then is shared when it no longer does.

    Raises:
        ArgumentError: a value out of range.
        NothingToQuantizeError: no parameter to share.

    >>> model = nn.Linear(16, 16)
    >>> schedule = ShareSchedule(model, torch.optim.SGD(model.parameters(), lr=0.1), bits=3, begin=2)
    >>> schedule.after_step(1); model.weight.unique().numel() > 8
    True
    >>> schedule.after_step(2); model.weight.unique().numel()
    8

    References:
        S. Han, H. Mao, W. J. Dally, Deep Compression, arXiv 1510.00149, section 3.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, bits: int, begin: int) -> None:
        self.bits = check_bits(bits, "share", *SHARE_BITS)
        self.begin = check_integer(begin, "begin", 0)
        self.optimizer = optimizer
        self._weights = {
            name: module.get_parameter(attribute)
            for name, (module, attribute) in prunable(model, (QUANTIZER_STATES,)).items()
        }
        self._clusters: dict[str, Clusters] = {}
        for name, weight in self._weights.items():
            if weight.requires_grad:
                weight.register_hook(partial(self._centroid_gradient, name))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Share what is due, and keep what is shared at one value per cluster; ``step`` counts optimizer steps."""
        for name, weight in self._weights.items():
            if name in self._clusters:
                # equal numbers, but a vectorised optimizer may round the last elements of a tensor another way
                weight.copy_(self._clusters[name].project(weight))
            elif step >= self.begin and weight.numel() and bool(torch.isfinite(weight).all()):
                self._share(name, weight)

    def state_dict(self) -> dict[str, Any]:
        """Return the clusters of what is shared; the centroids are the weights themselves."""
        return {"codes": {name: clusters.codes.clone() for name, clusters in self._clusters.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned.

        Raises:
            ArgumentError: other layers, shapes or values than in this model.
        """
        found: dict[str, Clusters] = {}
        for name, codes in state["codes"].items():
            weight = self._weights.get(name)
            if weight is None or codes.shape != weight.shape or codes.dtype != torch.int16:
                raise ArgumentError(f"state: codes of {name!r} do not fit a weight of this model")
            if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) <= 1 << self.bits:
                raise ArgumentError(f"state: codes of {name!r} must be from 0 to {1 << self.bits}")
            found[name] = Clusters(codes.to(weight.device).clone())
        self._clusters = found

    def _share(self, name: str, weight: torch.Tensor) -> None:
        shared = WeightValues(weight, name).share(self.bits)
        codes = torch.from_numpy(shared.codes.astype("int16")).reshape(shared.shape)
        clusters = self._clusters[name] = Clusters(codes.to(weight.device))
        weight.copy_(shared.tensor())
        for value in self.optimizer.state[weight].values():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                value.copy_(clusters.mean(value))

    def _centroid_gradient(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        clusters = self._clusters.get(name)
        return gradient if clusters is None else clusters.mean(gradient)
