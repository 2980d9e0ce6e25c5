"""A noted range is that of the tensor as it is: what turns it first does not take it, and does not note its own."""

from __future__ import annotations

import torch

from gradbits.quantizers.grids import Symmetric
from gradbits.quantizers.known import known_width, note_width
from gradbits.quantizers.quantizer import Quantizer
from gradbits.recipes import recipe


def test_a_noted_range_gives_the_same_codes():
    x, q = torch.randn(6, 8), Quantizer(grid=Symmetric(bits=8))
    want = q.quantize(x)
    note_width(x, x.abs().max())
    got = q.quantize(x)
    assert torch.equal(got.codes, want.codes)
    assert torch.equal(got.scale, want.scale)
    x.mul_(3.0)
    assert known_width(x) is None
    assert torch.equal(q.quantize(x).scale, q.quantize(x.clone()).scale)


def test_a_range_noted_on_what_has_gradients_is_used():
    """Twice the width stands for a noted one: looking again would find another scale."""
    x, q = torch.randn(6, 8, requires_grad=True), Quantizer(grid=Symmetric(bits=8))
    y = x * 1.0
    note_width(y, 2.0 * y.detach().abs().max())
    for seen in (y, y.view(48)):
        assert torch.equal(q.quantize(seen).scale.reshape(()), 2.0 * q.quantize(x).scale.reshape(()))


def test_what_rotates_looks_for_its_own_range():
    rule = recipe("int4_transformer").output.weight.rotation
    assert rule is not None
    assert Quantizer().is_plain
    assert not Quantizer(rotation=rule).is_plain
