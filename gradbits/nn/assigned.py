"""What follows a recipe: a float module with another class, so that parameters, hooks and references stay."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from gradbits.nn.assignment import Assignment
from gradbits.nn.compiled import register
from gradbits.nn.refuse import refuse_script


class Assigned:
    """What the quantized classes of products and of attention add to their float class."""

    float_class: ClassVar[type[nn.Module]]
    assignment: Assignment

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        register(self)

    def __prepare_scriptable__(self) -> None:  # the name that torch.jit.script looks for
        refuse_script(self.assignment.name)
