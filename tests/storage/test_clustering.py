"""Lloyd's iteration on sorted values, assignment to centroids, and the relative index."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gradbits.core.errors import ArgumentError, CorruptDataError, DtypeError
from gradbits.storage.lloyd import SortedValues, initial_centroids, lloyd
from gradbits.storage.relative import GapHistogram, absolute_index, relative_index
from gradbits.storage.sharing import WeightValues, assign, share

CALM = settings(deadline=None)
NUMBERS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=400)


def plain_lloyd(values: np.ndarray, centers: np.ndarray, iterations: int) -> tuple[np.ndarray, list[float]]:
    """The textbook iteration on unsorted values, and its cost before every update."""
    costs = []
    for _ in range(iterations):
        middles = (centers[:-1] + centers[1:]) / 2
        labels = np.searchsorted(middles, values, side="left")
        if middles.size:  # where a value lies on a border, the last bit of a mean decides which side it takes
            assume(np.abs(values[:, None] - middles).min() > 1e-9 * max(np.abs(values).max(), 1e-30))
        costs.append(float(((values - centers[labels]) ** 2).sum()))
        centers = np.array([values[labels == k].mean() if (labels == k).any() else c for k, c in enumerate(centers)])
    return centers, costs


@CALM
@given(NUMBERS, st.integers(1, 20), st.sampled_from(["linear", "density", "random"]))
def test_lloyd_is_the_textbook_iteration(numbers: list[float], k: int, init: str) -> None:
    values = np.array(numbers, np.float64)
    data = SortedValues(values)
    start = initial_centroids(data, k, init=init, seed=3)
    assert start.size == k
    assert (np.diff(start) >= 0).all()
    scale = max(float(np.abs(values).max()), 1e-30)
    for iterations in (1, 2, 5):
        found = lloyd(data, start, max_iterations=iterations)
        reference, costs = plain_lloyd(values, start, found.iterations)
        np.testing.assert_allclose(found.centroids, reference, rtol=0, atol=1e-9 * scale)
        assert (np.diff(costs) <= 1e-9 * scale**2 * values.size).all()
        assert found.counts.sum() == values.size


def test_float32_and_float64_agree_and_blocks_do_not_show() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    one = lloyd(SortedValues(values), initial_centroids(SortedValues(values), 16))
    two = lloyd(SortedValues(values.astype(np.float64)), initial_centroids(SortedValues(values), 16))
    np.testing.assert_allclose(one.centroids, two.centroids, rtol=1e-12)
    data = SortedValues(values)
    cuts = np.arange(1001)
    np.testing.assert_allclose(
        data.sums_below(cuts), np.concatenate([[0], np.cumsum(np.sort(values), dtype=np.float64)]), atol=1e-10
    )


def test_an_empty_cluster_keeps_its_centroid_and_ties_go_down() -> None:
    found = lloyd(SortedValues([0.0, 0.0, 10.0, 10.0]), [0.0, 5.0, 10.0])
    assert found.centroids.tolist() == [0.0, 5.0, 10.0]
    assert found.counts.tolist() == [2, 0, 2]
    assert lloyd(SortedValues([0.0, 1.0, 2.0]), [0.0, 2.0], max_iterations=1).counts.tolist() == [2, 1]
    assert assign(np.array([1.0]), np.array([0.0, 2.0])).tolist() == [1]


def test_enough_centroids_leave_no_error() -> None:
    shared = share(torch.tensor([1.0, 2.0, 2.0, 5.0, 0.0]), 2)
    assert shared.exact
    assert shared.tensor().tolist() == [1.0, 2.0, 2.0, 5.0, 0.0]


def test_the_papers_example() -> None:
    weight = torch.tensor(
        [[2.09, -0.98, 1.48, 0.09], [0.05, -0.14, -1.08, 2.12], [-0.91, 1.92, 0, -1.03], [1.87, 0, 1.53, 1.49]]
    )
    gradient = torch.tensor(
        [[-0.03, -0.01, 0.03, 0.02], [-0.01, 0.01, -0.02, 0.12], [-0.01, 0.02, 0.04, 0.01], [-0.07, -0.02, 0.01, -0.02]]
    )
    values = weight.numpy().reshape(-1).astype(np.float64)  # the example shares its zeros too
    found = lloyd(SortedValues(values), initial_centroids(SortedValues(values), 4))
    np.testing.assert_allclose(found.centroids, [-1, 0, 1.5, 2], atol=1e-6)
    codes = assign(values, found.centroids).astype(int) - 1
    assert codes.reshape(4, 4).tolist() == [[3, 0, 2, 1], [1, 1, 0, 3], [0, 3, 1, 0], [3, 1, 2, 2]]
    sums = np.bincount(codes, weights=gradient.numpy().reshape(-1))
    np.testing.assert_allclose(sums, [-0.03, 0.04, 0.02, 0.04], atol=1e-6)
    np.testing.assert_allclose(found.centroids - sums, [-0.97, -0.04, 1.48, 1.96], atol=1e-6)


@CALM
@given(st.sampled_from([np.float32, np.float64]), st.integers(1, 300), st.floats(1e-20, 1e20), st.integers(0, 2**31))
def test_assignment_is_to_the_nearest(dtype: type, k: int, scale: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    book = np.unique((random.standard_normal(k) ** 3 * scale).astype(dtype))
    values = np.concatenate([(random.standard_normal(500) * scale).astype(dtype), book, (book[:-1] + book[1:]) / 2])
    codes = assign(values.astype(dtype), book).astype(int) - 1
    wide, exact = values.astype(dtype).astype(np.float64), book.astype(np.float64)
    distance = np.abs(wide[:, None] - exact[None, :])
    chosen = distance[np.arange(values.size), codes]
    assert (chosen <= distance.min(1) + 1e-15 * np.abs(wide).max()).all()  # the middle itself is rounded


def test_half_types_keep_their_dtype_and_codebook_size() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        weight = torch.randn(200, 20).to(dtype)
        shared = share(weight, 4)
        assert shared.codebook.dtype == shared.tensor().dtype == dtype
        assert shared.codebook.numel() <= 16
        largest, _ = shared.error(weight)
        assert largest == float((shared.tensor().double() - weight.double()).abs().max())


def test_what_cannot_be_shared_is_named() -> None:
    with pytest.raises(ArgumentError, match="'w': holds NaN"):
        WeightValues(torch.tensor([1.0, float("nan")]), "w")
    with pytest.raises(ArgumentError, match="bits=12"):
        share(torch.ones(3), 12)
    with pytest.raises(ArgumentError, match="bits=True"):
        share(torch.ones(3), True)
    with pytest.raises(ArgumentError, match="init='best'"):
        share(torch.ones(3), 2, init="best")
    with pytest.raises(DtypeError, match="'w'"):
        WeightValues(torch.ones(2, dtype=torch.complex128), "w")
    with pytest.raises(ArgumentError, match="both at least 1"):
        lloyd(SortedValues([]), [1.0])


@CALM
@given(st.sets(st.integers(0, 5000), max_size=60), st.integers(1, 8))
def test_relative_index_round_trip(places: set[int], bits: int) -> None:
    positions = np.array(sorted(places), np.int64)
    gaps, is_real = relative_index(positions, 1 << bits)
    assert gaps.size == 0 or 1 <= gaps.min() <= gaps.max() <= 1 << bits
    assert (gaps[~is_real] == 1 << bits).all()
    assert (absolute_index(gaps, is_real, size=5001) == positions).all()
    counts, fillers = GapHistogram(positions).symbols(bits)
    assert counts.tolist() == np.bincount(gaps - 1, minlength=1 << bits).tolist()
    assert fillers == np.count_nonzero(~is_real)


def test_positions_beyond_the_tensor_are_refused() -> None:
    with pytest.raises(CorruptDataError, match="position 9 in a tensor of 9"):
        absolute_index([10], [True], size=9)
    with pytest.raises(CorruptDataError, match="2 gaps for 1"):
        absolute_index([1, 1], [True])
    with pytest.raises(CorruptDataError, match="not at least 1"):
        absolute_index([0], [True])
    with pytest.raises(ArgumentError, match="ascend"):
        relative_index([3, 3], 8)
    with pytest.raises(ArgumentError, match="origin=0"):
        relative_index([0], 8, origin=0)
