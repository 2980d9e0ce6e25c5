"""What the gradient quantizers cost: processor time of quantization next to that of the integer products.

For each recipe and layer shape: the time to quantize every operand of a training step, the time of the three products,
and the whole step. Writes ``benchmarks/logs/fqt_cost.txt``:

    OMP_NUM_THREADS=1 python benchmarks/fqt_cost.py [--repeats N]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timing import header, medians
from torch import nn

import gradbits as gb
from gradbits.nn.sampling import sampled_product

LOG = Path(__file__).parent / "logs" / "fqt_cost.txt"
RECIPES: dict[str, dict[str, Any]] = {
    "int8_dynamic": {},
    "unified_int8": {"keep_float": ()},
    "statquant_ptq": {},
    "statquant_psq": {},
    "statquant_bhq": {},
    "adaptive_int8": {"keep_float": ()},
    "int4_transformer": {},
    "int4_transformer, no sampling": {"sampling": False},
    "int4_transformer, fixed steps": {"learned_steps": False},
}
SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear 2048 x 512 -> 512": (lambda: nn.Linear(512, 512), (2048, 512)),
    "conv 3x3, 64 -> 64, 16x16, batch 64": (lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 64, 16, 16)),
}


def pieces(layer: nn.Module, x: torch.Tensor, recipe: gb.Recipe | None) -> dict[str, Callable[[], object]]:
    """Return what is timed: quantization, products, the whole step."""
    layer = copy.deepcopy(layer)
    if recipe is not None:
        gb.quantize_(layer, replace(recipe, keep_float=()))
    x = x.clone().requires_grad_()
    g = torch.randn_like(layer(x))  # a first batch settles what is settled once

    def step() -> None:
        torch.autograd.grad(layer(x), (x, layer.weight), g)

    if recipe is None:
        return {"step": step}
    call = layer(x).grad_fn
    while not hasattr(call, "call"):
        call = call.next_functions[0][0]
    call = call.call

    def quantize() -> dict[str, Any]:
        forward = {role: q for role, (q, _) in call.quantize_forward({"input": x, "weight": layer.weight}).items()}
        first = call.quantize("grad_input", "gradient", g, False)[0]
        same = recipe.share_gradient and recipe.grad_input.gradient == recipe.grad_weight.gradient
        second = first if same else call.quantize("grad_weight", "gradient", g, False)[0]
        return {**forward, "grad_input": first, "grad_weight": second}

    ready = quantize()

    def products() -> None:
        p = call.products
        p.product("output", ready["input"], ready["weight"])
        for product, other, shape in (("grad_input", "weight", x.shape), ("grad_weight", "input", layer.weight.shape)):
            rule = getattr(recipe, product).sampling
            if rule is None:
                p.product(product, ready[product], ready[other])
            else:
                noise = call.key(product, "sampling")
                sampled_product(p, product, ready[product], ready[other], shape, rule=rule, noise=noise)

    return {"quantize": quantize, "products": products, "step": step}


def main() -> None:
    """Measure, print, write the log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    lines = [header(f"python benchmarks/fqt_cost.py --repeats {options.repeats}")]
    for title, (make, shape) in SHAPES.items():
        torch.manual_seed(0)
        layer, x = make(), torch.randn(shape)
        contest = {"fp32 step": pieces(layer, x, None)["step"]}
        for label, choices in RECIPES.items():
            recipe = gb.recipe(label.split(",")[0], **choices)
            contest.update({f"{label} {part}": run for part, run in pieces(layer, x, recipe).items()})
        found = medians(contest, options.repeats)
        lines.append(f"{title}: fp32 step {found['fp32 step']:.2f} ms")
        heads = ("quantize", "products", "step", "quantize/products", "fp32/step")
        lines.append(f"  {'recipe':34}" + "".join(f"{head:>18}" for head in heads))
        for label in RECIPES:
            q, p, whole = (found[f"{label} {part}"] for part in ("quantize", "products", "step"))
            ratios = (f"{q / p:.2f}", f"{found['fp32 step'] / whole:.2f}")
            numbers = (f"{q:.2f} ms", f"{p:.2f} ms", f"{whole:.2f} ms", *ratios)
            lines.append(f"  {label:34}" + "".join(f"{number:>18}" for number in numbers))
        lines.append("")
    text = "\n".join(lines)
    print(text)
    LOG.write_text(text)


if __name__ == "__main__":
    main()
