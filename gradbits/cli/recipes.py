"""``gradbits recipes``: what there is, and what is in each."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer

from gradbits.core.errors import ArgumentError
from gradbits.quantizers.quantizer import Quantizer


def recipes(name: Annotated[str | None, typer.Argument(help="Show this recipe in detail.")] = None) -> None:
    """List the recipes, or show one: its paper, its parts, its defaults."""
    from rich.console import Console
    from rich.table import Table

    from gradbits.recipes import recipes as known

    console = Console()
    if name is not None:
        if name not in known():
            raise ArgumentError(f"recipe {name!r}: no such recipe; known are {', '.join(known())}")
        _show(name)
        return
    table = Table(title="Recipes", caption="gradbits recipes NAME shows one in detail")
    for column in ("name", "paper", "known as", "gradients"):
        table.add_column(column, overflow="fold")
    for info in known().values():
        table.add_row(
            info.name, f"{info.title}\n{info.paper}".strip(), info.survey, "unbiased" if info.unbiased else "biased"
        )
    console.print(table)


def _show(name: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from gradbits.recipes import recipes as known

    console = Console()
    info = known()[name]
    built = info.factory()
    console.print(f"[bold]{info.name}[/bold]  {info.title}")
    for label, value in (("paper", info.paper), ("known as", info.survey)):
        if value:
            console.print(f"{label}: {value}", markup=False)
    console.print()
    text = inspect.cleandoc(info.factory.__doc__ or "").split("\n>>>")[0].rstrip()
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print()
    parts = Table(title="Parts")
    parts.add_column("operand", no_wrap=True)
    parts.add_column("quantizer", overflow="fold")
    for product, role, q in built.operands():
        parts.add_row(f"{product}.{role}", _describe(q))
    for product in ("grad_input", "grad_weight"):
        if (sampling := getattr(getattr(built, product), "sampling", None)) is not None:
            parts.add_row(f"{product}.sampling", str(sampling))
    console.print(parts)
    options = Table(title="Options")
    options.add_column("option")
    options.add_column("default")
    for option, default in info.options.items():
        options.add_row(option, repr(default))
    console.print(options)
    text = f'gradbits.recipe("{name}", option=value); on the command line --set option=value, or {name}:option=value'
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _describe(q: Quantizer) -> str:
    """Return a quantizer in words."""
    axis = getattr(q.grain, "axis", None)
    grain = type(q.grain).__name__ + ("" if axis is None else f"(axis={axis})")
    digits = f"{q.grid.digits} × " if q.grid.digits > 1 else ""
    parts = [f"{digits}{q.bits} bits", type(q.grid).__name__, grain, str(q.range), q.rounding]
    if q.rotation is not None:
        parts.append(f"rotated by {q.rotation}")
    return ", ".join(parts)
