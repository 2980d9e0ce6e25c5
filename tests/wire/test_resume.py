"""A resumed run is the run without a break; on another number of ranks no error that waits is lost."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from torch import nn

from gradbits.core.errors import ArgumentError, CorruptDataError, DtypeError
from gradbits.wire.state import CommState

RESUMED = """
CASES = (("qsgd", {"bits": 3, "feedback": True}), ("sign", {}), ("alq", {"entropy": "huffman"}))


def start(codec, options):
    model = net()
    # small buckets: DDP rebuilds them after its first step, the resumed one after step 4
    ddp = DDP(model, bucket_cap_mb=0.004)
    comm = gb.compress_(ddp, codec, min_elements=100, group_mb=0.006, **options)
    return ddp, comm, torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)


def main(rank, world):
    for codec, options in CASES:
        torch.manual_seed(rank)
        ddp, comm, optimizer = start(codec, options)
        train(ddp, optimizer, range(3))
        tree = {"model": ddp.module.state_dict(), "optimizer": optimizer.state_dict(), "wire": comm.state_dict()}
        torch.save(tree, f"{sys.argv[1]}-{rank}-state")
        train(ddp, optimizer, range(3, 6))
        torch.manual_seed(77)
        again, resumed, second = start(codec, options)
        stored = torch.load(f"{sys.argv[1]}-{rank}-state", weights_only=True)
        again.module.load_state_dict(stored["model"])
        second.load_state_dict(stored["optimizer"])
        resumed.load_state_dict(stored["wire"])
        train(again, second, range(3, 6))
        assert torch.equal(flat(ddp), flat(again)), codec
        one, other = comm.state_dict(), resumed.state_dict()
        for kind in ("residual", "owned", "codec_state"):
            assert one[kind].keys() == other[kind].keys()
            assert all(torch.equal(one[kind][name], other[kind][name]) for name in one[kind])
        assert (one["step"], one["sent"], one["seed"]) == (other["step"], other["sent"], other["seed"])
"""


def test_resuming_on_as_many_ranks_is_bit_identical(tmp_path):
    run_ranks(tmp_path, RESUMED)


RESIZED = '''
from gradbits.core.errors import ArgumentError, CorruptDataError


def mass(states, name, numel):
    """What will still reach the parameter: the mean of the residuals and the owners' errors."""
    residual = torch.stack([state["residual"][name].double() for state in states]).mean(0).flatten()
    return residual + torch.cat([state["owned"][name] for state in states])[:numel].double()


def main(rank, world):
    options = {"bits": 4, "bucket": 16, "feedback": True, "min_elements": 100}
    ddp = DDP(net())
    comm = gb.compress_(ddp, "qsgd", **options)
    train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.05), range(3))
    states = [None] * world
    dist.all_gather_object(states, comm.state_dict())
    pair = dist.new_group([0, 1])
    if rank == 2:
        return
    smaller = DDP(net(), process_group=pair)
    smaller.module.load_state_dict(ddp.module.state_dict())
    fewer = gb.compress_(smaller, "qsgd", **options)
    fewer.load_state_dict(states)
    assert fewer.step == 3
    found = [None] * 2
    dist.all_gather_object(found, fewer.state_dict(), group=pair)
    for name, p in smaller.module.named_parameters():
        if name in states[0]["residual"]:
            before, after = mass(states, name, p.numel()), mass(found, name, p.numel())
            assert before.abs().max() > 0
            assert (before - after).abs().max() < 1e-6 * before.abs().max(), name
    loss_of(smaller, rank, 3).backward()
    # what does not fit is refused, and the state stays as it was
    for wrong, kind in (
        (states[0], ArgumentError), (states[:2], ArgumentError), ([], CorruptDataError), ({}, CorruptDataError),
        ({**states[0], "codec": gb.wire.codec("qsgd").to_json()}, ArgumentError),
        ([{**each, "residual": {"x": torch.zeros(2)}} for each in states], ArgumentError),
        ([states[0], {**states[1], "step": 9}, states[2]], CorruptDataError),
    ):
        kept = fewer.state_dict()
        try:
            fewer.load_state_dict(wrong)
            raise SystemExit("taken: a state that does not fit")
        except kind:
            pass
        assert torch.equal(kept["residual"]["0.weight"], fewer.state_dict()["residual"]["0.weight"])
'''


def test_on_another_number_of_ranks_the_errors_that_wait_are_kept(tmp_path):
    run_ranks(tmp_path, RESIZED, world=3)


OFF = """
def main(rank, world):
    # a group of one rank has nothing to send: gradients stay as they are
    single = [dist.new_group([0]), dist.new_group([1])][rank]
    plain, hooked = net(), DDP(net(), process_group=single)
    comm = gb.compress_(hooked, "qsgd", bits=2)
    for step in range(2):
        loss_of(plain, rank, step).backward()
        loss_of(hooked, rank, step).backward()
    for p, q in zip(plain.parameters(), hooked.parameters()):
        assert torch.equal(p.grad, q.grad)
    assert comm.bytes_sent == 0 and comm.ratio == 1.0
    # a model that is not compressed has no hook, though another one is
    other = DDP(net())
    compressed = DDP(net())
    gb.compress_(compressed, "qsgd")
    assert not other._comm_hooks
    # the hook and its state alone, as other programs register them
    model = net()
    state = gb.wire.CommState(model, "qsgd", bits=8, min_elements=100)
    ddp = DDP(model)
    ddp.register_comm_hook(state, gb.wire.hook)
    train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.05), range(2))
    assert state.step == 2 and state.ratio > 1.5 and equal_everywhere(flat(model))
"""


def test_off_means_off_and_the_bare_hook_works(tmp_path):
    run_ranks(tmp_path, OFF)


DAMAGED = {
    "step": "a",
    "world": -1,
    "sent": None,
    "seed": 0.5,
    "due": 3,
    "residual_scale": float("nan"),
    "seconds": 4,
    "residual": None,
    "owned": {},
    "codec_state": {"levels": torch.ones(3)},
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("gone", [False, True])
def test_a_damaged_state_is_refused_and_nothing_moves(name, gone):
    torch.manual_seed(0)
    comm = CommState(nn.Linear(64, 64), "onebit")
    before = comm.state_dict()
    state = {**before, name: DAMAGED[name], "step": 7 if name != "step" else DAMAGED[name]}
    if gone:
        del state[name]
    with pytest.raises(CorruptDataError, match="state"):
        comm.load_state_dict(state)
    after = comm.state_dict()
    assert after["step"] == 0
    assert torch.equal(after["residual"]["weight"], before["residual"]["weight"])


def test_states_that_are_none():
    comm = CommState(nn.Linear(64, 64), "onebit")
    state = comm.state_dict()
    bad = {**state, "residual": {"weight": torch.full((64, 64), float("nan"))}}
    for given, error in ((None, DtypeError), (bad, CorruptDataError), ([state, state], ArgumentError)):
        with pytest.raises(error, match="state"):
            comm.load_state_dict(given)
    comm.load_state_dict([state])
