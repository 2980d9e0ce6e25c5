"""The buffers of one group of parameters: its values row by row, and what error feedback remembers of them."""

from __future__ import annotations

import torch

from gradbits.wire.layout import GroupLayout


class GroupBuffers:
    """The values of one group of parameters, and what error feedback remembers of them.

    Args:
        layout: which parameters.
        feedback: whether encoding errors are remembered.
        device: of the gradients.
    """

    def __init__(self, layout: GroupLayout, feedback: bool, device: torch.device) -> None:
        self.layout = layout
        self.coded = torch.zeros(layout.world, layout.coded_width, device=device)
        self.raw = torch.zeros(layout.world, layout.raw_width, device=device)
        # errors of this rank's rows, and of the mean of the row that it owns; the pending ones hold once the whole
        # step is known to be finite on all ranks
        self.residual = torch.zeros_like(self.coded) if feedback else None
        self.owned = torch.zeros(layout.coded_width, device=device) if feedback else None
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self._spare: tuple[torch.Tensor, torch.Tensor] | None = None

    def spare(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return memory for the pending errors."""
        assert self.residual is not None
        assert self.owned is not None
        if self._spare is None:
            self._spare = (torch.empty_like(self.residual), torch.empty_like(self.owned))
        return self._spare

    def commit(self) -> None:
        """Let the pending errors hold."""
        if self.pending is not None:
            assert self.residual is not None
            assert self.owned is not None
            self._spare = (self.residual, self.owned)
            self.residual, self.owned = self.pending
            self.pending = None

    def rollback(self) -> None:
        """Forget the pending errors."""
        self.pending = None

    def rescale(self, factor: float) -> None:
        """Multiply what is remembered, because the losses are scaled by another factor now."""
        if self.residual is not None and self.owned is not None:
            self.residual *= factor
            self.owned *= factor
