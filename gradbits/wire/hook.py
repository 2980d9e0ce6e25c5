"""The DDP communication hook. DDP compares annotations with types, so this file must not postpone their evaluation."""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from gradbits.wire.state import CommState


def hook(state: "CommState", bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket of gradients over the ranks, compressed: a DDP communication hook.

    It is what ``gradbits.compress_`` registers, and what other programs take together with a ``CommState``, such as
    Lightning's ``DDPStrategy(ddp_comm_state=state, ddp_comm_hook=gradbits.wire.hook)``.

    It returns at once; a thread encodes, sends and decodes while autograd goes on. Errors are raised by ``backward()``.

    Args:
        state: of the model that DDP wraps.
        bucket: from DDP.

    Raises:
        ArgumentError: the bucket holds a parameter that the state does not know, or sparse gradients.
    """
    return state.flow.take(bucket)
