"""Recipes travel as JSON, take overrides, and refuse nonsense by name."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest

import gradbits as gb
from gradbits.core.errors import ArgumentError, GradbitsError
from gradbits.core.grain import PerRow
from gradbits.quantizers.grids import Affine
from gradbits.quantizers.quantizer import Quantizer
from gradbits.recipes.recipe import GradInput, Output, Recipe, parse_value
from gradbits.recipes.registry import configured


@pytest.fixture
def recipe():
    return gb.recipe("int8_dynamic")


@pytest.mark.parametrize("name", gb.recipes())
def test_json_round_trip(name):
    recipe = gb.recipe(name)
    text = recipe.to_json()
    assert Recipe.from_json(text) == recipe
    assert json.loads(text)["name"] == name


@pytest.mark.parametrize("name", gb.recipes())
def test_every_recipe_says_what_it_is(name):
    info = gb.recipes()[name]
    assert info.name == name == gb.recipe(name).name
    assert info.title
    assert info.factory.__doc__
    assert "Args:" in info.factory.__doc__
    for option in info.options:
        assert option in info.factory.__doc__, f"{option} is not documented"


def test_unknown_recipe():
    with pytest.raises(ArgumentError, match=r"recipe='int7': no such recipe; known are .*int8_dynamic"):
        gb.recipe("int7")


def test_unknown_option():
    with pytest.raises(ArgumentError, match="colour='red': recipe 'int8_dynamic' has the options bits"):
        gb.recipe("int8_dynamic", colour="red")


@pytest.mark.parametrize("bits", [1, 9, True, 4.0, "4"])
def test_illegal_bits_option(bits):
    with pytest.raises(ArgumentError, match="bits="):
        gb.recipe("int8_dynamic", bits=bits)


def test_overrides(recipe):
    changed = recipe.with_overrides(
        {
            "gradient.bits": "5",
            "output.weight.grain": "channel:0",
            "output.input.grain": "row",
            "share_gradient": "false",
            "keep_float": '["last_linear"]',
            "grad_input.gradient.rounding": "nearest",
            "name": "mine",
        }
    )
    assert {q.bits for _, role, q in changed.operands() if role == "gradient"} == {5}
    assert changed.output.input.grain == PerRow()
    assert changed.share_gradient is False
    assert changed.keep_float == ("last_linear",)
    assert (changed.grad_input.gradient.rounding, changed.grad_weight.gradient.rounding) == ("nearest", "stochastic")
    assert changed.name == "mine"
    assert recipe == gb.recipe("int8_dynamic")
    assert Recipe.from_json(changed.to_json()) == changed


def test_overrides_compose(recipe):
    assert recipe.with_overrides({}) == recipe
    a = recipe.with_overrides({"gradient.bits": 5}).with_overrides({"gradient.bits": 6})
    assert a == recipe.with_overrides({"gradient.bits": 6})
    whole = recipe.with_overrides({"weight.grid": Affine(bits=6)})
    assert whole.output.weight.grid == whole.grad_input.weight.grid == Affine(bits=6)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("colour", "red"),
        ("", "1"),
        (".", "1"),
        ("gradient", "5"),
        ("gradient.", "5"),
        (".bits", "5"),
        ("gradient.bits.more", "5"),
        ("gradient.colour", "red"),
        ("output.gradient.bits", "5"),
        ("learning_rate.alpha", "5"),
        ("gradient.bits", "1"),
        ("gradient.bits", "nine"),
        ("gradient.bits", "true"),
        ("gradient.bits", "4.0"),
        ("gradient.bits", "null"),
        ("gradient.grid", "symmetric"),
        ("gradient.range", "absmax"),
        ("gradient.grain", "rows"),
        ("gradient.grain", "3"),
        ("gradient.estimator", "ste"),
        ("gradient.rounding", "up"),
        ("output", "5"),
        ("output.input", "5"),
        ("grad_weight", "none"),
        ("keep_float", "head"),
        ("keep_float", '["head"]'),
        ("keep_float", "5"),
        ("share_gradient", "maybe"),
        ("share_gradient", "1"),
        ("matmul", "maybe"),
        ("learning_rate", "fast"),
        ("name", "5"),
        ("name", ""),
    ],
)
def test_nonsense_overrides(recipe, path, value):
    with pytest.raises(GradbitsError) as caught:
        recipe.with_overrides({path: value})
    assert str(caught.value).strip()


def test_an_override_names_what_is_legal(recipe):
    with pytest.raises(ArgumentError, match=r"gradient\.colour='red': Quantizer has no 'colour'; legal are grid,"):
        recipe.with_overrides({"gradient.colour": "red"})
    with pytest.raises(ArgumentError, match="does not quantize gradient"):
        Recipe(name="forward").with_overrides({"gradient.bits": 4})


@pytest.mark.parametrize(
    "options",
    [
        {"keep_float": ("head",)},
        {"keep_float": "last_linear"},
        {"matmul": "yes"},
        {"share_gradient": "yes"},
        {"output": Quantizer()},
        {"output": GradInput(gradient=Quantizer(), weight=Quantizer())},
        {"learning_rate": 0.1},
        {"name": 3},
        {"name": ""},
    ],
    ids=str,
)
def test_illegal_fields(options):
    with pytest.raises(GradbitsError, match=next(iter(options))):
        Recipe(**{"name": "mine", **options})


@pytest.mark.parametrize("value", [8, "int8", None])
def test_an_operand_is_a_quantizer(value):
    with pytest.raises(GradbitsError, match="weight"):
        Output(input=Quantizer(), weight=value)


def test_recipes_are_frozen_and_hashable(recipe):
    with pytest.raises(FrozenInstanceError):
        recipe.name = "other"
    assert hash(recipe) == hash(gb.recipe("int8_dynamic"))


def test_the_registry_holds_no_name_twice():
    names = [info.factory.__module__ + "." + name for name, info in gb.recipes().items()]
    assert len(names) == len(set(names)) >= 2


def test_settings_by_name_are_options_first():
    """As on the command line: texts, read as JSON where they are JSON."""
    made = configured("int4_transformer", {"sampling": "false", "attention": "int8_dynamic", "weight.grid.bits": "3"})
    assert made.grad_input.sampling is None
    assert made.matmul == gb.recipe("int8_dynamic")
    assert made.output.weight.bits == 3
    assert configured("statquant_bhq", {"matmul": "true"}).matmul.name == "statquant_psq"
    assert configured("statquant_psq", {"keep_float": '["last_linear"]'}).keep_float == ("last_linear",)
    assert configured("unified_int8", {}) == gb.recipe("unified_int8")
    # options shape the recipe before fields are replaced, whatever the order
    settings = {"grad_input.gradient.bits": "6", "gradient_bits": "4"}
    assert configured("statquant_psq", settings).grad_input.gradient.bits == 6


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("int9", {}, "no such recipe"),
        ("int4_transformer", {"foo": "1"}, "foo='1'.*'int4_transformer' has the options hadamard.*fields name"),
        ("int4_transformer", {"gradient.foo": "1"}, r"gradient\.foo"),
        ("statquant_psq", {"grad_weight.gradient.grain": "row"}, "grad_weight sums over that axis"),
        ("int4_transformer", {"hadamard": "3"}, "power of two"),
        ("int4_transformer", {"sampling": "maybe"}, "sampling='maybe'"),
        ("int4_transformer", {"learned_steps": "1"}, "learned_steps=1"),
        ("adaptive_int8", {"vectorized": "no"}, "vectorized='no'"),
        ("statquant_bhq", {"fallback": "no"}, "fallback='no'"),
        ("statquant_bhq", {"matmul": "no"}, "matmul='no'"),
        ("statquant_ptq", {"matmul": "no"}, "matmul='no'"),
    ],
)
def test_settings_that_are_not_legal(name, settings, message):
    with pytest.raises(GradbitsError, match=message):
        configured(name, settings)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("qat_int8", {"weight_bits": 1}, "weight_bits=1: must be an integer from 2 to 8"),
        ("qat_int8", {"activation_bits": 1}, "activation_bits=1: must be an integer from 2 to 8"),
        ("qat_int8", {"activation_bits": 4, "weight_bits": 9}, "weight_bits=9: must be an integer from 2 to 8"),
        ("qat_int8", {"decay": 2}, "decay=2: must be a number in [0, 1)"),
        ("qat_int8", {"delay": -1}, "delay=-1: must be an integer of at least 0"),
        ("qat_int8", {"freeze": "x"}, "freeze='x': must be an integer of at least 0"),
        ("qat_int8", {"rounding": "up"}, "rounding='up': must be one of 'single', 'double'"),
        ("ewgs", {"period": 0, "samples": 0}, "period=0: must be an integer of at least 1"),
        ("ewgs", {"quantizer_rate": -1}, "quantizer_rate=-1: must be a number in [0, inf)"),
        ("lsq", {"quantizer_rate": "x"}, "quantizer_rate='x': must be a number in [0, inf)"),
        ("int8_dynamic", {"bits": 1}, "bits=1: must be an integer from 2 to 8"),
        ("adaptive_int8", {"bits": 9}, "bits=9: must be an integer from 2 to 8"),
    ],
)
def test_an_error_names_the_option_that_was_given(name, options, message):
    with pytest.raises(GradbitsError) as caught:
        gb.recipe(name, **options)
    assert str(caught.value) == message
    with pytest.raises(GradbitsError) as caught:
        configured(name, options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "path", "value", "legal"),
    [
        ("ewgs", "weight.bits", "9", "an integer from 1 to 8"),
        ("ewgs", "output.weight.bits", "9", "an integer from 1 to 8"),
        ("ewgs", "hessian.period", "0", "an integer of at least 1"),
        ("ewgs", "hessian.period", "x", "an integer of at least 1"),
        ("ewgs", "hessian.tolerance", "-1", "a number in [0, inf)"),
        ("ewgs", "hessian", "5", "HessianScaling or None"),
        ("ewgs", "quantizer_learning.rate", "-1", "a number in [0, inf)"),
        ("qat_int8", "qat.delay", "-1", "an integer of at least 0"),
        ("qat_int8", "qat.rounding", "triple", "one of 'single', 'double'"),
        ("qat_int8", "input.range.decay", "2", "a number in [0, 1)"),
        ("int8_dynamic", "gradient.bits", "1", "an integer from 2 to 8"),
    ],
)
def test_an_error_names_the_path_that_was_set(name, path, value, legal):
    shown = repr(parse_value(value))
    with pytest.raises(GradbitsError) as caught:
        gb.recipe(name).with_overrides({path: value})
    assert str(caught.value) == f"{path}={shown}: must be {legal}"
