"""``gradbits compress``, ``decompress``, ``inspect`` and ``verify``: models as small checked files."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradbits.cli.storage_output import number_text, print_table, progress_bar, shape_text
from gradbits.core.errors import ArgumentError

if TYPE_CHECKING:
    from gradbits.storage.budget import Fit
    from gradbits.storage.compress import CompressReport
    from gradbits.storage.config import CompressConfig

_OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it is there.")]
_WORKERS = Annotated[int | None, typer.Option(min=1, help="Threads; default: one per processor.")]
_QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="Print no table and no progress.")]


def compress(
    source: Annotated[
        Path, typer.Argument(help="Model: safetensors, its index of shards, a folder, or a torch checkpoint.")
    ],
    output: Annotated[Path | None, typer.Option("--out", "-o", help="Default: the source with suffix .gbz.")] = None,
    conv_bits: Annotated[int, typer.Option(help="Codebook bits of convolutions.")] = 8,
    linear_bits: Annotated[int, typer.Option(help="Codebook bits of linear layers and embeddings.")] = 5,
    bits: Annotated[
        list[str] | None,
        typer.Option(help="GLOB=BITS for single tensors, first match wins; GLOB=keep stores exactly. Repeatable."),
    ] = None,
    sparsity: Annotated[
        float, typer.Option(help="Part of the weights to prune first, least magnitudes; 0 to 1.")
    ] = 0.0,
    index_bits: Annotated[
        int | None, typer.Option(help="Bits of the relative index, 3 to 8; default: cheapest.")
    ] = None,
    init: Annotated[str, typer.Option(help="Start of the clustering: linear, density or random.")] = "linear",
    seed: Annotated[int, typer.Option(help="For --init random.")] = 0,
    lossless: Annotated[bool, typer.Option("--lossless", help="Keep every tensor exactly.")] = False,
    coder: Annotated[str, typer.Option(help="For tensors that are kept exactly: huffman or zstd.")] = "huffman",
    max_size: Annotated[
        str | None, typer.Option(help="Choose bits per layer for a file of at most this size: 500000, 500KB, 2.5MiB.")
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(help="MODULE:FUNCTION that scores a state dict, higher is better; bits are chosen by it."),
    ] = None,
    max_drop: Annotated[float, typer.Option(help="With --calibrate: how much of the score may be lost.")] = 0.0,
    overwrite: _OVERWRITE = False,
    workers: _WORKERS = None,
    quiet: _QUIET = False,
) -> None:
    """Compress a model by Deep Compression (shared weights, Huffman codes) and say what was lost."""
    from gradbits.storage.compress import save_compressed
    from gradbits.storage.config import CompressConfig
    from gradbits.storage.files import compress_file
    from gradbits.storage.sources import open_source

    target = _target(source, output, ".gbz", overwrite)
    config = CompressConfig(
        conv_bits=conv_bits,
        linear_bits=linear_bits,
        overrides=tuple(_override(one) for one in bits or ()),
        sparsity=sparsity,
        index_bits=index_bits,
        init=init,
        seed=seed,
        lossless=lossless,
        coder=coder,
    )
    if max_size is None and calibrate is None:
        with progress_bar("compressing", source, quiet) as progress:
            report = compress_file(source, target, config, workers=workers, progress=progress)
    else:
        model = open_source(source)
        state = dict(model.tensors())
        fit = _fit(state, config, model.metadata, max_size=max_size, calibrate=calibrate, max_drop=max_drop)
        with progress_bar("compressing", source, quiet) as progress:
            report = save_compressed(
                state, target, fit.config, metadata=model.metadata, workers=workers, progress=progress
            )
        if fit.score is not None and fit.baseline is not None:
            print(f"score {fit.score:.6g}, uncompressed {fit.baseline:.6g}, {fit.evaluations} evaluations")
    if not quiet:
        _print_tensors(report)
    print(f"{target}: {report.original:,} bytes of tensors in a file of {report.stored:,} bytes, {report.ratio:.2f}x")


def _print_tensors(report: CompressReport) -> None:
    """Print how each tensor was stored and what that lost."""
    print_table(
        ("tensor", "dtype", "shape", "coding", "codebook", "sparsity", "ratio", "max error", "rms error"),
        [
            (
                one.name,
                one.dtype,
                shape_text(one.shape),
                one.coding,
                number_text(one.k, "d"),
                number_text(None if one.nnz is None else 1 - one.nnz / max(prod(one.shape), 1), ".3f"),
                number_text(one.original / one.stored if one.stored else None, ".1f"),
                f"{one.max_error:.3g}",
                f"{one.rms_error:.3g}",
            )
            for one in report.tensors
        ],
    )


def decompress(
    source: Annotated[Path, typer.Argument(help="The gbz file.")],
    output: Annotated[
        Path | None, typer.Option("--out", "-o", help="Default: the source with suffix .safetensors.")
    ] = None,
    overwrite: _OVERWRITE = False,
    workers: _WORKERS = None,
    quiet: _QUIET = False,
) -> None:
    """Turn a gbz file back into ordinary safetensors; a damaged file gives an error and no output."""
    from gradbits.storage.files import decompress_file

    target = _target(source, output, ".safetensors", overwrite)
    with progress_bar("decompressing", source, quiet) as progress:
        size = decompress_file(source, target, workers=workers, progress=progress)
    print(f"{target}: {size:,} bytes")


def inspect(
    file: Annotated[Path, typer.Argument(help="The gbz file.")],
    against: Annotated[Path | None, typer.Option(help="The original model: measure the errors anew.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a figure of bits, sparsity and error per tensor.")] = None,
) -> None:
    """Show what a gbz file holds, tensor by tensor: sparsity, codebook, bits per weight, ratio, error."""
    from gradbits.storage import describe as described

    rows = described.describe(file, against)
    print_table(
        (
            "tensor",
            "dtype",
            "shape",
            "coding",
            "codebook",
            "sparsity",
            "bits/weight",
            "ratio",
            "max error",
            "rms error",
        ),
        [
            (
                one.name,
                one.dtype,
                shape_text(one.shape),
                f"{one.coding} ({one.why})" if one.why else one.coding,
                number_text(one.codebook, "d"),
                number_text(one.sparsity, ".3f"),
                f"{one.bits_per_weight:.2f}",
                f"{one.ratio:.1f}",
                f"{one.max_error:.3g}",
                f"{one.rms_error:.3g}",
            )
            for one in rows
        ],
    )
    original = sum(one.original for one in rows if not one.coding.startswith("alias"))
    size = file.stat().st_size
    errors = f"measured against {against}" if against else "recorded when it was compressed"
    print(f"{file}: {original:,} bytes of tensors in a file of {size:,} bytes, {original / size:.2f}x; errors {errors}")
    if plot is not None:
        described.plot(rows, plot)
        print(f"{plot}: figure")


def verify(
    file: Annotated[Path, typer.Argument(help="The gbz file.")],
    workers: _WORKERS = None,
    quiet: _QUIET = False,
) -> None:
    """Check every byte of a gbz file by decoding every tensor; exit code 2 and one line if it is damaged."""
    from gradbits.storage.files import verify_file

    with progress_bar("verifying", file, quiet) as progress:
        count = verify_file(file, workers=workers, progress=progress)
    print(f"{file}: {count} tensors, all checksums match")


def _fit(
    state: dict[str, Any],
    config: CompressConfig,
    metadata: Any,
    *,
    max_size: str | None,
    calibrate: str | None,
    max_drop: float,
) -> Fit:
    from gradbits.storage.budget import fit_accuracy, fit_size

    if config.lossless:
        raise ArgumentError("--lossless: leaves no bits to choose; drop it or --max-size and --calibrate")
    budget = _bytes(max_size) if max_size is not None else None
    if calibrate is None:
        assert budget is not None  # the caller asks only if one of the two is given
        return fit_size(state, budget, config, metadata=metadata)
    fit = fit_accuracy(state, _function(calibrate), max_drop, config, metadata=metadata)
    if budget is not None and fit.size > budget:
        raise ArgumentError(f"--max-size {max_size}: with --max-drop {max_drop:g} the file has {fit.size} bytes")
    return fit


def _function(text: str) -> Any:
    module, _, name = text.partition(":")
    if not module or not name:
        raise ArgumentError(f"--calibrate {text!r}: must be MODULE:FUNCTION, for example evaluation:score")
    sys.path.insert(0, os.getcwd())  # as `python -m` does, so that a file in the current folder is found
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(f"--calibrate {text!r}: cannot be imported: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise ArgumentError(f"--calibrate {text!r}: is a {type(found).__name__}, not a function")
    return found


def _bytes(text: str) -> int:
    units = {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
    upper = text.strip().upper()
    unit = next((one for one in units if upper.endswith(one)), "")
    try:
        value = float(upper.removesuffix(unit)) * units.get(unit, 1)
    except ValueError:
        value = -1.0
    if not 1 <= value < 1e18:
        raise ArgumentError(f"--max-size {text!r}: must be a number of bytes such as 500000, 500KB or 2.5MiB")
    return int(value)


def _override(text: str) -> tuple[str, int | None]:
    pattern, _, value = text.rpartition("=")
    if pattern and value == "keep":
        return pattern, None
    if not pattern or not value.isdecimal():
        raise ArgumentError(f"--bits {text!r}: must be GLOB=BITS or GLOB=keep, for example 'head.*=8'")
    return pattern, int(value)


def _target(source: Path, output: Path | None, suffix: str, overwrite: bool) -> Path:
    name = source.name
    for ending in (".safetensors.index.json", ".safetensors", ".gbz", ".pt", ".pth", ".bin", ".ckpt"):
        if name.endswith(ending):
            name = name.removesuffix(ending)
            break
    target = output if output is not None else source.with_name(name + suffix)
    if target.exists() and source.exists() and target.samefile(source):
        raise ArgumentError(f"--out {target}: is the source itself; name another file")
    if target.exists() and not overwrite:
        raise ArgumentError(f"--out {target}: is there already; give --overwrite or another name")
    return target
