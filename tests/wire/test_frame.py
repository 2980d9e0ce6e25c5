"""Frames: what is written comes back, and any other bytes are a typed error."""

from __future__ import annotations

import struct
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradbits.core.errors import ArgumentError, CorruptDataError, DtypeError
from gradbits.core.noise import NoiseKey
from gradbits.wire.codec import Payload
from gradbits.wire.frame import DTYPES, MAGIC, from_frame, to_frame
from gradbits.wire.registry import codec, codecs, decode

FRAMES = [
    bytes(to_frame(codec(name, feedback=False, entropy=how).encode(torch.arange(-20.0, 20), NoiseKey.of(1))).numpy())
    for name in ("qsgd", "alq", "minmax_uint8", "onebit", "topk")
    for how in ((None, "huffman", "zstd") if name != "topk" else (None,))
]
LENGTH_AT = 16  # of the field that holds the length
frames = st.sampled_from(FRAMES)


def sealed(body: bytes) -> bytes:
    """Return ``body`` with its length and checksum set right, so that the decoder looks at the rest."""
    body = body[:LENGTH_AT] + struct.pack("<Q", len(body) + 4) + body[LENGTH_AT + 8 :]
    return body + struct.pack("<I", zlib.crc32(body))


def total(data: bytes) -> None:
    """Reading ``data`` gives a tensor or a typed error, and nothing in it is larger than its bytes allow."""
    try:
        payload = from_frame(data)
        assert payload.nbytes <= len(data)
        values = decode(payload)
    except CorruptDataError:
        return
    assert values.numel() <= 10_000 * len(data)
    assert values.shape == payload.shape


payloads = st.builds(
    Payload,
    codec=st.text(st.characters(max_codepoint=127), max_size=20),
    shape=st.lists(st.integers(0, 9), max_size=4).map(torch.Size),
    dtype=st.sampled_from(DTYPES),
    bits=st.integers(0, 8),
    bucket=st.integers(0, (1 << 32) - 1),
    parts=st.dictionaries(
        st.text(st.characters(max_codepoint=127), max_size=8),
        st.builds(lambda n, d: torch.arange(n).to(d), st.integers(0, 20), st.sampled_from(DTYPES)),
        max_size=5,
    ),
)


@given(payloads, st.integers(0, 9))
def test_round_trip(payload: Payload, offset: int) -> None:
    frame = to_frame(payload)
    shifted = torch.cat([torch.zeros(offset, dtype=torch.uint8), frame])[offset:]  # at any address
    for data in (frame, shifted, bytes(frame.numpy()), bytearray(frame.numpy()), memoryview(bytes(frame.numpy()))):
        back = from_frame(data)
        for name in ("codec", "shape", "dtype", "bits", "bucket"):
            assert getattr(back, name) == getattr(payload, name)
        assert list(back.parts) == list(payload.parts)
        for name, part in payload.parts.items():
            assert back.parts[name].dtype == part.dtype
            assert torch.equal(back.parts[name], part)


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(CorruptDataError):
        from_frame(data)
    total(sealed(MAGIC + b"\x01" + data.ljust(27, b"\0")))


@given(frames, st.data())
def test_cut_short_or_longer(frame: bytes, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, len(frame) - 1))
    for wrong in (frame[:size], frame[size:], frame + frame[:size] + b"\0"):
        if wrong != frame:
            with pytest.raises(CorruptDataError):
                from_frame(wrong)
    total(sealed(frame[: max(size, 28)]))


@given(frames, st.data())
def test_flipped_bits(frame: bytes, data: st.DataObject) -> None:
    wrong = bytearray(frame)
    for _ in range(data.draw(st.integers(1, 4))):
        wrong[data.draw(st.integers(0, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if wrong != frame:
        with pytest.raises(CorruptDataError):
            from_frame(bytes(wrong))
    total(sealed(bytes(wrong[:-4])))  # and with a checksum that fits


@given(frames, st.data())
def test_absurd_numbers(frame: bytes, data: st.DataObject) -> None:
    """Lengths and counts of all sizes, anywhere, are refused before anything is made of them."""
    wrong = bytearray(frame[:-4])
    size = data.draw(st.sampled_from([1, 2, 4, 8]))
    at = data.draw(st.integers(4, len(wrong) - size))
    value = data.draw(st.sampled_from([0, 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]))
    wrong[at : at + size] = (value & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
    total(sealed(bytes(wrong)))


@pytest.mark.parametrize("version", [0, 2, 255])
def test_other_versions(version: int) -> None:
    body = FRAMES[0][:4] + bytes([version]) + FRAMES[0][5:-4]
    with pytest.raises(CorruptDataError, match=f"version {version}"):
        from_frame(sealed(body))


def test_what_cannot_be_framed_or_read() -> None:
    part = {"x": torch.ones(1)}
    for wrong in (
        Payload(codec="é", shape=torch.Size([1]), dtype=torch.float32, parts=part),
        Payload(codec="x" * 256, shape=torch.Size([1]), dtype=torch.float32, parts=part),
        Payload(codec="x", shape=torch.Size([1] * 65), dtype=torch.float32, parts=part),
        Payload(codec="x", shape=torch.Size([1]), dtype=torch.float32, parts={str(i): part["x"] for i in range(17)}),
    ):
        with pytest.raises(ArgumentError, match="payload"):
            to_frame(wrong)
    with pytest.raises(DtypeError, match="dtype"):
        to_frame(Payload(codec="x", shape=torch.Size([1]), dtype=torch.float32, parts={"x": torch.ones(1).bool()}))
    for data in ("text", None, 3, torch.zeros(3), torch.zeros(2, 2, dtype=torch.uint8)):
        with pytest.raises(DtypeError, match="data"):
            from_frame(data)
    assert set(codecs()) >= {"qsgd", "alq", "minmax_uint8", "onebit", "topk"}


@pytest.mark.parametrize("field", [{"bits": 256}, {"bits": 9}, {"bits": -1}, {"bucket": 1 << 32}, {"bucket": -1}])
def test_what_no_reader_would_take_is_not_written(field):
    values = {"codec": "mine", "shape": torch.Size([1]), "dtype": torch.float32, "bits": 8, "bucket": 1, **field}
    with pytest.raises(ArgumentError, match="payload: bits="):
        to_frame(Payload(**values, parts={"x": torch.ones(1)}))
