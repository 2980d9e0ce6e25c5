"""Bits per byte of a small GPT in low precision, on Python's documentation and on a text file of your choice.

A thin wrapper around ``gradbits train --compare``: fp32, bf16, ``int8_dynamic``, ``statquant_psq`` and
``int4_transformer`` with and without row sampling; or, with ``--attention``, ``int8_dynamic`` with attention in float
and in 8 bits. Writes ``benchmarks/logs/fqt_gpt_NAME.txt`` and ``.json`` (``fqt_attention_NAME``):

    python benchmarks/fqt_gpt.py [--attention] [--text FILE] [--steps N] [--seeds 0,1,2] [--limit N] [--out FOLDER]

A large text with a free licence: ``/usr/share/doc/nodejs/api/all.html`` (5.9 MB), Debian package ``nodejs-doc``.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from fqt_run import compare, write

NETWORKS = (
    "fp32",
    "bf16",
    "int8_dynamic",
    "statquant_psq",
    "int4_transformer",
    "int4_transformer:grad_input.sampling=null:grad_weight.sampling=null",
)
ATTENTION = ("int8_dynamic:attention=false", "int8_dynamic")


def main() -> None:
    """Run the comparison and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attention", action="store_true", help="compare attention in float and in 8 bits only")
    parser.add_argument("--text", type=Path, help="a file to learn byte by byte; without it, Python's documentation")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--limit", type=int, help="first N bytes: a try-out, which writes no log")
    parser.add_argument("--out", type=Path, help="keep the run's folder here, and go on with it if it is there")
    options = parser.parse_args()
    source = f"--data text --text {shlex.quote(str(options.text))}" if options.text else "--data pydoc"
    networks = ",".join(ATTENTION if options.attention else NETWORKS)
    command = f"{source} --model gpt --compare {networks} --steps {options.steps}"
    command += f" --limit {options.limit}" if options.limit else ""
    kind = "fqt_attention" if options.attention else "fqt_gpt"
    name = f"{kind}_{options.text.parent.name + '_' + options.text.stem if options.text else 'pydoc'}"
    records = compare(command, options.seeds, options.out)
    write(name, f"{command} --seeds {options.seeds}", records, keep=not options.limit)


if __name__ == "__main__":
    main()
