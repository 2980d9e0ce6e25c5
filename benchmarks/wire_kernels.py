"""Kernels of the wire: GB/s of float32, next to a copy and a cast of the same values, all in turns.

OMP_NUM_THREADS=1 python benchmarks/wire_kernels.py [--numel N] [--repeats N] [--torch] [--log FILE]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from timing import header, medians

from gradbits.bench.gradients import drawn
from gradbits.core.noise import NoiseKey
from gradbits.kernels import buckets as torch_buckets
from gradbits.kernels import huffman_symbols
from gradbits.kernels.huffman import code_lengths, encoded_bits
from gradbits.kernels.native import buckets
from gradbits.wire.registry import codec

KINDS = (  # name, codec, its options
    ("qsgd 4 bits, bucket 512, largest magnitude", "qsgd", {"bits": 4, "bucket": 512, "norm": "linf"}),
    ("qsgd 4 bits, bucket 8192, L2", "qsgd", {"bits": 4, "bucket": 8192, "norm": "l2"}),
    ("qsgd 8 bits, bucket 512, largest magnitude", "qsgd", {"bits": 8, "bucket": 512, "norm": "linf"}),
    ("alq 3 bits, bucket 8192, L2", "alq", {"bits": 3, "bucket": 8192, "norm": "l2"}),
)
Contest = dict[str, Callable[[], object]]


def bucket_contest(x: torch.Tensor, out: torch.Tensor, slow: bool) -> Contest:
    """Return norms and codes from values, and values added to others."""
    contest: Contest = {}
    key = NoiseKey.of(1)
    for name, method, options in KINDS:
        chosen = codec(method, feedback=False, **options)
        state = chosen.init_state()
        seen = chosen.statistics(x)
        levels = chosen.levels(chosen.adapt(state, seen) if seen.numel() else state)
        bits, bucket = options["bits"], options["bucket"]
        order = 2.0 if options["norm"] == "l2" else math.inf
        norms = torch.empty(-(-x.numel() // bucket))
        packed = buckets.encode_buckets(x, norms, levels, bucket, bits, key, order)
        for where, made in (("", buckets), (", torch", torch_buckets)) if slow else (("", buckets),):
            contest[f"encode {name}{where}"] = (
                lambda made=made, levels=levels, bucket=bucket, bits=bits, order=order, norms=norms: (
                    made.encode_buckets(x, norms, levels, bucket, bits, key, order)
                )
            )
            contest[f"decode and add {name}{where}"] = (
                lambda made=made, levels=levels, bucket=bucket, bits=bits, norms=norms, packed=packed: (
                    made.decode_buckets(packed, norms, levels, bucket, bits, x.numel(), out)
                )
            )
    return contest


def huffman_contest(x: torch.Tensor) -> tuple[Contest, str]:
    """Return coding of symbols with 8 levels, and how many bits they take."""
    norms = torch.empty(-(-x.numel() // 512))
    levels = torch.arange(8).mul(2 / 7).sub(1)
    packed = buckets.encode_buckets(x, norms, levels, 512, 3, NoiseKey.of(2), math.inf)
    symbols = buckets.unpack_symbols(packed, 3, x.numel())
    counts = huffman_symbols.count_symbols(symbols, 8)
    lengths = torch.from_numpy(code_lengths(counts.numpy()))
    message = huffman_symbols.encode_symbols(symbols, lengths)
    assert torch.equal(huffman_symbols.decode_symbols(message), symbols)
    contest: Contest = {
        "count 8 levels": lambda: huffman_symbols.count_symbols(symbols, 8),
        "Huffman encode 8 levels": lambda: huffman_symbols.encode_symbols(symbols, lengths),
        "Huffman decode 8 levels": lambda: huffman_symbols.decode_symbols(message),
        "pack 3 bits": lambda: buckets.pack_symbols(symbols, 3),
        "unpack 3 bits": lambda: buckets.unpack_symbols(packed, 3, x.numel()),
    }
    bits = encoded_bits(counts.numpy(), lengths.numpy()) / x.numel()
    return contest, f"Huffman: {bits:.3f} bits a symbol, {8 * message.numel() / x.numel():.3f} with everything"


def main() -> None:
    """Measure, print, and write the log where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=25_000_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--torch", action="store_true", help="measure the torch reference too")
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    x = drawn(options.numel).values
    out, half = torch.zeros_like(x), torch.empty(x.shape, dtype=torch.float16)
    contest: Contest = {"copy": lambda: out.copy_(x), "cast to fp16": lambda: half.copy_(x)}
    contest.update(bucket_contest(x, out, options.torch))
    more, note = huffman_contest(x)
    contest.update(more)
    found = medians(contest, options.repeats)
    lines = [
        header(f"python benchmarks/wire_kernels.py --numel {options.numel} --repeats {options.repeats}"),
        f"{'operation':60} {'time':>9} {'GB/s of fp32':>13} {'time / copy':>12}",
    ]
    for name, spent in found.items():
        speed = 4e-6 * options.numel / spent
        lines.append(f"{name:60} {spent:6.2f} ms {speed:13.1f} {spent / found['copy']:12.2f}")
    lines.append(note)
    text = "\n".join(lines)
    print(text)
    if options.log:
        options.log.write_text(text + "\n")


if __name__ == "__main__":
    main()
