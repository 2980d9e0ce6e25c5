"""``gradbits bench``: what low bits gain on this machine, next to everything else that it could run."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

# subcommand -> module of gradbits.cli that holds a function of the same name
SUBCOMMANDS: dict[str, str] = {
    "gemm": "bench",
    "conv": "bench",
    "quantize": "bench",
    "step": "bench",
    "memory": "bench",
    "wire": "bench_wire",
}

Threads = Annotated[int | None, typer.Option(help="CPU threads. Default: what torch chooses.", show_default=False)]
Repeats = Annotated[int | None, typer.Option(help="Rounds; each runs everybody once. Default: 7, quick 3.")]
Clock = Annotated[
    str, typer.Option(help="wall, or cpu: processor time, with --threads 1 for machines that others use too.")
]
Quick = Annotated[bool, typer.Option("--quick", help="Smaller works and fewer rounds: a try-out, not a result.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write everything that was measured to this file.")]
Chart = Annotated[Path | None, typer.Option("--chart", help="Draw it to this file, as a.png or a.svg.")]


def build() -> typer.Typer:
    """Return the application with every subcommand."""
    app = typer.Typer(
        help="Measure speed and memory on this machine: interleaved rounds, medians, ratios, measured limits.",
        no_args_is_help=True,
    )
    for name, module in SUBCOMMANDS.items():
        app.command(name)(getattr(import_module(f"gradbits.cli.{module}"), name))
    return app


def gemm(
    threads: Threads = None,
    repeats: Repeats = None,
    clock: Clock = "wall",
    quick: Quick = False,
    json: Json = None,
    chart: Chart = None,
) -> None:
    """Matrix products of linear layers: every integer kernel next to fp32 and bf16."""
    from gradbits.bench.products import GEMMS, gemm_works

    _hold(lambda: gemm_works(GEMMS[1:2] if quick else GEMMS), threads, repeats, clock, quick, json, chart)


def conv(
    batch: Annotated[int, typer.Option(help="Images of a batch.")] = 128,
    threads: Threads = None,
    repeats: Repeats = None,
    clock: Clock = "wall",
    quick: Quick = False,
    json: Json = None,
    chart: Chart = None,
) -> None:
    """Products of convolutions: every integer kernel next to fp32 and bf16."""
    from gradbits.bench.products import CONVS, conv_works
    from gradbits.core.checks import check_integer

    check_integer(batch, "batch", 1)
    images = max(1, batch // 8) if quick else batch
    _hold(lambda: conv_works(CONVS[:1] if quick else CONVS, images), threads, repeats, clock, quick, json, chart)


def quantize(
    threads: Threads = None,
    repeats: Repeats = None,
    clock: Clock = "wall",
    quick: Quick = False,
    json: Json = None,
    chart: Chart = None,
) -> None:
    """Quantizing and packing: gradbits next to torch operations and to a copy of the same memory."""
    from gradbits.bench.coding import COLUMNS, ROWS, quantize_works

    rows = ROWS // 8 if quick else ROWS
    _hold(lambda: quantize_works(rows, COLUMNS), threads, repeats, clock, quick, json, chart)


def step(
    work: Annotated[
        list[str] | None,
        typer.Option(help="linear, conv, resnet18, gpt or resnet20; repeatable. Default: all.", show_default=False),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="A recipe; repeatable. Default: int8_dynamic, unified_int8.", show_default=False),
    ] = None,
    compiled: Annotated[bool, typer.Option(help="Let torch.compile take part: minutes to compile.")] = True,
    fuse: Annotated[bool, typer.Option(help="Let recipes compute batch norms with their ReLU, by fuse_.")] = True,
    torchao: Annotated[bool, typer.Option(help="Let torchao's int8 training take part where it is installed.")] = True,
    threads: Threads = None,
    repeats: Repeats = None,
    clock: Clock = "wall",
    quick: Quick = False,
    json: Json = None,
    chart: Chart = None,
) -> None:
    """Layers and whole training steps: recipes next to fp32 and bf16 autocast, eager and compiled."""
    from gradbits.bench.peers import RECIPES, variants
    from gradbits.bench.session import hold_apart
    from gradbits.bench.steps import SUBJECTS, step_work
    from gradbits.core.checks import check_choice
    from gradbits.recipes import recipe as build_recipe

    names = tuple(dict.fromkeys(work or SUBJECTS))
    for name in names:
        check_choice(name, "work", tuple(SUBJECTS))
    recipes = tuple(dict.fromkeys(recipe or RECIPES))
    for name in recipes:
        build_recipe(name)
    who = variants(recipes, compiled=compiled and not quick, torchao=torchao, fuse=fuse)
    settings = _settings(threads, repeats, clock, quick, json, chart)
    hold_apart([partial(step_work, name, who, quick=quick) for name in names], settings)
    _tell("")


def memory(
    model: Annotated[
        list[str] | None,
        typer.Option(help="resnet18, gpt or resnet20; repeatable. Default: all.", show_default=False),
    ] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="A recipe; repeatable. Default: int8_dynamic.", show_default=False)
    ] = None,
    threads: Threads = None,
    quick: Quick = False,
    json: Json = None,
    chart: Chart = None,
) -> None:
    """Bytes kept for the backward pass: as they are, and packed by pack_activations to 8, 4 and 2 bits."""
    from gradbits.bench.chart import save_memory_chart
    from gradbits.bench.memory import MODELS, memory_table, memory_work
    from gradbits.bench.record import head_lines, save_record
    from gradbits.bench.session import Settings
    from gradbits.core.checks import check_choice
    from gradbits.recipes import recipe as build_recipe

    names = tuple(dict.fromkeys(model or MODELS))
    for name in names:
        check_choice(name, "model", MODELS)
    recipes = tuple(dict.fromkeys(recipe or ("int8_dynamic",)))
    for name in recipes:
        build_recipe(name)
    settings = Settings(command=_command(), threads=threads, repeats=1, json=json, chart=chart)
    where = settings.settle()
    _show("\n".join(head_lines(where)[:2]))
    outcomes = []
    for name in names:
        outcomes.append(memory_work(name, recipes, quick=quick, tell=_tell))
        _show("\n" + memory_table(outcomes[-1]))
    if json is not None:
        save_record(json, where, works=outcomes)
    if chart is not None:
        save_memory_chart(chart, outcomes, where["command"])


def _hold(works: Any, *given: Any) -> None:
    """Hold the contests that ``works()`` returns, once the process is settled; ``given`` as ``_settings`` takes it."""
    from gradbits.bench.session import hold

    hold(works, _settings(*given))
    _tell("")


def _settings(
    threads: int | None, repeats: int | None, clock: str, quick: bool, json: Path | None, chart: Path | None
) -> Any:
    """Return how a benchmark runs."""
    from gradbits.bench.session import Settings

    return Settings(
        command=_command(),
        threads=threads,
        repeats=(3 if quick else 7) if repeats is None else repeats,
        clock=clock,
        json=json,
        chart=chart,
        show=_show,
        tell=_tell,
    )


def _show(text: str) -> None:
    """Print text below what is being done, which goes away."""
    _tell("")
    typer.echo(text)


def _tell(text: str) -> None:
    """Say on one line of the terminal what is being done."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def _command() -> str:
    """Return the command line that repeats this run."""
    return shlex.join(["gradbits", *sys.argv[1:]])
