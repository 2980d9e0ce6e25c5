"""One-dimensional k-means by Lloyd's iteration on sorted values: clusters are intervals, an iteration is k searches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradbits.core.checks import check_choice, check_integer, check_number
from gradbits.core.errors import ArgumentError

INITS = ("linear", "density", "random")
_BLOCK = 128  # values per partial sum: 1/16 of the memory that a full float64 prefix sum would take for float32 values


@dataclass(frozen=True, kw_only=True)
class KMeans:
    """Result of ``lloyd``: ascending ``centroids`` (k,), ``counts`` per cluster (k,), sum of squares, iterations."""

    centroids: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]
    inertia: float
    iterations: int


class SortedValues:
    """Ascending values with block-wise prefix sums, so that the sum of any interval costs one block.

    Args:
        values: finite numbers, shape (n,), in any order; float32 is kept, anything else becomes float64.
    """

    def __init__(self, values: npt.ArrayLike) -> None:
        array = np.asarray(values)
        if array.dtype not in (np.float32, np.float64):
            array = array.astype(np.float64)
        self.values = np.sort(array.reshape(-1))
        size = self.values.size
        if size and not (np.isfinite(self.values[0]) and np.isfinite(self.values[-1])):
            raise ArgumentError("values: must be finite")
        self._padded = np.zeros(-(-size // _BLOCK) * _BLOCK, self.values.dtype)
        self._padded[:size] = self.values
        self.values = self._padded[:size]
        self._blocks = self._padded.reshape(-1, _BLOCK)
        self._prefix = np.concatenate([[0.0], np.cumsum(self._blocks.sum(1, dtype=np.float64))])

    @property
    def size(self) -> int:
        """Number of values."""
        return self.values.size

    def sums_below(self, cuts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return the sum of the first ``cuts[i]`` values for every i."""
        block, rest = np.divmod(cuts, _BLOCK)
        inside = self._blocks[np.minimum(block, max(self._blocks.shape[0] - 1, 0))].astype(np.float64)
        inside[np.arange(_BLOCK) >= rest[:, None]] = 0.0
        return self._prefix[block] + inside.sum(1)

    def distinct(self, limit: int) -> npt.NDArray[np.floating] | None:
        """Return the distinct values if there are at most ``limit``, else None."""
        if self.size == 0:
            return self.values
        steps = self.values[1:] != self.values[:-1]
        if int(np.count_nonzero(steps)) + 1 > limit:
            return None
        return self.values[np.concatenate([[True], steps])]


def initial_centroids(data: SortedValues, k: int, *, init: str = "linear", seed: int = 0) -> npt.NDArray[np.float64]:
    """Return k starting centroids: equally spaced over the range, at equal quantiles, or drawn from the values.

    Args:
        data: the values, at least one.
        k: number of centroids, at least 1.
        init: ``"linear"`` (equal spacing on [min, max]), ``"density"`` (equal counts: the CDF is cut into equal parts)
            or ``"random"`` (k different positions of the sorted values, from ``seed``).
        seed: for ``"random"``.

    >>> initial_centroids(SortedValues([0.0, 1.0, 3.0]), 4).tolist()
    [0.0, 1.0, 2.0, 3.0]

    References:
        S. Han, H. Mao, W. J. Dally, Deep Compression, arXiv 1510.00149, section 3.2.
    """
    check_choice(init, "init", INITS)
    check_integer(k, "k", 1)
    if data.size == 0:
        raise ArgumentError("values: there are none to cluster")
    if init == "linear":
        return np.linspace(float(data.values[0]), float(data.values[-1]), k)
    if init == "density":
        places = ((np.arange(k) + 0.5) / k * data.size).astype(np.int64)
    else:
        generator = np.random.Generator(np.random.PCG64(seed))
        places = np.sort(generator.choice(data.size, min(k, data.size), replace=False, shuffle=False))
        places = np.concatenate([places, np.full(k - places.size, data.size - 1)])
    return data.values[places].astype(np.float64)


def lloyd(
    data: SortedValues,
    centroids: npt.ArrayLike,
    *,
    max_iterations: int = 300,
    tolerance: float = 0.0,
) -> KMeans:
    """Minimize ``sum_k sum_{w in C_k} (w - c_k)^2`` from the given centroids; O(k log n) per iteration.

    A value halfway between two centroids goes to the lower one; an empty cluster keeps its centroid.

    Args:
        data: the values, at least one.
        centroids: starting centroids, shape (k,), in any order.
        max_iterations: at least 1; the iteration also ends when no value changes its cluster.
        tolerance: ends when no centroid moves by more than this part of the range of the values; 0 means: run on.

    Raises:
        ArgumentError: no values, no centroids, or centroids that are not finite.

    >>> result = lloyd(SortedValues([0.0, 1.0, 10.0, 12.0]), [0.0, 12.0])
    >>> result.centroids.tolist(), result.counts.tolist(), result.inertia
    ([0.5, 11.0], [2, 2], 2.5)

    References:
        S. P. Lloyd, Least squares quantization in PCM, 1982.
        S. Han, H. Mao, W. J. Dally, Deep Compression, arXiv 1510.00149, section 3.
    """
    check_integer(max_iterations, "max_iterations", 1)
    check_number(tolerance, "tolerance", 0.0)
    centers = np.sort(np.asarray(centroids, np.float64).reshape(-1))
    if data.size == 0 or centers.size == 0 or not np.isfinite(centers).all():
        raise ArgumentError(f"lloyd: {data.size} values and {centers.size} centroids; both at least 1 and finite")
    spread = float(data.values[-1]) - float(data.values[0])
    cuts = cluster_cuts(data, centers)
    iterations = 0
    while iterations < max_iterations:
        iterations += 1
        sums, counts = np.diff(data.sums_below(cuts)), np.diff(cuts)
        moved = np.where(counts > 0, sums / np.maximum(counts, 1), centers)
        # rounding can put a mean a hair outside its own interval; order must hold
        moved = np.maximum.accumulate(moved)
        shift = float(np.abs(moved - centers).max())
        centers = moved
        new_cuts = cluster_cuts(data, centers)
        if np.array_equal(new_cuts, cuts) or shift <= tolerance * spread * (tolerance > 0):
            cuts = new_cuts
            break
        cuts = new_cuts
    return KMeans(centroids=centers, counts=np.diff(cuts), inertia=inertia(data, centers, cuts), iterations=iterations)


def cluster_cuts(data: SortedValues, centers: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return the k + 1 positions in the sorted values where the clusters of ascending ``centers`` begin and end."""
    middles = (centers[:-1] + centers[1:]) / 2
    if data.values.dtype == np.float32:  # the largest float32 that is not above: same answer, no copy of the values
        near = middles.astype(np.float32)
        middles = np.where(near > middles, np.nextafter(near, np.float32(-np.inf)), near).astype(np.float32)
    inner = np.searchsorted(data.values, middles, side="right")
    return np.concatenate([[0], inner, [data.size]]).astype(np.int64)


def inertia(data: SortedValues, centers: npt.NDArray[np.floating], cuts: npt.NDArray[np.int64]) -> float:
    """Return ``sum_k sum_{w in C_k} (w - c_k)^2`` for the clusters between ``cuts``."""
    total = 0.0
    step = 1 << 20  # bounded temporaries
    for center, begin, end in zip(centers.tolist(), cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        for start in range(begin, end, step):
            residual = data.values[start : min(start + step, end)].astype(np.float64) - center
            total += float(np.einsum("i,i", residual, residual))  # no BLAS: its threads would fight the pool's
    return total
