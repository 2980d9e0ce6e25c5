"""The handwritten digits that come with the package: 1,437 images to train on and 360 to test on, 8 x 8 pixels."""

from __future__ import annotations

import hashlib
import io
from importlib.resources import files

import numpy as np
import torch

from gradbits.core.errors import CorruptDataError, MissingDataError
from gradbits.train.datasets import ImageData

SHA256 = "d047ae49462a3a86b0627ac1519e29ee6751cd0b41a57f9360e0218c14ef5996"


def load_digits() -> ImageData:
    """Return the bundled UCI digits (E. Alpaydin and C. Kaynak, CC BY 4.0) in their fixed split.

    The test images are listed in the file itself, so the split is the same in every version of every library.

    Raises:
        MissingDataError: the file was not installed.
        CorruptDataError: the file is damaged.
    """
    name = "gradbits/train/data/digits.npz"
    try:
        raw = (files("gradbits.train") / "data" / "digits.npz").read_bytes()
    except OSError as error:
        raise MissingDataError(f"{name}: is not in the installed package; install gradbits again") from error
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as archive:
            arrays = [np.ascontiguousarray(archive[key]) for key in ("images", "labels", "test")]
    except Exception as error:  # a damaged archive raises whatever the zip reader meets first
        raise CorruptDataError(f"{name}: is not a readable NumPy archive ({type(error).__name__})") from error
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes())
    if digest.hexdigest() != SHA256:
        raise CorruptDataError(f"{name}: content has sha256 {digest.hexdigest()[:16]}..., not {SHA256[:16]}...")
    images, labels, test = arrays
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[test] = True
    images = images[:, None]
    return ImageData(
        name="digits",
        train_images=torch.from_numpy(images[~is_test]),
        train_labels=torch.from_numpy(labels[~is_test].astype(np.int64)),
        test_images=torch.from_numpy(images[is_test]),
        test_labels=torch.from_numpy(labels[is_test].astype(np.int64)),
        classes=10,
    )
