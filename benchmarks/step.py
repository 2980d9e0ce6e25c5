"""One training step: float32, bfloat16 autocast and recipes, with and without the native kernels.

OMP_NUM_THREADS=1 python benchmarks/step.py [--repeats N] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import header, medians, use_native

import gradbits
from gradbits.train.models import build_model

BATCH = {"resnet20": 64, "gpt": 4}
GPT = {"context": 256, "d_model": 256, "layers": 4, "heads": 4}
RECIPES = ("fp32", "bf16", "int8_dynamic", "unified_int8")


OFF = ", GRADBITS_NATIVE=0"


def step_of(model_name: str, recipe: str) -> Callable[[], None]:
    """Return a function that makes one training step."""
    torch.manual_seed(0)
    size = BATCH[model_name]
    if model_name == "gpt":
        model = build_model("gpt", {"vocabulary": 256}, GPT)
        inputs = torch.randint(0, 256, (size, GPT["context"]))
        targets = torch.randint(0, 256, (size * GPT["context"],))
    else:
        model = build_model("resnet20", {"in_channels": 3, "classes": 10}).to(memory_format=torch.channels_last)
        inputs = torch.randn(size, 3, 32, 32).to(memory_format=torch.channels_last)
        targets = torch.randint(0, 10, (size,))
    if recipe not in ("fp32", "bf16"):
        gradbits.quantize_(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    cast = torch.autocast("cpu", torch.bfloat16) if recipe == "bf16" else contextlib.nullcontext()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with cast:
            loss = F.cross_entropy(model(inputs).flatten(0, -2).float(), targets)
        loss.backward()
        optimizer.step()

    return step


def main() -> None:
    """Measure, print, and write the numbers where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(header(f"python benchmarks/step.py --repeats {options.repeats}"))
    records = []
    for model_name, size in BATCH.items():
        contest = {}
        for recipe in RECIPES:
            contest[recipe] = step_of(model_name, recipe)
            if recipe not in ("fp32", "bf16"):
                contest[recipe + OFF] = step_of(model_name, recipe)
        found = medians(contest, options.repeats, lambda name: use_native(not name.endswith(OFF)))
        use_native(True)
        print(f"{model_name}, batch {size}")
        for name, value in found.items():
            print(f"  {name:36} {value:8.1f} ms   fp32 / this {found['fp32'] / value:5.2f}")
        records.append({"model": model_name, "batch": size, "milliseconds": found})
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
