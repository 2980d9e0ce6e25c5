"""Positions of the non-zeros as distances: a distance too long for its bits is broken by filler zeros."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gradbits.core.checks import check_integer
from gradbits.core.errors import ArgumentError, CorruptDataError

Positions = npt.NDArray[np.int64]


def relative_index(
    positions: npt.ArrayLike, max_gap: int, *, origin: int = -1
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return (gaps, is_real): ``gap_i = p_i - p_(i-1)``, broken by fillers of length ``max_gap`` where it is longer.

    With w index bits the gaps 1 to ``max_gap = 2^w`` are stored as ``gap - 1``.

    Args:
        positions: ascending, all above ``origin``, shape (n,).
        max_gap: longest gap that has a code, at least 1.
        origin: where the first gap is measured from; -1 lets position 0 have gap 1.

    Returns:
        gaps in [1, max_gap] and, for each, whether it ends at a non-zero (True) or at a filler zero (False).

    Raises:
        ArgumentError: positions that do not ascend or that are not above ``origin``.

    >>> gaps, is_real = relative_index([1, 4, 15], 8, origin=0)
    >>> gaps.tolist(), is_real.tolist()
    ([1, 3, 8, 3], [True, True, False, True])

    References:
        S. Han, H. Mao, W. J. Dally, Deep Compression, arXiv 1510.00149, section 2.
    """
    check_integer(max_gap, "max_gap", 1)
    places = np.asarray(positions, np.int64)
    steps = np.diff(places, prepend=origin)
    if places.size and int(steps.min()) < 1:
        raise ArgumentError(f"positions: must ascend and be above origin={origin}")
    fillers = (steps - 1) // max_gap
    ends = np.cumsum(fillers + 1) - 1
    gaps = np.full(int(ends[-1]) + 1 if places.size else 0, max_gap, np.int64)
    gaps[ends] = steps - fillers * max_gap
    is_real = np.zeros(gaps.size, bool)
    is_real[ends] = True
    return gaps, is_real


def absolute_index(
    gaps: npt.ArrayLike, is_real: npt.ArrayLike, *, size: int | None = None, origin: int = -1
) -> Positions:
    """Return the positions that ``relative_index`` was given.

    Args:
        gaps: distances of at least 1, shape (m,).
        is_real: False where the distance ends at a filler zero, shape (m,).
        size: number of places; positions must lie below it.
        origin: as for ``relative_index``.

    Raises:
        CorruptDataError: a position at or beyond ``size``, or gaps and marks of different number.

    >>> absolute_index([1, 3, 8, 3], [True, True, False, True], origin=0).tolist()
    [1, 4, 15]
    """
    steps, real = np.asarray(gaps, np.int64), np.asarray(is_real, bool)
    if steps.shape != real.shape:
        raise CorruptDataError(f"relative index: {steps.size} gaps for {real.size} values")
    if steps.size and int(steps.min()) < 1:
        raise CorruptDataError(f"relative index: gap {int(steps.min())} is not at least 1")
    places = np.cumsum(steps) + origin
    if size is not None and places.size and int(places[-1]) >= size:
        raise CorruptDataError(f"relative index: position {int(places[-1])} in a tensor of {size} elements")
    return places[real]


class GapHistogram:
    """How often each gap occurs, from which the cost of any number of index bits follows without coding anything."""

    def __init__(self, positions: Positions) -> None:
        steps = np.diff(positions, prepend=-1)
        if steps.size and int(steps.max()) < 1 << 20:
            occurrences = np.bincount(steps)
            self.gaps = np.flatnonzero(occurrences)
            self.counts = occurrences[self.gaps]
        else:
            self.gaps, self.counts = np.unique(steps, return_counts=True)

    def symbols(self, bits: int) -> tuple[npt.NDArray[np.int64], int]:
        """Return (counts of the symbols ``gap - 1`` with ``2**bits`` symbols, number of fillers among them).

        >>> GapHistogram(np.array([0, 3, 14])).symbols(3)
        (array([1, 0, 2, 0, 0, 0, 0, 1]), 1)
        """
        longest = 1 << bits
        fillers_each = (self.gaps - 1) // longest
        fillers = int(np.dot(fillers_each, self.counts))
        last = self.gaps - fillers_each * longest - 1
        counts = np.zeros(longest, np.int64)
        np.add.at(counts, last, self.counts)
        counts[-1] += fillers
        return counts, fillers
