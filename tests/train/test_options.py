"""Options: defaults, refusals, storage, and what a resumed run may be asked for."""

from __future__ import annotations

import json

import pytest

from gradbits.core.errors import ArgumentError, CorruptDataError, GradbitsError
from gradbits.train.entry import Entry, parse_entry
from gradbits.train.options import TrainOptions


def test_defaults_make_a_whole_run():
    options = TrainOptions().resolved()
    assert (options.data, options.model, options.networks) == ("digits", "small_cnn", ("unified_int8",))
    assert options.epochs == 40
    assert options.steps is None
    text = TrainOptions(text="book.txt").resolved()
    assert (text.data, text.model) == ("text", "gpt")
    assert text.steps
    assert text.text.startswith("/")


def test_json_round_trip():
    options = TrainOptions(seeds=(0, 1), networks=("fp32", "bf16"), model_set=("width=8",), lr=0.3).resolved()
    assert TrainOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options
    assert options.model_options() == {"width": 8}


def test_model_options_are_json_or_text():
    options = TrainOptions(model_set=("a=3", "b=0.5", "c=true", "d=gelu", "e=[1, 2]"))
    assert options.model_options() == {"a": 3, "b": 0.5, "c": True, "d": "gelu", "e": [1, 2]}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"data": "cifar"}, "data='cifar'"),
        ({"wire": "fp8"}, "wire='fp8'"),
        ({"wire": "qsgd", "wire_bits": 99}, "wire_bits=99: must be an integer from 2 to 8"),
        ({"wire": "onebit", "wire_bucket": 512}, "wire_bucket=512"),
        ({"wire": "fp16", "wire_bits": 4}, "wire_bits=4"),
        ({"wire": "alq", "entropy": "gzip"}, "entropy='gzip'"),
        ({"optimizer": "quantized_adam", "wire": "alq"}, "wire='alq'"),
        ({"data": "pydoc", "model": "resnet20"}, "model='resnet20'"),
        ({"data": "digits", "model": "gpt"}, "model='gpt'"),
        ({"epochs": 1, "steps": 3}, "steps=3"),
        ({"epochs": 0}, "epochs=0"),
        ({"steps": True}, "steps=True"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"limit": -1}, "limit=-1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"optimizer": "lion"}, "'sgd', 'adam', 'adamw'"),
        ({"schedule": "step"}, "'cosine', 'constant'"),
        ({"compute": "fast"}, "'auto', 'integer', 'simulate'"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "seeds='1,1'"),
        ({"seeds": (-1,)}, "seeds=-1"),
        ({"networks": ("fp32", "none")}, "same network"),
        ({"networks": ("fp32:gradient.bits=5",)}, "fp32 has no quantizers"),
        ({"networks": ("int8_dynamic:gradient.bits",)}, "path=value"),
        ({"networks": ("fp32",), "overrides": ("gradient.bits=5",)}, "no quantizers to override"),
        ({"device": "abacus"}, "device='abacus'"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_what_is_not_legal_is_named(given, named):
    with pytest.raises(GradbitsError, match=named):
        TrainOptions(**given).resolved()


def test_entries():
    assert parse_entry("none") == Entry(recipe="fp32")
    entry = parse_entry("unified_int8:gradient.bits=5:weight.bits=4", ("gradient.bits=6", "activation.bits=7"))
    assert dict(entry.overrides) == {"gradient.bits": "5", "activation.bits": "7", "weight.bits": "4"}
    assert entry.slug == "unified_int8_gradient.bits=5_activation.bits=7_weight.bits=4"
    assert parse_entry("bf16", ("gradient.bits=6",)).overrides == ()


def test_a_resumed_run_takes_the_stored_options_and_refuses_others():
    stored = TrainOptions(lr=0.1, networks=("none", "bf16"), text=None).resolved()
    assert TrainOptions().merged(stored) == stored
    assert TrainOptions(lr=0.1, data="digits", networks=("fp32", "bf16")).merged(stored) == stored
    with pytest.raises(ArgumentError, match=r"lr=0\.2: the run to resume was started with 0\.1"):
        TrainOptions(lr=0.2).merged(stored)
    with pytest.raises(ArgumentError, match=r"networks=fp32: .* fp32,bf16"):
        TrainOptions(networks=("fp32",)).merged(stored)


def test_unknown_stored_options_are_refused():
    with pytest.raises(CorruptDataError, match="'colour'"):
        TrainOptions.from_dict({"colour": "red"})
