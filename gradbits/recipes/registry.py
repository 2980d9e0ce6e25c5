"""Where recipes are found: every file of this package may hold functions marked as recipes."""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import import_module
from typing import Any

from gradbits.core.errors import ArgumentError, GradbitsError
from gradbits.recipes.recipe import Recipe, parse_value

Factory = Callable[..., Recipe]


@dataclass(frozen=True, kw_only=True)
class RecipeInfo:
    """What is known of a recipe before it is built.

    Args:
        name: name for ``quantize_`` and the command line.
        factory: function that returns the recipe; its arguments are the recipe's options.
        title: the paper's title, or a short description.
        paper: where to find the paper.
        survey: name of the method in the survey literature.
        unbiased: whether both backward products are unbiased estimates for the quantized forward pass.
    """

    name: str
    factory: Factory
    title: str
    paper: str
    survey: str
    unbiased: bool

    @property
    def options(self) -> dict[str, Any]:
        """The recipe's options and their defaults."""
        return {name: p.default for name, p in inspect.signature(self.factory).parameters.items()}


def published(*, title: str, paper: str = "", survey: str = "", unbiased: bool) -> Callable[[Factory], Factory]:
    """Mark a function that returns a recipe; its name is the recipe's name."""

    def mark(factory: Factory) -> Factory:
        info = RecipeInfo(
            name=factory.__name__, factory=factory, title=title, paper=paper, survey=survey, unbiased=unbiased
        )
        factory.recipe_info = info  # type: ignore[attr-defined]
        return factory

    return mark


@lru_cache(maxsize=1)
def recipes() -> dict[str, RecipeInfo]:
    """Return every recipe by name.

    >>> "unified_int8" in recipes()
    True
    """
    found: dict[str, RecipeInfo] = {}
    package = import_module("gradbits.recipes")
    for module in pkgutil.iter_modules(package.__path__):
        for value in vars(import_module(f"gradbits.recipes.{module.name}")).values():
            info = getattr(value, "recipe_info", None)
            if isinstance(info, RecipeInfo):
                found[info.name] = info
    return dict(sorted(found.items()))


def configured(name: str, settings: Mapping[str, Any]) -> Recipe:
    """Return a published recipe with options and fields set by name, as on the command line.

    A name that is an option of the recipe goes to ``recipe``, any other to ``Recipe.with_overrides``, in that order. A
    string is read as JSON where it is JSON.

    Args:
        name: one of ``recipes()``.
        settings: values by option, as ``sampling``, or path, as ``gradient.bits``.

    Raises:
        ArgumentError: no recipe of that name, or a setting that is neither an option nor a field.

    >>> configured("int4_transformer", {"sampling": "false", "keep_float": '["last_linear"]'}).grad_weight.sampling
    """
    options = recipes()[name].options if name in recipes() else {}
    chosen = {key: parse_value(value) for key, value in settings.items() if key in options}
    made = recipe(name, **chosen)
    rest = {key: value for key, value in settings.items() if key not in options}
    for key, value in rest.items():
        if "." not in key and key not in (known := [field.name for field in fields(made)]):
            raise ArgumentError(
                f"{key}={value!r}: recipe {name!r} has the options {', '.join(options)} and the fields "
                f"{', '.join(known)}"
            )
    return made.with_overrides(rest)


def recipe(name: str, **options: Any) -> Recipe:
    """Return a published recipe.

    Args:
        name: one of ``recipes()``.
        options: the recipe's options, see ``recipes()[name].options``.

    Raises:
        ArgumentError: no recipe of that name, or no option of that name.

    >>> recipe("int8_dynamic", bits=4).output.weight.bits
    4
    """
    known = recipes()
    if name not in known:
        raise ArgumentError(f"recipe={name!r}: no such recipe; known are {', '.join(known)}")
    legal = known[name].options
    for option, value in options.items():
        if option not in legal:
            raise ArgumentError(f"{option}={value!r}: recipe {name!r} has the options {', '.join(legal)}")
    try:
        return known[name].factory(**options)
    except GradbitsError as error:
        raise type(error)(_renamed(str(error), options)) from None


def _renamed(message: str, options: Mapping[str, Any]) -> str:
    """Return a message about a field of a spec, as ``Symmetric.bits=1: ...``, as one about the option behind it."""
    for option, value in options.items():
        found = re.match(rf"\w+\.(\w+)={re.escape(repr(value))}: ", message)
        if found and re.search(rf"(^|_){found[1]}$", option):
            return f"{option}={value!r}: {message[found.end() :]}"
    return message
