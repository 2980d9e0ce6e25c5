"""Batches are a pure function of seed and step."""

from __future__ import annotations

import pytest
import torch

from gradbits.core.errors import ArgumentError, CorruptDataError, DtypeError
from gradbits.train.datasets import TextData, load_data
from gradbits.train.tasks import ImageTask, TextTask, make_task


@pytest.fixture(scope="module")
def text():
    return TextData(
        name="text",
        train=torch.arange(900, dtype=torch.int64).remainder(251).to(torch.uint8),
        test=torch.arange(100, dtype=torch.uint8),
    )


@pytest.mark.parametrize("name", ["digits", "text"])
def test_any_step_can_be_drawn_in_any_order(name, text):
    data = load_data("digits") if name == "digits" else text
    straight, jumping = make_task(data, 16, 8), make_task(data, 16, 8)
    batches = [straight.batch(3, step) for step in range(100)]
    torch.manual_seed(99)
    for step in (95, 2, 50):
        batch = jumping.batch(3, step)
        assert torch.equal(batch.inputs, batches[step].inputs)
        assert torch.equal(batch.targets, batches[step].targets)
    assert not torch.equal(straight.batch(4, 0).inputs, batches[0].inputs)


def test_drawing_leaves_the_default_generator_alone(text):
    state = torch.get_rng_state()
    ImageTask(load_data("digits"), 16).batch(0, 30)
    TextTask(text, 4, 8).batch(0, 30)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_epoch_shows_every_image_at_most_once_and_the_next_in_another_order():
    task = ImageTask(load_data("digits"), 100)
    assert task.steps_per_epoch == 14
    rows = [torch.cat([task.batch(0, 14 * e + i).inputs for i in range(14)]) for e in (0, 1)]
    counts = torch.cat([task.data.train_images.flatten(1)]).unique(dim=0).shape[0]
    assert counts == 1437  # all images differ, so that equal rows mean a repeated one
    assert rows[0].flatten(1).unique(dim=0).shape[0] == 1400
    assert not torch.equal(rows[0], rows[1])


def test_images_are_standardised():
    task = ImageTask(load_data("digits"), 1437)
    inputs = task.batch(0, 0).inputs
    assert inputs.dtype == torch.float32
    assert inputs.mean().abs() < 1e-5
    assert (inputs.std(correction=0) - 1).abs() < 1e-5


def test_text_targets_are_the_next_bytes(text):
    batch = TextTask(text, 4, 8).batch(0, 0)
    assert batch.inputs.shape == (4, 8)
    assert torch.equal(batch.targets.view(4, 8), (batch.inputs + 1).remainder(251))


def test_the_test_text_is_seen_once_and_in_order(text):
    task = TextTask(text, 4, 8)
    inputs = torch.cat([batch.inputs.flatten() for batch in task.test_batches()])
    targets = torch.cat([batch.targets for batch in task.test_batches()])
    assert inputs.tolist() == list(range(96))
    assert targets.tolist() == list(range(1, 97))


def test_the_test_images_are_seen_once_and_in_order():
    data = load_data("digits")
    labels = torch.cat([batch.targets for batch in ImageTask(data, 7).test_batches()])
    assert torch.equal(labels, data.test_labels)


def test_sizes_that_do_not_fit_are_refused(text):
    with pytest.raises(ArgumentError, match="batch_size=2000: must be at most 1437"):
        ImageTask(load_data("digits"), 2000)
    with pytest.raises(CorruptDataError, match="context=100"):
        TextTask(text, 4, 100)
    with pytest.raises(DtypeError, match="context"):
        TextTask(text, 4, "8")
