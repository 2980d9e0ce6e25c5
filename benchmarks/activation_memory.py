"""Bytes that autograd keeps from one forward pass, with and without ``pack_activations``.

    python benchmarks/activation_memory.py

writes ``benchmarks/logs/activation_memory.txt``. Every tensor counts once, parameters are left out.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import gradbits as gb
from gradbits.train.models import build_model

LOG = Path(__file__).parent / "logs" / "activation_memory.txt"


def models() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Return each model with a batch."""
    torch.manual_seed(0)
    image = {"in_channels": 3, "classes": 10, "image_size": (32, 32)}
    gpt = build_model("gpt", {"vocabulary": 256, "context": 128}, {"d_model": 256, "layers": 6})
    return {
        "resnet20, batch 128, 32 x 32": (build_model("resnet20", image), torch.randn(128, 3, 32, 32)),
        "gpt d 256, 6 layers, batch 8, 128 bytes": (gpt, torch.randint(0, 256, (8, 128))),
    }


def kept(model: nn.Module, batch: torch.Tensor, bits: int | None) -> int:
    """Return the bytes kept; ``bits=None`` packs nothing."""
    # a group that no tensor reaches packs nothing and still counts
    least = 1024 if bits is not None else 1 << 60
    with gb.pack_activations(bits=bits or 8, min_elements=least) as packed:
        logits = model(batch)
        F.cross_entropy(logits.flatten(0, -2), torch.zeros(logits.shape[:-1].numel(), dtype=torch.int64))
    return packed.tally.after if bits is not None else packed.tally.before


def main() -> None:
    """Print and write the table."""
    lines = ["python benchmarks/activation_memory.py", f"torch {torch.__version__}", ""]
    lines.append(f"{'model':42}{'recipe':15}{'as it is':>12}{'8 bits':>18}{'4 bits':>18}{'2 bits':>18}")
    for label, (model, batch) in models().items():
        base = kept(model, batch, None)
        for recipe in ("fp32", "int8_dynamic"):
            net = copy.deepcopy(model)
            if recipe != "fp32":
                gb.quantize_(net, recipe)
            sizes = [kept(net, batch, bits) for bits in (None, 8, 4, 2)]
            cells = [f"{s / 1e6:8.1f} MB {s / base:5.3f}" for s in sizes]
            lines.append(f"{label:42}{recipe:15}{cells[0]:>12}" + "".join(f"{c:>18}" for c in cells[1:]))
    text = "\n".join(lines)
    LOG.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
