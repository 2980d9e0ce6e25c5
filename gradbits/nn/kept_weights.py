"""Codes of a weight that has not changed are computed once: for evaluation and gradient accumulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gradbits.core.qtensor import QTensor
from gradbits.kernels.dispatch import Request, choose, run
from gradbits.quantizers.quantizer import Quantizer

_NOTE = "gradbits_weight_codes"


@dataclass
class KeptWeight:
    """What is known of a weight's codes; it lives on the parameter.

    PyTorch counts changes in place, but not those by ``.data`` or NumPy, so before codes are used again a digest of
    the weight's memory must be what it was: that reads memory once, where quantizing reads it twice and writes codes.
    A weight that changes between any two calls, as in plain training, is neither digested nor kept; nor is one any more
    that has been found changed without PyTorch's counting it, as sharding does.

    Args:
        place: names the weight's memory, its count of changes, and the quantizer.
        digest: of the memory when the codes were made, or None: seen once, nothing kept yet.
        codes: of the weight then.
        trusted: whether nobody has changed it uncounted.
    """

    place: tuple[Any, ...] = ()
    digest: int | None = None
    codes: QTensor | None = None
    trusted: bool = True

    def __reduce__(self) -> tuple[type[KeptWeight], tuple[()]]:
        return KeptWeight, ()  # files and copies hold no codes


def kept_codes(weight: torch.Tensor, q: Quantizer) -> QTensor | None:
    """Return the codes of ``weight`` by ``q`` where they are known to be what quantizing would give.

    Where they may become known, ``keep_codes`` is to be told of what quantizing gave.
    """
    note: KeptWeight | None = getattr(weight, _NOTE, None)
    if note is None or note.digest is None or note.place != _place(weight, q):
        return None
    if _digest(weight) == note.digest:
        return note.codes
    note.trusted, note.codes, note.digest = False, None, None
    return None


def keep_codes(weight: torch.Tensor, q: Quantizer, codes: QTensor) -> None:
    """Note that ``codes`` are what ``q`` gives for ``weight``; kept are those of a weight that is seen again."""
    if not _may_keep(weight, q):
        return
    place = _place(weight, q)
    note: KeptWeight | None = getattr(weight, _NOTE, None)
    if note is None:
        weight.__dict__[_NOTE] = KeptWeight(place)
    elif note.place != place:
        note.place, note.digest, note.codes = place, None, None
    elif note.trusted:
        note.digest, note.codes = _digest(weight), codes


def _may_keep(weight: torch.Tensor, q: Quantizer) -> bool:
    """Whether the codes depend on the weight alone, and a digest is cheaper than they are."""
    if not isinstance(weight, torch.nn.Parameter) or weight.is_inference() or weight.numel() == 0:
        return False
    if q.is_stochastic or q.init_state(1) or q.range.can_clip or q.estimator.learns or q.estimator.shapes:
        return False
    return choose("digest", Request(weight.device.type)).backend == "native"


def _place(weight: torch.Tensor, q: Quantizer) -> tuple[Any, ...]:
    return weight.data_ptr(), weight.shape, weight.stride(), weight.dtype, weight._version, q


def _digest(weight: torch.Tensor) -> int:
    return int(run("digest", Request(weight.device.type), "auto", weight.detach()))
