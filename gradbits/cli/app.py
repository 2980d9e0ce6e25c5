"""The command line's root: which verbs there are, and how errors look."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import typer

from gradbits.core.errors import GradbitsError

# verb -> module of gradbits.cli that holds a function of the same name
VERBS: dict[str, str] = {
    "doctor": "doctor",
    "recipes": "recipes",
    "train": "train",
    "evaluate": "evaluate",
    "export": "export",
    "compress": "storage",
    "decompress": "storage",
    "inspect": "storage",
    "verify": "storage",
}

# verb with subcommands -> module of gradbits.cli whose ``build`` returns them
GROUPS: dict[str, str] = {"bench": "bench"}


def build() -> typer.Typer:
    """Return the application with every verb."""
    app = typer.Typer(
        name="gradbits",
        help="Low-bit training for PyTorch: weights, activations and gradients in few bits.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for verb, module in VERBS.items():
        app.command(verb)(getattr(import_module(f"gradbits.cli.{module}"), verb))
    for verb, module in GROUPS.items():
        app.add_typer(import_module(f"gradbits.cli.{module}").build(), name=verb)
    return app


def run() -> None:
    """Run the application; a ``GradbitsError`` is the user's to mend, so it is shown as one line."""
    code: int | str | None = 0
    try:
        build()()
    except SystemExit as end:
        code = end.code
    except GradbitsError as error:
        if type(error).__name__ != "OtherRankError":  # rank 0 says it
            print(f"gradbits: error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # the ordinary end of a gloo group can wait for its own thread forever
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
    sys.exit(code)
