"""Whole files: compress, decompress, verify, and load into a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gradbits.core.errors import ArgumentError
from gradbits.core.files import write_atomically
from gradbits.storage.compress import (
    CompressReport,
    Progress,
    default_workers,
    save_compressed,
    split_aliases,
    write_sections,
)
from gradbits.storage.config import CompressConfig
from gradbits.storage.reader import GbzFile
from gradbits.storage.sources import open_source


def compress_file(
    source: str | Path,
    target: str | Path,
    config: CompressConfig | None = None,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> CompressReport:
    """Compress a model file into a gbz file; tensors are read, coded and let go one after the other.

    Args:
        source: safetensors, sharded safetensors (its index), a torch checkpoint, or gbz.
        target: the gbz file to make.
        config: see ``CompressConfig``.
        workers: threads; None means one per processor.
        progress: called with name and bytes of each tensor.

    Raises:
        MissingDataError, CorruptDataError: the source cannot be read.
        DtypeError: it holds a tensor that cannot be stored.
    """
    model = open_source(source)
    if model.loaded:
        return save_compressed(
            model.loaded, target, config, metadata=model.metadata, workers=workers, progress=progress
        )
    return write_sections(model.tensors(), target, config, metadata=model.metadata, workers=workers, progress=progress)


def decompress_file(
    source: str | Path, target: str | Path, *, workers: int | None = None, progress: Progress | None = None
) -> int:
    """Write the tensors of a gbz file as ordinary safetensors, metadata included, and return the bytes written.

    Every tensor's checksum is verified before anything is written; the target appears whole or not at all.

    Args:
        source: the gbz file.
        target: the safetensors file to make.
        workers: threads; None means one per processor.
        progress: called with name and bytes of each tensor.

    Raises:
        CorruptDataError: the source is damaged; nothing is written.
    """
    from safetensors.torch import save

    with GbzFile(source) as packed:
        tensors = packed.tensors(workers=workers or default_workers(), progress=progress)
        metadata = dict(packed.metadata)
    _, aliases = split_aliases(tensors)
    for name in aliases:  # safetensors stores no tensor twice under one memory
        tensors[name] = tensors[name].clone()
    data = save(tensors, metadata or None)
    write_atomically(Path(target), lambda file: file.write(data))
    return len(data)


def verify_file(source: str | Path, *, workers: int | None = None, progress: Progress | None = None) -> int:
    """Check every byte of a gbz file by decoding every tensor, and return the number of tensors.

    Raises:
        CorruptDataError: the file is damaged; names the tensor.
    """
    count = 0
    with GbzFile(source) as packed:
        for _ in packed.items(workers=workers or default_workers(), progress=progress):
            count += 1
    return count


def load_compressed(
    model: torch.nn.Module, path: str | Path, *, strict: bool = True, workers: int | None = None
) -> Any:
    """Load a gbz file into a model, as ``model.load_state_dict`` does, and return what that returns.

    All tensors are decoded and verified before the first is copied, so a damaged file leaves the model as it was.

    Args:
        model: of the architecture that was compressed.
        path: the gbz file.
        strict: names must be the same on both sides.
        workers: threads; None means one per processor.

    Raises:
        CorruptDataError: the file is damaged.
        ArgumentError: names or shapes do not fit the model.

    >>> import tempfile
    >>> model = torch.nn.Linear(32, 32)
    >>> path = Path(tempfile.mkdtemp()) / "model.gbz"
    >>> _ = save_compressed(model, path)
    >>> load_compressed(torch.nn.Linear(32, 32), path)
    <All keys matched successfully>
    """
    with GbzFile(path) as packed:
        tensors: Mapping[str, torch.Tensor] = packed.tensors(workers=workers or default_workers())
    own = model.state_dict()
    wrong = [name for name, tensor in tensors.items() if name in own and own[name].shape != tensor.shape]
    odd = sorted(set(own) ^ set(tensors)) if strict else []
    if wrong or odd:
        what = f"shapes of {', '.join(wrong[:4])} differ" if wrong else f"only one side has {', '.join(odd[:4])}"
        raise ArgumentError(f"{path}: does not fit the model: {what}")
    return model.load_state_dict(dict(tensors), strict=strict)
