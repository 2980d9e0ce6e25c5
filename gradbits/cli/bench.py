"""``gradbits bench``: what low bits gain on this machine, next to everything else that it could run."""

from __future__ import annotations

from importlib import import_module

import typer

# subcommand -> module of gradbits.cli that holds a function of the same name
SUBCOMMANDS: dict[str, str] = {
    "wire": "bench_wire",
}


def build() -> typer.Typer:
    """Return the application with every subcommand."""
    app = typer.Typer(
        help="Measure speed and memory on this machine: interleaved rounds, medians, ratios, measured limits.",
        no_args_is_help=True,
    )
    for name, module in SUBCOMMANDS.items():
        app.command(name)(getattr(import_module(f"gradbits.cli.{module}"), name))
    return app
