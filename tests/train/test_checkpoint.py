"""Checkpoints: what goes in comes out, and damage of any kind is noticed."""

from __future__ import annotations

import math
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradbits.core.errors import CorruptDataError, DtypeError, MissingDataError
from gradbits.train.checkpoint import load_checkpoint, save_checkpoint

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)
ANY_FOLDER = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@ANY_FOLDER
@given(tree=TREES)
def test_trees_come_back(tmp_path, tree):
    save_checkpoint(tmp_path / "a.pt", tree)
    assert same(load_checkpoint(tmp_path / "a.pt"), tree)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_tensors_come_back(tmp_path, dtype, shape):
    tensor = torch.ones(shape).to(dtype)
    save_checkpoint(tmp_path / "a.pt", {"a": [tensor, {0: tensor}]})
    tree = load_checkpoint(tmp_path / "a.pt")
    assert same(tree, {"a": [tensor, {0: tensor}]})


def test_special_floats_come_back(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"loss": math.nan, "best": math.inf, "x": torch.tensor([math.nan])})
    tree = load_checkpoint(tmp_path / "a.pt")
    assert math.isnan(tree["loss"])
    assert tree["best"] == math.inf
    assert tree["x"].isnan().all()


def test_names_with_dots_do_not_collide(tmp_path):
    tree = {"a.b": torch.zeros(2), "a": {"b": torch.ones(3)}, "$tensor": "not one"}
    save_checkpoint(tmp_path / "a.pt", tree)
    assert same(load_checkpoint(tmp_path / "a.pt"), tree)


def test_a_view_is_stored_without_its_base(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"x": torch.zeros(1_000_000)[:3].t()})
    assert (tmp_path / "a.pt").stat().st_size < 20_000


def test_an_optimizer_goes_on_where_it_was(tmp_path):
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.arange(4.0)
    optimizer.step()
    save_checkpoint(tmp_path / "a.pt", optimizer.state_dict())
    other = torch.nn.Parameter(weight.detach().clone())
    again = torch.optim.AdamW([other], lr=0.5)
    again.load_state_dict(load_checkpoint(tmp_path / "a.pt"))
    other.grad = weight.grad = torch.ones(4)
    optimizer.step()
    again.step()
    assert torch.equal(weight, other)


def test_torch_loads_it_with_weights_only(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"x": torch.ones(2)})
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert {type(value) for value in content["tensors"].values()} == {torch.Tensor}
    assert isinstance(content["json"], str)


def test_other_objects_are_refused_and_the_old_file_stays(tmp_path):
    save_checkpoint(tmp_path / "a.pt", {"x": 1})
    with pytest.raises(DtypeError, match=r"state\.model\.1: .* not set"):
        save_checkpoint(tmp_path / "a.pt", {"model": [1, {2}]})
    assert load_checkpoint(tmp_path / "a.pt") == {"x": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "a.pt"
    save_checkpoint(path, {"model": {"weight": torch.arange(300.0)}, "step": 7, "name": "fp32"})
    return path.read_bytes()


@ANY_FOLDER
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_byte_is_noticed_or_harmless(tmp_path, whole, where, flip):
    raw = bytearray(whole)
    raw[int(where * len(raw))] ^= flip
    path = tmp_path / "a.pt"
    path.write_bytes(raw)
    message = None
    try:
        tree = load_checkpoint(path)
    except CorruptDataError as error:
        message = str(error)
    if message is None:  # the byte was padding
        assert same(tree, {"model": {"weight": torch.arange(300.0)}, "step": 7, "name": "fp32"})
    else:
        assert str(path) in message
        assert "\n" not in message.strip()


@ANY_FOLDER
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(tmp_path, whole, share):
    path = tmp_path / "a.pt"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CorruptDataError, match=r"a\.pt"):
        load_checkpoint(path)


def test_exchanged_content_is_noticed_where_the_archive_is_whole(tmp_path, whole):
    path = tmp_path / "a.pt"
    path.write_bytes(whole)
    content = torch.load(path, weights_only=True)
    next(iter(content["tensors"].values()))[5] = -1
    torch.save(content, path)
    with pytest.raises(CorruptDataError, match="checksum"):
        load_checkpoint(path)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    "foreign",
    [
        {"weight": torch.ones(2)},
        [1, 2],
        {"format": "gradbits-checkpoint", "version": 99},
        {"format": "gradbits-checkpoint", "version": 1},
        {"format": "gradbits-checkpoint", "version": 1, "json": 3, "tensors": [4]},
        Evil(),
    ],
)
def test_a_foreign_file_is_refused_and_nothing_in_it_runs(tmp_path, foreign, capsys):
    path = tmp_path / "a.pt"
    torch.save(foreign, path)
    with pytest.raises(CorruptDataError, match=r"a\.pt"):
        load_checkpoint(path)
    assert "executed" not in capsys.readouterr().out


def test_another_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CorruptDataError, match="not a checkpoint of gradbits"):
        load_checkpoint(tmp_path / "a.pt")
    with pytest.raises(MissingDataError, match=r"absent\.pt"):
        load_checkpoint(tmp_path / "absent.pt")
