"""Models come in as safetensors, shards, checkpoints and gbz, and go out as ordinary safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gradbits.core.errors import ArgumentError, CorruptDataError, MissingDataError
from gradbits.storage import CompressConfig, compress_file, decompress_file, verify_file
from gradbits.storage.sources import open_source

State = dict[str, torch.Tensor]
LOSSLESS = CompressConfig(lossless=True)


@pytest.fixture
def model() -> State:
    return {"b.weight": torch.randn(20, 30), "a.weight": torch.randn(8, 4, 3, 3).bfloat16(), "n": torch.tensor(3)}


def same(one: State, other: State) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_safetensors_there_and_back(model: State, tmp_path: Path) -> None:
    save_file(model, tmp_path / "m.safetensors", metadata={"format": "pt", "epoch": "7"})
    seen: list[tuple[str, int]] = []
    report = compress_file(
        tmp_path / "m.safetensors", tmp_path / "m.gbz", LOSSLESS, progress=lambda *one: seen.append(one)
    )
    assert {name for name, _ in seen} == set(model)
    assert sum(size for _, size in seen) == report.original
    size = decompress_file(tmp_path / "m.gbz", tmp_path / "back.safetensors")
    assert size == (tmp_path / "back.safetensors").stat().st_size
    assert same(load_file(tmp_path / "back.safetensors"), model)
    with safe_open(tmp_path / "back.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "epoch": "7"}


def test_lossy_weights_come_back_in_their_dtype(model: State, tmp_path: Path) -> None:
    save_file(model, tmp_path / "m.safetensors")
    compress_file(tmp_path / "m.safetensors", tmp_path / "m.gbz")
    decompress_file(tmp_path / "m.gbz", tmp_path / "back.safetensors")
    found = load_file(tmp_path / "back.safetensors")
    assert {name: one.dtype for name, one in found.items()} == {name: one.dtype for name, one in model.items()}
    # compressing what came back loses nothing more
    compress_file(tmp_path / "back.safetensors", tmp_path / "again.gbz")
    decompress_file(tmp_path / "again.gbz", tmp_path / "twice.safetensors")
    assert same(load_file(tmp_path / "twice.safetensors"), found)


def test_shards(model: State, tmp_path: Path) -> None:
    save_file({"a.weight": model["a.weight"]}, tmp_path / "m-1.safetensors", metadata={"format": "pt"})
    save_file({name: model[name] for name in ("b.weight", "n")}, tmp_path / "m-2.safetensors")
    places = {"a.weight": "m-1.safetensors", "b.weight": "m-2.safetensors", "n": "m-2.safetensors"}
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    for source in (index, tmp_path):
        compress_file(source, tmp_path / "m.gbz", LOSSLESS)
        decompress_file(tmp_path / "m.gbz", tmp_path / "back.safetensors.tmp")
        assert same(load_file(tmp_path / "back.safetensors.tmp"), model)


@pytest.mark.parametrize(
    ("weight_map", "error"),
    [
        ({"a.weight": "../m-1.safetensors"}, CorruptDataError),
        ({"a.weight": "/m-1.safetensors"}, CorruptDataError),
        ({"a.weight": 3}, CorruptDataError),
        ({"a.weight": "m-1.bin"}, CorruptDataError),
        ({"a.weight": "m-9.safetensors"}, MissingDataError),
        ({"x": "m-1.safetensors"}, CorruptDataError),
        ([1], CorruptDataError),
        (None, CorruptDataError),
    ],
)
def test_an_index_that_lies_is_refused(weight_map: Any, error: type[Exception], model: State, tmp_path: Path) -> None:
    save_file({"a.weight": model["a.weight"]}, tmp_path / "m-1.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(error):
        open_source(index)


@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict"])
def test_checkpoints(key: str | None, model: State, tmp_path: Path) -> None:
    tree = model if key is None else {"epoch": 3, key: model, "optimizer": {"state": {}}}
    torch.save(tree, tmp_path / "m.pt")
    assert same(dict(open_source(tmp_path / "m.pt").tensors()), model)
    compress_file(tmp_path / "m.pt", tmp_path / "m.gbz", LOSSLESS)
    assert verify_file(tmp_path / "m.gbz") == len(model)


def test_tied_weights_of_a_checkpoint_are_stored_once(tmp_path: Path) -> None:
    weight = torch.randn(50, 40)
    torch.save({"embed": weight, "head": weight}, tmp_path / "m.pt")
    report = compress_file(tmp_path / "m.pt", tmp_path / "m.gbz")
    assert report.original == 8000
    decompress_file(tmp_path / "m.gbz", tmp_path / "m.safetensors")
    found = load_file(tmp_path / "m.safetensors")
    assert torch.equal(found["embed"], found["head"])


def test_a_checkpoint_of_a_training_run(model: State, tmp_path: Path) -> None:
    checkpoint = pytest.importorskip("gradbits.train.checkpoint")
    tree = {"position": {"step": 3}, "network": {"model": model, "optimizer": {"lr": 0.1}}}
    checkpoint.save_checkpoint(tmp_path / "c.pt", tree)
    assert same(dict(open_source(tmp_path / "c.pt").tensors()), model)


class Evil:
    """Would run code if a checkpoint were unpickled without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil"),))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CorruptDataError, match="weights_only"):
        open_source(tmp_path / "evil.pt")
    assert not Path("evil").exists()
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(ArgumentError, match="'epoch'"):
        open_source(tmp_path / "none.pt")
    for name, data in {"a.safetensors": b"\x10" + bytes(30), "b.pt": b"PK\x03\x04" + bytes(30), "c.bin": b""}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CorruptDataError, match=name):
            open_source(tmp_path / name)
    with pytest.raises(MissingDataError):
        open_source(tmp_path / "nowhere.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingDataError, match="a folder must hold"):
        open_source(tmp_path / "empty")


def test_nothing_is_written_when_the_source_is_damaged(model: State, tmp_path: Path) -> None:
    save_file(model, tmp_path / "m.safetensors")
    compress_file(tmp_path / "m.safetensors", tmp_path / "m.gbz")
    data = bytearray((tmp_path / "m.gbz").read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / "m.gbz").write_bytes(data)
    with pytest.raises(CorruptDataError):
        decompress_file(tmp_path / "m.gbz", tmp_path / "back.safetensors")
    assert not (tmp_path / "back.safetensors").exists()
