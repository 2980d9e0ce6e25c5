"""``compress_``: one call that makes a distributed model average its gradients in few bits."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradbits.core.checks import check_module
from gradbits.core.errors import ArgumentError
from gradbits.wire.codec import Codec
from gradbits.wire.hook import hook
from gradbits.wire.state import CommState


def compress_(model: nn.Module, codec: str | Codec = "qsgd", **options: Any) -> CommState:
    r"""Make ``model`` average its gradients over the ranks in few bits; return what it keeps and counts.

    Each of the W ranks sends every other one its part of the encoded gradient, averages what it gets, and sends the
    encoded mean back: :math:`2\,(W-1)/W\cdot b` bits per element and rank, whatever W is. All ranks decode the same
    bytes, so replicas stay bitwise equal. Call it on every rank, after the model is wrapped and before the first step.

    Args:
        model: ``DistributedDataParallel``, or a module to which ``fully_shard`` (FSDP2) was applied, whose gradients
            are then reduce-scattered in few bits.
        codec: a codec or its name, see ``gradbits.wire.codecs()``.
        options: the codec's, such as ``bits`` and ``bucket``; ``entropy`` and ``feedback`` as in
            ``gradbits.wire.codec``; ``start``, ``min_elements``, ``group_mb``, ``scale`` and ``on_nonfinite`` as in
            ``CommState``.

    Returns:
        The state: ``bytes_sent``, ``ratio``, ``seconds``, ``state_dict()`` and ``load_state_dict()``.

    Raises:
        ArgumentError, DtypeError: an option that is not legal, a model that is neither, or one that has a hook already.

    Example (on each rank)::

        ddp = torch.nn.parallel.DistributedDataParallel(model)
        comm = gradbits.compress_(ddp, "alq", bits=3, entropy="huffman")

    References:
        See the codec's.
    """
    check_module(model)
    if isinstance(model, DistributedDataParallel):
        if model.__dict__.get("_comm_hooks"):
            raise ArgumentError("model: has a communication hook already; DDP takes one, so wrap the module anew")
        options.setdefault("process_group", model.process_group)
        state = CommState(model, codec, **options)
        state.setup()
        model.register_comm_hook(state, hook)
        return state
    from gradbits.wire.fsdp import compress_fsdp_, is_fsdp

    if is_fsdp(model):
        return compress_fsdp_(model, codec, **options)
    raise ArgumentError(
        f"model: is a {type(model).__name__}; wrap it in DistributedDataParallel or apply fully_shard first"
    )
