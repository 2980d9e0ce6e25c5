"""A transformer of more than 20 M parameters: speed and size of gbz next to zstd -3 and next to plain quantization.

    python benchmarks/storage_transformer.py --log benchmarks/logs/storage_transformer.txt

Weights are random, normal with a standard deviation per layer. Every time is the median of ``--repeats`` runs, file to
file on the same disk (gbz and its safetensors are forced to the disk, zstd's files are not), all threads of the machine
unless ``--workers`` says otherwise; MB are 10^6 bytes of fp32 weights. zstd works on the safetensors file.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import zstandard
from safetensors.torch import save_file

from gradbits.storage import CompressConfig, CompressReport, compress_file, decompress_file, fit_size, save_compressed
from gradbits.storage.compress import default_workers

State = dict[str, torch.Tensor]


def build(width: int, layers: int, vocabulary: int) -> State:
    """Return the state dict of a decoder: embedding, per layer attention (4 w^2) and feed-forward (8 w^2), norms."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    state = {"embed.weight": matrix(vocabulary, width)}
    for layer in range(layers):
        for name, shape in {
            "attention.qkv": (3 * width, width),
            "attention.out": (width, width),
            "mlp.up": (4 * width, width),
            "mlp.down": (width, 4 * width),
        }.items():
            state[f"layers.{layer}.{name}.weight"] = matrix(*shape)
            state[f"layers.{layer}.{name}.bias"] = 0.02 * torch.randn(shape[0], generator=generator)
        state[f"layers.{layer}.norm.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
    return state


def timed(work: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of ``work``."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def plain(weight: torch.Tensor, bits: int) -> tuple[float, int]:
    """Symmetric abs-max quantization with one fp32 scale per row: (sum of squared errors, bytes)."""
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1, keepdim=True) / top
    error = (torch.round(weight / scale) * scale - weight).double()
    return float(error.square().sum()), (weight.numel() * bits + 7) // 8 + 4 * weight.shape[0]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.workers)
    lines: list[str] = []

    def say(text: str = "") -> None:
        lines.append(text)
        print(text, flush=True)

    state = build(options.width, options.layers, options.vocabulary)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    say(f"{size // 4:,} parameters, {size / 1e6:.1f} MB in fp32; {platform.machine()}, {options.workers} workers")
    say(f"torch {torch.__version__}, zstandard {zstandard.__version__}, median of {options.repeats}")
    say()
    with tempfile.TemporaryDirectory() as name:
        speed(state, size, Path(name), options, say)
        equal_error(state, Path(name), say)
    if options.log is not None:
        options.log.write_text("\n".join(lines) + "\n")


def speed(state: State, size: int, folder: Path, options: argparse.Namespace, say: Callable[..., None]) -> None:
    """Throughput and ratio of every way to write and read the file."""
    say(f"{'':48} {'compress':>10} {'decompress':>11} {'ratio':>7} {'rms error / rms weight':>24}")
    for kind, tensors in {
        "dense": state,
        "90 % pruned": {name: _pruned(tensor) for name, tensor in state.items()},
    }.items():
        save_file(tensors, folder / "m.safetensors")
        energy = sum(float(tensor.double().square().sum()) for tensor in tensors.values())
        for title, config in {
            "gbz, 5-bit codebooks": CompressConfig(),
            "gbz, lossless, Huffman": CompressConfig(lossless=True),
            "gbz, lossless, zstd on byte planes": CompressConfig(lossless=True, coder="zstd"),
        }.items():
            write, read, report = gbz_speed(folder, config, options)
            squares = sum(one.rms_error**2 * _count(one.shape) for one in report.tensors)
            _row(say, f"{kind}: {title}", size / write, size / read, report.ratio, (squares / energy) ** 0.5)
        for threads in (0, options.workers):
            write, read, stored = zstd_speed(folder, threads, options)
            title = f"zstd -3{f', {threads} threads' if threads else ''}"
            _row(say, f"{kind}: {title}", size / write, size / read, size / stored, 0.0)
    say()


def gbz_speed(folder: Path, config: CompressConfig, options: argparse.Namespace) -> tuple[float, float, CompressReport]:
    """Return (seconds to compress, seconds to decompress, what became of the tensors)."""
    source, packed, back = folder / "m.safetensors", folder / "m.gbz", folder / "b.safetensors"
    report = compress_file(source, packed, config, workers=options.workers)
    write = timed(lambda: compress_file(source, packed, config, workers=options.workers), options.repeats)
    read = timed(lambda: decompress_file(packed, back, workers=options.workers), options.repeats)
    return write, read, report


def zstd_speed(folder: Path, threads: int, options: argparse.Namespace) -> tuple[float, float, int]:
    """Return (seconds to compress, seconds to decompress, bytes)."""
    source, packed, back = folder / "m.safetensors", folder / "m.zst", folder / "b.safetensors"
    write = timed(lambda: _zstd(source, packed, threads), options.repeats)
    read = timed(lambda: _unzstd(packed, back), options.repeats)
    return write, read, packed.stat().st_size


def _row(say: Callable[..., None], title: str, write: float, read: float, ratio: float, error: float) -> None:
    say(f"{title:48} {write / 1e6:6.0f} MB/s {read / 1e6:7.0f} MB/s {ratio:7.2f} {error:24.4f}")


def _pruned(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() < 2:
        return tensor
    limit = tensor.abs().flatten().kthvalue(int(0.9 * tensor.numel())).values
    return tensor * (tensor.abs() > limit)


def _count(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _zstd(source: Path, target: Path, threads: int) -> None:
    with source.open("rb") as inside, target.open("wb") as outside:
        zstandard.ZstdCompressor(level=3, threads=threads).copy_stream(inside, outside)
        outside.flush()


def _unzstd(source: Path, target: Path) -> None:
    with source.open("rb") as inside, target.open("wb") as outside:
        zstandard.ZstdDecompressor().copy_stream(inside, outside)
        outside.flush()


def equal_error(state: State, folder: Path, say: Callable[..., None]) -> None:
    """Bytes that gbz needs for no more squared error than plain 8-bit and 4-bit quantization, biases left out."""
    weights = {name: tensor for name, tensor in state.items() if tensor.dim() == 2}
    count = sum(tensor.numel() for tensor in weights.values())
    say("weights only, plain = abs-max with one fp32 scale per row; gbz = fewest codebook bits with no more error")
    for bits in (8, 4):
        plains = [plain(weight, bits) for weight in weights.values()]
        goal, budget = sum(one for one, _ in plains), sum(one for _, one in plains)
        for codebook in range(2, 12):
            report = save_compressed(weights, folder / "e.gbz", CompressConfig(linear_bits=codebook))
            squares = sum(one.rms_error**2 * _count(one.shape) for one in report.tensors)
            if squares <= goal:
                break
        say(
            f"plain {bits} bits: {budget:,} bytes; gbz {codebook} bits: {report.stored:,} bytes, "
            f"{report.stored / budget:.3f} of plain, {8 * report.stored / count:.2f} bits per weight, "
            f"squared error {squares / goal:.3f} of plain"
        )
        fit = fit_size(weights, budget, max_bits=8)
        report = save_compressed(weights, folder / "e.gbz", fit.config)
        squares = sum(one.rms_error**2 * _count(one.shape) for one in report.tensors)
        say(
            f"plain {bits} bits: gbz --max-size {budget}: {report.stored:,} bytes, "
            f"squared error {squares / goal:.3f} of plain, codebook bits {sorted(set(fit.bits.values()))}"
        )


if __name__ == "__main__":
    main()
