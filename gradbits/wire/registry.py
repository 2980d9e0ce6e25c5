"""Where codecs are found: every file of ``gradbits.wire.methods`` may define some."""

from __future__ import annotations

import pkgutil
from dataclasses import fields, replace
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

from gradbits.core.checks import check_choice, check_instance
from gradbits.core.errors import ArgumentError, CorruptDataError
from gradbits.wire.codec import Codec, Payload

ENTROPY = ("huffman", "zstd")


@lru_cache(maxsize=1)
def codecs() -> dict[str, type[Codec]]:
    """Return every codec's class by name; the wrappers, which take another codec, are not among them.

    >>> "qsgd" in codecs()
    True
    """
    found: dict[str, type[Codec]] = {}
    package = import_module("gradbits.wire.methods")
    for _, name, _ in pkgutil.iter_modules(package.__path__):
        module = import_module(f"gradbits.wire.methods.{name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Codec) and value.__module__ == module.__name__:
                found[value().name] = value
    return dict(sorted(found.items()))


def codec(name: str | Codec, *, entropy: str | None = None, feedback: bool | None = None, **options: Any) -> Codec:
    """Return a codec by name, with the wrappers that are asked for.

    Args:
        name: one of ``codecs()``, or a codec, which is returned with the wrappers that it lacks; error feedback is
            around entropy coding, whatever the order in which they came.
        entropy: ``"huffman"`` or ``"zstd"``: code the symbols so; None: leave them at their fixed width.
        feedback: whether what the codec loses is added to the next gradient; None: as the codec that was given has it,
            or as the method wants, which is yes for biased codecs and no for unbiased ones.
        options: the codec's fields, such as ``bits`` or ``bucket``.

    Raises:
        ArgumentError: no codec or option of that name, or an illegal value.
        MissingDependencyError: ``"zstd"`` without the package ``zstandard``.

    >>> codec("qsgd", bits=8).bits
    8
    >>> codec("qsgd", bits=3, entropy="huffman").name
    'qsgd'
    """
    check_instance(name, "codec", str, Codec)
    check_instance(feedback, "feedback", bool, None)
    from gradbits.wire.feedback import ErrorFeedback

    built = name if isinstance(name, Codec) else _build(name, options)
    if isinstance(name, Codec) and options:
        raise ArgumentError(f"{next(iter(options))}: options belong to a codec's name; this is a codec: {name!r}")
    around = built if isinstance(built, ErrorFeedback) else None  # stays outside of entropy coding
    built = built.codec if isinstance(built, ErrorFeedback) else built
    if entropy is not None:
        check_choice(entropy, "entropy", ENTROPY)
        from gradbits.wire.entropy import Huffman, Zstd

        if not built.has_codes:
            raise ArgumentError(f"entropy={entropy!r}: codec {built.name!r} has no symbols left that could be coded")
        built = Huffman(codec=built) if entropy == "huffman" else Zstd(codec=built)
    if feedback is None:
        feedback = around is not None or built.wants_feedback
    if not feedback:
        return built
    return ErrorFeedback(codec=built) if around is None else replace(around, codec=built)


def _build(name: str, options: dict[str, Any]) -> Codec:
    known = codecs()
    if name not in known:
        raise ArgumentError(f"codec={name!r}: no such codec; known are {', '.join(known)}")
    legal = [f.name for f in fields(known[name])]
    for option, value in options.items():
        if option not in legal:
            has = f"has the options {', '.join(legal)}" if legal else "has no options"
            raise ArgumentError(f"{option}={value!r}: codec {name!r} {has}")
    return known[name](**options)


def decode(payload: Payload) -> torch.Tensor:
    """Return the tensor of a payload of any codec.

    Raises:
        CorruptDataError: the payload is not one that a codec makes.

    >>> decode(codec("qsgd").encode(torch.zeros(3)))
    tensor([0., 0., 0.])
    """
    check_instance(payload, "payload", Payload)
    kind = codecs().get(payload.codec)
    if kind is None:
        raise CorruptDataError(f"payload: codec {payload.codec!r} is not known; known are {', '.join(codecs())}")
    from gradbits.wire.entropy import plain

    return kind().decode(plain(payload))
