"""Law 2 and the values themselves: every layer class, recipes with every legal grain, grid and offset."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import gradbits as gb
from gradbits.core.grain import PerChannel, PerRow, PerTensor
from gradbits.nn.bilinear import OPERANDS
from gradbits.nn.call import Call
from gradbits.nn.layers import QUANTIZED_CLASSES
from gradbits.quantizers.grids import Affine, Grid, Symmetric
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import AbsMax, MinMax
from gradbits.recipes.recipe import LEGAL_AXIS, GradInput, GradWeight, Output, Recipe

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

GRIDS: dict[str, Grid] = {
    "symmetric": Symmetric(),
    "offset": Affine(),
    "zero_point": Affine(bits=7, zero="widen"),
    "nudged": Affine(bits=5, zero="nudge"),
    "narrow": Symmetric(bits=3),
}


def make_recipe(grid: str, other: str, fine: bool) -> Recipe:
    """A recipe whose operands have ``grid`` and ``other``, one scale a tensor or the finest legal grain."""

    def q(product: str, role: str, which: str) -> Quantizer:
        axis = LEGAL_AXIS[product, role]
        grain = PerTensor() if not fine else PerRow() if axis == 0 and role != "weight" else PerChannel(axis=axis)
        kind = GRIDS[which]
        rule = AbsMax() if isinstance(kind, Symmetric) else MinMax()
        return Quantizer(
            grid=kind, grain=grain, range=rule, rounding="stochastic" if role == "gradient" else "nearest"
        )

    return Recipe(
        name="mixed",
        output=Output(input=q("output", "input", grid), weight=q("output", "weight", other)),
        grad_input=GradInput(
            gradient=q("grad_input", "gradient", other), weight=q("grad_input", "weight", grid)
        ),
        grad_weight=GradWeight(
            gradient=q("grad_weight", "gradient", grid), input=q("grad_weight", "input", other)
        ),
    )


PARTS = [
    ("symmetric", "symmetric", False),
    ("symmetric", "symmetric", True),
    ("offset", "zero_point", False),
    ("offset", "zero_point", True),
    ("zero_point", "offset", True),
    ("nudged", "symmetric", False),
    ("narrow", "offset", True),
]
RECIPES = {f"{a}-{b}-{'fine' if fine else 'tensor'}": (a, b, fine) for a, b, fine in PARTS}


@dataclass(frozen=True)
class Case:
    make: object
    shape: tuple[int, ...]
    second: tuple[int, ...] = ()


LAYERS = {
    "Linear": Case(lambda: nn.Linear(7, 5), (6, 7)),
    "Linear 3d": Case(lambda: nn.Linear(7, 5, bias=False), (2, 3, 7)),
    "Linear 1d": Case(lambda: nn.Linear(7, 5), (7,)),
    "Matmul": Case(gb.nn.Matmul, (2, 3, 4, 5), (2, 3, 5, 6)),
    "Matmul broadcast": Case(gb.nn.Matmul, (2, 1, 4, 5), (3, 5, 6)),
    "Matmul 2d": Case(gb.nn.Matmul, (4, 5), (5, 6)),
    "Conv1d": Case(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2), (3, 4, 9)),
    "Conv2d": Case(lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 7, 8)),
    "Conv2d same": Case(lambda: nn.Conv2d(3, 4, (4, 3), padding="same", bias=False), (2, 3, 5, 6)),
    "Conv2d valid": Case(lambda: nn.Conv2d(3, 4, 2, padding="valid"), (2, 3, 5, 6)),
    "Conv2d circular": Case(lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 5, 6)),
    "Conv2d reflect": Case(lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), (2, 3, 5, 6)),
    "Conv2d groups": Case(lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 5, 5)),
    "Conv2d depthwise": Case(lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2), (2, 4, 7, 5)),
    "Conv2d covered": Case(lambda: nn.Conv2d(3, 4, 2, padding=3), (2, 3, 4, 4)),
    "Conv2d unbatched": Case(lambda: nn.Conv2d(3, 4, 3), (3, 5, 6)),
    "Conv3d": Case(lambda: nn.Conv3d(2, 3, 2, stride=2, padding=1), (2, 2, 4, 3, 4)),
    "ConvTranspose1d": Case(lambda: nn.ConvTranspose1d(4, 3, 3, stride=2, output_padding=1), (2, 4, 5)),
    "ConvTranspose2d": Case(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 5, 4)),
    "ConvTranspose2d groups": Case(lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), (2, 4, 3, 3)),
    "ConvTranspose3d": Case(lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 3, 2, 3)),
}


def problem(name: str) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(3)
    case = LAYERS[name]
    return case.make(), [torch.randn(s) + 0.3 for s in (case.shape, case.second) if s]


def run(layer: nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    inputs = [x.clone().requires_grad_() for x in inputs]
    torch.manual_seed(5)
    y = layer(*inputs)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) + 0.2
    return [y.detach(), *torch.autograd.grad(y, [*inputs, *layer.parameters()], g)]


def quantized(name: str, recipe: Recipe, compute: str) -> tuple[nn.Module, list[torch.Tensor]]:
    layer, inputs = problem(name)
    gb.quantize_(layer, recipe, compute=compute, strict=True)
    return layer, inputs


def refusal(name: str, fine: bool) -> bool:
    """Whether the layer cannot follow scales per channel, by law 1."""
    return fine and ("groups" in name or "depthwise" in name or "Matmul" in name)


CASES = [(n, r) for n in LAYERS for r in RECIPES if not refusal(n, RECIPES[r][2])]


def test_every_class_is_here():
    kinds = {type(case.make()) for case in LAYERS.values()}
    assert kinds == set(QUANTIZED_CLASSES)


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_simulated_equals_integer(name, recipe):
    made = make_recipe(*RECIPES[recipe])
    results = [run(*quantized(name, made, compute)) for compute in ("integer", "simulate", "auto")]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_products_are_those_of_the_dequantized_operands(name, recipe, monkeypatch):
    """Record what is quantized, then recompute each product in float64 from the dequantized operands."""
    seen: dict[tuple[str, str], torch.Tensor] = {}
    original = Call.quantize

    def record(self, product, role, *args, **kwargs):
        codes, mask = original(self, product, role, *args, **kwargs)
        seen[product, role] = codes.dequantize(torch.float64)
        return codes, mask

    monkeypatch.setattr(Call, "quantize", record)
    layer, inputs = quantized(name, make_recipe(*RECIPES[recipe]), "auto")
    products = layer.products(products_size(layer, inputs[0]))
    y, *grads = run(layer, inputs)

    def product(which: str) -> torch.Tensor:  # equal quantizers share the codes of the forward pass
        a, b = (seen.get((which, role), seen.get(("output", role))) for role in OPERANDS[which])
        return products.in_float(which, a, b)

    wanted = {which: product(which) for which in OPERANDS}
    bias = getattr(layer, "bias", None)
    if bias is not None:
        wanted["output"] = wanted["output"] + products.bias_for_output(bias.detach().double(), wanted["output"].dim())
    close(y, wanted["output"])
    if inputs[0].shape.numel() == wanted["grad_input"].numel() and not padded_by_hand(layer):
        close(grads[0], wanted["grad_input"])
    if grads[1].numel() == wanted["grad_weight"].numel():
        close(grads[1], wanted["grad_weight"])


def padded_by_hand(layer: nn.Module) -> bool:
    return getattr(layer, "padding_mode", "zeros") != "zeros" or getattr(layer, "padding", None) == "same"


def products_size(layer: nn.Module, x: torch.Tensor) -> tuple[int, ...]:
    spatial = len(getattr(layer, "kernel_size", ()))
    if not spatial:
        return ()
    if getattr(layer, "transposed", False):
        with torch.no_grad():
            return tuple(layer(x).shape[-spatial:])
    extra = [0] * spatial
    if layer.padding_mode != "zeros" or layer.padding == "same":
        extra = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if layer.padding == "same" and layer.padding_mode == "zeros" and all(e % 2 == 0 for e in extra):
            extra = [0] * spatial
    return tuple(n + e for n, e in zip(x.shape[-spatial:], extra, strict=True))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    want = want.reshape(got.shape)
    assert float((got.double() - want).abs().max()) <= 2e-6 * float(want.abs().max()) * 4


@pytest.mark.parametrize("name", LAYERS)
def test_close_to_float_with_eight_bits(name):
    layer, inputs = problem(name)
    want = run(layer, inputs)
    gb.quantize_(layer, "int8_dynamic")
    for a, b in zip(run(layer, inputs), want, strict=True):
        assert a.shape == b.shape
        assert float((a - b).norm()) < 0.06 * float(b.norm())


@pytest.mark.parametrize("name", LAYERS)
def test_back_in_float_nothing_is_left(name):
    layer, inputs = problem(name)
    want, kind = run(layer, inputs), type(layer)
    untouched = set(layer.__dict__)
    with_states = gb.recipe("unified_int8", keep_float=())
    gb.quantize_(layer, "int8_dynamic" if "Matmul" in name else with_states)
    gb.dequantize_(layer)
    assert type(layer) is kind
    assert set(layer.__dict__) == untouched
    assert all(torch.equal(a, b) for a, b in zip(run(layer, inputs), want, strict=True))
