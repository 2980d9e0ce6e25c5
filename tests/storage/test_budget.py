"""Bits chosen by a budget: the file is really that small, the score really that good."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from gradbits.core.errors import ArgumentError, NothingToQuantizeError
from gradbits.storage import CompressConfig, GbzFile, fit_accuracy, fit_size, save_compressed

State = dict[str, torch.Tensor]


def make_state() -> State:
    generator = torch.Generator().manual_seed(0)
    sparse = torch.randn(100, 60, generator=generator)
    sparse[sparse.abs() < 1.5] = 0
    return {
        "conv.weight": torch.randn(20, 10, 3, 3, generator=generator),
        "a[0].weight": torch.randn(80, 50, generator=generator).half(),
        "sparse.weight": sparse,
        "wild.weight": torch.randn(60, 60, generator=generator) ** 5,
        "head.weight": torch.randn(40, 40, generator=generator),
        "bias": torch.randn(40, generator=generator),
        "ids": torch.arange(100),
    }


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_the_file_keeps_within_the_budget_and_uses_it(share: float, tmp_path: Path) -> None:
    state, metadata = make_state(), {"note": "x" * 100}
    config = CompressConfig(overrides=(("head.*", 6),))
    sizes = [
        save_compressed(state, tmp_path / "x.gbz", _with_bits(state, bits), metadata=metadata).stored for bits in (2, 8)
    ]
    budget = round(sizes[0] + share * (sizes[1] - sizes[0]))
    fit = fit_size(state, budget, config, metadata=metadata)
    report = save_compressed(state, tmp_path / "x.gbz", fit.config, metadata=metadata)
    assert report.stored == fit.size <= budget
    assert set(fit.bits) == {"conv.weight", "a[0].weight", "sparse.weight", "wild.weight"}
    found = {one.name: one for one in report.tensors}
    for name, bits in fit.bits.items():
        assert found[name].k is not None
        assert found[name].k <= 1 << bits
    assert 32 < found["head.weight"].k <= 64
    # spending less never lowers the error
    smaller = fit_size(state, round(0.95 * budget), config, metadata=metadata)
    assert smaller.size <= fit.size
    assert sum(smaller.bits.values()) <= sum(fit.bits.values())


def _with_bits(state: State, bits: int) -> CompressConfig:
    return CompressConfig(overrides=(("head.*", 6),), conv_bits=bits, linear_bits=bits)


def test_a_budget_that_cannot_be_met_says_what_could() -> None:
    with pytest.raises(ArgumentError, match="smallest file at 2 bits has"):
        fit_size(make_state(), 1000)
    with pytest.raises(NothingToQuantizeError):
        fit_size({"bias": torch.ones(3)}, 1000)
    with pytest.raises(ArgumentError, match="min_bits=5"):
        fit_size(make_state(), 10_000, min_bits=5, max_bits=4)


@pytest.mark.parametrize("drop", [0.3, 0.05, 0.01])
def test_the_score_from_the_file_is_within_the_drop(drop: float, tmp_path: Path) -> None:
    state = make_state()
    calls = []

    def score(found: Mapping[str, torch.Tensor]) -> float:
        calls.append(1)
        wrong = sum(float((found[name].double() - one.double()).norm() / one.double().norm()) for name, one in pairs)
        return 1.0 - wrong / len(pairs)

    pairs = [(name, one) for name, one in state.items() if one.is_floating_point()]
    fit = fit_accuracy(state, score, drop)
    assert fit.evaluations == len(calls) < 12
    report = save_compressed(state, tmp_path / "x.gbz", fit.config)
    assert report.stored == fit.size
    with GbzFile(tmp_path / "x.gbz") as file:
        assert score(file.tensors()) == pytest.approx(fit.score, abs=1e-12)
    assert fit.baseline == 1.0
    assert fit.score >= 1.0 - drop
    assert fit.size < save_compressed(state, tmp_path / "y.gbz", _with_bits(state, 8)).stored


def test_a_drop_that_cannot_be_met_is_an_error() -> None:
    state = make_state()
    with pytest.raises(ArgumentError, match="max_drop=0"):
        fit_accuracy(state, lambda found: -float((found["wild.weight"] - state["wild.weight"]).abs().sum()), 0.0)


def test_tied_and_pruned_tensors_are_counted_as_they_are_stored(tmp_path: Path) -> None:
    weight = torch.randn(64, 64)
    state = {"a.weight": weight, "b.weight": weight, "c.weight": torch.randn(64, 64)}
    config = CompressConfig(sparsity=0.8)
    fit = fit_size(state, 2500, config)
    assert save_compressed(state, tmp_path / "x.gbz", fit.config).stored == fit.size <= 2500
    assert set(fit.bits) == {"a.weight", "c.weight"}
