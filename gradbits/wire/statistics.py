r"""What a rank must tell the others about its normalized gradients so that all find the same levels.

Both forms are vectors that add up over ranks and over steps. The mixture sorts buckets by mean and deviation of their
normalized coordinates into bins and adds up, per bin, :math:`\sum_n\gamma_n\,(1, \mu_n, \sigma_n^2, \mu_n^2)`; buckets
of one bin become one component of the density, with their mean and variance. A bin is 20 % wide in :math:`\sigma`. The
norm-less form has three numbers, :math:`N, \sum r, \sum_n (B_n-1)\,\sigma_n^2`, and gives one component.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gradbits.kernels.dispatch import Request, run
from gradbits.kernels.quantize import CHUNK
from gradbits.wire.density import SIGMA_FLOOR, Density

_SIGMA_BINS = 64  # from SIGMA_FLOOR to 1
_MEAN_EDGES = (-10.0, -3.0, -1.0, -0.25, 0.25, 1.0, 3.0, 10.0)  # of mu / sigma
_BINS = _SIGMA_BINS * (len(_MEAN_EDGES) + 1)
_PER_BIN = 4
MIXTURE, SINGLE = _BINS * _PER_BIN, 3  # lengths of the two forms


@dataclass(frozen=True)
class Moments:
    """Norm, and mean and unbiased deviation of the normalized coordinates, of every bucket that has them; float64.

    Args:
        norms, means, sigmas: per bucket.
        counts: values per bucket.
    """

    norms: torch.Tensor
    means: torch.Tensor
    sigmas: torch.Tensor
    counts: torch.Tensor


def bucket_moments(x: torch.Tensor, bucket: int, order: float, ignore_small: bool = False) -> Moments:
    """Return the moments of the buckets of ``x``; buckets of norm 0 or of one value have none.

    Args:
        x: flat float32 values, finite.
        bucket: values per bucket.
        order: of the norm, 2 or infinity.
        ignore_small: whether a short last bucket is left out.

    >>> moments = bucket_moments(torch.tensor([3.0, 4.0, 0.0, 0.0]), 2, 2.0)
    >>> moments.norms.tolist(), moments.means.tolist()
    ([5.0], [0.7])
    """
    if ignore_small:
        x = x[: x.numel() // bucket * bucket]
    norms = run("bucket_norms", Request(x.device.type), "auto", x, bucket, order).double()
    whole = x.numel() // bucket
    pieces = list(x[: whole * bucket].view(-1, bucket).split(max(1, CHUNK // bucket))) if whole else []
    if whole < norms.numel():
        pieces.append(x[whole * bucket :].view(1, -1))
    means, sigmas, counts = [norms.new_zeros(0)], [norms.new_zeros(0)], [norms.new_zeros(0)]
    for rows in pieces:
        wide = rows.double()
        means.append(wide.mean(1))
        sigmas.append(wide.std(1) if rows.shape[1] > 1 else torch.zeros_like(means[-1]))
        counts.append(torch.full_like(means[-1], rows.shape[1]))
    mean, sigma, count = torch.cat(means), torch.cat(sigmas), torch.cat(counts)
    kept = (norms > 0) & (count > 1)
    norms = norms[kept]
    return Moments(norms, mean[kept] / norms, sigma[kept] / norms, count[kept])


def mixture_statistics(moments: Moments, norm_power: int) -> torch.Tensor:
    r"""Return the mixture's vector, buckets weighted with :math:`\gamma_n = \|v_n\|^k`, k the ``norm_power``."""
    weight = moments.norms**norm_power
    sigma = moments.sigmas.clamp(SIGMA_FLOOR, 1.0)
    row = (torch.log(sigma / SIGMA_FLOOR) / math.log(1 / SIGMA_FLOOR) * _SIGMA_BINS).long().clamp(0, _SIGMA_BINS - 1)
    edges = torch.tensor(_MEAN_EDGES, dtype=torch.float64, device=sigma.device)
    column = torch.bucketize(moments.means / sigma, edges)
    found = torch.zeros(_BINS, _PER_BIN, dtype=torch.float64, device=sigma.device)
    mean, variance = moments.means, moments.sigmas**2
    rows = torch.stack([torch.ones_like(mean), mean, variance, mean**2], 1) * weight[:, None]
    return found.index_add_(0, row * (len(_MEAN_EDGES) + 1) + column, rows).view(-1)


def single_statistics(moments: Moments) -> torch.Tensor:
    """Return the norm-less form's vector."""
    total = (moments.counts * moments.means).sum()
    return torch.stack([moments.counts.sum(), total, ((moments.counts - 1) * moments.sigmas**2).sum()])


def density_of(statistics: torch.Tensor) -> Density | None:
    """Return the density on [-1, 1] that a vector of either form describes; None where it holds nothing.

    >>> moments = bucket_moments(torch.tensor([1.0, -1.0, 2.0, 0.5]), 4, 2.0)
    >>> one, mixed = (density_of(s) for s in (single_statistics(moments), mixture_statistics(moments, 2)))
    >>> bool((one.mu == mixed.mu).all()), one.sigma.numel()
    (True, 1)
    """
    statistics = statistics.cpu()
    if statistics.numel() == SINGLE:
        count, total, squares = statistics.unbind()
        if not bool(count > 0):
            return None
        return Density.of(total / count, (squares / count).clamp(min=0).sqrt(), torch.ones(1))
    bins = statistics.view(_BINS, _PER_BIN)
    weight, mean, variance, square = bins[bins[:, 0] > 0].unbind(1)
    if not weight.numel():
        return None
    mu = mean / weight
    spread = variance / weight + (square / weight - mu**2).clamp(min=0)
    return Density.of(mu, spread.clamp(min=0).sqrt(), weight)
