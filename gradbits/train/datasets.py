"""What the reference runs learn from: the kinds of data set, and the names under which they are loaded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from gradbits.core.errors import ArgumentError

IMAGE_SETS = ("digits", "fashion-mnist", "mnist", "idx")
TEXT_SETS = ("pydoc", "text")
DATA_SETS = IMAGE_SETS + TEXT_SETS


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Labelled grey images with a fixed split.

    Args:
        name: the name it was loaded under.
        train_images, test_images: uint8, [count, channels, height, width].
        train_labels, test_labels: int64, [count], 0 to ``classes - 1``.
        classes: how many classes there are.
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: int

    @property
    def channels(self) -> int:
        """The channels of an image."""
        return int(self.train_images.shape[1])

    def limited(self, count: int | None) -> ImageData:
        """Return the set with the first ``count`` training images only; the test images stay."""
        if count is None:
            return self
        return ImageData(
            name=self.name,
            train_images=self.train_images[:count],
            train_labels=self.train_labels[:count],
            test_images=self.test_images,
            test_labels=self.test_labels,
            classes=self.classes,
        )

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that differ as soon as one value of the set does."""
        return _fingerprint(self.train_images, self.train_labels, self.test_images, self.test_labels)


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Bytes of text: the first nine tenths to train on, the last tenth to test on.

    Args:
        name: the name it was loaded under.
        train, test: uint8, [bytes].
    """

    name: str
    train: torch.Tensor
    test: torch.Tensor

    def limited(self, count: int | None) -> TextData:
        """Return the set with the first ``count`` training bytes only; the test bytes stay."""
        return self if count is None else TextData(name=self.name, train=self.train[:count], test=self.test)

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that differ as soon as one byte of the set does."""
        return _fingerprint(self.train, self.test)


def _fingerprint(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_data(
    name: str, *, data_dir: Path | None = None, text: Path | None = None, limit: int | None = None
) -> ImageData | TextData:
    """Load the data set of that name.

    Args:
        name: one of ``DATA_SETS``; ``idx`` is any folder of four IDX files, ``text`` any file.
        data_dir: the folder that holds the four files of ``fashion-mnist``, ``mnist`` or ``idx``.
        text: the file for ``name="text"``.
        limit: keep only that many training samples (images, or bytes of text).

    Raises:
        ArgumentError: an unknown name, or an option that the data set does not take.
        MissingDataError: the files are not there; says where to get them.
        CorruptDataError: a file is damaged; says which and how.

    >>> data = load_data("digits")
    >>> tuple(data.train_images.shape), tuple(data.test_images.shape)
    ((1437, 1, 8, 8), (360, 1, 8, 8))
    """
    # each reader is a file of its own and imported here: a run needs one of them
    if name not in DATA_SETS:
        raise ArgumentError(f"data={name!r}: must be one of {', '.join(map(repr, DATA_SETS))}")
    if data_dir is not None and name not in IMAGE_SETS[1:]:
        raise ArgumentError(f"data_dir={str(data_dir)!r}: only {', '.join(IMAGE_SETS[1:])} are read from a folder")
    if text is not None and name != "text":
        raise ArgumentError(f"text={str(text)!r}: goes with data 'text', not {name!r}")
    data: ImageData | TextData
    if name == "digits":
        from gradbits.train.digits import load_digits

        data = load_digits()
    elif name in IMAGE_SETS:
        from gradbits.train.idx import load_idx

        data = load_idx(name, data_dir)
    elif name == "pydoc":
        from gradbits.train.text import load_pydoc

        data = load_pydoc()
    else:
        from gradbits.train.text import load_text

        if text is None:
            raise ArgumentError("data='text': needs the file to read: --text FILE")
        data = load_text(text)
    return data.limited(limit)
