"""The verb ``export``: a trained model as an ONNX file, with proof."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gradbits.train.export_file import Exported


def export(
    file: Annotated[
        Path, typer.Argument(help="Model that was trained with qat_int8: models/*.safetensors or a checkpoint.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="File to make. Default: FILE with the suffix .onnx, or .pt2 for pt2.")
    ] = None,
    form: Annotated[
        str,
        typer.Option(help="qdq (runtimes use their int8 kernels), integer (bit for bit, slower), pt2 (torch.export)."),
    ] = "qdq",
    check: Annotated[
        bool, typer.Option("--check", help="Run the test set through onnxruntime; show sizes and latencies.")
    ] = False,
    threads: Annotated[int, typer.Option(help="Threads of onnxruntime in the check.")] = 1,
    data: Annotated[str | None, typer.Option(help="Data set, as for train. Default: what the file says.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the four IDX files of fashion-mnist, mnist or idx.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Training samples that the model had. Default: what the file says.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model, as for train. Default: what the file says.", show_default=False)
    ] = None,
    model_set: Annotated[list[str] | None, typer.Option(help="Argument of the model; repeatable.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe with its options, as for train. Default: what the file says.")
    ] = None,
) -> None:
    """Write a model that was trained with qat_int8 as an ONNX file, and check it in onnxruntime."""
    from rich.console import Console

    from gradbits.core.checks import check_integer
    from gradbits.train.export_file import export_file

    check_integer(threads, "threads", 1)
    done = export_file(
        file,
        out,
        form=form,
        check=check,
        threads=threads,
        data=data,
        data_dir=data_dir,
        limit=limit,
        model=model,
        model_set=tuple(model_set) if model_set else None,
        recipe=recipe,
    )
    console = Console()
    if done.checked:
        console.print(_table(done, threads))
    console.print(f"{done.form}: {done.path}", highlight=False, markup=False, soft_wrap=True)


def _table(done: Exported, threads: int) -> Any:
    from rich.table import Table

    from gradbits.train.export_file import BATCH

    title = f"{done.samples:,} test samples, onnxruntime on {threads} thread{'s' if threads > 1 else ''}"
    note = "differing: integers of the result, and answers, that differ from the evaluation of the trained model"
    table = Table(title=title, caption=note)
    for column in ("form", "bytes", "accuracy", "differing", "in floats", "1 sample", f"{BATCH} samples"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for row in done.checked:
        times = (f"{ms:.2f} ms" if ms is not None else "" for ms in (row.ms_one, row.ms_batch))
        accuracy = "" if row.accuracy is None else f"{100 * row.accuracy:.2f} %"
        differing = "" if row.differing is None else f"{row.differing:,}, {row.answers:,}"
        table.add_row(row.name, f"{row.nbytes:,}", accuracy, differing, f"{row.largest:.2g}", *times)
    return table
