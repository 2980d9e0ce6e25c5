"""Which saved tensors are statistics of others, such as a norm's means: too few to pack, and too different."""

from __future__ import annotations

from collections import deque

import torch

LEAST_SHARE = 4  # a statistic stands for at least that many values
FUSED = 3  # rows of the statistics that gradbits' own fused batch norm saves: one value a channel in each
GROUP_NORM, CAST = "NativeGroupNormBackward0", "ToCopyBackward0"


class Statistics:
    """Recognises statistics by their shape: that of a tensor that was saved shortly before, with axes reduced.

    A hook sees one tensor at a time and not the operation that saves it, but every norm saves its input before the
    statistics of it.

    Args:
        least: a statistic has at least that many elements; smaller tensors are nobody's concern.
        window: how many of the last large tensors count as shortly before.

    >>> statistics = Statistics(least=4)
    >>> statistics.see(torch.zeros(8, 4, 64))
    >>> [statistics.has(torch.zeros(shape)) for shape in ((8, 4, 1), (8, 4), (4,), (4, 64))]
    [True, True, True, False]
    """

    def __init__(self, least: int, window: int = 8) -> None:
        self.least = least
        self.recent: deque[torch.Size] = deque(maxlen=window)

    def see(self, tensor: torch.Tensor) -> None:
        """Note a tensor that was saved, of which statistics may follow."""
        if tensor.is_floating_point() and tensor.numel() >= self.least * LEAST_SHARE:
            self.recent.append(tensor.shape)

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a statistic of what was seen."""
        if not tensor.is_floating_point():
            return False
        made_by = "" if tensor.grad_fn is None else tensor.grad_fn.name()
        if made_by == GROUP_NORM and tensor.output_nr > 0:
            return True
        if made_by == CAST:
            return False  # of a weight, under autocast; a 1 x 1 kernel has the shape of a reduced 3 x 3 one
        return any(_is_statistic(tensor.shape, whole, tensor.requires_grad) for whole in self.recent)


def _is_statistic(shape: torch.Size, whole: torch.Size, has_gradient: bool) -> bool:
    """Whether ``shape`` is that of statistics of a tensor of shape ``whole``."""
    if shape.numel() * LEAST_SHARE > whole.numel():
        return False
    if len(shape) == len(whole) and all(a in (1, b) for a, b in zip(shape, whole, strict=True)):
        return True  # axes of size 1 in place of others: layer norm, RMS norm, normalize
    if shape == whole[: len(shape)]:
        return True  # the last axes are gone: logsumexp, also that of attention
    channels = whole[1] if len(whole) > 1 else 0
    if shape in ((channels,), (FUSED, channels)):
        return True  # batch norm, instance norm
    groups = shape[1] if len(shape) == 2 and len(whole) > 2 and shape[0] == whole[0] else 0
    return groups > 0 and channels % groups == 0 and not has_gradient  # group norm in a graph of torch.compile
