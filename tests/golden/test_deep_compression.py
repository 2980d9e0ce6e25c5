"""Deep Compression against reference data: Huffman codes, relative index, k-means, centroid gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from gradbits.kernels.huffman import canonical_codes, code_lengths, decode, encode, encoded_bits
from gradbits.storage.lloyd import SortedValues, initial_centroids, lloyd
from gradbits.storage.relative import GapHistogram, absolute_index, relative_index
from gradbits.storage.share import GatherCentroids
from gradbits.storage.sharing import assign

Golden = Callable[[str], dict[str, torch.Tensor]]


def arrays(golden: Golden) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in golden("deep_compression.npz").items()}


def bases(data: dict[str, np.ndarray], start: str, end: str) -> list[str]:
    found = [name[: -len(end)] for name in data if name.startswith(start) and name.endswith(end)]
    assert found, f"no array {start}...{end}"
    return found


def test_huffman_codes(golden: Golden) -> None:
    data = arrays(golden)
    for case in bases(data, "huff/", "/freq"):
        counts, reference = data[f"{case}/freq"], data[f"{case}/lengths"]
        lengths = code_lengths(counts)
        used = lengths[lengths > 0].astype(float)
        limited = int(reference.max()) > 15
        if not limited:
            assert encoded_bits(counts, lengths) == int(data[f"{case}/total_bits"]), case
            assert abs(encoded_bits(counts, lengths) / counts.sum() - float(data[f"{case}/avg_bits"])) < 1e-9, case
            assert (canonical_codes(reference) == data[f"{case}/canonical_codes"]).all(), case
        assert used.size == 1 or (2.0**-used).sum() == 1.0, case
        assert ((lengths > 0) == (reference > 0)).all(), case
        if counts.sum() < 10**6:
            symbols = np.repeat(np.arange(counts.size), counts)
            symbols = np.random.default_rng(0).permutation(symbols)
            stream = encode(symbols, lengths)
            assert (decode(stream, lengths) == symbols).all(), case
            one_used = np.count_nonzero(counts) == 1
            if not limited and not one_used and f"{case}/official_data_bytes" in data:
                # theirs has one byte of header and no chunks
                official = int(data[f"{case}/official_data_bytes"]) - 1
                assert official <= len(stream.payload) <= official + stream.sizes.size, case


def test_relative_index(golden: Golden) -> None:
    data = arrays(golden)
    for case in bases(data, "relidx/", "/nonzero_pos"):
        positions, size = data[f"{case}/nonzero_pos"], int(data[f"{case}/n"])
        for name in bases(data, f"{case}/maxgap", "/gaps"):
            longest = int(name.rpartition("maxgap")[2])
            gaps, is_real = relative_index(positions, longest, origin=0)
            assert (gaps == data[f"{name}/gaps"]).all(), name
            assert (is_real == data[f"{name}/is_real"].astype(bool)).all(), name
            assert (absolute_index(gaps, is_real, size=size, origin=0) == positions).all(), name
            if longest & (longest - 1) == 0 and longest > 1:
                shifted, _ = relative_index(positions, longest)
                counts, fillers = GapHistogram(positions).symbols(longest.bit_length() - 1)
                assert (counts == np.bincount(shifted - 1, minlength=longest)).all(), name
                assert fillers == shifted.size - positions.size, name


def test_kmeans(golden: Golden) -> None:
    data = arrays(golden)
    for case in bases(data, "kmeans/", "/lloyd_centroids"):
        weights = data[f"{case.rpartition('/')[0]}/w"]
        reference = data[f"{case}/lloyd_centroids"]
        kept = weights[weights != 0]
        values = SortedValues(kept)
        start = initial_centroids(values, reference.size)
        np.testing.assert_allclose(start, data[f"{case}/init"], atol=1e-6 * np.abs(start).max(), rtol=1e-5)
        found = lloyd(values, data[f"{case}/init"])
        np.testing.assert_allclose(found.centroids, reference, atol=1e-5, rtol=1e-5, err_msg=case)
        np.testing.assert_allclose(found.inertia, float(data[f"{case}/lloyd_inertia"]), rtol=1e-9, err_msg=case)
        assert (found.counts == data[f"{case}/lloyd_counts"]).all(), case
        codes = assign(kept, found.centroids.astype(np.float32))
        labels = data[f"{case}/lloyd_labels_rowmajor"]
        assert np.mean(codes.astype(int) - 1 != labels[labels >= 0]) <= 1e-3, case


def test_official_clusters_where_none_is_empty(golden: Golden) -> None:
    data = arrays(golden)
    compared = 0
    for case in bases(data, "kmeans/", "/official_centroids"):
        if not data[f"{case}/lloyd_counts"].all():
            continue  # theirs moves empty clusters elsewhere; here they keep their centroid
        weights = data[f"{case.rpartition('/')[0]}/w"]
        steps = int(data[f"{case}/official_n_iter"])
        found = lloyd(SortedValues(weights[weights != 0]), data[f"{case}/init"], max_iterations=steps)
        reference = np.sort(data[f"{case}/official_centroids"])
        np.testing.assert_allclose(found.centroids, reference, atol=1e-5, rtol=1e-5, err_msg=case)
        compared += 1
    assert compared


def test_centroid_gradients(golden: Golden) -> None:
    data = arrays(golden)
    for case in bases(data, "kmeans/", "/grad_centroids"):
        labels = torch.from_numpy(data[f"{case}/lloyd_labels_rowmajor"].astype(np.int16))
        codebook = torch.from_numpy(data[f"{case}/lloyd_centroids"]).requires_grad_()
        weight = GatherCentroids.apply(codebook, labels + 1)
        gradient = torch.from_numpy(data[f"{case}/grad_w"]).reshape(weight.shape)
        weight.backward(gradient)
        reference = data[f"{case}/grad_centroids"]
        np.testing.assert_allclose(
            codebook.grad.numpy(), reference, atol=1e-6 * np.abs(reference).max(), rtol=1e-5, err_msg=case
        )
