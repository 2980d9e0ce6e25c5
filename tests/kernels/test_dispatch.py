"""The dispatcher: one table, the first kernel that can, and a reason for every other."""

from __future__ import annotations

import pytest
import torch

from gradbits.core.errors import ArgumentError, FallbackError
from gradbits.kernels.dispatch import COMPUTE, Epilogue, Request, choose, explain, kernel_table, run

PRODUCTS = ("matmul", "conv_output", "conv_grad_input", "conv_grad_weight")


def test_every_product_can_be_simulated_and_computed_in_integers():
    for op in PRODUCTS:
        backends = [k.backend for k in kernel_table()[op]]
        assert len(set(backends)) == len(backends)
        assert {"torch", "simulate"} <= set(backends)


@pytest.mark.parametrize("op", PRODUCTS)
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_some_kernel_runs_every_request(op, device):
    for spatial in (0,) if op == "matmul" else (1, 2, 3):
        for terms in (0, 1, 10**6):
            for groups in (1, 7):
                request = Request(device, terms, spatial, groups)
                assert choose(op, request, "simulate").backend == "simulate"
                assert choose(op, request, "integer").backend != "simulate"
                assert choose(op, request, "auto").why_not(request) is None


def test_explain_gives_a_reason_or_none():
    found = dict(explain("conv_output", Request("cuda", 9, 2)))
    assert found["torch"] == ""
    assert "processor only" in found["onednn"]
    assert "spatial dimensions" in dict(explain("conv_output", Request("cpu", 9, 3)))["onednn"]
    assert "overflow int32" in dict(explain("conv_output", Request("cpu", 10**6, 2)))["onednn"]


@pytest.mark.parametrize("compute", ["", "int8", None, 1, True])
def test_unknown_compute(compute):
    with pytest.raises(ArgumentError, match=r"compute=.*" + ".*".join(COMPUTE)):
        choose("matmul", Request("cpu"), compute)


def test_unknown_operation():
    with pytest.raises(FallbackError, match=r"'fft'.*unknown operation"):
        choose("fft", Request("cpu"))
    with pytest.raises(FallbackError, match="'quantize'"):
        choose("quantize", Request("cpu"), "simulate")


def test_run_computes():
    a = torch.tensor([[1, -2]], dtype=torch.int8)
    for compute in COMPUTE:
        assert run("matmul", Request("cpu", 2), compute, a, a.t(), Epilogue(torch.tensor(0.5))).item() == 2.5
