"""What a network is asked to do with a data set: which batch comes at which step, and how well it does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch

from gradbits.core.checks import check_integer
from gradbits.core.errors import ArgumentError, CorruptDataError
from gradbits.train.datasets import ImageData, TextData

CONTEXT = 128  # bytes of text in one sample
TEST_BATCH = 256


class Batch(NamedTuple):
    """``inputs`` go into the model; its logits, flattened to [N, classes], are compared with ``targets`` [N]."""

    inputs: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on that device."""
        return Batch(self.inputs.to(device), self.targets.to(device))


class Task(Protocol):
    """Batches as a pure function of (seed, step), so that a run is resumed by its step number alone."""

    metric: str
    batch_size: int
    steps_per_epoch: int

    def batch(self, seed: int, step: int) -> Batch:
        """Return the training batch of a step, the same for every network of a comparison."""

    def test_batches(self) -> Iterator[Batch]:
        """Yield the whole test set in its fixed order."""

    def model_arguments(self) -> dict[str, Any]:
        """Return what a model factory may want to know of the data."""


class ImageTask:
    """Classify images: every epoch in a new order, pixels standardised by the training set's mean and deviation.

    Args:
        data: the images.
        batch_size: samples of a batch; the last incomplete batch of an epoch is left out.

    Raises:
        ArgumentError: the training set is smaller than one batch.
    """

    metric = "test_accuracy"

    def __init__(self, data: ImageData, batch_size: int) -> None:
        count = len(data.train_images)
        self.data = data
        self.batch_size = check_integer(batch_size, "batch_size", 2)
        if count < batch_size:
            raise ArgumentError(f"batch_size={batch_size}: must be at most {count}, the number of training samples")
        self.steps_per_epoch = count // batch_size
        pixels = data.train_images.double()
        self._mean, self._scale = pixels.mean().item(), 1.0 / max(pixels.std(correction=0).item(), 1e-6)
        self._order: tuple[tuple[int, int], torch.Tensor] | None = None

    def batch(self, seed: int, step: int) -> Batch:
        """Return the training batch of a step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != (seed, epoch):
            order = torch.randperm(len(self.data.train_images), generator=generator(seed, epoch))
            self._order = ((seed, epoch), order)
        rows = self._order[1][index * self.batch_size : (index + 1) * self.batch_size]
        return Batch(self._standardised(self.data.train_images[rows]), self.data.train_labels[rows])

    def test_batches(self) -> Iterator[Batch]:
        """Yield the test images in their order."""
        for images, labels in zip(
            self.data.test_images.split(TEST_BATCH), self.data.test_labels.split(TEST_BATCH), strict=True
        ):
            yield Batch(self._standardised(images), labels)

    def model_arguments(self) -> dict[str, Any]:
        """Return the channels and the size of the images and the number of classes."""
        return {
            "in_channels": self.data.channels,
            "classes": self.data.classes,
            "image_size": tuple(self.data.train_images.shape[2:]),
        }

    def _standardised(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().sub_(self._mean).mul_(self._scale)


class TextTask:
    """Predict the next byte: random windows of the training text, every byte of the test text once.

    Args:
        data: the text.
        batch_size: windows of a batch.
        context: bytes of a window.

    Raises:
        CorruptDataError: the text is shorter than a window.
    """

    metric = "bits_per_byte"

    def __init__(self, data: TextData, batch_size: int, context: int = CONTEXT) -> None:
        self.data = data
        self.batch_size = check_integer(batch_size, "batch_size", 1)
        self.context = check_integer(context, "context", 2)
        for part, text in (("training", data.train), ("test", data.test)):
            if len(text) <= context:
                raise CorruptDataError(
                    f"data {data.name!r}: the {part} text has {len(text)} bytes; must be more than context={context}"
                )
        self.steps_per_epoch = max(1, len(data.train) // (batch_size * context))

    def batch(self, seed: int, step: int) -> Batch:
        """Return the training batch of a step; targets are the inputs shifted by one byte."""
        last = len(self.data.train) - self.context
        starts = torch.randint(last, (self.batch_size, 1), generator=generator(seed, step))
        windows = self.data.train[starts + torch.arange(self.context + 1)].long()
        return Batch(windows[:, :-1], windows[:, 1:].flatten())

    def test_batches(self) -> Iterator[Batch]:
        """Yield the test text in windows that follow one another; what does not fill a window is left out."""
        count = (len(self.data.test) - 1) // self.context
        inputs = self.data.test[: count * self.context].view(count, self.context).long()
        targets = self.data.test[1 : count * self.context + 1].view(count, self.context).long()
        rows = max(1, TEST_BATCH // 8)
        for chunk, wanted in zip(inputs.split(rows), targets.split(rows), strict=True):
            yield Batch(chunk, wanted.flatten())

    def model_arguments(self) -> dict[str, Any]:
        """Return the number of byte values and the length of a window."""
        return {"vocabulary": 256, "context": self.context}


def make_task(data: ImageData | TextData, batch_size: int, context: int = CONTEXT) -> Task:
    """Return the task that fits the kind of data."""
    return ImageTask(data, batch_size) if isinstance(data, ImageData) else TextTask(data, batch_size, context)


def generator(seed: int, number: int) -> torch.Generator:
    """Return a generator for one epoch or step, independent of torch's default one and of its neighbours."""
    mixed = hashlib.sha256(f"{seed}/{number}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(mixed, "big") >> 1)
