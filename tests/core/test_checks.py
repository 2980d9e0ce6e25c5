"""Illegal arguments are refused with a typed error that names the argument and shows the value."""

from __future__ import annotations

import pytest
import torch

from gradbits.core import errors
from gradbits.core.checks import (
    check_axis,
    check_bits,
    check_choice,
    check_float_tensor,
    check_integer,
    check_number,
)
from gradbits.core.errors import ArgumentError, DtypeError, GradbitsError


@pytest.mark.parametrize("value", [1, 9, 0, -8, True, False, 4.0, "4", None, float("nan")])
def test_illegal_bits(value):
    with pytest.raises(ArgumentError, match=r"bits=.*must be an integer from 2 to 8") as caught:
        check_bits(value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", range(2, 9))
def test_legal_bits(value):
    assert check_bits(value) == value


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_only_real_floating_point_tensors(dtype):
    with pytest.raises(DtypeError, match=str(dtype)):
        check_float_tensor(torch.zeros(2).to(dtype), "x")


@pytest.mark.parametrize("value", [1.0, [1.0], None, "x"])
def test_not_a_tensor(value):
    with pytest.raises(DtypeError, match=f"x: must be a floating-point tensor, not {type(value).__name__}"):
        check_float_tensor(value, "x")


@pytest.mark.parametrize(("axis", "dim"), [(2, 2), (-3, 2), (0, 0), (-1, 0)])
def test_axis_out_of_range(axis, dim):
    with pytest.raises(ArgumentError, match=f"axis={axis}"):
        check_axis(axis, "axis", dim)


@pytest.mark.parametrize("axis", [True, 1.0, "1", None])
def test_axis_of_a_wrong_type(axis):
    with pytest.raises(DtypeError, match="axis="):
        check_axis(axis, "axis", 3)


@pytest.mark.parametrize("value", [True, 1.5, "3", None])
def test_integer_of_a_wrong_type(value):
    with pytest.raises(DtypeError, match="count="):
        check_integer(value, "count", 0)


@pytest.mark.parametrize("value", [-1, 11])
def test_integer_out_of_range(value):
    with pytest.raises(ArgumentError, match="an integer from 0 to 10"):
        check_integer(value, "count", 0, 10)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.0])
def test_number_out_of_range(value):
    with pytest.raises(ArgumentError, match="decay="):
        check_number(value, "decay", 0.0, 1.0, open_high=True)


def test_number_without_upper_limit_is_finite():
    assert check_number(3, "x", 0.0) == 3.0
    with pytest.raises(ArgumentError, match="x=inf"):
        check_number(float("inf"), "x", 0.0)


def test_choice():
    with pytest.raises(ArgumentError, match="rounding='up': must be one of 'nearest', 'stochastic'"):
        check_choice("up", "rounding", ("nearest", "stochastic"))


def test_every_error_is_one_of_ours():
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(kinds) > 5
    assert all(issubclass(e, GradbitsError) and e.__doc__ for e in kinds)
