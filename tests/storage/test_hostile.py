"""Whatever a file holds, reading it gives the right tensors or a typed error, in memory bounded by the file."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradbits.core.errors import CorruptDataError
from gradbits.storage import GbzFile, save_compressed, verify_file
from gradbits.storage.layout import ALIGNMENT, FREE_EXPANSION, MAGIC, MAX_EXPANSION, PREFIX, VERSION, checksum

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], dict[str, torch.Tensor]]:
    path = tmp_path / "file.gbz"

    def reader(data: bytes) -> dict[str, torch.Tensor]:
        path.write_bytes(data)
        with GbzFile(path) as file:
            return file.tensors()

    return reader


def head_of(data: bytes) -> tuple[Any, bytes]:
    size = PREFIX.unpack(data[: PREFIX.size])[3]
    return json.loads(data[PREFIX.size : PREFIX.size + size]), data[PREFIX.size + size :]


def sign(tree: Any, body: bytes, text: bytes | None = None) -> bytes:
    """A file with this header whose own checksum and sizes are right: what someone with bad intent would write."""
    header = json.dumps(tree, separators=(",", ":")).encode() if text is None else text
    header += b" " * (-(PREFIX.size + len(header)) % ALIGNMENT)
    total = PREFIX.size + len(header) + len(body)
    bare = PREFIX.pack(MAGIC, VERSION, 0, len(header), total, b"\0" * 8)
    return PREFIX.pack(MAGIC, VERSION, 0, len(header), total, checksum(bare, header)) + header + body


def resum(tree: dict[str, Any], body: bytes) -> bytes:
    for name, entry in tree.items():
        if name != "__metadata__":
            begin, end = entry["offsets"]
            entry["sum"] = checksum(body[begin:end]).hex()
    return sign(tree, body)


def test_the_valid_file_is_read(packed: bytes, read: Callable[[bytes], Any]) -> None:
    tree, body = head_of(packed)
    assert len(read(packed)) == len(tree) - 1
    assert set(read(resum(tree, body))) == set(read(packed))


@QUICK
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_bit_flip_is_found(position: float, bit: int, packed: bytes, tmp_path: Path) -> None:
    damaged = bytearray(packed)
    damaged[int(position * len(packed))] ^= 1 << bit
    (tmp_path / "f.gbz").write_bytes(damaged)
    with pytest.raises(CorruptDataError):
        verify_file(tmp_path / "f.gbz", workers=1)


def test_every_bit_of_a_small_file_counts(tmp_path: Path, read: Callable[[bytes], Any]) -> None:
    save_compressed({"w": torch.arange(40.0).reshape(5, 8), "b": torch.ones(3)}, tmp_path / "s.gbz")
    data = (tmp_path / "s.gbz").read_bytes()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptDataError):
            read(bytes(damaged))


@QUICK
@given(cut=st.floats(0, 1, exclude_max=True), more=st.binary(max_size=20))
def test_truncated_and_extended_files_are_refused(cut: float, more: bytes, packed: bytes, tmp_path: Path) -> None:
    for data in (packed[: int(cut * len(packed))], packed + b"\0" + more):
        (tmp_path / "f.gbz").write_bytes(data)
        with pytest.raises(CorruptDataError):
            verify_file(tmp_path / "f.gbz", workers=1)


@QUICK
@given(data=st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes, tmp_path: Path) -> None:
    for content in (data, MAGIC + data, packed_prefix(data)):
        (tmp_path / "f.gbz").write_bytes(content)
        with pytest.raises(CorruptDataError):
            verify_file(tmp_path / "f.gbz", workers=1)


def packed_prefix(data: bytes) -> bytes:
    return sign(None, b"", text=data)


@settings(parent=QUICK, max_examples=100)
@given(position=st.floats(0, 1, exclude_max=True), patch=st.binary(min_size=1, max_size=6))
def test_damage_under_valid_checksums_gives_a_tensor_or_a_typed_error(
    position: float, patch: bytes, packed: bytes, tmp_path: Path
) -> None:
    tree, body = head_of(packed)
    changed = bytearray(body)
    place = int(position * len(body))
    changed[place : place + len(patch)] = patch[: len(body) - place]
    (tmp_path / "f.gbz").write_bytes(resum(tree, bytes(changed)))
    with GbzFile(tmp_path / "f.gbz") as file:
        for name, entry in file.entries.items():
            if entry.begin <= place < entry.end:
                with suppress(CorruptDataError):
                    assert tuple(file.tensor(name).shape) == entry.shape


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.lists(st.integers(-1, 2**63), max_size=4),
    st.sampled_from(
        ["raw", "shared", "planes", "zstd", "alias", "gap4", "bitmap", "dense", "F32", "BOOL", "I64", "BF16"]
    ),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(parent=QUICK, max_examples=150)
@given(data=st.data())
def test_any_change_of_the_header_gives_a_tensor_or_a_typed_error(
    data: st.DataObject, packed: bytes, tmp_path: Path
) -> None:
    tree, body = head_of(packed)
    name = data.draw(st.sampled_from([key for key in tree if key != "__metadata__"]))
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(
            st.sampled_from(["dtype", "shape", "coding", "offsets", "sum", "k", "nnz", "index", "of", "why"])
        )
        if data.draw(st.integers(0, 4)) == 0:
            tree[name].pop(key, None)
        else:
            tree[name][key] = data.draw(VALUES)
    (tmp_path / "f.gbz").write_bytes(sign(tree, body))
    with suppress(CorruptDataError), GbzFile(tmp_path / "f.gbz") as file:
        for one in file.names():
            assert tuple(file.tensor(one).shape) == file.entries[one].shape


def entry(**changes: Any) -> dict[str, Any]:
    return {
        "dtype": "F32",
        "shape": [4],
        "coding": "raw",
        "offsets": [0, 16],
        "sum": checksum(bytes(16)).hex(),
        **changes,
    }


HEADERS: dict[str, tuple[Any, int]] = {
    "not an object": ([], 0),
    "metadata is not text": ({"__metadata__": {"a": 1}}, 0),
    "metadata is a list": ({"__metadata__": ["a"]}, 0),
    "tensor is not an object": ({"a": 3}, 0),
    "unknown dtype": ({"a": entry(dtype="Q4")}, 16),
    "dtype is a list": ({"a": entry(dtype=["F32"])}, 16),
    "unknown coding": ({"a": entry(coding="pickle")}, 16),
    "unknown key": ({"a": entry(extra=1)}, 16),
    "negative size": ({"a": entry(shape=[-4])}, 16),
    "size is a bool": ({"a": entry(shape=[True, 4])}, 16),
    "size is a float": ({"a": entry(shape=[4.0])}, 16),
    "too many axes": ({"a": entry(shape=[1] * 65 + [4])}, 16),
    "absurd shape": ({"a": entry(shape=[2**40, 2**40])}, 16),
    "absurd shape behind a zero": ({"a": entry(shape=[0, 2**40, 2**40], offsets=[0, 0])}, 0),
    "shape larger than the bytes": ({"a": entry(shape=[5])}, 16),
    "shape smaller than the bytes": ({"a": entry(shape=[3])}, 16),
    "section beyond the end": ({"a": entry(shape=[8], offsets=[0, 32])}, 16),
    "section before the start": ({"a": entry(offsets=[-8, 8])}, 16),
    "section ends before it begins": ({"a": entry(offsets=[16, 0])}, 16),
    "overlapping sections": ({"a": entry(), "b": entry()}, 16),
    "overlap in part": ({"a": entry(), "b": entry(offsets=[8, 24])}, 24),
    "hole between sections": ({"a": entry(), "b": entry(offsets=[24, 40])}, 40),
    "bytes after the last section": ({"a": entry()}, 24),
    "sections out of order": ({"a": entry(offsets=[16, 32]), "b": entry()}, 32),
    "checksum too short": ({"a": entry(sum="00")}, 16),
    "zip bomb": ({"a": entry(coding="planes", shape=[2**34])}, 16),
    "alias of nothing": ({"a": entry(coding="alias", offsets=[0, 0], of="b")}, 0),
    "alias of itself": ({"a": entry(coding="alias", offsets=[0, 0], of="a")}, 0),
    "alias of another shape": ({"a": entry(), "b": entry(coding="alias", offsets=[16, 16], shape=[5], of="a")}, 16),
    "alias with a section": ({"a": entry(), "b": entry(coding="alias", offsets=[16, 32], of="a")}, 32),
    "shared without k": ({"a": entry(coding="shared")}, 16),
    "shared integers": ({"a": entry(coding="shared", dtype="I32", k=1, nnz=1, index="dense", loss=[0, 0])}, 16),
    "more non-zeros than elements": ({"a": entry(coding="shared", k=1, nnz=5, index="dense", loss=[0, 0])}, 16),
    "codebook too large": ({"a": entry(coding="shared", k=4096, nnz=1, index="dense", loss=[0, 0])}, 16),
    "unknown index": ({"a": entry(coding="shared", k=1, nnz=1, index="gap9", loss=[0, 0])}, 16),
    "negative loss": ({"a": entry(coding="shared", k=1, nnz=1, index="dense", loss=[-1, 0])}, 16),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie_are_refused_when_the_file_is_opened(name: str, tmp_path: Path) -> None:
    tree, body = HEADERS[name]
    (tmp_path / "f.gbz").write_bytes(sign(tree, bytes(body)))
    with pytest.raises(CorruptDataError):
        GbzFile(tmp_path / "f.gbz")


def test_the_entry_of_these_headers_is_itself_legal(read: Callable[[bytes], Any]) -> None:
    assert read(sign({"a": entry()}, bytes(16)))["a"].tolist() == [0.0] * 4
    aliases = {"a": entry(), "b": entry(coding="alias", offsets=[16, 16], of="a")}
    assert read(sign(aliases, bytes(16)))["b"].tolist() == [0.0] * 4


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":' * 100_000,
        b"[" * 1_000_000,
        b'{"a":1,"a":2}',
        b'{"__metadata__":{"a":"1","a":"2"}}',
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"\\ud800":{}}',
        b'{"__metadata__":{"a":"\\udc00"}}',
        b"\xff\xfe",
        b"",
        b"null",
    ],
    ids=lambda text: text[:12].decode("latin-1"),
)
def test_json_beyond_the_format_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "f.gbz").write_bytes(sign(None, b"", text=text))
    with pytest.raises(CorruptDataError):
        GbzFile(tmp_path / "f.gbz")


def test_padding_is_checked(packed: bytes, read: Callable[[bytes], Any]) -> None:
    body = bytearray(24)
    tree = {"a": entry(dtype="U8", shape=[17], offsets=[0, 17], sum=checksum(bytes(17)).hex())}
    assert read(sign(tree, bytes(body)))["a"].tolist() == [0] * 17
    body[20] = 1
    with pytest.raises(CorruptDataError, match="not zero"):
        read(sign(tree, bytes(body)))


def test_bools_other_than_zero_and_one_are_refused(read: Callable[[bytes], Any]) -> None:
    tree = {"a": entry(dtype="BOOL", shape=[8], offsets=[0, 8], sum=checksum(bytes([2] * 8)).hex())}
    with pytest.raises(CorruptDataError, match="bool"):
        read(sign(tree, bytes([2] * 8)))


def test_memory_stays_in_proportion_to_the_file(tmp_path: Path) -> None:
    size = 1 << 16
    claimed = (MAX_EXPANSION * size + FREE_EXPANSION) // 4  # the most that the header may claim
    shared = entry(coding="shared", shape=[claimed], k=1, nnz=1, index="dense", loss=[0, 0], offsets=[0, size])
    for tree in ({"a": shared}, {"a": {**shared, "index": "gap8"}}, {"a": {**shared, "index": "bitmap"}}):
        tree["a"]["sum"] = checksum(bytes(size)).hex()
        (tmp_path / "f.gbz").write_bytes(sign(tree, bytes(size)))
        tracemalloc.start()
        with pytest.raises(CorruptDataError), GbzFile(tmp_path / "f.gbz") as file:
            file.tensor("a")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 * size
    with pytest.raises(CorruptDataError, match="allowed"):
        GbzFile(tmp_path / "f.gbz", max_bytes=1000)


def test_many_aliases_of_one_tensor_are_refused(tmp_path: Path) -> None:
    size = 1 << 22
    tree = {"a": entry(dtype="U8", shape=[size], offsets=[0, size], sum=checksum(bytes(size)).hex())}
    for number in range(2000):
        tree[f"b{number}"] = entry(dtype="U8", shape=[size], coding="alias", offsets=[size, size], of="a")
    (tmp_path / "f.gbz").write_bytes(sign(tree, bytes(size)))
    with pytest.raises(CorruptDataError, match="claimed"):
        GbzFile(tmp_path / "f.gbz")


def test_zstd_frames_that_declare_another_size_are_refused(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    for data in (bytes(1 << 24), b"", bytes(3999)):
        frame = zstandard.ZstdCompressor(write_content_size=True).compress(data)
        frame += bytes(-len(frame) % 8)
        for body in (frame, frame[:-8], frame.rstrip(b"\0")):
            tree = {"a": entry(coding="zstd", shape=[1000], offsets=[0, len(body)], sum=checksum(body).hex())}
            padded = body + bytes(-len(body) % 8)
            (tmp_path / "f.gbz").write_bytes(sign(tree, padded))
            with pytest.raises(CorruptDataError):
                verify_file(tmp_path / "f.gbz")


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.gbz"
    save_compressed({"a": torch.ones(4)}, path)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(Exception, match="disk full"):
        save_compressed({"a": torch.zeros(4)}, path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["x.gbz"]
