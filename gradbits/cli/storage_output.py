"""How the storage verbs show progress and tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from gradbits.core.errors import GradbitsError

if TYPE_CHECKING:
    from gradbits.storage.compress import Progress


@contextmanager
def progress_bar(what: str, source: Path, quiet: bool) -> Iterator[Progress | None]:
    """Give a function that moves a progress bar on stderr by bytes; None where nobody would see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=_total(source))

        def advance(name: str, size: int) -> None:
            bar.update(task, advance=size, description=f"{what} {name[-40:]}")

        yield advance


def _total(source: Path) -> int | None:
    """Bytes of the tensors, as nearly as the file sizes tell; None where only reading would."""
    from gradbits.storage.reader import GbzFile

    try:
        if source.suffix == ".gbz":
            with GbzFile(source) as packed:
                return sum(entry.nbytes for entry in packed.entries.values())
        return source.stat().st_size if source.is_file() and source.suffix != ".json" else None
    except (OSError, GradbitsError):
        return None  # the error is told by the call that follows


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first four columns are text, the others numbers."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE, pad_edge=False)
    for place, title in enumerate(titles):
        table.add_column(title, justify="left" if place < 4 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    # a table that does not fit is still whole in a file or a pipe
    (console if console.is_terminal else Console(width=max(200, console.width))).print(table)


def shape_text(shape: tuple[int, ...]) -> str:
    """Return a shape as it is shown, ``64x80``."""
    return "x".join(map(str, shape)) if shape else "scalar"


def number_text(value: float | None, form: str) -> str:
    """Return a formatted number, nothing for None."""
    return "" if value is None else format(value, form)
