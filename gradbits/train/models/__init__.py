"""The models of the reference runs by name, and factories from anywhere."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from gradbits.core.errors import ArgumentError

IMAGE_MODELS = ("mlp", "small_cnn", "resnet20", "resnet18", "mobilenet")
TEXT_MODELS = ("gpt",)
MODELS = IMAGE_MODELS + TEXT_MODELS


def build_model(name: str, task_arguments: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> nn.Module:
    """Build a model.

    Args:
        name: one of ``MODELS``, or ``package.module:factory``.
        task_arguments: what the data says (channels, classes, vocabulary); passed where the factory takes it.
        options: further keyword arguments of the factory; each must be one that it takes.

    Raises:
        ArgumentError: an unknown name, a factory that cannot be imported or does not return a module, an option
            that it does not take; lists the legal ones.

    >>> model = build_model("mlp", {"in_channels": 1, "image_size": (8, 8), "classes": 10}, {"width": 16})
    >>> sum(parameter.numel() for parameter in model.parameters())
    1482
    """
    factory = _factory(name)
    options = dict(options or {})
    taken = _taken(factory)
    if taken is not None:
        for key in options:
            if key not in taken:
                legal = ", ".join(sorted(key for key in taken if key not in task_arguments)) or "none"
                raise ArgumentError(f"model_set={key!r}: model {name!r} takes {legal}")
    known = {key: value for key, value in task_arguments.items() if taken is None or key in taken}
    try:
        model = factory(**{**known, **options})
    except TypeError as error:
        raise ArgumentError(f"model={name!r}: cannot be called with {sorted({**known, **options})}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model={name!r}: must return a torch.nn.Module, not {type(model).__name__}")
    return model


def _factory(name: str) -> Callable[..., Any]:
    if name in MODELS:
        module = importlib.import_module(f"gradbits.train.models.{name}")
        return getattr(module, name)
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise ArgumentError(f"model={name!r}: must be one of {', '.join(map(repr, MODELS))} or package.module:factory")
    with _working_folder_importable():
        try:
            factory = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise ArgumentError(f"model={name!r}: cannot be imported: {error}") from error
    if not callable(factory):
        raise ArgumentError(f"model={name!r}: must be a callable that returns a module, not {type(factory).__name__}")
    return factory


@contextlib.contextmanager
def _working_folder_importable() -> Iterator[None]:
    # as `python -m` does, so that a factory in a script beside the user works with the installed command too
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _taken(factory: Callable[..., Any]) -> set[str] | None:
    """The keywords that the factory takes; None where it takes any."""
    parameters = inspect.signature(factory).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
