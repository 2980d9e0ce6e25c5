"""Checkpoints: plain tensors and JSON in one file, written whole, with a checksum that notices damage."""

from __future__ import annotations

import errno
import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import torch

from gradbits.core.errors import CorruptDataError, DtypeError, MissingDataError
from gradbits.core.files import write_atomically

FORMAT = "gradbits-checkpoint"
VERSION = 1
Tree = Any  # tensors, None, bool, int, float, str; lists, tuples and dictionaries of them


def save_checkpoint(path: Path, tree: Tree) -> None:
    """Write ``tree`` to ``path``: the old file stays until the new one is complete.

    Args:
        path: the file to make; ``torch.load(path, weights_only=True)`` reads it too.
        tree: nested dictionaries, lists and tuples of tensors, numbers, strings and ``None``.

    Raises:
        DtypeError: something else in the tree; names where.
        GradbitsError: the file cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_packed(tree, tensors, "state"))
    content = {
        "format": FORMAT,
        "version": VERSION,
        "json": text,
        "tensors": tensors,
        "sha256": _checksum(text, tensors),
    }
    write_atomically(path, lambda file: torch.save(content, file))


def load_checkpoint(path: Path) -> Tree:
    """Return the tree that ``save_checkpoint`` stored, tensors on the CPU.

    Raises:
        MissingDataError: there is no such file.
        CorruptDataError: it is truncated or damaged, of another program, or of a later version.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # the archive's own checksums, before anything in it is interpreted
            if damaged := archive.testzip():
                raise CorruptDataError(f"{path}: is damaged: checksum of its part {damaged!r} is wrong")
    except FileNotFoundError as error:
        raise MissingDataError(f"{path}: there is no such file") from error
    except CorruptDataError:
        raise
    except OSError as error:
        if error.errno == errno.EINVAL:  # a damaged offset sends the zip reader to a place before the file
            raise CorruptDataError(f"{path}: is damaged: its directory points outside of it") from error
        raise MissingDataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged archive raises whatever the zip reader meets first
        raise CorruptDataError(f"{path}: is truncated, damaged or not a checkpoint ({error})") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CorruptDataError(f"{path}: is not a checkpoint of gradbits ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CorruptDataError(f"{path}: is not a checkpoint of gradbits")
    if content.get("version") != VERSION:
        raise CorruptDataError(f"{path}: has format version {content.get('version')!r}; this version reads {VERSION}")
    text, tensors = content.get("json"), content.get("tensors")
    if not isinstance(text, str) or not isinstance(tensors, dict) or content.get("sha256") != _checksum(text, tensors):
        raise CorruptDataError(f"{path}: is damaged: its checksum does not fit its content")
    return _unpacked(json.loads(text), tensors)


def _packed(tree: Tree, tensors: dict[str, torch.Tensor], where: str) -> Any:
    """Replace what JSON has no word for by {"$kind": ...}; tensors go to ``tensors``."""
    if isinstance(tree, torch.Tensor):
        # a view would store all of what it looks at, and a shared tensor would change under a reader's hands
        name = f"{len(tensors)}:{where}"  # numbered, because names with dots can make two paths look alike
        tensors[name] = tree.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": name}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, (list, tuple)):
        items = [_packed(item, tensors, f"{where}.{index}") for index, item in enumerate(tree)]
        return items if isinstance(tree, list) else {"$tuple": items}
    if isinstance(tree, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in tree):
            return {key: _packed(value, tensors, f"{where}.{key}") for key, value in tree.items()}
        pairs = [[_packed(k, tensors, where), _packed(v, tensors, f"{where}.{k!r}")] for k, v in tree.items()]
        return {"$items": pairs}
    raise DtypeError(f"{where}: a checkpoint holds tensors, numbers, texts, lists and dicts, not {type(tree).__name__}")


def _unpacked(tree: Any, tensors: dict[str, torch.Tensor]) -> Tree:
    if isinstance(tree, list):
        return [_unpacked(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    if "$tuple" in tree:
        return tuple(_unpacked(item, tensors) for item in tree["$tuple"])
    if "$items" in tree:
        return {_unpacked(key, tensors): _unpacked(value, tensors) for key, value in tree["$items"]}
    return {key: _unpacked(value, tensors) for key, value in tree.items()}


def _checksum(text: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
