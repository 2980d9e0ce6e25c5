"""Trained models as files: ordinary safetensors that say what they are, and whatever else holds a model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from gradbits.core.errors import ArgumentError, CorruptDataError
from gradbits.core.files import write_atomically
from gradbits.nn.assignment import QuantizerStates
from gradbits.nn.quantized import Quantized
from gradbits.storage.sources import open_source
from gradbits.train.checkpoint import FORMAT, load_checkpoint
from gradbits.train.entry import Entry
from gradbits.train.options import TrainOptions


def model_metadata(entry: Entry, options: TrainOptions, seed: int) -> dict[str, str]:
    """Return what a model file says of itself; paths are left out, for they mean nothing elsewhere."""
    metadata = {
        "data": options.data or "",
        "model": options.model or "",
        "model_set": json.dumps(list(options.model_set or ())),
        "recipe": entry.label,
        "seed": str(seed),
    }
    if options.limit is not None:  # images are standardised by the training samples that were used
        metadata["limit"] = str(options.limit)
    return metadata


def state_names(model: nn.Module) -> set[str]:
    """Return the names of everything that the quantizers of ``model`` remember.

    >>> import gradbits as gb
    >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)); _ = gb.quantize_(net, "int8_dynamic")
    >>> state_names(net)
    set()
    """
    prefixes = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, QuantizerStates))
    return {name for name in model.state_dict() if name.startswith(prefixes)}


def ranges_text(model: nn.Module) -> str | None:
    """Return the ranges of a model in quantization-aware training as JSON, or None for any other model.

    Integer inference needs them, so they travel in the metadata of a model file, where no float model stumbles on them.
    """
    if not any(isinstance(m, Quantized) and m.assignment.recipe.qat is not None for m in model.modules()):
        return None
    names, states = state_names(model), model.state_dict()
    known = {name: states[name].flatten() for name in sorted(names) if bool(torch.isfinite(states[name]).all())}
    return json.dumps({name: value.tolist() for name, value in known.items()})


def _ranges(path: Path, text: str) -> dict[str, torch.Tensor]:
    """Return the tensors that ``ranges_text`` described."""
    try:
        found = json.loads(text)
        tensors = {}
        for name, values in found.items():
            whole = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
            tensor = torch.tensor(values, dtype=torch.int64 if whole else torch.float32)
            tensors[str(name)] = tensor.reshape(()) if whole else tensor
        return tensors
    except (ValueError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise CorruptDataError(f"{path}: metadata ranges={text[:40]!r}: must be JSON of names and numbers") from error


def save_model(path: Path, model: nn.Module, metadata: Mapping[str, str]) -> None:
    """Write the parameters and buffers of ``model`` as safetensors; quantizer states are no tensors of it.

    So a float model of the same kind loads the file with ``load_state_dict(..., strict=True)``.

    Args:
        path: the file to make; it appears whole or not at all.
        model: quantized or not.
        metadata: strings by name.

    Raises:
        GradbitsError: the file cannot be written.
    """
    from safetensors.torch import save

    left_out = state_names(model)
    tensors = {
        # copies, because safetensors stores no memory twice and tied weights have both their names
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
        if name not in left_out
    }
    ranges = ranges_text(model)
    data = save(tensors, {**metadata, **({} if ranges is None else {"ranges": ranges})})
    write_atomically(path, lambda file: file.write(data))


def load_model(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """Return tensors and metadata of a model file: safetensors, gbz, a checkpoint of a run or another torch file.

    Raises:
        MissingDataError: it cannot be read.
        CorruptDataError: it is damaged, or of no known format.
        ArgumentError: a torch file without a model.
    """
    if _is_checkpoint(path):
        tree = load_checkpoint(path)  # compares its checksum
        try:
            tensors, metadata = dict(tree["network"]["model"]), dict(tree.get("metadata", {}))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CorruptDataError(f"{path}: is not a checkpoint of a training run") from error
    else:
        source = open_source(path)
        tensors, metadata = dict(source.tensors()), dict(source.metadata)
    for name, value in metadata.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise CorruptDataError(f"{path}: metadata {name!r} is not a text")
    if "ranges" in metadata:
        tensors.update(_ranges(path, metadata["ranges"]))
    return tensors, metadata


def load_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor], misfit: str) -> None:
    """Copy tensors into a model; quantizer states may be missing, or be there for nothing.

    Raises:
        ArgumentError: tensors that the model lacks, or that have another shape or kind; begins with ``misfit``.
    """
    own = model.state_dict()
    missing = sorted(set(own) - set(tensors) - state_names(model))
    extra = sorted(name for name in set(tensors) - set(own) if not re.search(r"(^|\.)quantizers\.", name))
    if missing or extra:
        what = f"it has no {missing[0]!r}" if missing else f"the model has no {extra[0]!r}"
        raise ArgumentError(f"{misfit}: {what}")
    for name, tensor in tensors.items():
        if name not in own:
            continue
        if tensor.shape != own[name].shape:
            raise ArgumentError(f"{misfit}: {name!r} is {list(tensor.shape)}, not {list(own[name].shape)}")
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise ArgumentError(f"{misfit}: {name!r} is {tensor.dtype}, not {own[name].dtype}")
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name in own})


def load_initial(model: nn.Module, path: Path) -> None:
    """Copy the weights of a model file into a float model that is to be trained on.

    Raises:
        MissingDataError: the file cannot be read.
        CorruptDataError: it is damaged.
        ArgumentError: it does not fit the model.
    """
    tensors, _ = load_model(path)
    load_tensors(model, tensors, f"init={str(path)!r}: does not fit the model")


def _is_checkpoint(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return False
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever is wrong with it, the reader of sources says it better
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT
