"""FSDP2 with compressed gradients on real gloo processes."""

from __future__ import annotations

from ranks import run_ranks

MAIN = """
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
import gradbits.wire.exchange as exchange
from gradbits.core.errors import ArgumentError, WireError


def sharded(**options):
    model = net(norm=False)
    fully_shard(model[2])
    fully_shard(model)
    return model, (gb.compress_(model, min_elements=100, **options) if options else None)


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def main(rank, world):
    # close to what FSDP does alone, exact below the threshold, and the same scaling
    plain, _ = sharded()
    model, comm = sharded(codec="qsgd", bits=8, bucket=64)
    for m in (plain, model):
        loss_of(m, rank, 0).backward()
    for (name, p), (_, q) in zip(plain.named_parameters(), model.named_parameters()):
        a, b = whole(p.grad), whole(q.grad)
        if p.dim() == 1:
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-9), name
        else:
            assert not torch.equal(a, b) and (a - b).norm() < 0.05 * a.norm(), name
    assert comm.step == 1 and comm.ratio > 2, comm.ratio

    # training, error feedback, levels: what is gathered is the same on all ranks
    for options in ({"codec": "alq"}, {"codec": "sign"}, {"codec": "qsgd", "entropy": "huffman", "start": 2}):
        model, comm = sharded(**options)
        before = loss_of(model, rank, 0).item()
        train(model, torch.optim.Adam(model.parameters(), lr=0.01), range(12))
        assert comm.step == 12
        assert equal_everywhere(torch.cat([whole(p.detach()).flatten() for p in model.parameters()]))
        assert loss_of(model, rank, 0).item() < before
        if "levels" in comm.codec_state:
            assert equal_everywhere(comm.codec_state["levels"])
            assert not torch.equal(comm.codec_state["levels"], comm.encoding.init_state()["levels"])

    # errors are kept by name, do not move with an overflow, and are stored as plain tensors
    model, comm = sharded(codec="sign")
    loss_of(model, rank, 0).backward()
    before = comm.state_dict()
    assert set(before["residual"]) == {"0.weight", "2.weight", "4.weight"}
    assert all(value.any() and type(value) is torch.Tensor for value in before["residual"].values())
    model.zero_grad()
    loss = loss_of(model, rank, 1)
    (loss * (float("inf") if rank == 1 else 1.0)).backward()
    after = comm.state_dict()
    assert all(torch.equal(before["residual"][name], after["residual"][name]) for name in before["residual"])
    assert all(not torch.isfinite(whole(p.grad)).all() for p in model.parameters())
    model.zero_grad()
    again, resumed = sharded(codec="sign")
    resumed.load_state_dict(after)
    for m in (model, again):
        loss_of(m, rank, 2).backward()
    for p, q in zip(model.parameters(), again.parameters()):
        assert torch.equal(whole(p.grad), whole(q.grad))

    # a damaged message
    pack = exchange.pack
    if rank == 1:
        def damaged(message):
            data = pack(message)
            data[-3] ^= 4
            return data
        exchange.pack = damaged
    try:
        loss_of(model, rank, 3).backward()
        raise SystemExit("damage went unnoticed")
    except WireError as error:
        assert "step 3" in str(error) and "rank 1 arrived damaged at rank 0" in str(error), error
    exchange.pack = pack
    # frozen parameters take no part, and the rest is compressed
    model = net(norm=False)
    model[0].bias.requires_grad_(False)
    fully_shard(model)
    comm = gb.compress_(model, "onebit", min_elements=100)
    loss_of(model, rank, 0).backward()
    assert comm.ratio > 2 and model[0].bias.grad is None, comm.ratio

    # what cannot be done is said
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("replicas", "shards"))
    replicated = net(norm=False)
    fully_shard(replicated, mesh=mesh)
    for made, options, message in (
        (model, {}, "compressed already"),
        (replicated, {}, "replicated"),
        (model, {"process_group": dist.group.WORLD}, "process_group"),
    ):
        try:
            gb.compress_(made, "qsgd", **options)
            raise SystemExit(f"{message}: was taken")
        except ArgumentError as error:
            assert message in str(error), error

    # the ranks disagree
    model, _ = sharded()
    try:
        gb.compress_(model, "qsgd" if rank == 0 else "alq")
        raise SystemExit("codecs that differ were taken")
    except ArgumentError as error:
        assert "rank 1" in str(error), error
    try:
        gb.compress_(net(), "qsgd")
        raise SystemExit("a model that is not distributed was taken")
    except ArgumentError:
        pass
"""


def test_fsdp(tmp_path):
    run_ranks(tmp_path, MAIN)
