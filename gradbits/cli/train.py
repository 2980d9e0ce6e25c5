"""The verb ``train``: reference runs, alone or side by side."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gradbits.train.options import TrainOptions


def train(
    *,
    data: Annotated[
        str | None, typer.Option(help="digits (default), fashion-mnist, mnist, idx, pydoc or text.", show_default=False)
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the four IDX files of fashion-mnist, mnist or idx.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A file to learn byte by byte; the last tenth is the test.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first N training samples (bytes of a text).")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="mlp, small_cnn, resnet20, resnet18, mobilenet, gpt or package.module:factory.", show_default=False
        ),
    ] = None,
    model_set: Annotated[
        list[str] | None, typer.Option(help="Argument of the model, as d_model=256; repeatable.")
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="A model file to start from: safetensors, gbz or a checkpoint of train.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A recipe, fp32, bf16 or none. Default: unified_int8; int8_dynamic for text.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Option or field of the recipe, as sampling=false or gradient.bits=5; repeatable."),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="Train several on the same batches: fp32,bf16,unified_int8:gradient.bits=5.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, as 0,1,2. Default: 0.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Length in epochs.")] = None,
    steps: Annotated[int | None, typer.Option(help="Length in steps, instead of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples of a batch.")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="sgd (momentum 0.9), adam, adamw, quantized_adam, onebit_adam.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay.")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine (default) or constant.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda where there is one.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: what torch chooses.")] = None,
    compute: Annotated[
        str | None, typer.Option(help="auto (default), integer or simulate: how quantized products are computed.")
    ] = None,
    pack_activations: Annotated[
        int | None, typer.Option(help="Bits of what autograd keeps for the backward pass, 2 to 8. Default: as it is.")
    ] = None,
    gradient_l1: Annotated[
        float | None,
        typer.Option(
            "--gradient-l1", help="Coefficient of the L1 norms of the loss's gradients, as 0.01; for float networks."
        ),
    ] = None,
    gradient_l1_activations: Annotated[
        float | None,
        typer.Option("--gradient-l1-activations", help="The same for activations alone. Default: as --gradient-l1."),
    ] = None,
    gradient_l1_start: Annotated[
        float | None, typer.Option("--gradient-l1-start", help="Part of the steps before it begins. Default: 0.")
    ] = None,
    eval_bits: Annotated[
        str | None, typer.Option(help="Test the trained networks quantized to so many bits as well: 8,6,5,4.")
    ] = None,
    prune: Annotated[
        float | None, typer.Option(help="Sparsity of the weights, reached from 10 to 60 % of the steps, as 0.9.")
    ] = None,
    share: Annotated[
        int | None, typer.Option(help="Bits of codebooks, 1 to 8, that the last fifth of the steps trains.")
    ] = None,
    measure_variance: Annotated[
        bool,
        typer.Option(
            "--measure-variance", help="Also measure bias and variance of every layer's gradients, once trained."
        ),
    ] = False,
    draws: Annotated[
        int | None, typer.Option(help="Draws of the noise for --measure-variance, at least 3. Default: 32.")
    ] = None,
    wire: Annotated[
        str | None,
        typer.Option(help="With torchrun: gradients between ranks, none, fp16, bf16, powersgd or a codec, as alq."),
    ] = None,
    wire_bits: Annotated[int | None, typer.Option(help="Bits of the codec.")] = None,
    wire_bucket: Annotated[int | None, typer.Option(help="Values that share a scale on the wire.")] = None,
    wire_feedback: Annotated[
        bool | None, typer.Option(help="Add what is lost to the next gradient. Default: as the codec wants.")
    ] = None,
    wire_start: Annotated[int | None, typer.Option(help="Steps at the beginning that go uncompressed.")] = None,
    entropy: Annotated[str | None, typer.Option(help="huffman or zstd: entropy coding on the wire.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints, besides one at each test.")] = None,
    log_every: Annotated[int | None, typer.Option(help="Steps between lines of log.jsonl. Default: 10.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for everything. Default: a fresh one under runs/.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again in a folder that is not empty.")] = False,
) -> None:
    """Train a small network in few bits, or several side by side, and show what it costs and how good it gets."""
    from gradbits.core.errors import ArgumentError
    from gradbits.train.options import TrainOptions

    if recipe is not None and compare is not None:
        raise ArgumentError(f"recipe={recipe!r}: cannot be combined with compare={compare!r}; name it there")
    networks = _split(compare) if compare is not None else ((recipe,) if recipe is not None else None)
    options = TrainOptions(
        data=data,
        data_dir=None if data_dir is None else str(data_dir),
        text=None if text is None else str(text),
        limit=limit,
        model=model,
        model_set=tuple(model_set) if model_set else None,
        init=None if init is None else str(init),
        networks=networks,
        overrides=tuple(set_) if set_ else None,
        seeds=_integers("seeds", seeds, "0,1,2"),
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        schedule=schedule,
        device=device,
        threads=threads,
        compute=compute,
        pack_activations=pack_activations,
        gradient_l1=gradient_l1,
        gradient_l1_activations=gradient_l1_activations,
        gradient_l1_start=gradient_l1_start,
        eval_bits=_integers("eval_bits", eval_bits, "8,6,5,4"),
        prune=prune,
        share=share,
        measure_variance=True if measure_variance else None,
        draws=draws,
        wire=wire,
        wire_bits=wire_bits,
        wire_bucket=wire_bucket,
        wire_feedback=wire_feedback,
        wire_start=wire_start,
        entropy=entropy,
        save_every=save_every,
        log_every=log_every,
    )
    _run(options, out=out, resume=resume, overwrite=overwrite)


def _run(options: TrainOptions, *, out: Path | None, resume: bool, overwrite: bool) -> None:
    """Train, on this process or as one of several ranks, and say where everything lies."""
    from rich.console import Console

    from gradbits.train.experiment import Experiment
    from gradbits.train.interrupt import Interrupted
    from gradbits.train.ranks import joined

    program = [Path(sys.executable).name, "-m", "gradbits"] if sys.argv[0].endswith("__main__.py") else ["gradbits"]
    with joined() as ranks:
        if ranks.world > 1:
            program = ["torchrun", f"--nproc-per-node={ranks.world}", "-m", "gradbits"]
        command = shlex.join([*program, *sys.argv[1:]])
        # a pipe has no width; rich would take 80
        console = Console(width=None if sys.stdout.isatty() else 120, quiet=not ranks.leads)
        experiment = Experiment(
            options, out=out, resume=resume, overwrite=overwrite, command=command, console=console, ranks=ranks
        )
        try:
            experiment.run()
        except Interrupted as stopped:
            root = experiment.folder().root if ranks.leads else ""
            again = shlex.join([*program, "train", "--out", str(root), "--resume"])
            console.print(
                f"stopped, the state is saved; to go on: {again}", highlight=False, markup=False, soft_wrap=True
            )
            raise typer.Exit(128 + stopped.signal) from stopped
        if ranks.leads:
            folder = experiment.folder()
            console.print(f"models: {folder.models}", highlight=False, markup=False, soft_wrap=True)
            console.print(f"results: {folder.results}", highlight=False, markup=False, soft_wrap=True)
            if experiment.options.measure_variance:
                console.print(f"variance: {folder.variance}", highlight=False, markup=False, soft_wrap=True)


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _integers(name: str, text: str | None, example: str) -> tuple[int, ...] | None:
    from gradbits.core.errors import ArgumentError

    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ArgumentError(f"{name}={text!r}: must be integers with commas between them, as {example}") from error
