"""Law 1: a scale that varies along a contracted axis is refused when the recipe is built."""

from __future__ import annotations

import itertools

import pytest
from torch import nn

import gradbits as gb
from gradbits.core.errors import ArgumentError, ScaleAxisError
from gradbits.core.grain import Grain, PerBlock, PerChannel, PerRow, PerTensor
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import EMA
from gradbits.recipes.recipe import GradInput, GradWeight, Output, Recipe

PRODUCTS = {"output": (Output, "input", "weight"), "grad_input": (GradInput, "gradient", "weight")}
PRODUCTS["grad_weight"] = (GradWeight, "gradient", "input")
# the contracted axis of each operand, from the equations Y = X Wᵀ, dX = G W, dW = Gᵀ X
CONTRACTED = {
    ("output", "input"): 1,
    ("output", "weight"): 1,
    ("grad_input", "gradient"): 1,
    ("grad_input", "weight"): 0,
    ("grad_weight", "gradient"): 0,
    ("grad_weight", "input"): 0,
}
GRAINS: list[Grain] = [PerTensor(), PerRow(), PerBlock(size=16), *(PerChannel(axis=a) for a in (0, 1, 2, -1, -2))]


def build(product: str, role: str, grain: Grain) -> Recipe:
    kind, *roles = PRODUCTS[product]
    parts = {r: Quantizer(grain=grain if r == role else PerTensor()) for r in roles}
    return Recipe(name="mine", **{product: kind(**parts)})


def is_legal(product: str, role: str, grain: Grain) -> bool:
    if isinstance(grain, PerTensor):
        return True
    return isinstance(grain, PerChannel) and grain.axis == 1 - CONTRACTED[product, role]


@pytest.mark.parametrize(("place", "grain"), list(itertools.product(CONTRACTED, GRAINS)), ids=str)
def test_every_grain_of_every_operand(place, grain):
    product, role = place
    if is_legal(product, role, grain):
        assert getattr(getattr(build(product, role, grain), product), role).grain == grain
        return
    with pytest.raises(ScaleAxisError) as caught:
        build(product, role, grain)
    message = str(caught.value)
    assert f"{product}.{role}.grain={grain}" in message
    assert "legal are PerTensor() and Per" in message


def test_an_override_cannot_break_the_law():
    recipe = gb.recipe("int8_dynamic")
    for path, grain in [
        ("grad_weight.gradient.grain", "row"),
        ("output.input.grain", "channel"),
        ("grad_input.weight.grain", "channel:0"),
        ("gradient.grain", "block:32"),
    ]:
        with pytest.raises(ScaleAxisError, match=path.split(".")[-2]):
            recipe.with_overrides({path: grain})


def test_json_cannot_break_the_law():
    data = gb.recipe("int8_dynamic").to_dict()
    data["grad_weight"]["gradient"]["grain"] = PerRow().to_dict()
    with pytest.raises(ScaleAxisError):
        Recipe.from_dict(data)


@pytest.mark.parametrize(
    ("layer", "place", "grain"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), ("grad_input", "weight"), PerChannel(axis=1)),
        (nn.Conv2d(4, 4, 3, groups=4), ("grad_weight", "input"), PerChannel(axis=1)),
        (nn.ConvTranspose2d(4, 4, 3, groups=2), ("output", "weight"), PerChannel(axis=0)),
        (nn.ConvTranspose2d(4, 4, 3, groups=2), ("grad_weight", "gradient"), PerChannel(axis=1)),
    ],
    ids=str,
)
def test_scales_across_groups_are_left_in_float_with_the_reason(layer, place, grain):
    recipe = build(*place, grain)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(4, 4))
    rows = gb.quantize_(model, recipe).rows
    assert "across the groups" in rows[0].reason
    assert not rows[1].reason
    assert type(layer).__name__ in ("Conv2d", "ConvTranspose2d")


@pytest.mark.parametrize("place", [p for p, axis in CONTRACTED.items() if axis == 1 and p[1] != "weight"], ids=str)
def test_a_running_range_per_row_is_refused(place):
    """Rows of different batches have nothing in common: a state per row has no size."""
    kind, *roles = PRODUCTS[place[0]]
    parts = {r: Quantizer(grain=PerRow(), range=EMA()) if r == place[1] else Quantizer() for r in roles}
    product = kind(**parts)
    with pytest.raises(ArgumentError, match=r"EMA.*row"):
        Recipe(name="mine", **{place[0]: product})
