"""What goes into a gbz file comes out: exactly where exactness is promised, as codebook values elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.core.errors import ArgumentError, DtypeError, MissingDataError
from gradbits.storage import (
    CompressConfig,
    GbzFile,
    compress_tensor,
    load_compressed,
    save_compressed,
    verify_file,
)
from gradbits.storage.dtypes import DTYPES
from gradbits.storage.layout import INDEXES, MAX_EXPANSION, Entry
from gradbits.storage.shared_section import decode_shared, encode_shared
from gradbits.storage.sharing import Shared, difference, share

State = dict[str, torch.Tensor]
KEPT = ("fc.bias", "smooth.bias", "zeros.weight", "same.weight", "one.weight", "empty.weight", "scalar", "steps")
ALWAYS = (*KEPT, "flags", "ids", "bad.weight")


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Same dtype, shape and bits."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = [whole.contiguous().reshape(-1).view(torch.uint8) if whole.numel() else whole for whole in (one, other)]
    return bool(torch.equal(*bits))


@pytest.mark.parametrize("workers", [1, 4])
def test_every_kind_of_tensor(state: State, tmp_path: Path, workers: int) -> None:
    path = tmp_path / "model.gbz"
    report = save_compressed(state, path, metadata={"epoch": "3"}, workers=workers)
    assert report.stored == path.stat().st_size
    assert report.ratio == report.original / report.stored
    own = sum(tensor.numel() * tensor.element_size() for name, tensor in state.items() if name != "head.weight")
    assert report.original == own
    with GbzFile(path) as file:
        assert dict(file.metadata) == {"epoch": "3"}
        found = file.tensors(workers=workers)
        assert list(found) == file.names()
        assert set(found) == set(state)
        for name in state:
            assert equal(file.tensor(name), found[name]), name
    errors = {one.name: (one.max_error, one.rms_error) for one in report.tensors}
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        if name in ALWAYS:
            assert equal(found[name], tensor), name
        elif name != "head.weight":
            assert found[name].unique().numel() <= (256 if name == "conv.weight" else 33), name
            assert ((found[name] == 0) == (tensor == 0)).all(), name
            largest, rms = difference(found[name], tensor)
            np.testing.assert_allclose(errors[name], (largest, rms), rtol=1e-5)
            assert 0 < rms <= largest < 0.3
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("lossless", [False, True])
def test_every_dtype_of_the_format(name: str, lossless: bool, tmp_path: Path) -> None:
    dtype = DTYPES[name]
    values = torch.arange(600).reshape(20, 30) % 3
    tensor = values.to(dtype) if dtype != torch.bool else values > 1
    state = {"t": tensor, "e": tensor[:0], "s": tensor[1, 1]}
    save_compressed(state, tmp_path / "x.gbz", CompressConfig(lossless=lossless))
    with GbzFile(tmp_path / "x.gbz") as file:
        assert all(equal(file.tensor(key), one) for key, one in state.items())


def test_the_order_of_tied_tensors_is_the_callers(tmp_path: Path) -> None:
    weight = torch.randn(8, 8)
    save_compressed({"a": weight, "b": torch.ones(2), "c": weight}, tmp_path / "x.gbz")
    with GbzFile(tmp_path / "x.gbz") as file:
        assert set(file.names()) == {"a", "b", "c"}
        assert file.entries["c"].coding == "alias"
        assert equal(file.tensor("a"), file.tensor("c"))


@pytest.mark.parametrize("coder", ["huffman", "zstd"])
def test_lossless_keeps_every_bit(state: State, tmp_path: Path, coder: str) -> None:
    report = save_compressed(state, tmp_path / "x.gbz", CompressConfig(lossless=True, coder=coder))
    with GbzFile(tmp_path / "x.gbz") as file:
        assert all(equal(file.tensor(name), tensor) for name, tensor in state.items())
        codings = {entry.coding for entry in file.entries.values()}
    assert ("zstd" if coder == "zstd" else "planes") in codings
    assert all(one.max_error == one.rms_error == 0 for one in report.tensors)


def test_tensors_that_do_not_shrink_are_stored_as_they_are() -> None:
    noise = torch.randint(0, 256, (64, 64)).to(torch.uint8)
    for config in (CompressConfig(), CompressConfig(lossless=True)):
        section, report = compress_tensor("noise", noise, config)
        assert section.coding == "raw"
        assert report.stored == report.original
    section, report = compress_tensor("tiny.weight", torch.randn(3, 3))
    assert section.coding == "raw"


def test_the_reason_for_raw_is_in_the_header(state: State, tmp_path: Path) -> None:
    save_compressed(state, tmp_path / "x.gbz")
    with GbzFile(tmp_path / "x.gbz") as file:
        assert file.entries["bad.weight"].extra == {"why": "holds NaN or Inf"}


def test_weights_shared_before_lose_nothing(tmp_path: Path) -> None:
    weight = share(torch.randn(64, 64), 7).tensor()
    _, report = compress_tensor("fc.weight", weight, CompressConfig(linear_bits=3))
    assert 64 < weight.unique().numel() == report.k
    assert report.max_error == 0.0
    _, report = compress_tensor("fc.weight", weight, CompressConfig(overrides=(("fc.*", 3),)))
    assert report.k == 8
    assert report.max_error > 0


def test_bits_by_kind_and_by_name() -> None:
    config = CompressConfig(conv_bits=4, linear_bits=3, overrides=(("head.*", 2), ("*.bias", 3), ("keep.*", None)))
    found = {
        name: compress_tensor(name, tensor, config)[1].k
        for name, tensor in {
            "c.weight": torch.randn(16, 8, 3, 3),
            "d.weight": torch.randn(16, 8, 30),
            "l.weight": torch.randn(64, 64),
            "head.weight": torch.randn(64, 64),
            "l.bias": torch.randn(400),
            "keep.weight": torch.randn(64, 64),
        }.items()
    }
    assert found == {
        "c.weight": 16, "d.weight": 16, "l.weight": 8, "head.weight": 4, "l.bias": 8, "keep.weight": None,
    }  # fmt: skip


@settings(deadline=None, max_examples=25)
@given(
    size=st.integers(1, 2000),
    density=st.sampled_from([0.0, 0.001, 0.03, 0.2, 0.6, 0.97, 1.0]),
    k=st.sampled_from([1, 2, 5, 31, 256]),
    seed=st.integers(0, 2**31),
)
def test_every_index_gives_the_same_tensor_and_the_smallest_is_taken(
    size: int, density: float, k: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    codes = (random.integers(1, k + 1, size) * (random.random(size) < density)).astype(np.uint16)
    shared = Shared(codes=codes, codebook=torch.arange(1.0, k + 1), shape=(size,), exact=True)
    sizes = {}
    for index in INDEXES:
        section, extra = encode_shared(shared, indexes=(index,))
        assert extra["index"] == index
        assert extra["nnz"] == np.count_nonzero(codes)
        assert equal(_decode(section, extra, (size,)), shared.tensor())
        sizes[index] = len(section)
    section, extra = encode_shared(shared)
    assert len(section) == min(sizes.values())


def _decode(section: bytes, extra: dict[str, object], shape: tuple[int, ...]) -> torch.Tensor:
    entry = Entry(dtype="F32", shape=shape, coding="shared", begin=0, end=len(section), sum="", extra=extra)
    return decode_shared(memoryview(section), entry)


def test_the_cheapest_index_follows_the_sparsity() -> None:
    random = np.random.default_rng(0)
    chosen = []
    for density in (0.01, 0.08, 0.3, 1.0):
        codes = (random.integers(1, 9, 100_000) * (random.random(100_000) < density)).astype(np.uint16)
        shared = Shared(codes=codes, codebook=torch.arange(1.0, 9), shape=(100_000,), exact=True)
        chosen.append(encode_shared(shared)[1]["index"])
    assert chosen[0] == "gap8"
    assert chosen[1].startswith("gap")
    assert chosen[3] == "dense"


def test_a_tensor_of_nothing_but_zeros_stays_within_the_formats_expansion(tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        zeros = torch.zeros(1200, 1000, dtype=dtype)
        for config in (CompressConfig(), CompressConfig(index_bits=8), CompressConfig(lossless=True, coder="zstd")):
            report = save_compressed({"w": zeros}, tmp_path / "x.gbz", config)
            assert 60 < report.original / report.tensors[0].stored <= MAX_EXPANSION or config.lossless
            with GbzFile(tmp_path / "x.gbz") as file:
                assert equal(file.tensor("w"), zeros)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]),
    st.lists(st.integers(0, 12), max_size=4),
    st.integers(1, 8),
)
def test_any_shape_and_scale(dtype: torch.dtype, scale: float, shape: list[int], bits: int) -> None:
    tensor = (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)
    config = CompressConfig(overrides=(("*", bits),))
    section, report = compress_tensor("w", tensor, config)
    assert report.stored <= report.original
    if section.coding == "shared":
        spread = float(tensor.double().max() - tensor.double().min())
        assert report.max_error <= spread
        assert np.isfinite(report.rms_error)


def test_sparsity_prunes_before_it_shares() -> None:
    weight = torch.randn(100, 100)
    section, report = compress_tensor("fc.weight", weight, CompressConfig(sparsity=0.9))
    assert report.nnz == 1000
    assert report.max_error >= float(weight.abs().flatten().kthvalue(9000)[0])
    assert section.coding == "shared"


def test_load_compressed_into_a_model(tmp_path: Path) -> None:
    def build() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.Flatten())

    model, fresh = build(), build()
    report = save_compressed(model, tmp_path / "x.gbz")
    assert {one.name for one in report.tensors} == set(model.state_dict())
    assert not load_compressed(fresh, tmp_path / "x.gbz").missing_keys
    with GbzFile(tmp_path / "x.gbz") as file:
        assert all(equal(file.tensor(name), tensor) for name, tensor in fresh.state_dict().items())
    with pytest.raises(ArgumentError, match="shapes of"):
        load_compressed(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), tmp_path / "x.gbz", strict=False)
    with pytest.raises(ArgumentError, match="only one side has"):
        load_compressed(torch.nn.Linear(2, 2), tmp_path / "x.gbz")


def test_a_damaged_file_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model, fresh = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    save_compressed(model, tmp_path / "x.gbz")
    data = bytearray((tmp_path / "x.gbz").read_bytes())
    data[-20] ^= 1
    (tmp_path / "x.gbz").write_bytes(data)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(ValueError, match=r"x\.gbz: tensor '"):
        load_compressed(fresh, tmp_path / "x.gbz")
    assert all(equal(before[name], tensor) for name, tensor in fresh.state_dict().items())


def test_files_are_the_same_whatever_the_threads(state: State, tmp_path: Path) -> None:
    for workers in (1, 3):
        save_compressed(state, tmp_path / f"{workers}.gbz", workers=workers)
    assert (tmp_path / "1.gbz").read_bytes() == (tmp_path / "3.gbz").read_bytes()
    assert verify_file(tmp_path / "1.gbz") == len(state)


def test_illegal_tensors_and_names_are_named(tmp_path: Path) -> None:
    with pytest.raises(DtypeError, match="'s'"):
        save_compressed({"s": torch.eye(3).to_sparse()}, tmp_path / "x.gbz")
    with pytest.raises(DtypeError, match="complex128"):
        save_compressed({"c": torch.zeros(2, dtype=torch.complex128)}, tmp_path / "x.gbz")
    with pytest.raises(DtypeError, match="device meta"):
        save_compressed({"m": torch.zeros(2, device="meta")}, tmp_path / "x.gbz")
    with pytest.raises(ArgumentError, match="not a tensor"):
        save_compressed({"c": 3}, tmp_path / "x.gbz")
    with pytest.raises(ArgumentError, match="__metadata__"):
        save_compressed({"__metadata__": torch.zeros(2)}, tmp_path / "x.gbz")
    with pytest.raises(ArgumentError, match="metadata"):
        save_compressed({"a": torch.zeros(2)}, tmp_path / "x.gbz", metadata={"a": 1})
    with pytest.raises(ArgumentError, match="text that JSON"):
        save_compressed({"a\ud800": torch.zeros(2)}, tmp_path / "x.gbz")
    assert not list(tmp_path.iterdir())
    with pytest.raises(MissingDataError, match="nowhere"):
        GbzFile(tmp_path / "nowhere.gbz")
    save_compressed({"a": torch.zeros(2)}, tmp_path / "x.gbz")
    with GbzFile(tmp_path / "x.gbz") as file, pytest.raises(ArgumentError, match="has no tensor 'b'"):
        file.tensor("b")


def test_config_json_round_trip() -> None:
    config = CompressConfig(conv_bits=6, overrides=(("a*", None), ("b", 3)), index_bits=4, lossless=True)
    assert CompressConfig.from_json(config.to_json()) == config
    for text in ("[1]", "{", '{"bits": 3}', '{"overrides": [1]}'):
        with pytest.raises(ArgumentError):
            CompressConfig.from_json(text)
    for wrong in ({"conv_bits": 0}, {"index_bits": 2}, {"sparsity": 1.5}, {"init": "?"}, {"overrides": (("a", 12),)}):
        with pytest.raises(ArgumentError):
            CompressConfig(**wrong)
