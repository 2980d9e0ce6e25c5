"""``quantize_`` and ``report``: which layers, why not the others, and what stays as it was."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import gradbits as gb
from gradbits.core.errors import ArgumentError, DtypeError, FallbackError, GradbitsError, NothingToQuantizeError
from gradbits.nn.layers import QuantizedLinear
from gradbits.quantizers.ranges import EMA


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.head = nn.Linear(4, 4), nn.Linear(4, 4)


def model() -> nn.Module:
    torch.manual_seed(0)
    parts = {"a": Block(), "b": Block(), "norm": nn.LayerNorm(4), "act": nn.ReLU(), "head": nn.Linear(4, 2)}
    return nn.ModuleDict(parts)


def recipes_of(net: nn.Module) -> dict[str, str]:
    return {row.name: row.recipe for row in gb.report(net).rows}


@pytest.mark.parametrize(
    ("rules", "quantized"),
    [
        ("int8_dynamic", {"a.attn", "a.head", "b.attn", "b.head", "head"}),
        ({"*": "int8_dynamic"}, {"a.attn", "a.head", "b.attn", "b.head", "head"}),
        ({"*.head": None, "*": "int8_dynamic"}, {"a.attn", "b.attn", "head"}),
        ({"*head": None, "*": "int8_dynamic"}, {"a.attn", "b.attn"}),
        ({"a.*": "int8_dynamic"}, {"a.attn", "a.head"}),
        ({"?.attn": "int8_dynamic"}, {"a.attn", "b.attn"}),
        ({"[ab].head": "int8_dynamic", "*": None}, {"a.head", "b.head"}),
    ],
)
def test_name_rules(rules, quantized):
    net = model()
    report = gb.quantize_(net, rules)
    assert {row.name for row in report.quantized} == quantized
    assert report == gb.report(net)
    assert all(row.reason for row in report.left_alone)


def test_several_recipes_in_one_model():
    net = model()
    four = gb.recipe("int8_dynamic", bits=4)
    gb.quantize_(net, {"a.*": four, "b.attn": "unified_int8", "b.*": None, "*": "int8_dynamic"})
    assert recipes_of(net) == {
        "a.attn": "int8_dynamic",
        "a.head": "int8_dynamic",
        "b.attn": "unified_int8",
        "b.head": "float",
        "head": "int8_dynamic",
    }
    assert net["a"].attn.assignment.recipe is four


@pytest.mark.parametrize("bad", [None, 3, ["*"], [("*", "int8_dynamic")], {"*": 3}, {"*": ["int8_dynamic"]}])
def test_rules_of_a_wrong_type(bad):
    with pytest.raises(DtypeError, match="rules"):
        gb.quantize_(model(), bad)


def test_illegal_arguments():
    with pytest.raises(ArgumentError, match="pattern 3"):
        gb.quantize_(model(), {3: "int8_dynamic"})
    with pytest.raises(ArgumentError, match="recipe='int9'"):
        gb.quantize_(model(), "int9")
    with pytest.raises(ArgumentError, match="compute='fast'"):
        gb.quantize_(model(), "int8_dynamic", compute="fast")
    with pytest.raises(ArgumentError, match="on_nonfinite='ignore'"):
        gb.quantize_(model(), "int8_dynamic", on_nonfinite="ignore")
    with pytest.raises(DtypeError, match=r"model: must be a torch\.nn.Module, not Tensor"):
        gb.quantize_(torch.ones(3), "int8_dynamic")


@pytest.mark.parametrize("rules", [{"nothing.*": "int8_dynamic"}, {"*": None}, {}, {"norm": "int8_dynamic"}])
def test_nothing_matches(rules):
    net = model()
    before = {n: type(m) for n, m in net.named_modules()}
    with pytest.raises(NothingToQuantizeError, match="would quantize no layer"):
        gb.quantize_(net, rules)
    assert {n: type(m) for n, m in net.named_modules()} == before


def test_a_model_without_layers():
    with pytest.raises(NothingToQuantizeError, match="no layers"):
        gb.quantize_(nn.Sequential(nn.ReLU(), nn.Dropout()), "int8_dynamic")


class Halved(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) / 2


UNSUPPORTED = {
    "subclass": (lambda: Halved(4, 4), "subclass of Linear"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "parametrized"),
    "lazy": (lambda: nn.LazyLinear(4), "no shape yet|subclass"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "multiplies its own weights"),
    "bilinear": (lambda: nn.Bilinear(4, 4, 4), "multiplies its own weights"),
    "embedding": (lambda: nn.Embedding(4, 4), "no product to quantize"),
    "recurrent": (lambda: nn.LSTM(4, 4), "multiplies its own weights"),
    "output_padding": (lambda: nn.ConvTranspose1d(4, 4, 3, dilation=3, stride=1, output_padding=2), "output_padding"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_left_alone_says_why_and_computes_as_before(name):
    make, why = UNSUPPORTED[name]
    torch.manual_seed(0)
    odd = make()
    net = nn.ModuleList([odd, nn.Linear(4, 4)])
    kind = type(odd)
    report = gb.quantize_(net, "int8_dynamic")
    (row,) = [r for r in report.rows if r.name == "0"]
    assert row.recipe == "float"
    assert re.search(why, row.reason), row.reason
    assert type(odd) is kind
    assert row.reason in str(report)


@pytest.mark.parametrize("name", ["subclass", "parametrized", "attention", "output_padding"])
def test_strict_refuses_what_would_fall_back(name):
    make, why = UNSUPPORTED[name]
    net = nn.ModuleDict({"odd": make(), "fine": nn.Linear(4, 4)})
    with pytest.raises(FallbackError, match=f"odd.*({why})"):
        gb.quantize_(net, "int8_dynamic", strict=True)
    assert type(net["fine"]) is nn.Linear
    gb.quantize_(net, {"odd*": None, "*": "int8_dynamic"}, strict=True)  # said by name: not a fallback
    assert type(net["fine"]) is QuantizedLinear


def test_strict_lets_pass_what_the_recipe_keeps_in_float():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2))
    report = gb.quantize_(net, "unified_int8", strict=True)
    assert {r.name for r in report.left_alone} == {"0", "4"}
    assert all("keep_float" in r.reason for r in report.left_alone)
    gb.quantize_(net, gb.recipe("unified_int8", keep_float=()))
    assert not gb.report(net).left_alone


def test_idempotent():
    net = model()
    first = gb.quantize_(net, "unified_int8")
    x = torch.randn(3, 4)
    net["a"].attn(x).sum().backward()
    state = copy.deepcopy(net.state_dict())
    assert gb.quantize_(net, "unified_int8") == first
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items() if not v.isnan().any())
    assert state.keys() == net.state_dict().keys()


def test_other_rules_replace_the_former():
    net = model()
    gb.quantize_(net, "unified_int8")
    assert any("quantizers" in key for key in net.state_dict())
    gb.quantize_(net, {"a.*": "int8_dynamic"}, compute="simulate")
    assert {name for name, recipe in recipes_of(net).items() if recipe != "float"} == {"a.attn", "a.head"}
    assert not any("quantizers" in key for key in net.state_dict())
    assert net["a"].attn.assignment.compute == "simulate"
    assert type(net["b"].attn) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_parameters_keep_name_dtype_and_identity(dtype):
    net = model().to(dtype)
    before = dict(net.named_parameters())
    opt = torch.optim.SGD(net.parameters(), lr=0.5)
    gb.quantize_(net, "int8_dynamic")
    after = dict(net.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[n] is p and p.dtype == dtype for n, p in before.items())
    layer = net["head"]
    old = layer.weight.detach().clone()
    layer(torch.ones(2, 4, dtype=dtype)).sum().backward()
    opt.step()
    assert not torch.equal(layer.weight, old)


def test_a_module_used_twice_is_listed_once():
    shared = nn.Linear(4, 4)
    report = gb.quantize_(nn.Sequential(shared, nn.ReLU(), shared), "int8_dynamic")
    assert len(report.rows) == 1


def test_the_root_itself():
    layer = nn.Linear(4, 4)
    assert gb.quantize_(layer, "int8_dynamic").rows[0].name == ""
    assert type(layer) is QuantizedLinear


def test_a_report_is_readable_and_is_json():
    net = model()
    before = gb.report(net)
    assert {r.reason for r in before.rows} == {"quantize_ was not asked to"}
    report = gb.quantize_(net, {"b.*": None, "*": gb.recipe("int8_dynamic", gradient_bits=5)})
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["grad_input"] == "5×8"
    text = str(report)
    assert text.splitlines()[-1] == "3 of 5 layers quantized"
    assert "rule 'b.*' leaves it in float" in text
    simulated = gb.quantize_(model(), "int8_dynamic", compute="simulate")
    assert {r.backend for r in simulated.rows} == {"simulate"}


def test_every_error_is_one_of_ours():
    for call in (lambda: gb.quantize_(model(), "x"), lambda: gb.quantize_(nn.ReLU(), "int8_dynamic")):
        with pytest.raises(GradbitsError):
            call()


def test_off_means_off():
    """A model that was never quantized, or is float again, holds plain classes and computes what PyTorch computes."""
    net = model()
    want = net["head"](torch.ones(1, 4))
    gb.quantize_(net, "int8_dynamic")
    gb.dequantize_(net)
    gb.dequantize_(net)
    assert {type(m).__module__.split(".")[0] for m in net.modules() if not isinstance(m, Block)} == {"torch"}
    assert torch.equal(net["head"](torch.ones(1, 4)), want)
    assert not gb.report(net).quantized


def test_fused_inference_of_encoders_does_not_bypass_quantized_layers() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        plain = encoder(x)
    gb.quantize_(encoder, gb.recipe("int8_dynamic").with_overrides({"output.weight.bits": 3}))
    calls = []
    linear = encoder.layers[0].linear1
    linear.forward = lambda h, forward=linear.forward: (calls.append(1), forward(h))[1]
    with torch.no_grad():
        quantized = encoder(x)
    assert calls
    assert not torch.allclose(quantized, plain, atol=1e-3)
    del linear.forward
    gb.dequantize_(encoder)
    with torch.no_grad():
        assert torch.equal(encoder(x), plain)


def test_a_pattern_that_decides_nothing_is_named() -> None:
    for rules in ({"nope": None, "*": "int8_dynamic"}, {"*": "int8_dynamic", "0": None}):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        with pytest.warns(UserWarning, match="decides for no layer"):
            assert len(gb.quantize_(net, rules).quantized) == 2  # the first match wins
        with pytest.raises(FallbackError, match="decides for no layer"):
            gb.quantize_(net, rules, strict=True)


@pytest.mark.parametrize("call", [gb.report, gb.dequantize_, lambda m: gb.quantize_(m, "int8_dynamic")])
def test_something_else_than_a_module_is_refused(call: Any) -> None:
    with pytest.raises(DtypeError, match="model: must be a"):
        call(None)


def test_states_are_made_where_the_layers_compute():
    net = nn.Sequential(nn.Linear(4, 4, device="meta"), gb.nn.Matmul())
    recipe = gb.recipe("int8_dynamic").with_overrides({"output.input.range": EMA()})
    gb.quantize_(net, recipe)
    states = dict(net.named_buffers())
    assert {name.split(".")[0] for name in states} == {"0", "1"}  # the product has no parameters of its own
    assert {t.device.type for t in states.values()} == {"meta"}
