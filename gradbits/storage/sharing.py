"""Weight sharing of one tensor: non-zero weights become indices into a codebook of k centroids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gradbits.core.checks import check_bits, check_choice, check_integer
from gradbits.core.errors import ArgumentError
from gradbits.storage.dtypes import dtype_name, from_bytes, to_bytes, to_words
from gradbits.storage.lloyd import INITS, SortedValues, cluster_cuts, inertia, initial_centroids, lloyd

MAX_BITS = 11  # 2**11 centroids, the zero and spare symbols stay below the largest Huffman alphabet
REUSE = 4  # a tensor whose values occur this often on average was shared before
_ASSIGN_BLOCK = 1 << 18  # values assigned at a time, so that temporaries stay in cache
_BINS = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A tensor as codes: 0 is an exact zero, i is centroid ``codebook[i - 1]``.

    Attributes:
        codes: uint16, shape (numel,), row-major.
        codebook: shape (k,), in the tensor's own dtype, ascending.
        shape: of the tensor.
        exact: the tensor held no more than k distinct non-zero values, so nothing was lost.
    """

    codes: npt.NDArray[np.uint16]
    codebook: torch.Tensor
    shape: tuple[int, ...]
    exact: bool

    def counts(self) -> npt.NDArray[np.int64]:
        """Return how often each code occurs, shape (k + 1,)."""
        return np.bincount(self.codes, minlength=self.codebook.numel() + 1)

    def tensor(self) -> torch.Tensor:
        """Return the tensor with every weight replaced by its centroid."""
        table = torch.cat([self.codebook.new_zeros(1), self.codebook])
        name = dtype_name(table, "codebook")
        return from_bytes(to_words(table).take(self.codes), name, self.shape)

    def error(self, original: torch.Tensor) -> tuple[float, float]:
        """Return (largest, root-mean-square) absolute difference to ``original``."""
        return difference(self.tensor(), original)


def difference(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Return (largest, root-mean-square) absolute difference of two tensors of one shape; 0 for empty ones.

    >>> difference(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    (2.0, 1.4142135623730951)
    """
    largest, squares = 0.0, 0.0
    for a, b in zip(_blocks(one), _blocks(other), strict=True):
        gap = a - b
        largest = max(largest, float(gap.max()), -float(gap.min()))
        if largest:  # scaled, so that the squares of small or large weights neither vanish nor overflow
            gap = gap / gap.dtype.type(largest)
            squares += float(np.einsum("i,i", gap, gap, dtype=np.float64)) * largest**2
    return largest, (squares / max(one.numel(), 1)) ** 0.5


def all_finite(tensor: torch.Tensor) -> bool:
    """Return whether a floating-point tensor holds neither NaN nor Inf.

    >>> all_finite(torch.tensor([1.0, float("inf")]))
    False
    """
    return all(bool(np.isfinite(block).all()) for block in _blocks(tensor))


def _blocks(tensor: torch.Tensor) -> Iterator[npt.NDArray[np.floating]]:
    """Values in pieces that fit the cache. numpy, and no BLAS in it: both would start threads beside the pool's."""
    flat = tensor.detach().cpu().reshape(-1)
    wide = torch.float64 if flat.dtype == torch.float64 else torch.float32
    for start in range(0, flat.numel(), _ASSIGN_BLOCK):
        yield flat[start : start + _ASSIGN_BLOCK].to(wide).numpy()


class WeightValues:
    """The non-zero weights of one tensor, sorted once, from which codebooks of any size can be made.

    Args:
        tensor: float16, bfloat16, float32 or float64, finite, any shape.
        name: for messages.

    Raises:
        ArgumentError: NaN or Inf among the weights.
    """

    def __init__(self, tensor: torch.Tensor, name: str = "tensor") -> None:
        dtype_name(tensor, name)
        self.dtype, self.shape = tensor.dtype, tuple(tensor.shape)
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        flat = tensor.detach().cpu().reshape(-1).to(wide).contiguous()
        self.flat = to_bytes(flat).view(np.float64 if wide == torch.float64 else np.float32)
        self.mask = self.flat != 0
        self.nonzero = int(np.count_nonzero(self.mask))
        dense = self.nonzero == self.flat.size
        try:
            self.sorted = SortedValues(self.flat if dense else self.flat[self.mask])
        except ArgumentError as error:
            raise ArgumentError(f"tensor {name!r}: holds NaN or Inf; weights to be shared are finite") from error

    def share(
        self, bits: int, *, init: str = "linear", seed: int = 0, max_iterations: int = 300, keep: int = 0
    ) -> Shared:
        """Return the tensor shared among at most ``2**bits`` centroids; see ``share``."""
        codebook, exact = self.codebook(bits, init=init, seed=seed, max_iterations=max_iterations, keep=keep)
        codes = assign(self.flat, codebook, self.mask if self.nonzero < self.flat.size else None)
        return Shared(codes=codes, codebook=self._narrow(codebook), shape=self.shape, exact=exact)

    def codebook(
        self, bits: int, *, init: str = "linear", seed: int = 0, max_iterations: int = 300, keep: int = 0
    ) -> tuple[npt.NDArray[np.floating], bool]:
        """Return (centroids as the tensor's dtype can hold them, whether they are the weights' own values)."""
        check_bits(bits, "bits", 1, MAX_BITS)
        check_choice(init, "init", INITS)
        check_integer(keep, "keep", 0, 1 << MAX_BITS)
        own = self.sorted.distinct(max(1 << bits, min(keep, self.nonzero // REUSE)))
        if own is not None:
            return own, True
        start = initial_centroids(self.sorted, 1 << bits, init=init, seed=seed)
        centroids = torch.from_numpy(lloyd(self.sorted, start, max_iterations=max_iterations).centroids)
        held = self._widen(centroids.to(self.dtype))
        return np.unique(held), False

    def cost(self, codebook: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.int64], float]:
        """Return (weights per centroid, sum of squared errors) without making the codes."""
        centers = codebook.astype(np.float64)
        cuts = cluster_cuts(self.sorted, centers)
        return np.diff(cuts), inertia(self.sorted, centers, cuts)

    def _widen(self, values: torch.Tensor) -> npt.NDArray[np.floating]:
        return values.to(torch.float64 if self.flat.dtype == np.float64 else torch.float32).numpy()

    def _narrow(self, values: npt.NDArray[np.floating]) -> torch.Tensor:
        return torch.from_numpy(values.copy()).to(self.dtype)


def share(
    tensor: torch.Tensor,
    bits: int,
    *,
    init: str = "linear",
    seed: int = 0,
    max_iterations: int = 300,
    keep: int = 0,
) -> Shared:
    """Return ``tensor`` with its non-zero weights shared among ``k <= 2^b`` centroids: argmin ``sum_i |w - c_i|^2``.

    A tensor with at most ``2**bits`` distinct non-zero values keeps exactly these; so does one with at most ``keep``,
    if each occurs four times on average. Zeros stay zeros.

    Args:
        tensor: float16, bfloat16, float32 or float64, finite, any shape.
        bits: b, 1 to 11.
        init: ``"linear"``, ``"density"`` or ``"random"``.
        seed: for ``"random"``.
        max_iterations: of Lloyd's iteration.
        keep: number of distinct values that counts as shared already.

    Raises:
        ArgumentError: bits or init not legal, NaN or Inf in the tensor.
        DtypeError: not a floating-point tensor that can be stored.

    >>> shared = share(torch.tensor([[0.0, 1.0], [1.1, 5.0]]), 1)
    >>> shared.codes.tolist(), shared.codebook.tolist()
    ([0, 1, 1, 2], [1.0499999523162842, 5.0])

    References:
        S. Han, H. Mao, W. J. Dally, Deep Compression, arXiv 1510.00149, section 3.
    """
    return WeightValues(tensor).share(bits, init=init, seed=seed, max_iterations=max_iterations, keep=keep)


def assign(
    values: npt.NDArray[np.floating], codebook: npt.NDArray[np.floating], mask: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.uint16]:
    """Return for each value the number (from 1) of its nearest centroid, the lower at a tie; 0 where ``mask`` is False.

    Args:
        values: shape (n,).
        codebook: ascending, of the same dtype, shape (k,).
        mask: where a code is wanted, shape (n,); None means everywhere.

    >>> assign(np.array([0.0, 0.9, 2.0]), np.array([0.0, 1.0])).tolist()
    [1, 2, 2]
    """
    codes = np.zeros(values.size, np.uint16)
    if codebook.size == 0:
        return codes
    wide = codebook.astype(np.float64)
    middles = (wide[:-1] + wide[1:]) / 2
    if values.dtype == np.float32:
        near = middles.astype(np.float32)
        middles = np.where(near > middles, np.nextafter(near, np.float32(-np.inf)), near).astype(np.float32)
    finder = _Finder(middles)
    for start in range(0, values.size, _ASSIGN_BLOCK):
        block = slice(start, start + _ASSIGN_BLOCK)
        codes[block] = finder(values[block])
    if mask is not None:
        codes *= mask
    return codes


class _Finder:
    """Counts the middles below each value: by a table of equal bins if no bin holds two of them, else by search."""

    def __init__(self, middles: npt.NDArray[np.floating]) -> None:
        self.middles = middles
        self.table: npt.NDArray[np.uint16] | None = None
        if middles.size < 2:
            return
        self.low, span = middles[0], float(middles[-1]) - float(middles[0])
        self.scale = middles.dtype.type((_BINS - 2) / span) if span > 0 else middles.dtype.type(np.inf)
        if not np.isfinite(self.scale) or not np.isfinite(span):
            return
        bins = self._bins(middles)
        if np.unique(bins).size == middles.size:
            below = np.bincount(bins, minlength=_BINS)
            self.table = (np.cumsum(below) - below).astype(np.uint16)
            self.next = np.append(middles, middles.dtype.type(np.inf))

    def _bins(self, values: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
        # ascending in the value, rounding included, so a value in a lower bin than a middle is below it
        return np.clip((values - self.low) * self.scale + 1, 0, _BINS - 1).astype(np.int64)

    def __call__(self, values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint16]:
        if self.table is None:
            return (np.searchsorted(self.middles, values, side="left") + 1).astype(np.uint16)
        found = self.table[self._bins(values)]
        return found + (values > self.next[found]) + np.uint16(1)
