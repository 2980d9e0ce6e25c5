"""What may walk along with a training run: schedules and counters that act once a step."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Companion(Protocol):
    """Anything that acts after each optimizer step and can be stored: pruning schedules, range refreshes.

    The loop calls ``after_step`` in the order of its list and keeps the states in the checkpoint, so they must
    consist of tensors, numbers, strings, ``None``, lists, tuples and dictionaries.
    """

    def after_step(self, step: int) -> None:
        """Act on the run; ``step`` counts from 1 and the optimizer has just made that step."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state that ``state_dict`` returned."""
