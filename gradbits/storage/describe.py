"""What a gbz file holds, tensor by tensor, and a figure of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from gradbits.core.errors import ArgumentError, MissingDependencyError
from gradbits.storage.reader import GbzFile
from gradbits.storage.sharing import difference
from gradbits.storage.sources import open_source


@dataclass(frozen=True, kw_only=True)
class Row:
    """One tensor of a gbz file.

    Attributes:
        name, dtype, shape: of the tensor.
        coding: how it is stored, with the form of the index.
        original, stored: bytes in memory and in the file (its section alone).
        sparsity: part of exact zeros; None where only decoding would tell.
        codebook: number of centroids; None if the tensor is not shared.
        max_error, rms_error: absolute, as measured against ``against``, else as recorded when it was compressed.
        measured: whether the errors were measured now.
        why: why a tensor was not shared, if the file says so.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    coding: str
    original: int
    stored: int
    sparsity: float | None
    codebook: int | None
    max_error: float
    rms_error: float
    measured: bool
    why: str

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per element."""
        return 8 * self.stored / max(prod(self.shape), 1)

    @property
    def ratio(self) -> float:
        """Bytes in memory / bytes of the section; 1 for an empty tensor or an alias, which take no room."""
        return self.original / self.stored if self.stored else 1.0


def describe(path: str | Path, against: str | Path | None = None) -> list[Row]:
    """Return one row per tensor of a gbz file.

    Args:
        path: the gbz file.
        against: the model it was made from, in any format that ``open_source`` reads: errors are then measured, and
            every tensor decoded; without it the header alone is read.

    Raises:
        CorruptDataError: the file is damaged.
        ArgumentError: a tensor of ``path`` is not in ``against``, or has another shape there.
    """
    originals = dict(open_source(against).tensors()) if against is not None else {}
    rows = []
    with GbzFile(path) as packed:
        for name, entry in packed.entries.items():
            extra = entry.extra
            size = prod(entry.shape)
            largest, rms = extra.get("loss", (0.0, 0.0))
            if against is not None:
                original = originals.get(name)
                if original is None or tuple(original.shape) != entry.shape:
                    found = "not there" if original is None else f"of shape {list(original.shape)} there"
                    raise ArgumentError(f"{against}: tensor {name!r} of shape {list(entry.shape)} is {found}")
                tensor = packed.tensor(name)
                exact = entry.coding != "shared" and tensor.dtype == original.dtype
                largest, rms = (0.0, 0.0) if exact else difference(tensor, original)
            coding = f"shared, {extra['index']}" if entry.coding == "shared" else entry.coding
            rows.append(
                Row(
                    name=name,
                    dtype=entry.dtype,
                    shape=entry.shape,
                    coding=f"alias of {extra['of']}" if entry.coding == "alias" else coding,
                    original=entry.nbytes,
                    stored=entry.stored,
                    sparsity=1 - extra["nnz"] / size if "nnz" in extra and size else None,
                    codebook=extra.get("k"),
                    max_error=float(largest),
                    rms_error=float(rms),
                    measured=against is not None,
                    why=extra.get("why", ""),
                )
            )
    return rows


def plot(rows: Sequence[Row], target: str | Path) -> None:
    """Draw bits per weight, sparsity and rms error of every tensor, and write the figure to ``target``.

    Args:
        rows: from ``describe``.
        target: file to make; its suffix picks the format (png, svg, pdf).

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ArgumentError: a suffix that matplotlib does not know, or no tensor to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("a plot needs the package matplotlib: pip install 'gradbits[plot]'") from error
    if not rows:
        raise ArgumentError("plot: the file holds no tensor")
    places = list(range(len(rows)))
    figure = Figure(figsize=(10, max(2.5, 0.28 * len(rows) + 1.2)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    columns = (
        ("bits per weight", [row.bits_per_weight for row in rows]),
        ("sparsity", [row.sparsity or 0.0 for row in rows]),
        ("rms error", [row.rms_error for row in rows]),
    )
    for axis, (title, values) in zip(axes, columns, strict=True):
        axis.barh(places, values, color="#4477aa")
        axis.set_title(title)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(places, [row.name for row in rows], fontsize=7)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    axes[1].set_xlim(0, 1)
    try:
        figure.savefig(str(target), dpi=150)
    except (ValueError, OSError) as error:
        raise ArgumentError(f"plot={str(target)!r}: cannot be written: {error}") from error
