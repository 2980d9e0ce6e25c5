"""``gradbits bench wire``: what codecs cost and save for a gradient, and when a link is too fast for them."""

from __future__ import annotations

import json as json_text
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradbits.core.errors import ArgumentError

if TYPE_CHECKING:
    from gradbits.bench.wire import Question, Row


def wire(
    model: Annotated[
        str | None, typer.Option(help="Whose gradient: a built-in model or package.module:factory.", show_default=False)
    ] = None,
    numel: Annotated[
        str | None, typer.Option(help="Or this many drawn values, as 25M. Default: 1M.", show_default=False)
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set for --model. Default: digits; pydoc for gpt.", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples of a batch, for --model. Default: 128.", show_default=False)
    ] = None,
    codecs: Annotated[str | None, typer.Option(help="Names, as qsgd,alq. Default: all.", show_default=False)] = None,
    bits: Annotated[
        str | None, typer.Option(help="Bits to try, as 3,4. Default: each codec's own.", show_default=False)
    ] = None,
    bucket: Annotated[int | None, typer.Option(help="Values per norm. Default: each codec's own.")] = None,
    entropy: Annotated[str, typer.Option(help="Entropy coding to try: none, huffman, zstd, as none,huffman.")] = "none",
    world: Annotated[int, typer.Option(help="Ranks.")] = 4,
    gbps: Annotated[str, typer.Option(help="Links in Gbit/s.")] = "0.1,1,10",
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: what torch chooses.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds; each runs everybody once.")] = 5,
    clock: Annotated[str, typer.Option(help="wall, or cpu: processor time, with --threads 1.")] = "wall",
    seed: Annotated[int, typer.Option(help="Of the gradient.")] = 0,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write everything that was measured to this file.")
    ] = None,
) -> None:
    """Codecs for gradients: bits, speed, error, predicted time of a step, and up to which bandwidth they help."""
    import torch

    from gradbits.bench import gradients
    from gradbits.bench.timing import CLOCKS
    from gradbits.bench.wire import Question, measure, record, verdicts
    from gradbits.core.checks import check_choice, check_integer, check_output

    if model is not None and numel is not None:
        raise ArgumentError(f"numel={numel!r}: cannot be combined with model={model!r}, which has its own size")
    for name, value in (("data", data), ("batch_size", batch_size)):
        if model is None and value is not None:
            raise ArgumentError(f"{name}={value!r}: only with --model; drawn values are no batch of data")
    samples = 128 if batch_size is None else check_integer(batch_size, "batch_size", 1)
    if threads is not None:
        torch.set_num_threads(check_integer(threads, "threads", 1))
    question = Question(
        names=_words(codecs),
        bits=_integers(bits, "bits"),
        entropy=tuple(check_choice(word, "entropy", ("none", "huffman", "zstd")) for word in _words(entropy)),
        bucket=bucket,
        world=world,
        gbps=_numbers(gbps, "gbps"),
        repeats=repeats,
        clock=check_choice(clock, "clock", tuple(CLOCKS)),
    )
    question.codecs()  # says what is wrong before anything takes time
    check_output(json, "json")
    count = gradients.parse_count("1M" if numel is None else numel)
    found = gradients.drawn(count, seed) if model is None else gradients.of_model(model, data, samples, seed)
    rows = measure(found, question, _tell)
    _tell("")
    _print(rows, question, f"{found.origin}: {found.values.numel():,} values, {world} ranks")
    for sentence in verdicts(rows, question):
        typer.echo(sentence)
    if json is not None:
        made = record(rows, question, found, shlex.join(["gradbits", *sys.argv[1:]]))
        json.parent.mkdir(parents=True, exist_ok=True)
        json.write_text(json_text.dumps(made, indent=1) + "\n")


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word for part in (text or "").split(",") if (word := part.strip()))


def _numbers(text: str | None, name: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in _words(text))
    except ValueError as error:
        raise ArgumentError(f"{name}={text!r}: must be numbers with commas between them") from error


def _integers(text: str | None, name: str) -> tuple[int, ...]:
    numbers = _numbers(text, name)
    if any(number != int(number) for number in numbers if math.isfinite(number)) or not all(
        map(math.isfinite, numbers)
    ):
        raise ArgumentError(f"{name}={text!r}: must be whole numbers with commas between them")
    return tuple(int(number) for number in numbers)


def _print(rows: list[Row], question: Question, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=title,
        caption="GB/s of float32; step: ms, predicted without latency; break-even: Gbit/s above which fp32 is faster",
    )
    table.add_column("codec")
    for heading in ("bits/element", "ratio", "encode GB/s", "decode GB/s", "rel. error", "break-even"):
        table.add_column(heading, justify="right")
    for speed in question.gbps:
        table.add_column(f"step, {speed:g} Gbit/s", justify="right")
    best = [min(row.steps[i] for row in rows) for i in range(len(question.gbps))]
    for row in rows:
        limit = "-" if row.name == "fp32" else _short(row.break_even)
        steps = [f"{_short(t)} *" if t == b else _short(t) for t, b in zip(row.steps, best, strict=True)]
        cells = [_short(row.bits_per_element), _short(row.ratio), _short(row.encode_gb), _short(row.decode_gb)]
        table.add_row(row.name, *cells, _short(row.error), limit, *steps)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _short(value: float) -> str:
    return "-" if math.isinf(value) else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _tell(text: str) -> None:
    """Say on one line of the terminal what is being done."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
