"""Codecs by name: which options are legal, and what is wrapped around what."""

from __future__ import annotations

import pytest
import torch

from gradbits.core.errors import ArgumentError, CorruptDataError, DtypeError, GradbitsError
from gradbits.wire.codec import Payload
from gradbits.wire.entropy import Huffman
from gradbits.wire.feedback import ErrorFeedback
from gradbits.wire.registry import codec, codecs, decode

ILLEGAL = [
    {"bits": 0}, {"bits": 9}, {"bits": True}, {"bits": 2.0}, {"bits": "3"}, {"bucket": 0}, {"bucket": -1},
    {"bucket": 1.5}, {"bucket": 1 << 32}, {"norm": "l1"}, {"layout": "none"}, {"p": 0.0}, {"p": 1.0},
    {"p": float("nan")},
    {"clip": 0.0}, {"clip": -1}, {"norm_power": 0}, {"norm_power": 3}, {"norm_less": 1}, {"sweeps": -1}, {"rate": 0.0},
    {"rate": float("inf")}, {"symmetric": None}, {"schedule": 3}, {"ratio": 0.0}, {"ratio": 1.1}, {"eps": -1.0},
    {"entropy": "lzma"}, {"feedback": 1}, {"colour": "red"}, {"k": -1}, {"k": 15},
]  # fmt: skip


@pytest.mark.parametrize("name", codecs())
def test_illegal_options(name: str) -> None:
    for options in ILLEGAL:
        with pytest.raises(GradbitsError, match=next(iter(options))):
            codec(name, **options)


def test_names_that_are_not_codecs() -> None:
    with pytest.raises(ArgumentError, match="known are alq"):
        codec("qsdg")
    with pytest.raises(DtypeError, match="codec"):
        codec(3)
    with pytest.raises(ArgumentError, match="bits"):
        codec(codec("qsgd"), bits=3)
    with pytest.raises(CorruptDataError, match="known"):
        decode(Payload(codec="?", shape=torch.Size([0]), dtype=torch.float32))


def test_feedback_by_default_where_the_method_wants_it() -> None:
    with_feedback = {name for name in codecs() if type(codec(name)).__name__ == "ErrorFeedback"}
    assert with_feedback == {"log_grid", "minmax_uint8", "onebit", "sign", "topk", "uniform_grid"}


def test_feedback_is_around_entropy_coding_whatever_came_first() -> None:
    inside = ErrorFeedback(codec=codec("onebit", feedback=False), beta=0.5)
    assert codec("onebit", entropy="huffman") == codec(codec("onebit"), entropy="huffman")
    assert codec(inside, entropy="huffman") == ErrorFeedback(codec=Huffman(codec=inside.codec), beta=0.5)
    assert codec(inside) == inside
    assert codec(inside, feedback=False) == inside.codec
    with pytest.raises(ArgumentError, match="around entropy coding"):
        Huffman(codec=inside)
    with pytest.raises(ArgumentError, match=r"entropy='huffman'.*'topk'"):
        codec("topk", entropy="huffman")
    with pytest.raises(ArgumentError, match="has no options"):
        codec("onebit", bits=3)
