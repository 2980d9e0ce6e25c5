"""Data sets: the fixed splits, and files that are missing, damaged or of another kind."""

from __future__ import annotations

import gzip
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradbits.core.errors import ArgumentError, CorruptDataError, GradbitsError, MissingDataError
from gradbits.train.datasets import load_data
from gradbits.train.digits import load_digits
from gradbits.train.idx import FASHION_FOLDER, PARTS, load_idx, read_idx
from gradbits.train.text import load_text, split


def write_idx(path, array):
    array = np.asarray(array, dtype=np.uint8)
    raw = struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_set(folder, suffix="", train=40, test=10):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for part, count in zip(PARTS, (train, train, test, test), strict=True):
        shape = (count, 9, 8) if "idx3" in part else (count,)
        write_idx(folder / f"{part}{suffix}", generator.integers(0, 3, shape))


def test_digits_are_the_uci_test_set_in_a_fixed_split():
    data = load_digits()
    assert data.train_images.shape == (1437, 1, 8, 8)
    assert data.test_images.shape == (360, 1, 8, 8)
    assert data.train_images.max() == 16
    counts = torch.bincount(torch.cat([data.train_labels, data.test_labels]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert data.fingerprint() == load_digits().fingerprint()


def test_limit_keeps_the_test_images():
    data = load_data("digits", limit=100)
    assert len(data.train_images) == len(data.train_labels) == 100
    assert len(data.test_images) == 360
    assert data.fingerprint() != load_digits().fingerprint()


def test_importing_reads_no_data_and_draws_no_numbers():
    code = (
        "import sys, torch; torch.manual_seed(5); state = torch.get_rng_state();"
        "import gradbits.train; assert torch.equal(state, torch.get_rng_state());"
        "bad = [m for m in sys.modules if m.startswith(('matplotlib', 'pydoc_data', 'gradbits.train.digits'))];"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("inside", ["", "data", "package/data"])
def test_idx_folders(tmp_path, suffix, inside):
    write_set(tmp_path / inside, suffix)
    data = load_idx("idx", tmp_path)
    assert data.train_images.shape == (40, 1, 9, 8)
    assert data.test_labels.shape == (10,)
    assert data.classes == 3


def test_idx_images_arrive_unchanged(tmp_path):
    images = np.arange(2 * 5 * 4, dtype=np.uint8).reshape(2, 5, 4)
    write_idx(tmp_path / "x-idx3-ubyte.gz", images)
    assert np.array_equal(read_idx(tmp_path / "x-idx3-ubyte.gz", 3), images)


def damage(path, how):
    raw = path.read_bytes()
    if how == "truncated":
        path.write_bytes(raw[:-5])
    elif how == "longer":
        path.write_bytes(raw + b"x")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "header only half":
        path.write_bytes(raw[:7])
    elif how == "magic":
        path.write_bytes(b"\x00\x00\x08\x04" + raw[4:])
    elif how == "huge":
        path.write_bytes(raw[:4] + b"\xff" * 12 + raw[16:])
    elif how == "count":
        path.write_bytes(raw[:4] + struct.pack(">I", 41) + raw[8:])


@pytest.mark.parametrize(
    ("part", "how"),
    [
        *((PARTS[0], how) for how in ("truncated", "longer", "empty", "header only half", "magic", "huge", "count")),
        *((PARTS[1], how) for how in ("truncated", "longer", "empty", "header only half", "magic", "count")),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, how, part):
    write_set(tmp_path)
    damage(tmp_path / part, how)
    with pytest.raises(CorruptDataError, match=part):
        load_idx("idx", tmp_path)


@pytest.mark.parametrize("cut", [0, 3, 15, 40])
def test_a_truncated_gzip_file_is_named(tmp_path, cut):
    write_set(tmp_path, ".gz")
    path = tmp_path / f"{PARTS[0]}.gz"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CorruptDataError, match=PARTS[0]):
        load_idx("idx", tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=60) | st.binary(max_size=60).map(lambda b: b"\x00\x00\x08\x01" + b), gz=st.booleans())
def test_any_bytes_give_an_array_or_a_typed_error(tmp_path, raw, gz):
    path = tmp_path / ("a.gz" if gz else "a")
    path.write_bytes(raw)
    message = None
    try:
        array = read_idx(path, 1)
    except CorruptDataError as error:
        message = str(error)
    if message is None:
        assert array.size == len(raw) - 8
    else:
        assert str(path) in message


def test_images_and_labels_must_agree(tmp_path):
    write_set(tmp_path)
    write_idx(tmp_path / PARTS[1], np.zeros(39))
    with pytest.raises(CorruptDataError, match="39 labels for the 40 images"):
        load_idx("idx", tmp_path)


def test_another_set_under_a_known_name_is_refused(tmp_path):
    write_set(tmp_path)
    with pytest.raises(CorruptDataError, match="not the published file"):
        load_idx("mnist", tmp_path)


def test_missing_data_says_where_to_get_it(tmp_path):
    with pytest.raises(MissingDataError, match=r"Debian package dataset-fashion-mnist .*--data-dir"):
        load_data("fashion-mnist", data_dir=tmp_path / "absent")
    with pytest.raises(MissingDataError, match="--data-dir"):
        load_data("mnist")
    write_set(tmp_path)
    (tmp_path / PARTS[3]).unlink()
    with pytest.raises(MissingDataError, match=PARTS[3]):
        load_data("idx", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"name": "cifar"}, "'digits', 'fashion-mnist'"),
        ({"name": "digits", "data_dir": "somewhere"}, "data_dir"),
        ({"name": "pydoc", "text": "file"}, "text"),
        ({"name": "text"}, "--text FILE"),
    ],
)
def test_options_that_do_not_fit(arguments, named):
    with pytest.raises(ArgumentError, match=named):
        load_data(**arguments)


@pytest.mark.skipif(not FASHION_FOLDER.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed")
def test_fashion_mnist_from_the_debian_package(tmp_path):
    data = load_data("fashion-mnist")
    assert data.train_images.shape == (60000, 1, 28, 28)
    assert data.test_images.shape == (10000, 1, 28, 28)
    assert torch.bincount(data.test_labels).tolist() == [1000] * 10
    for part in PARTS:
        shutil.copy(FASHION_FOLDER / f"{part}.gz", tmp_path)
    labels = bytearray(gzip.decompress((tmp_path / f"{PARTS[1]}.gz").read_bytes()))
    labels[1000] ^= 1
    (tmp_path / f"{PARTS[1]}.gz").write_bytes(gzip.compress(bytes(labels), 1))
    with pytest.raises(CorruptDataError, match=f"{PARTS[1]}.gz: is not the published file"):
        load_idx("fashion-mnist", tmp_path)


def test_text_is_split_at_nine_tenths(tmp_path):
    path = tmp_path / "a.txt"
    raw = bytes(range(256)) * 4 + b"tail"
    path.write_bytes(raw)
    data = load_text(path)
    assert bytes(data.train.tolist() + data.test.tolist()) == raw
    assert len(data.test) == len(raw) // 10
    assert load_data("text", text=path, limit=50).train.tolist() == list(range(50))


def test_pydoc_is_english():
    data = load_data("pydoc")
    assert len(data.train) + len(data.test) > 300_000
    assert b"The following identifiers" in bytes(data.train.tolist()) + bytes(data.test.tolist())


@pytest.mark.parametrize(("content", "error"), [(b"short", CorruptDataError), (None, MissingDataError)])
def test_a_text_that_cannot_be_used_is_named(tmp_path, content, error):
    path = tmp_path / "some.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=r"some\.txt") as caught:
        load_text(path)
    assert isinstance(caught.value, GradbitsError)


@given(raw=st.binary(min_size=1, max_size=200))
@settings(deadline=None)
def test_split_loses_no_byte(raw):
    data = split("text", raw)
    assert bytes(data.train.tolist() + data.test.tolist()) == raw
