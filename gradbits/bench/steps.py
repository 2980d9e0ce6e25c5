"""What ``gradbits bench step`` measures: single layers forward and backward, and whole training steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from gradbits.bench.contest import Contestant, Ready, Work
from gradbits.bench.peers import FP32, REFERENCES, Variant
from gradbits.train.models import build_model

IMAGE = {"in_channels": 3, "classes": 10}
SHRINK = 8  # quick mode divides batches by it


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model or layer, its batch, and what gradbits is expected to reach on it.

    Args:
        label: shown above its table.
        model: builds it.
        inputs: builds a batch of a given size.
        batch: samples of a batch.
        step: whether it is a training step with loss and optimizer, or a layer's forward and backward pass alone.
        must, aim: ratio to fp32 eager and to the best of bf16.
    """

    label: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int], torch.Tensor]
    batch: int
    step: bool
    must: tuple[float, float]
    aim: tuple[float, float]


def _images(batch: int, channels: int = 3, side: int = 32) -> torch.Tensor:
    return torch.randn(batch, channels, side, side).to(memory_format=torch.channels_last)


def _image_model(name: str) -> nn.Module:
    return _channels_last(build_model(name, IMAGE))


def _conv() -> nn.Module:
    return _channels_last(nn.Conv2d(64, 64, 3, padding=1, bias=False))


def _channels_last(model: Any) -> nn.Module:
    found: nn.Module = model.to(memory_format=torch.channels_last)
    return found


SUBJECTS: dict[str, Subject] = {
    "linear": Subject(
        label="linear forward + backward, {batch} x 1024 -> 1024",
        model=partial(nn.Linear, 1024, 1024),
        inputs=lambda batch: torch.randn(batch, 1024),
        batch=8192,
        step=False,
        must=(3.6, 1.8),
        aim=(3.9, 1.95),
    ),
    "conv": Subject(
        label="conv 3 x 3 forward + backward, 64 -> 64, 32 x 32, batch {batch}",
        model=_conv,
        inputs=partial(_images, channels=64),
        batch=128,
        step=False,
        must=(3.0, 1.55),
        aim=(3.6, 1.8),
    ),
    "resnet18": Subject(
        label="training step of ResNet-18, 32 x 32, batch {batch}",
        model=partial(_image_model, "resnet18"),
        inputs=_images,
        batch=128,
        step=True,
        must=(2.8, 1.5),
        aim=(3.4, 1.9),
    ),
    "gpt": Subject(
        label="training step of GPT, d 512, 6 layers, vocabulary 1024, sequence 256, batch {batch}",
        model=partial(
            build_model, "gpt", {"vocabulary": 1024}, {"context": 256, "d_model": 512, "layers": 6, "heads": 8}
        ),
        inputs=lambda batch: torch.randint(0, 1024, (batch, 256)),
        batch=8,
        step=True,
        must=(2.5, 1.4),
        aim=(3.2, 1.8),
    ),
    "resnet20": Subject(
        label="training step of ResNet-20, 32 x 32, batch {batch}",
        model=partial(_image_model, "resnet20"),
        inputs=_images,
        batch=128,
        step=True,
        must=(1.6, 1.05),
        aim=(2.6, 1.7),
    ),
}


def step_work(name: str, variants: tuple[Variant, ...], *, quick: bool = False) -> Work:
    """Return one of ``SUBJECTS`` as a work.

    Args:
        name: which.
        variants: who takes part; the first is what outputs are compared with.
        quick: an eighth of the batch, and no expectations: they hold for the whole.
    """
    subject = SUBJECTS[name]
    batch = max(1, subject.batch // SHRINK) if quick else subject.batch
    torch.manual_seed(0)
    model, inputs = subject.model(), subject.inputs(batch)
    contestants = tuple(
        Contestant(name=v.name, build=partial(_ready, subject, model, inputs, v), peak=v.peak, ours=v.ours)
        for v in variants
    )
    return Work(
        name=subject.label.format(batch=batch),
        contestants=contestants,
        amount=_operations(subject, model, inputs),
        references=REFERENCES,
        must=None if quick else dict(zip(REFERENCES, subject.must, strict=True)),
        aim=None if quick else dict(zip(REFERENCES, subject.aim, strict=True)),
    )


def _operations(subject: Subject, model: nn.Module, inputs: torch.Tensor) -> float:
    """Return the operations of the products of one run, forward and backward."""
    few = max(1, inputs.shape[0] // 32)  # products grow with the batch; counting needs a run
    ready = _ready(subject, model, inputs[:few], Variant(name="count"))
    with FlopCounterMode(display=False) as counter:
        ready.run()
    return counter.get_total_flops() * inputs.shape[0] / few


def _ready(subject: Subject, model: nn.Module, inputs: torch.Tensor, variant: Variant) -> Ready:
    """Return a variant that can start: its outputs are those of the model before any step."""
    if not subject.step:
        variant = replace(variant, keep_float=())  # a layer alone is the first and the last
    fresh = variant.prepare(model)
    other_numbers = variant.recipe is not None or variant.torchao
    before = replace(variant, compiled=False).prepare(model) if other_numbers else None

    def output() -> torch.Tensor:
        torch.manual_seed(0)
        with torch.no_grad(), variant.around():
            result: torch.Tensor = (model if before is None else before)(inputs)
        return result

    run = _training_step(fresh, inputs, variant) if subject.step else _passes(fresh, inputs, variant)
    return Ready(run=run, output=output if before is not None or variant.name == FP32 else None)


def _passes(layer: nn.Module, inputs: torch.Tensor, variant: Variant) -> Callable[[], object]:
    """Return a layer's forward and backward pass; activations and gradients have the dtype that they would have."""
    dtype = torch.bfloat16 if variant.autocast else torch.float32
    x = inputs.to(dtype).requires_grad_()
    with torch.no_grad(), variant.around():
        g = torch.randn_like(layer(x))

    def run() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        with variant.around():
            y = layer(x)
        y.backward(g)

    return run


def _training_step(model: nn.Module, inputs: torch.Tensor, variant: Variant) -> Callable[[], object]:
    """Return a training step: forward, cross-entropy, backward, SGD with momentum."""
    text = not inputs.is_floating_point()
    count = inputs.numel() if text else inputs.shape[0]
    targets = torch.randint(0, 10, (count,), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model.train()

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with variant.around():
            logits = model(inputs).flatten(0, -2)
            loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        optimizer.step()

    return run
