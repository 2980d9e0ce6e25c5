"""Where values are in a group's rows, and the messages that carry them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradbits.core.errors import CorruptDataError
from gradbits.wire.layout import is_coded, make_groups
from gradbits.wire.message import Message, pack, unpack

shapes = st.lists(st.lists(st.integers(0, 7), max_size=3).map(torch.Size), min_size=1, max_size=5)


@given(shapes, st.integers(1, 5), st.integers(1, 40), st.booleans())
def test_values_come_back_from_rows(sizes, world, cut, permuted):
    named = [(str(index), shape) for index, shape in enumerate(sizes)]
    groups = make_groups(named, world=world, min_elements=6, group_elements=cut)
    slots = [(group, slot, name) for group in groups for name in ("coded", "raw") for slot in getattr(group, name)]
    assert sorted(slot.name for _, slot, _ in slots) == sorted(name for name, _ in named)
    for group in groups:
        for kind in ("coded", "raw"):
            rows = torch.full((world, getattr(group, f"{kind}_width")), float("nan"))
            values = {slot.name: torch.randn(slot.shape) for slot in getattr(group, kind)}
            for slot in getattr(group, kind):
                value = values[slot.name]
                if permuted and value.dim() > 1:  # as channels-last gradients are
                    value = value.transpose(0, -1).contiguous().transpose(0, -1)
                slot.write(rows, value)
            assert not rows.isnan().any()  # padding is zero
            for slot in getattr(group, kind):
                out = torch.empty(slot.shape)
                if permuted and out.dim() > 1:
                    out = out.transpose(0, -1).contiguous().transpose(0, -1)
                assert torch.equal(slot.read(rows, out), values[slot.name])
                assert torch.equal(out, values[slot.name])
                assert rows[:, slot.start : slot.start + slot.chunk].count_nonzero() <= slot.numel
                marked = torch.ones_like(rows)
                slot.clear_padding(marked)
                assert slot.view(marked).sum() == slot.numel


def test_ownership_depends_on_the_parameter_alone():
    named = [(str(index), torch.Size([9, index + 3])) for index in range(6)]
    chunks = [
        {slot.name: slot.chunk for group in make_groups(named, world=4, min_elements=1, group_elements=size)
         for slot in group.coded}
        for size in (1, 50, 10_000)
    ]  # fmt: skip
    assert chunks[0] == chunks[1] == chunks[2]


@pytest.mark.parametrize(
    ("shape", "coded"),
    [((32, 32), True), ((31, 33), False), ((1024,), False), ((65536,), True), ((), False), ((0, 9), False)],
)
def test_what_is_worth_encoding(shape, coded):
    assert is_coded(torch.Size(shape), 1024) is coded


def message(**changes):
    fields = {
        "sender": 3, "step": 70, "group": 2, "flags": torch.tensor([0, 1, 2], dtype=torch.uint8),
        "frame": torch.arange(50, dtype=torch.uint8), "raw": torch.randn(4), **changes,
    }  # fmt: skip
    return Message(**fields)


def opened(data, **changes):
    return unpack(data, **{"sender": 3, "step": 70, "group": 2, "flags": 3, "raw": 4, **changes})


def test_a_message_comes_back_also_with_zeros_behind_it():
    sent = message()
    for data in (pack(sent), torch.cat([pack(sent), torch.zeros(9, dtype=torch.uint8)])):
        found = opened(data)
        assert all(torch.equal(getattr(found, name), getattr(sent, name)) for name in ("flags", "frame", "raw"))
        assert found.culprit is None
    assert opened(pack(message(culprit=1))).culprit == 1


@given(st.integers(0, 46), st.integers(0, 7))
def test_every_changed_bit_outside_the_frame_is_noticed(place, bit):
    data = pack(message())
    data[place] ^= 1 << bit
    with pytest.raises(CorruptDataError):
        opened(data)


@given(st.binary(max_size=120))
def test_any_bytes_are_an_error_and_nothing_worse(data):
    with pytest.raises(CorruptDataError):
        opened(torch.tensor(list(data), dtype=torch.uint8))


@pytest.mark.parametrize("change", [{"sender": 2}, {"step": 71}, {"group": 0}, {"flags": 2}, {"raw": 5}])
def test_a_message_about_something_else_is_an_error(change):
    with pytest.raises(CorruptDataError):
        opened(pack(message()), **change)


def test_a_message_that_is_cut_short_is_an_error():
    data = pack(message())
    for length in range(len(data)):
        with pytest.raises(CorruptDataError):
            opened(data[:length])
