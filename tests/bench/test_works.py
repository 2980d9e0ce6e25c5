"""The works of the benchmark, small: what they compute is what their names say."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gradbits.bench import steps
from gradbits.bench.coding import quantize_works
from gradbits.bench.contest import compete
from gradbits.bench.memory import memory_table, memory_work
from gradbits.bench.peers import BF16, FP32, PEERS, UnavailableError, Variant, variants
from gradbits.bench.products import conv_works, gemm_works
from gradbits.bench.roofline import roofline


@pytest.fixture
def small(monkeypatch):
    """Models and batches of which a test can afford a step."""
    models = {
        "resnet20": lambda: steps._channels_last(
            steps.build_model("resnet20", {**steps.IMAGE, "width": 8}, {"blocks": 1})
        ),
        "gpt": lambda: steps.build_model("gpt", {"vocabulary": 1024}, {"context": 256, "d_model": 16, "layers": 1}),
        "linear": lambda: torch.nn.Linear(1024, 64),
        "conv": steps._conv,
        "resnet18": lambda: steps._channels_last(steps.build_model("resnet18", steps.IMAGE, {"width": 4})),
    }
    for name, subject in steps.SUBJECTS.items():
        changed = dataclasses.replace(subject, model=models[name], batch=2)
        monkeypatch.setitem(steps.SUBJECTS, name, changed)


@pytest.mark.parametrize("name", steps.SUBJECTS)
def test_steps(small, name):
    who = variants(compiled=False, torchao=False)
    work = steps.step_work(name, who)
    found = compete(work, repeats=1)
    assert [m.name for m in found] == [v.name for v in who]
    assert all(len(m.times) == 1 for m in found)
    quantized = [m for m in found if m.ours]
    assert len(quantized) == 4
    assert all(m.error is not None and 1e-4 < m.error < 0.3 for m in quantized)
    assert all(m.error is None for m in found if not m.ours)
    assert work.must is not None
    assert steps.step_work(name, who, quick=True).must is None


def test_operations_of_a_linear_layer():
    work = steps.step_work("linear", (Variant(name=FP32),), quick=True)
    assert work.amount == 3 * 2 * 1024 * 1024 * 1024  # three products of 1024 rows


def test_every_peer_takes_part_and_without_a_compiler_says_so(monkeypatch):
    names = [v.name for v in variants()]
    assert names[: len(PEERS)] == list(PEERS)
    assert len(names) == len(set(names)) == 10
    assert BF16 in names
    monkeypatch.setattr("gradbits.kernels.machine.compiler", lambda: None)
    with pytest.raises(UnavailableError, match=r"C\+\+ compiler"):
        Variant(name="c", compiled=True).prepare(torch.nn.Linear(2, 2))
    with pytest.raises(UnavailableError, match="there are none"):
        Variant(name="t", torchao=True).prepare(torch.nn.Conv2d(2, 2, 1))


@pytest.mark.parametrize("works", [gemm_works(((32, 16, 24),)), conv_works(((16, 24, 3, 2, 8),), batch=2)])
def test_every_kernel_computes_the_same_product(works):
    for work in works:
        ready = {c.name: c.build() for c in work.contestants if c.name not in ("int8 native", "int8 onednn")}
        exact = ready["fp32"].run()
        for name in ("int8 torch", "int8 simulate"):
            assert torch.allclose(ready[name].run(), exact * 1e-4, rtol=1e-5, atol=1e-6)
        assert work.amount > 0


def test_quantize_works_run():
    for work in quantize_works(rows=64, columns=64):
        found = compete(work, repeats=1)
        assert found[0].name == "copy"
        assert any(m.times for m in found if m.ours)


def test_memory(small):
    record = memory_work("resnet20", ("int8_dynamic",))
    rows = {(row["variant"], row["bits"]): row for row in record["rows"]}
    assert rows[FP32, None]["share"] == 1.0
    for variant in ("fp32 eager", "int8_dynamic"):
        sizes = [rows[variant, bits]["saved"] for bits in (None, 8, 4, 2)]
        assert sizes == sorted(sizes, reverse=True)
    assert "must / aim" in memory_table(record)


def test_limits_are_positive():
    assert all(value > 0 for value in roofline(repeats=1, side=64).values())
