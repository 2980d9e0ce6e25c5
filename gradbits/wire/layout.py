"""Which parameters travel together, and where each one's values are in the buffer of its group.

Groups are made once from the model's parameters, in reverse order (that of their gradients), and know nothing of DDP's
buckets: what is encoded, and the noise of its rounding, stays the same when DDP rebuilds those.

A parameter of n values is cut into ``world`` chunks of ceil(n / world), the last ones padded with zeros; row r of a
group's buffer holds chunk r of each of its parameters. Rank r owns row r, so which values of a parameter it owns
depends on the parameter alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

VECTOR_FACTOR = 64  # vectors (biases, norms) are encoded from this many times more elements on than matrices


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One parameter in a group.

    Args:
        name: of the parameter.
        shape: of the parameter.
        chunk: values of it in each row.
        start: where they begin in a row.
    """

    name: str
    shape: torch.Size
    chunk: int
    start: int

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return self.shape.numel()

    def view(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the slot's part [world, chunk] of a group's rows [world, width]."""
        return rows[:, self.start : self.start + self.chunk]

    def clear_padding(self, rows: torch.Tensor, first: int = 0) -> None:
        """Set the padding in ``rows`` [any number, width] to zero; ``first`` is the number of their first row."""
        for index, row in enumerate(self.view(rows), start=first):
            if (index + 1) * self.chunk > self.numel:
                row[max(0, self.numel - index * self.chunk) :] = 0

    def write(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Copy a tensor of the parameter's shape into the rows, cast to their dtype."""
        flat, part = values.detach().reshape(-1), self.view(rows)
        full = self.numel // self.chunk if self.chunk else 0
        part[:full].copy_(flat[: full * self.chunk].view(full, self.chunk))
        if full < len(part):
            rest = self.numel - full * self.chunk
            part[full, :rest].copy_(flat[full * self.chunk :])
            part[full, rest:] = 0
            part[full + 1 :] = 0

    def read(self, rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Copy the parameter's values from the rows into ``out`` and return it."""
        part = self.view(rows)
        full = self.numel // self.chunk if self.chunk else 0
        flat = out.view(-1) if out.is_contiguous() else torch.empty(self.numel, dtype=out.dtype, device=out.device)
        flat[: full * self.chunk].view(full, self.chunk).copy_(part[:full])
        if full < len(part):
            flat[full * self.chunk :].copy_(part[full, : self.numel - full * self.chunk])
        if not out.is_contiguous():
            out.copy_(flat.view(out.shape))
        return out


@dataclass(frozen=True, kw_only=True)
class GroupLayout:
    """The parameters that travel together.

    Args:
        index: number of the group.
        world: number of ranks.
        coded: parameters that are encoded.
        raw: parameters that go as they are.
    """

    index: int
    world: int
    coded: tuple[Slot, ...]
    raw: tuple[Slot, ...]

    @property
    def coded_width(self) -> int:
        """Values of a row that are encoded."""
        return sum(slot.chunk for slot in self.coded)

    @property
    def raw_width(self) -> int:
        """Values of a row that go as they are."""
        return sum(slot.chunk for slot in self.raw)

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(slot.numel for slot in (*self.coded, *self.raw))

    @property
    def title(self) -> str:
        """The group for messages: its number and its first parameter."""
        first = next(iter((*self.coded, *self.raw)), None)
        return f"group {self.index}" + (f" ({first.name!r} ...)" if first else "")


def is_coded(shape: torch.Size, min_elements: int) -> bool:
    """Return whether a parameter is worth encoding: large enough, and a vector only if it is very large.

    >>> is_coded(torch.Size([64, 64]), 1024), is_coded(torch.Size([4096]), 1024), is_coded(torch.Size([4, 4]), 1024)
    (True, False, False)
    """
    count = shape.numel()
    return count > 0 and count >= min_elements * (VECTOR_FACTOR if len(shape) < 2 else 1)


def make_groups(
    shapes: Iterable[tuple[str, torch.Size]], *, world: int, min_elements: int, group_elements: int
) -> list[GroupLayout]:
    """Return the groups for parameters that are given in the order of the model.

    Args:
        shapes: name and shape of each parameter.
        world: number of ranks.
        min_elements: see ``is_coded``.
        group_elements: a group is closed when it holds at least this many.

    >>> groups = make_groups([("a", torch.Size([4, 5])), ("b", torch.Size([3]))], world=2, min_elements=8,
    ...                      group_elements=100)
    >>> groups[0].title, groups[0].coded_width, groups[0].raw_width
    ("group 0 ('a' ...)", 10, 2)
    """
    groups: list[GroupLayout] = []
    coded: list[Slot] = []
    raw: list[Slot] = []
    held = 0

    def close() -> None:
        nonlocal coded, raw, held
        groups.append(GroupLayout(index=len(groups), world=world, coded=tuple(coded), raw=tuple(raw)))
        coded, raw, held = [], [], 0

    for name, shape in reversed(list(shapes)):
        slots = coded if is_coded(shape, min_elements) else raw
        start = slots[-1].start + slots[-1].chunk if slots else 0
        slots.append(Slot(name=name, shape=shape, chunk=-(-shape.numel() // world), start=start))
        held += shape.numel()
        if held >= group_elements:
            close()
    if coded or raw:
        close()
    return groups
