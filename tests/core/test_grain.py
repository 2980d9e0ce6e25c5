"""Grains: what shares one scale, for every shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbits.core.errors import ArgumentError, GradbitsError
from gradbits.core.grain import Grain, PerBlock, PerChannel, PerRow, PerTensor, as_grain

SHAPES = st.lists(st.integers(0, 5), min_size=0, max_size=4).map(tuple)


@st.composite
def shaped_grains(draw) -> tuple[tuple[int, ...], Grain]:
    shape = draw(SHAPES)
    options: list[st.SearchStrategy[Grain]] = [st.just(PerTensor()), st.integers(1, 9).map(lambda n: PerBlock(size=n))]
    if shape:
        options += [st.just(PerRow()), st.integers(-len(shape), len(shape) - 1).map(lambda a: PerChannel(axis=a))]
    return shape, draw(st.one_of(options))


def group_of(grain: Grain, shape: tuple[int, ...]) -> torch.Tensor:
    """The index of each element's scale, written out plainly."""
    count = torch.Size(shape).numel()
    flat = torch.arange(count).reshape(shape)
    if isinstance(grain, PerBlock):
        return flat // grain.size
    if isinstance(grain, PerChannel):
        axis = grain.axis % len(shape)
        view = [1] * len(shape)
        view[axis] = shape[axis]
        return torch.arange(shape[axis]).view(view).expand(shape)
    return torch.zeros(shape, dtype=torch.int64)


@settings(max_examples=150, deadline=None)
@given(shaped_grains())
def test_expand_gives_each_element_its_own_scale(case):
    shape, grain = case
    scale_shape = grain.scale_shape(shape)
    scale = torch.arange(torch.Size(scale_shape).numel()).reshape(scale_shape)
    expanded = grain.expand(scale, torch.Size(shape))
    assert torch.equal(expanded.expand(shape), group_of(grain, shape))


@settings(max_examples=150, deadline=None)
@given(shaped_grains())
def test_split_groups_what_shares_a_scale(case):
    shape, grain = case
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    parts = grain.split(x)
    assert parts.shape[:-1] == torch.Size(grain.scale_shape(shape))
    groups = group_of(grain, shape)
    for index, part in enumerate(parts.reshape(-1, parts.shape[-1]) if parts.numel() else ()):
        assert set(part.tolist()) == set(x[groups == index].tolist())


@pytest.mark.parametrize(
    ("text", "grain"),
    [
        ("tensor", PerTensor()),
        ("row", PerRow()),
        ("channel", PerChannel(axis=1)),
        ("channel:-2", PerChannel(axis=-2)),
        ("block:7", PerBlock(size=7)),
    ],
)
def test_short_names(text, grain):
    assert as_grain(text) == grain
    assert as_grain(grain) is grain


@pytest.mark.parametrize(
    "text",
    [
        *("", "rows", "Tensor", "row:1", "tensor:0", "block", "block:x", "block:0", "block:-3", "block: "),
        *("channel:--5", "channel:²", "channel:1.5", 3, None, True),
    ],
)
def test_unknown_names(text):
    with pytest.raises(ArgumentError):
        as_grain(text)


@pytest.mark.parametrize("axis", [True, 1.0, "1", None])
def test_an_axis_is_an_integer(axis):
    with pytest.raises(GradbitsError, match="axis="):
        PerChannel(axis=axis)


def test_rows_run_along_axis_0():
    with pytest.raises(ArgumentError, match=r"PerRow.axis=1.*PerChannel"):
        PerRow(axis=1)


@pytest.mark.parametrize("size", [0, -1, True, 2.0, "8"])
def test_block_sizes(size):
    with pytest.raises(GradbitsError, match=r"PerBlock\.size="):
        PerBlock(size=size)


@pytest.mark.parametrize(
    ("grain", "shape"), [(PerRow(), ()), (PerChannel(axis=2), (3, 4)), (PerChannel(axis=-3), (3,))]
)
def test_axis_out_of_range(grain, shape):
    with pytest.raises(ArgumentError, match="axis="):
        grain.scale_shape(shape)
