"""Specs travel as JSON and come back equal; damaged ones are refused."""

from __future__ import annotations

import json

import pytest

from gradbits.core.errors import ArgumentError, GradbitsError
from gradbits.core.grain import Grain, PerBlock, PerChannel, PerRow, PerTensor
from gradbits.core.spec import Spec
from gradbits.quantizers.grids import Affine, Grid, Symmetric
from gradbits.quantizers.quantizer import Quantizer


@pytest.mark.parametrize(
    "spec",
    [
        PerTensor(),
        PerRow(),
        PerChannel(axis=-1),
        PerBlock(size=3),
        Affine(bits=3, zero="widen"),
        Quantizer(grid=Symmetric(bits=5), grain=PerBlock(size=9), rounding="stochastic"),
    ],
)
def test_round_trip(spec):
    text = spec.to_json()
    assert "\n" not in text
    assert type(spec).from_json(text) == spec
    assert Spec.from_json(text) == spec
    assert type(spec).from_dict(json.loads(text)) == spec


def test_the_class_is_checked():
    with pytest.raises(ArgumentError, match="must be a Grid"):
        Grid.from_dict(PerTensor().to_dict())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"type": "PerNothing"}, "no such spec"),
        ({}, "no such spec"),
        ({"type": ["PerTensor"]}, "no such spec"),
        ({"type": "PerBlock", "sise": 3}, "no such field; legal are size"),
        ({"type": "PerBlock", "size": -3}, "PerBlock.size=-3"),
        ({"type": "GradInput", "gradient": {"type": "Quantizer"}}, "weight"),
        ([], "must be"),
        ("PerTensor", "must be"),
        (None, "must be"),
    ],
)
def test_damaged_data(data, message):
    with pytest.raises(GradbitsError, match=message):
        Spec.from_dict(data)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"type": "PerTensor"', "NaN"])
def test_damaged_text(text):
    with pytest.raises(GradbitsError):
        Grain.from_json(text)


def test_specs_are_frozen_and_keyword_only():
    with pytest.raises(AttributeError):
        PerBlock(size=3).size = 4
    with pytest.raises(TypeError):
        PerBlock(3)
