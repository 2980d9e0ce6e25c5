"""Native kernels against what runs without them, and against float32, each as a ratio within one run.

OMP_NUM_THREADS=1 python benchmarks/kernels.py [--repeats N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from timing import header, medians

from gradbits.core.noise import NoiseKey
from gradbits.kernels import coding, onednn, reference
from gradbits.kernels import quantize as torch_quantize
from gradbits.kernels.dispatch import Epilogue
from gradbits.kernels.geometry import ConvGeometry
from gradbits.kernels.native import convolutions, packing, products, quantize

Contest = dict[str, Callable[[], object]]
CONVS = (  # batch, channels in, out, kernel, stride, image side
    (32, 1, 16, 3, 1, 28),
    (32, 32, 32, 3, 1, 14),
    (32, 64, 64, 3, 1, 32),
    (32, 128, 128, 3, 1, 16),
    (32, 64, 64, 3, 1, 8),
    (32, 64, 128, 3, 2, 32),
    (32, 32, 32, 3, 1, 16),
    (32, 16, 16, 3, 1, 32),
    (32, 3, 16, 3, 1, 32),
)


def codes(*shape: int) -> torch.Tensor:
    """Return random codes; images with channels last."""
    found = torch.randint(-127, 128, shape, dtype=torch.int8)
    return found.to(memory_format=torch.channels_last) if len(shape) == 4 else found


def coding_contests() -> dict[str, Contest]:
    """Return what moves memory: against the torch reference and a copy."""
    x, key = torch.randn(8192, 2048), NoiseKey.of(1)
    y = torch.empty_like(x)
    whole = torch_quantize.CodeMap(torch.tensor([[30.0]]), -127, 127)
    by_row = torch_quantize.CodeMap(torch.rand(8192, 1) * 30, -127, 127)
    contests: dict[str, Contest] = {}
    for name, m, noise in (("nearest", whole, None), ("stochastic", whole, key), ("stochastic, rows", by_row, key)):
        contests[f"quantize {name}, 64 MiB"] = {
            "native": lambda m=m, noise=noise: quantize.quantize(x, m, noise),
            "torch": lambda m=m, noise=noise: torch_quantize.quantize(x, m, noise),
            "copy": lambda: y.copy_(x),
        }
    for axis in (None, 0, 1):
        contests[f"minimum and maximum, axis {axis}, 64 MiB"] = {
            "native": lambda axis=axis: quantize.min_max(x, axis),
            "torch": lambda axis=axis: coding.min_max(x, axis),
            "copy": lambda: y.copy_(x),
        }
    few = torch.randint(-8, 8, (1 << 24,), dtype=torch.int8)
    packed = packing.pack(few, 4)
    contests["pack 4 bits, 16 MiB"] = {"native": lambda: packing.pack(few, 4), "torch": lambda: coding.pack(few, 4)}
    contests["unpack 4 bits, 16 MiB"] = {
        "native": lambda: packing.unpack(packed, 4, few.numel()),
        "torch": lambda: coding.unpack(packed, 4, few.numel()),
    }
    return contests


def matmul_contests() -> dict[str, Contest]:
    """Return the three products of linear layers, and a batch of attention products."""
    contests: dict[str, Contest] = {}
    e = Epilogue(torch.tensor([[0.01]]))
    for m, k, n in ((8192, 1024, 1024), (2048, 1024, 1024), (2048, 512, 2048), (2048, 512, 512), (128, 784, 128)):
        x, w, g = codes(m, k), codes(n, k), codes(m, n)
        for product, a, b in (("output", x, w.t()), ("grad_input", g, w), ("grad_weight", g.t(), x)):
            fa, fb = a.float(), b.float()
            contests[f"matmul {product} {m}x{k}->{n}"] = {
                "native": lambda a=a, b=b: products.matmul(a, b, e),
                "torch": lambda a=a, b=b: reference.matmul(a, b, e),
                "library alone": lambda a=a, b=b: products.own_matmul(a, b, e),
                "torch._int_mm, no epilogue": lambda a=a, b=b: torch._int_mm(a, b),
                "fp32": lambda fa=fa, fb=fb: fa @ fb,
            }
    a, b = codes(64, 256 * 64).view(64, 256, 64), codes(64, 64 * 256).view(64, 64, 256)
    fa, fb = a.float(), b.float()
    one = Epilogue(torch.tensor(0.01))
    contests["matmul of a batch, 64 x (256x64->256)"] = {
        "native": lambda: products.matmul(a, b, one),
        "torch": lambda: reference.matmul(a, b, one),
        "fp32": lambda: fa @ fb,
    }
    return contests


def conv_contests() -> dict[str, Contest]:
    """Return the three products of convolutions; ``torch`` is the fastest path without the library."""
    contests: dict[str, Contest] = {}
    e = Epilogue(torch.full((1, 1, 1, 1), 0.01))
    for batch, ci, co, k, s, side in CONVS:
        g = ConvGeometry((s, s), (k // 2, k // 2), (1, 1), 1, (side, side), (k, k))
        x, w, grad = codes(batch, ci, side, side), codes(co, ci, k, k), codes(batch, co, *g.output_size)
        fx, fw, fg = x.float(), w.float(), grad.float()

        def backward(
            mask: tuple[bool, bool, bool], g: ConvGeometry = g, fx: object = fx, fw: object = fw, fg: object = fg
        ) -> object:
            return torch.ops.aten.convolution_backward(
                fg, fx, fw, None, g.stride, g.padding, g.dilation, False, (0, 0), 1, mask
            )

        name = f"{batch}x{ci}->{co}, {k}x{k}/{s}, {side}x{side}"
        contests[f"conv output {name}"] = {
            "native": lambda x=x, w=w, g=g: convolutions.conv_output(x, w, g, e),
            "torch": lambda x=x, w=w, g=g: onednn.conv_output(x, w, g, e),
            "fp32": lambda fx=fx, fw=fw, g=g: torch.conv2d(fx, fw, None, g.stride, g.padding),
        }
        contests[f"conv grad_input {name}"] = {
            "native": lambda grad=grad, w=w, g=g: convolutions.conv_grad_input(grad, w, g, e),
            "torch": lambda grad=grad, w=w, g=g: onednn.conv_grad_input(grad, w, g, e),
            "fp32": lambda backward=backward: backward((True, False, False)),
        }
        contests[f"conv grad_weight {name}"] = {
            "native": lambda grad=grad, x=x, g=g: convolutions.conv_grad_weight(grad, x, g, e),
            "torch": lambda grad=grad, x=x, g=g: reference.conv_grad_weight(grad, x, g, e),
            "fp32": lambda backward=backward: backward((False, True, False)),
        }
    return contests


def main() -> None:
    """Measure, print, and write the numbers where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    print(header(f"python benchmarks/kernels.py --repeats {options.repeats}"))
    print(f"{'operation':52} {'native':>9} {'torch':>9}  {'torch / native':>14}  others / native")
    records = []
    for name, contest in {**coding_contests(), **matmul_contests(), **conv_contests()}.items():
        found = medians(contest, options.repeats)
        own = found["native"]
        others = ", ".join(f"{k} {v / own:.2f}" for k, v in found.items() if k not in ("native", "torch"))
        print(f"{name:52} {own:6.2f} ms {found['torch']:6.2f} ms  {found['torch'] / own:14.2f}  {others}")
        records.append({"operation": name, "milliseconds": found})
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
