"""Variance of quantized gradients on a network trained for an epoch: PTQ, PSQ and BHQ, with the closed-form bounds.

Trains ``small_cnn`` on Fashion-MNIST in float, then draws the noise of every layer's gradient quantizer again and again
on one training batch. Writes the table to ``benchmarks/logs/fqt_variance.txt``, the picture to
``docs/pictures/fqt_variance.png``:

    python benchmarks/fqt_variance.py [--limit N] [--draws N]
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch.nn import functional as F

import gradbits as gb
from gradbits.observe import measure_variance, save_variance
from gradbits.observe.variance import VarianceReport
from gradbits.train.datasets import load_data
from gradbits.train.models import build_model
from gradbits.train.tasks import make_task

ROOT = Path(__file__).parent.parent
METHODS = ("statquant_ptq", "statquant_psq", "statquant_bhq")
BITS = (8, 6, 5, 4)
OTHERS = ("int8_dynamic", "unified_int8", "adaptive_int8", "int4_transformer")


def trained(limit: int | None) -> tuple[torch.nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return the network after one epoch, and a batch to measure on."""
    data = load_data("fashion-mnist").limited(limit)
    task = make_task(data, 128)
    torch.manual_seed(0)
    model = build_model("small_cnn", task.model_arguments())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=task.steps_per_epoch)
    for number in range(task.steps_per_epoch):
        batch = task.batch(0, number)
        loss = F.cross_entropy(model(batch.inputs), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return model, [tuple(task.batch(0, task.steps_per_epoch))]


def measured(model: torch.nn.Module, recipe: gb.Recipe, batch: tuple[torch.Tensor, ...], draws: int) -> VarianceReport:
    """Return the report of one recipe on a copy of the model."""
    net = copy.deepcopy(model)
    gb.quantize_(net, recipe)
    return measure_variance(net, lambda: F.cross_entropy(net(batch[0]), batch[1]), draws=draws)


def main() -> None:
    """Measure, print, and write the log and the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--draws", type=int, default=24)
    options = parser.parse_args()
    model, (batch,) = trained(options.limit)
    command = f"python benchmarks/fqt_variance.py --draws {options.draws}"
    command += f" --limit {options.limit}" if options.limit else ""
    lines = [command, f"torch {torch.__version__}; small_cnn, one epoch of Fashion-MNIST in fp32, batch of 128", ""]
    reports: dict[str, VarianceReport] = {}
    for bits in BITS:
        for name in METHODS:
            reports[f"{name} {bits}"] = measured(model, gb.recipe(name, gradient_bits=bits), batch, options.draws)
    layers = list(dict.fromkeys(r.layer for r in reports["statquant_ptq 8"].rows if r.product == "grad_input"))
    lines.append("grad_input, variance / |grad|^2 of each layer alone (in brackets: closed-form bound / |grad|^2)")
    lines.append("bits method         " + "".join(f"{layer:>24}" for layer in layers))
    for label, report in reports.items():
        name, bits_text = label.split()
        found = {r.layer: r for r in report.rows if r.product == "grad_input"}
        cells = "".join(f"{found[x].relative:>12.3g} ({found[x].bound / found[x].size:8.3g})" for x in layers)
        lines.append(f"{bits_text:4} {name:14} {cells}")
    lines += ["", "summed over the layers: variance of PTQ, PSQ, BHQ and the ratios"]
    for bits in BITS:
        total = [reports[f"{name} {bits}"].total("grad_input") for name in METHODS]
        lines.append(
            f"{bits} bits  " + "  ".join(f"{v:.3g}" for v in total)
            + f"   PTQ/PSQ {total[0] / total[1]:.2f}  PSQ/BHQ {total[1] / total[2]:.2f}"
        )
    worst = max((abs(r.bias_z), f"{label}, {r.layer}") for label, rep in reports.items() for r in rep.rows)
    lines += ["", f"largest |z| of the test for bias over all of the above: {worst[0]:.1f} ({worst[1]})", ""]
    for name in OTHERS:
        lines += [name, str(measured(model, gb.recipe(name), batch, options.draws)), ""]
    text = "\n".join(lines)
    print(text)
    if not options.limit:
        (ROOT / "benchmarks" / "logs" / "fqt_variance.txt").write_text(text)
        pictured = {label: report for label, report in reports.items() if label.endswith(" 5")}
        save_variance(ROOT / "docs" / "pictures" / "fqt_variance.png", pictured, "small_cnn, 5-bit gradients")


if __name__ == "__main__":
    main()
