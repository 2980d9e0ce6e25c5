"""How well a model file does on its test set, whatever of the known formats it has."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradbits.core.errors import ArgumentError, CorruptDataError, GradbitsError
from gradbits.train.datasets import load_data
from gradbits.train.entry import parse_entry
from gradbits.train.evaluate import evaluate
from gradbits.train.model_file import load_model, load_tensors
from gradbits.train.models import MODELS
from gradbits.train.network import Network, build_network
from gradbits.train.options import TrainOptions
from gradbits.train.tasks import CONTEXT, Task, make_task


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The test result of a model file.

    Args:
        metric: ``test_accuracy`` (a share from 0 to 1) or ``bits_per_byte``.
        value: the result.
        samples: test samples: images, or bytes that were predicted.
        data, model, network: what was evaluated on what.
    """

    metric: str
    value: float
    samples: int
    data: str
    model: str
    network: str


def evaluate_file(
    path: str | Path,
    *,
    data: str | None = None,
    data_dir: str | Path | None = None,
    text: str | Path | None = None,
    limit: int | None = None,
    model: str | None = None,
    model_set: Sequence[str] | None = None,
    recipe: str | None = None,
    device: str | None = None,
) -> Evaluation:
    """Return the test result of a model file; what is not given comes from the file's metadata.

    Args:
        path: safetensors, gbz, a checkpoint of ``gradbits train`` or another torch file.
        data: name of the data set; ``data_dir`` and ``text`` say where it is.
        limit: training samples that the model was trained on, by which images are standardised.
        model: a built-in name or ``package.module:factory``. A file's word is taken for built-in models only, because
            a factory is code that runs.
        model_set: ``name=value`` texts for the model; those of the file only go with the model of the file.
        recipe: ``fp32`` (default), ``bf16`` or a recipe, as ``name`` or ``name:path=value``. A range that the file does
            not hold is taken from each test batch.
        device: where it is computed.

    Raises:
        MissingDataError: the file or the data cannot be read.
        CorruptDataError: one of them is damaged.
        ArgumentError: an option that is not legal or not known, or a model that the file does not fit.
    """
    opened = open_network(
        path,
        data=data,
        data_dir=data_dir,
        text=text,
        limit=limit,
        model=model,
        model_set=model_set,
        recipe=recipe or "fp32",
        device=device,
    )
    network, task, options = opened.network, opened.task, opened.options
    return Evaluation(
        metric=task.metric,
        value=_evaluate(network, task, opened.seed, options.model or ""),
        samples=sum(len(batch.targets) for batch in task.test_batches()),
        data=options.data or "",
        model=options.model or "",
        network=network.entry.label,
    )


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model file as a network, with the task and the options that it was trained for."""

    network: Network
    task: Task
    options: TrainOptions
    seed: int
    metadata: Mapping[str, str]


def open_network(
    path: str | Path,
    *,
    data: str | None = None,
    data_dir: str | Path | None = None,
    text: str | Path | None = None,
    limit: int | None = None,
    model: str | None = None,
    model_set: Sequence[str] | None = None,
    recipe: str | None = None,
    device: str | None = None,
) -> Opened:
    """Return the network of a model file; arguments and errors are those of ``evaluate_file``.

    Args:
        recipe: as there; None takes the one that the file was trained with.
    """
    path = Path(path)
    tensors, metadata = load_model(path)
    if text is not None and data is None:
        data = "text"
    recipe = recipe or _told(path, metadata, "recipe")
    entry = parse_entry(recipe)
    chosen = _model(path, model, metadata)
    if model_set is None and model in (None, metadata.get("model")):
        model_set = _model_set(path, metadata)
    check_model_set(model_set)
    options = TrainOptions(
        data=data or _told(path, metadata, "data"),
        data_dir=None if data_dir is None else str(data_dir),
        text=None if text is None else str(text),
        limit=limit if limit is not None else _number(path, metadata, "limit"),
        model=chosen,
        model_set=tuple(model_set or ()),
        networks=(recipe,),
        device=device,
    ).resolved()
    loaded = load_data(
        options.data or "",
        data_dir=Path(options.data_dir) if options.data_dir else None,
        text=Path(options.text) if options.text else None,
        limit=options.limit,
    )
    task = make_task(loaded, 2, options.model_options().get("context", CONTEXT))
    seed = _number(path, metadata, "seed") or 0
    try:
        network = build_network(entry, options, task, seed, 1)
    except (RuntimeError, MemoryError, OverflowError) as error:  # a size that the machine cannot hold
        raise ArgumentError(f"model={chosen!r}: cannot be built: {_first_line(error)}") from error
    load_tensors(network.model, tensors, f"{path}: does not fit model {chosen!r}{_shown(options.model_set)}")
    return Opened(network=network, task=task, options=options, seed=seed, metadata=metadata)


def check_model_set(texts: Sequence[str] | None) -> None:
    """Refuse arguments of a model that are no ``name=value``.

    Raises:
        ArgumentError: names ``model_set``.
    """
    for text in texts or ():
        name, _, value = text.partition("=")
        if not name.strip() or not value.strip():
            raise ArgumentError(f"model_set={text!r}: must be name=value, for example width=8")


def _evaluate(network: Network, task: Task, seed: int, model: str) -> float:
    try:
        return evaluate(network, task, seed)
    except GradbitsError:
        raise
    except (RuntimeError, IndexError) as error:
        raise ArgumentError(f"model={model!r}: does not take this data: {_first_line(error)}") from error


def _told(path: Path, metadata: Mapping[str, str], key: str) -> str:
    if not metadata.get(key):
        raise ArgumentError(f"{path}: does not say its {key}; give --{key}")
    return metadata[key]


def _model(path: Path, given: str | None, metadata: Mapping[str, str]) -> str:
    if given is not None:
        return given
    told = _told(path, metadata, "model")
    if told not in MODELS:
        raise ArgumentError(f"{path}: names code as its model; if you trust it, give --model {told!r}")
    return told


def _model_set(path: Path, metadata: Mapping[str, str]) -> tuple[str, ...]:
    try:
        texts = json.loads(metadata.get("model_set", "[]"))
    except (ValueError, RecursionError):
        texts = None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise CorruptDataError(f"{path}: metadata model_set={metadata['model_set']!r}: must be a JSON list of texts")
    return tuple(texts)


def _number(path: Path, metadata: Mapping[str, str], key: str) -> int | None:
    text = metadata.get(key)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) >= 2**63:
        raise CorruptDataError(f"{path}: metadata {key}={text!r}: must be an integer of at least 0")
    return int(text)


def _shown(model_set: Sequence[str] | None) -> str:
    return f" with {', '.join(model_set)}" if model_set else ""


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
