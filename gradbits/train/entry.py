"""Which networks a run trains: a recipe name or a float format, with overrides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gradbits.core.errors import ArgumentError

FLOAT = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One network of a comparison.

    Args:
        recipe: ``fp32``, ``bf16`` (autocast with fp32 parameters) or the name of a recipe.
        overrides: (path, value) pairs for the recipe, as ``("gradient.bits", "5")``.
    """

    recipe: str
    overrides: tuple[tuple[str, str], ...] = ()

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return self.recipe in FLOAT

    @property
    def label(self) -> str:
        """The entry as it is written on the command line."""
        return ":".join((self.recipe, *(f"{path}={value}" for path, value in self.overrides)))

    @property
    def slug(self) -> str:
        """The label as a part of a file name."""
        return re.sub(r"[^A-Za-z0-9.=_-]+", "_", self.label)


def parse_override(text: str) -> tuple[str, str]:
    """Return path and value of ``path=value``.

    Raises:
        ArgumentError: another form.

    >>> parse_override("gradient.bits=5")
    ('gradient.bits', '5')
    """
    path, equals, value = text.partition("=")
    if not equals or not path.strip() or not value.strip():
        raise ArgumentError(f"set={text!r}: must be path=value, for example gradient.bits=5")
    return path.strip(), value.strip()


def parse_entry(text: str, common: Sequence[str] = ()) -> Entry:
    """Return the entry that ``name`` or ``name:path=value:path=value`` stands for.

    Args:
        text: as on the command line; ``none`` is another word for ``fp32``.
        common: overrides for every quantized entry; those of the entry itself win.

    Raises:
        ArgumentError: an override of another form, or one for a float network.

    >>> parse_entry("unified_int8:gradient.bits=5").label
    'unified_int8:gradient.bits=5'
    """
    name, *own = (part.strip() for part in text.split(":"))
    if not name:
        raise ArgumentError(f"compare={text!r}: must be name or name:path=value")
    name = "fp32" if name == "none" else name
    if name in FLOAT:
        if own:
            raise ArgumentError(f"compare={text!r}: {name} has no quantizers, so nothing to override")
        return Entry(recipe=name)
    overrides = dict(parse_override(item) for item in (*common, *own))
    return Entry(recipe=name, overrides=tuple(overrides.items()))
