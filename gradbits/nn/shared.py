"""Codes that several layers take from one input are computed and kept once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gradbits.core.qtensor import QTensor
from gradbits.quantizers.quantizer import Quantizer


@dataclass
class Shared:
    """The codes of one tensor by one quantizer; they live on the tensor and go with it.

    Args:
        owner: the tensor, or the one it is a view of.
        place: names its elements as they are now, and the quantizer.
        codes: what is known, or None.
    """

    owner: torch.Tensor
    place: tuple[Any, ...]
    codes: QTensor | None = None

    @staticmethod
    def of(value: torch.Tensor, q: Quantizer, tokens: int) -> Shared | None:
        """Return what is known of the codes of ``value``; None where they may differ from call to call."""
        owner = value if value._base is None else value._base
        if q.is_stochastic or q.init_state(1) or q.range.can_clip or value.is_inference() or owner.grad_fn is None:
            return None  # what no operation has made may be changed behind PyTorch's back, by NumPy or ``.data``
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype, value._version, q, tokens)
        known: dict[Any, QTensor] = getattr(owner, "gradbits_codes", {})
        return Shared(owner, place, known.get(place))

    def keep(self, codes: QTensor) -> None:
        """Note the codes for the next layer that asks."""
        known: dict[Any, QTensor] = self.owner.__dict__.setdefault("gradbits_codes", {})
        for place in [place for place in known if place[4] != self.place[4]]:
            del known[place]  # the tensor was changed since
        known[self.place] = codes
