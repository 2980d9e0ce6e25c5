"""``gradbits doctor``: what this machine has, and which kernel each operation takes and why."""

from __future__ import annotations

OPTIONAL = {
    "matplotlib": "curves and plots (pip install 'gradbits[plot]')",
    "zstandard": "zstd coding of stored tensors (pip install 'gradbits[zstd]')",
    "triton": "GPU kernels",
}
SPATIAL = {"matmul": (0,), "conv_output": (1, 2, 3), "conv_grad_input": (1, 2, 3), "conv_grad_weight": (1, 2, 3)}


def doctor() -> None:
    """Show devices, instruction sets, compiler, optional packages, and the kernel path of every operation."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import numpy
    import torch
    from rich.console import Console
    from rich.table import Table

    import gradbits
    from gradbits.kernels import machine
    from gradbits.kernels.native import describe

    console = Console()
    facts = Table(title="This machine", show_header=False)
    facts.add_row("gradbits", gradbits.__version__)
    facts.add_row("python", platform.python_version())
    facts.add_row("torch", f"{torch.__version__} (tested with 2.13.0)")
    facts.add_row("numpy", numpy.__version__)
    facts.add_row("processor", f"{machine.processor_name()}, {torch.get_num_threads()} threads")
    facts.add_row("instruction sets", ", ".join(machine.instruction_sets()) or "not known on this system")
    facts.add_row("devices", ", ".join(machine.devices()))
    compiler = machine.compiler()
    facts.add_row("C++ compiler", compiler or "none: not needed, every kernel below runs without one")
    facts.add_row("native kernels", describe())
    for package, use in OPTIONAL.items():
        try:
            facts.add_row(package, version(package))
        except PackageNotFoundError:
            facts.add_row(package, f"not installed: {use}")
    console.print(facts)
    console.print(_paths(torch.cuda.is_available()))


def _paths(cuda: bool) -> object:
    """Return the table of kernel paths."""
    from rich.table import Table

    from gradbits.kernels.dispatch import Request, explain, kernel_table

    table = Table(title="Kernel paths", caption="the first backend that can run an operation is taken")
    for column in ("operation", "device", "computed by", "why not another"):
        table.add_column(column, overflow="fold")
    for op in kernel_table():
        for device in ("cpu", "cuda") if cuda else ("cpu",):
            for spatial in SPATIAL.get(op, (0,)):
                choices = explain(op, Request(device, 0, spatial))
                taken = next((backend for backend, reason in choices if not reason), "nothing")
                refused = [f"{backend}: {reason}" for backend, reason in choices if reason]
                label = f"{op} {spatial}d" if spatial else op
                table.add_row(label, device, taken, "\n".join(refused))
    return table
