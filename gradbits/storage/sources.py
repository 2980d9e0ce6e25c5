"""Where tensors come from: a safetensors file, a sharded one with its index, a torch checkpoint, a gbz file."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gradbits.core.errors import ArgumentError, CorruptDataError, MissingDataError
from gradbits.storage.reader import GbzFile

NESTED = ("state_dict", "model_state_dict", "model", "module")  # where checkpoints keep the model


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model on disk: tensors are read one at a time where the format allows.

    Attributes:
        names: of the tensors, in order.
        metadata: strings by name.
        files: safetensors file of each tensor, or
        loaded: the tensors themselves.
    """

    names: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    loaded: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) in order.

        Raises:
            CorruptDataError: a safetensors file that is damaged.
        """
        opened: dict[Path, Any] = {}
        for name in self.names:
            if name in self.loaded:
                yield name, self.loaded[name]
                continue
            path = self.files[name]
            if path not in opened:
                opened = {path: _open_safetensors(path)}
            try:
                tensor = opened[path].get_tensor(name)
            except Exception as error:  # safetensors raises an exception class of its own
                raise CorruptDataError(f"{path}: tensor {name!r} cannot be read: {error}") from error
            yield name, tensor


def open_source(path: str | Path) -> Source:
    """Return the tensors of a model file, whatever of the known formats it has; the format is told by its content.

    Args:
        path: ``.safetensors``, ``.safetensors.index.json``, a folder that holds one of these, a torch checkpoint (read
            with ``weights_only=True``; the model may be nested under ``state_dict``, ``model_state_dict``, ``model`` or
            ``module``; a checkpoint of ``gradbits train`` is one too), or ``.gbz``.

    Raises:
        MissingDataError: no such file, or a shard is missing.
        CorruptDataError: damaged, or of no known format.
        ArgumentError: a checkpoint without a state dict.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise MissingDataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if head.startswith(b"\x89GBZ"):
        with GbzFile(path) as packed:
            return Source(names=tuple(packed.names()), metadata=packed.metadata, loaded=packed.tensors())
    if path.name.endswith(".json"):
        return _sharded(path)
    if head.startswith(b"PK\x03\x04") or head[:1] == b"\x80":
        return _checkpoint(path)
    opened = _open_safetensors(path)
    names = tuple(opened.keys())
    return Source(names=names, metadata=opened.metadata() or {}, files=dict.fromkeys(names, path))


def _in_folder(folder: Path) -> Path:
    for pattern in ("*.safetensors.index.json", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
    raise MissingDataError(f"{folder}: a folder must hold one *.safetensors.index.json or one *.safetensors")


def _open_safetensors(path: Path) -> Any:
    from safetensors import safe_open

    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except FileNotFoundError as error:
        raise MissingDataError(f"{path}: there is no such file") from error
    except Exception as error:  # safetensors raises an exception class of its own
        raise CorruptDataError(f"{path}: neither gbz, safetensors nor a torch checkpoint: {error}") from error


def _sharded(path: Path) -> Source:
    try:
        tree = json.loads(path.read_text("utf-8"))
        weight_map = dict(tree["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptDataError(f"{path}: not an index of sharded safetensors (needs a weight_map)") from error
    files: dict[str, Path] = {}
    for name, shard in weight_map.items():
        # a shard lies beside its index: a name that leads elsewhere is not followed
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CorruptDataError(f"{path}: tensor {name!r}: shard {shard!r} is no safetensors file beside the index")
        files[name] = path.parent / shard
    metadata: dict[str, str] = {}
    for shard_path in sorted(set(files.values())):
        opened = _open_safetensors(shard_path)
        metadata.update(opened.metadata() or {})
        expected = {name for name, place in files.items() if place == shard_path}
        if not expected <= set(opened.keys()):
            missing = ", ".join(sorted(expected - set(opened.keys()))[:4])
            raise CorruptDataError(f"{shard_path}: does not hold {missing}, which the index places there")
    names = sorted(files, key=lambda name: (files[name], name))
    return Source(names=tuple(names), metadata=metadata, files=files)


def _checkpoint(path: Path) -> Source:
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CorruptDataError(
            f"{path}: not a torch checkpoint that loads with weights_only=True: {str(error).splitlines()[0]}"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError, OSError) as error:
        raise CorruptDataError(f"{path}: not a readable torch checkpoint: {str(error).splitlines()[0]}") from error
    state = _find_state(_run_state(tree) or tree)
    if state is None:
        keys = ", ".join(map(repr, list(tree)[:8])) if isinstance(tree, Mapping) else type(tree).__name__
        raise ArgumentError(
            f"{path}: holds no state dict: found {keys}; tensors by name are expected, at the top or under {NESTED}"
        )
    return Source(names=tuple(state), loaded=state)


def _run_state(tree: Any) -> dict[str, Any] | None:
    """The model in a checkpoint of ``gradbits train``: a JSON tree that names its tensors."""
    if not isinstance(tree, Mapping) or tree.get("format") != "gradbits-checkpoint":
        return None
    try:
        model, tensors = json.loads(tree["json"])["network"]["model"], tree["tensors"]
        return {name: tensors[place["$tensor"]] for name, place in model.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None


def _find_state(tree: Any) -> dict[str, torch.Tensor] | None:
    if not isinstance(tree, Mapping):
        return None
    if tree and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in tree.items()):
        return dict(tree)
    for key in NESTED:
        found = _find_state(tree[key]) if key in tree else None
        if found is not None:
            return found
    return None
