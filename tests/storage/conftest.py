"""A small state dict with every kind of tensor that a model may hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradbits.storage import save_compressed

State = dict[str, torch.Tensor]


def make_state() -> State:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    sparse = normal(60, 70)
    sparse[torch.rand(60, 70, generator=generator) < 0.9] = 0
    bad = normal(8, 8)
    bad[0, 0], bad[1, 1] = float("nan"), float("inf")
    tied = normal(16, 40)
    return {
        "conv.weight": normal(12, 6, 5, 5),
        "fc.weight": normal(48, 64),
        "sparse.weight": sparse,
        "half.weight": normal(32, 32).half(),
        "brain.weight": normal(40, 31).bfloat16(),
        "double.weight": normal(33, 17).double(),
        "strided.weight": normal(40, 30).t(),
        "fc.bias": normal(48),
        "smooth.bias": torch.full((4000,), 0.5),
        "zeros.weight": torch.zeros(50, 50),
        "same.weight": torch.full((30, 30), -2.5),
        "one.weight": torch.tensor([[7.0]]),
        "empty.weight": torch.zeros(0, 5),
        "scalar": torch.tensor(3.25),
        "steps": torch.tensor(12345),
        "flags": torch.tensor([True, False, True]),
        "ids": torch.arange(-5, 300),
        "bad.weight": bad,
        "embed.weight": tied,
        "head.weight": tied,
    }


@pytest.fixture
def state() -> State:
    return make_state()


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a valid gbz file that holds one tensor of every coding."""
    path: Path = tmp_path_factory.mktemp("gbz") / "all.gbz"
    save_compressed(make_state(), path, metadata={"made": "für Tests"})
    return path.read_bytes()
