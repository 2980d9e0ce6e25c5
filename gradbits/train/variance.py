"""Bias and variance of the gradients of trained networks: what ``--measure-variance`` shows and leaves behind."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from gradbits.core.files import write_atomically
from gradbits.observe.replay import PRODUCTS
from gradbits.observe.variance import VarianceReport, measure_variance
from gradbits.observe.variance_plot import save_variance
from gradbits.train.interrupt import StopRequest
from gradbits.train.network import Network
from gradbits.train.tasks import Batch


def measure_variances(
    networks: Sequence[Network], batch: Batch, draws: int, stop: StopRequest | None = None
) -> Iterator[tuple[Network, VarianceReport]]:
    """Yield each network with the bias and the variance of its gradients on one training batch.

    Every layer's noise is drawn alone, under the exact gradient of its output, see
    ``gradbits.observe.measure_variance``; what autograd keeps for the backward pass is not packed meanwhile.

    Args:
        networks: quantized; left as they were.
        batch: for all of them.
        draws: how often the noise is drawn.
        stop: looked at before each network.

    Raises:
        Interrupted: a stop was requested.
    """
    for network in networks:
        if stop is not None:
            stop.check()
        network.model.train()
        inputs = batch.to(network.device)

        yield network, measure_variance(network.model, partial(_loss, network, inputs), draws=draws)


def _loss(network: Network, batch: Batch) -> torch.Tensor:
    return network.forward(batch)[0]


def save_variances(path: Path, reports: Mapping[str, VarianceReport], *, seed: int, step: int) -> None:
    """Write the reports as JSON: by network, a row for each backward product of each layer.

    Args:
        path: the file to make.
        reports: network -> report.
        seed: of the networks that were measured.
        step: training steps before that.
    """
    networks = [{"network": label, **report.to_dict()} for label, report in reports.items()]
    text = json.dumps({"seed": seed, "step": step, "networks": networks}, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def draw_variances(path: Path, reports: Mapping[str, VarianceReport], title: str) -> None:
    """Draw the relative variances of every layer of every network.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    save_variance(path, reports, title)


def variance_table(reports: Mapping[str, VarianceReport]) -> Table:
    r"""Return the comparison, a row per network: :math:`\sum \mathrm{Var}/\sum |\nabla|^2` over the layers.

    Beside it stands the same for the closed-form bound, and the largest value of the test for bias.
    """
    table = Table(
        title="noise of the gradients, summed over the layers", title_justify="left", box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("network", overflow="fold")
    for heading in ("grad_input\nvar / |grad|²", "bound", "grad_weight\nvar / |grad|²", "bound", "bias:\nlargest z"):
        table.add_column(heading, justify="right", no_wrap=True)
    for label, report in reports.items():
        cells = []
        for product in PRODUCTS:
            rows = [row for row in report.rows if row.product == product]
            size = sum(row.size for row in rows)
            for total in (sum(row.variance for row in rows), sum(row.bound for row in rows)):
                cells.append(f"{total / size:.3g}" if size else "-")
        worst = max((row.bias_z for row in report.rows), default=math.nan)
        table.add_row(label, *cells, "-" if math.isnan(worst) else f"{worst:.1f}")
    return table
