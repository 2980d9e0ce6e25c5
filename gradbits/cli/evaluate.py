"""The verb ``evaluate``: the test result of a model file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    file: Annotated[
        Path, typer.Argument(help="Model: safetensors, gbz, a checkpoint of gradbits train or another torch file.")
    ],
    data: Annotated[str | None, typer.Option(help="Data set, as for train. Default: what the file says.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the four IDX files of fashion-mnist, mnist or idx.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A file of which the last tenth is the test.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Training samples that the model had. Default: what the file says.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model, as for train. Default: what the file says.", show_default=False)
    ] = None,
    model_set: Annotated[
        list[str] | None, typer.Option(help="Argument of the model, as d_model=256; repeatable.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Evaluate in few bits: a recipe, bf16, or name:path=value. Default: fp32.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: cuda where there is one.")] = None,
) -> None:
    """Measure a model file on its test set: accuracy, or bits per byte of a text."""
    from gradbits.train.evaluate_file import evaluate_file

    found = evaluate_file(
        file,
        data=data,
        data_dir=data_dir,
        text=text,
        limit=limit,
        model=model,
        model_set=tuple(model_set) if model_set else None,
        recipe=recipe,
        device=device,
    )
    if found.metric == "test_accuracy":
        result = f"test accuracy {100 * found.value:.2f} % on {found.samples:,} test samples"
    else:
        result = f"test {found.value:.4f} bits per byte on {found.samples:,} test samples (bytes)"
    print(f"{file}: {result} ({found.data}, {found.model}, {found.network})")
