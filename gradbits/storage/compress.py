"""From a state dict to a gbz file: prune, share, code, with the loss of every tensor measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from gradbits.core.errors import ArgumentError
from gradbits.storage.config import CompressConfig
from gradbits.storage.dtypes import SHAREABLE, dtype_name, to_bytes
from gradbits.storage.layout import INDEXES, expands_too_much
from gradbits.storage.lossless import encode_planes, encode_zstd, require_coder
from gradbits.storage.prune import magnitude_mask
from gradbits.storage.shared_section import encode_shared
from gradbits.storage.sharing import WeightValues, all_finite, difference
from gradbits.storage.writer import Section, write_gbz

KEPT_VALUES = 256  # a tensor with no more distinct values was shared before


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """What became of one tensor: sizes in bytes, absolute errors; ``nnz`` and ``k`` are None if it was not shared."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    coding: str
    original: int
    stored: int
    nnz: int | None = None
    k: int | None = None
    max_error: float = 0.0
    rms_error: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CompressReport:
    """What became of a model; ``original`` counts the bytes of the tensors alone, ``stored`` the whole file."""

    tensors: tuple[TensorReport, ...]
    original: int
    stored: int

    @property
    def ratio(self) -> float:
        """Original bytes / bytes of the whole file: header, checksums, codebooks, tables and padding included."""
        return self.original / self.stored


Progress = Callable[[str, int], None]


def default_workers() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compress_tensor(
    name: str, tensor: torch.Tensor, config: CompressConfig | None = None
) -> tuple[Section, TensorReport]:
    """Return the section that stores ``tensor`` under ``config``, and what it cost.

    Args:
        name: of the tensor, for overrides and messages.
        tensor: any dense tensor of a dtype that safetensors knows.
        config: None means the defaults of Deep Compression.

    Raises:
        DtypeError: a tensor that cannot be stored.

    >>> section, report = compress_tensor("fc.weight", torch.linspace(-1, 1, 4096).reshape(64, 64))
    >>> report.k, report.max_error < 0.04, report.original / report.stored > 6
    (32, True, True)

    References:
        S. Han, H. Mao, W. J. Dally, Deep Compression, arXiv 1510.00149.
    """
    config = config or CompressConfig()
    dtype = dtype_name(tensor, name)
    bits = config.bits(name, tensor.dim()) if dtype in SHAREABLE and tensor.numel() else None
    if bits is not None:
        if all_finite(tensor):
            found = _share(name, tensor, dtype, bits, config)
            if found is not None:
                return found
        else:
            return _exact(name, tensor, dtype, config, why="holds NaN or Inf")
    return _exact(name, tensor, dtype, config)


def _share(
    name: str, tensor: torch.Tensor, dtype: str, bits: int, config: CompressConfig
) -> tuple[Section, TensorReport] | None:
    pruned = tensor.detach() * magnitude_mask(tensor, sparsity=config.sparsity) if config.sparsity else tensor.detach()
    keep = KEPT_VALUES if config.keep_shared and not config.override(name)[0] else 0
    shared = WeightValues(pruned, name).share(bits, init=config.init, seed=config.seed, keep=keep)
    indexes = INDEXES if config.index_bits is None else (f"gap{config.index_bits}",)
    data, extra = encode_shared(shared, indexes=indexes)
    size = tensor.numel() * tensor.element_size()
    if len(data) >= size:
        return None
    largest, rms = (0.0, 0.0) if shared.exact and not config.sparsity else difference(shared.tensor(), tensor.cpu())
    extra["loss"] = [float(f"{largest:.3g}"), float(f"{rms:.3g}")]
    shape = tuple(tensor.shape)
    report = TensorReport(
        name=name,
        dtype=dtype,
        shape=shape,
        coding=f"shared, {extra['index']}",
        original=size,
        stored=len(data),
        nnz=extra["nnz"],
        k=extra["k"],
        max_error=largest,
        rms_error=rms,
    )
    return Section(name=name, dtype=dtype, shape=shape, coding="shared", data=data, extra=extra), report


def _exact(
    name: str, tensor: torch.Tensor, dtype: str, config: CompressConfig, why: str | None = None
) -> tuple[Section, TensorReport]:
    raw = to_bytes(tensor)
    coding, data = "raw", memoryview(raw.tobytes())
    if raw.size and (config.lossless or (dtype in SHAREABLE and why is None)):
        width = tensor.element_size()
        for coder, encode in (("zstd", encode_zstd), ("planes", encode_planes)):
            if coder == "zstd" and config.coder != "zstd":
                continue
            packed = encode(raw, width)
            if len(packed) < len(data) and not expands_too_much(raw.size, len(packed)):
                coding, data = coder, memoryview(packed)
                break
    shape = tuple(tensor.shape)
    extra = {"why": why} if why is not None and coding == "raw" else {}
    report = TensorReport(name=name, dtype=dtype, shape=shape, coding=coding, original=raw.size, stored=len(data))
    return Section(name=name, dtype=dtype, shape=shape, coding=coding, data=data, extra=extra), report


def save_compressed(
    state: Mapping[str, torch.Tensor] | torch.nn.Module,
    path: str | Path,
    config: CompressConfig | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> CompressReport:
    """Write a state dict or a module as a gbz file and return what became of it; tied weights are stored once.

    Args:
        state: tensors by name, or a module whose ``state_dict()`` is meant.
        path: the file to make; it is replaced in one step.
        config: None means the defaults of Deep Compression: 8 bits for convolutions, 5 for linear layers.
        metadata: strings by name, kept in the header.
        workers: threads; None means one per processor.
        progress: called with the name and the bytes of each tensor when it is coded.

    Raises:
        DtypeError: a tensor that cannot be stored.
        ArgumentError: an illegal name.

    >>> import tempfile
    >>> report = save_compressed({"fc.weight": torch.eye(256)}, Path(tempfile.mkdtemp()) / "eye.gbz")
    >>> report.ratio > 100, report.tensors[0].nnz, report.tensors[0].max_error
    (True, 256, 0.0)

    References:
        S. Han, H. Mao, W. J. Dally, Deep Compression, arXiv 1510.00149.
    """
    tensors = state.state_dict() if isinstance(state, torch.nn.Module) else state
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentError(f"state: {name!r} is a {type(tensor).__name__}, not a tensor")
    own, aliases = split_aliases(tensors)
    pairs = ((name, tensors[name]) for name in own)
    return write_sections(pairs, path, config, aliases=aliases, metadata=metadata, workers=workers, progress=progress)


def write_sections(
    tensors: Iterable[tuple[str, torch.Tensor]],
    path: str | Path,
    config: CompressConfig | None = None,
    *,
    aliases: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> CompressReport:
    """Compress (name, tensor) pairs as they come, a few at a time, and write them; see ``save_compressed``.

    Args:
        tensors: pairs; tensors are let go as soon as they are coded.
        aliases: name of a tied tensor -> name of the one that is stored.
    """
    config = config or CompressConfig()
    require_coder(config.coder)
    coded = list(_compress_all(tensors, config, workers or default_workers(), progress))
    sections = [section for section, _ in coded]
    reports = [report for _, report in coded]
    stored = {section.name: section for section in sections}
    for name, target in (aliases or {}).items():
        like = stored[target]
        sections.append(
            Section(name=name, dtype=like.dtype, shape=like.shape, coding="alias", data=b"", extra={"of": target})
        )
        coding = f"alias of {target}"
        reports.append(TensorReport(name=name, dtype=like.dtype, shape=like.shape, coding=coding, original=0, stored=0))
    size = write_gbz(path, sections, metadata)
    return CompressReport(tensors=tuple(reports), original=sum(one.original for one in reports), stored=size)


def _compress_all(
    tensors: Iterable[tuple[str, torch.Tensor]], config: CompressConfig, workers: int, progress: Progress | None
) -> Iterator[tuple[Section, TensorReport]]:
    with ThreadPoolExecutor(workers) as pool:
        waiting = []
        for name, tensor in tensors:
            waiting.append(pool.submit(compress_tensor, name, tensor, config))
            if len(waiting) > workers:  # so that few uncompressed tensors are in memory at once
                yield _done(waiting.pop(0).result(), progress)
        for future in waiting:
            yield _done(future.result(), progress)


def _done(result: tuple[Section, TensorReport], progress: Progress | None) -> tuple[Section, TensorReport]:
    if progress is not None:
        progress(result[1].name, result[1].original)
    return result


def split_aliases(tensors: Mapping[str, torch.Tensor]) -> tuple[list[str], dict[str, str]]:
    """Return (names to store, tied name -> stored name); tied are equal views of the same memory."""
    first: dict[tuple[object, ...], str] = {}
    own, aliases = [], {}
    for name, tensor in tensors.items():
        strided = tensor.layout == torch.strided and tensor.numel() > 0
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if strided else (name,)
        if view in first and not isinstance(view[0], str):
            aliases[name] = first[view]
        else:
            first[view] = name
            own.append(name)
    return own, aliases
