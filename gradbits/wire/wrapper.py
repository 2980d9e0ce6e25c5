"""A codec around a codec: what it does not change is the inner one's."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradbits.wire.codec import Codec, State


@dataclass(frozen=True, kw_only=True)
class Wrapper(Codec):
    """What every wrapper leaves to the codec in it; a wrapper adds ``encode`` and ``decode``.

    Args:
        codec: the codec that is wrapped.
    """

    codec: Codec

    @property
    def name(self) -> str:
        return self.codec.name

    @property
    def unbiased(self) -> bool:
        return self.codec.unbiased

    def init_state(self) -> State:
        return self.codec.init_state()

    def statistics(self, x: torch.Tensor) -> torch.Tensor:
        return self.codec.statistics(x)

    def adapt(self, state: State, statistics: torch.Tensor) -> State:
        return {**state, **self.codec.adapt(state, statistics)}

    def is_due(self, step: int) -> bool:
        return self.codec.is_due(step)
