"""Specs: frozen configurations that compose and travel as JSON."""

from __future__ import annotations

import json
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, TypeVar

from gradbits.core.errors import ArgumentError

S = TypeVar("S", bound="Spec")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A frozen, keyword-only configuration with a JSON round trip.

    Subclasses are frozen dataclasses whose fields are JSON values, tuples or other specs.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as JSON values; the key ``type`` names the class."""
        return {"type": type(self).__name__, **{f.name: _encode(getattr(self, f.name)) for f in fields(self)}}

    @classmethod
    def from_dict(cls: type[S], data: dict[str, Any]) -> S:
        """Return the spec that ``data`` describes.

        Raises:
            ArgumentError: an unknown type or field, a field that is missing, or a value that is not legal.
        """
        if not isinstance(data, dict):
            raise ArgumentError(f"{data!r}: must be a dict with the key 'type'")
        spec = _decode(data)
        if not isinstance(spec, cls):
            raise ArgumentError(f"type={data.get('type')!r}: must be a {cls.__name__}")
        return spec

    def to_json(self) -> str:
        """Return the spec as one line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls: type[S], text: str) -> S:
        """Return the spec that ``text`` describes.

        Raises:
            ArgumentError: ``text`` is not JSON, or as in ``from_dict``.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArgumentError(f"text={text!r}: is not JSON: {error}") from None
        return cls.from_dict(data)


def _encode(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_dict()
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(v) for v in value)
    if not isinstance(value, dict):
        return value
    known: dict[str, type[Spec]] = {c.__name__: c for c in _subclasses(Spec)}
    name = value.get("type")
    if not isinstance(name, str) or name not in known:
        raise ArgumentError(f"type={name!r}: no such spec; known are {', '.join(sorted(known))}")
    legal = {f.name for f in fields(known[name])}
    given = {k: _decode(v) for k, v in value.items() if k != "type"}
    if unknown := sorted(set(given) - legal):
        raise ArgumentError(f"{name}.{unknown[0]}: no such field; legal are {', '.join(sorted(legal))}")
    if missing := sorted(f.name for f in fields(known[name]) if _is_required(f) and f.name not in given):
        raise ArgumentError(f"{name}.{missing[0]}: is missing")
    return known[name](**given)


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _subclasses(cls: type[Spec]) -> list[type[Spec]]:
    found: list[type[Spec]] = []
    for child in cls.__subclasses__():
        found += [child, *_subclasses(child)]
    return found
