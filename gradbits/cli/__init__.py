"""The ``gradbits`` command: each verb is a file of this package, imported when the command runs."""

from __future__ import annotations


def main() -> None:
    """Run the command line; a refused request is one line on stderr and exit code 2."""
    from gradbits.cli.app import run

    run()
