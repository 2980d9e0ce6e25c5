"""What goes wrong between ranks is an error that names the step, on every rank, and never a hang."""

from __future__ import annotations

from ranks import run_ranks

KILLED = """
import signal, time
from gradbits.core.errors import WireError


def main(rank, world):
    ddp = DDP(net(norm=False))
    gb.compress_(ddp, "qsgd", min_elements=500)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    train(ddp, optimizer, range(3))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        train(ddp, optimizer, [3])
        raise SystemExit("the loss of a rank went unnoticed")
    except WireError as error:
        assert "step 3" in str(error), error
    assert time.monotonic() - started < 40
    return "alone"
"""


def test_a_killed_rank_is_an_error_that_names_the_step(tmp_path):
    run_ranks(tmp_path, KILLED, timeout=20, lost=(1,))


DAMAGED = '''
import gradbits.wire.exchange as exchange
from gradbits.core.errors import WireError
from gradbits.wire.transport import Transport

whole_pack, whole_gather = exchange.pack, Transport.all_gather


def damaged_by_sender(stage, at):
    """Rank 1 flips a bit of what it sends in step 2: in its frame, or in what goes uncompressed."""
    calls = 0

    def pack(message):
        nonlocal calls
        data = whole_pack(message)
        calls += message.step == 2
        if message.step == 2 and calls == stage:
            data[at] ^= 16
        return data

    return pack


def damaged_on_the_way(self, message, length):
    """Only rank 1 sees the damage."""
    received = whole_gather(self, message, length)
    step = int.from_bytes(bytes(message[12:16].tolist()), "little")
    if step == 2:
        received[0][-9] ^= 1
    return received


def main(rank, world):
    # (what is patched on rank 1, who must be named): the first two messages of rank 1 in a step go to ranks 0 and 2
    # (all-to-all), the third one to all
    for case, wanted in (
        ((1, -3), "rank 1 arrived damaged at rank 0"),
        ((2, 40), "rank 1 arrived damaged at rank 2"),
        ((3, -3), "rank 1 arrived damaged at rank"),
        ("way", "rank 0 arrived damaged at rank 1"),
    ):
        ddp = DDP(net(norm=False))
        gb.compress_(ddp, "qsgd", min_elements=500, entropy="huffman" if case == (3, -3) else None)
        exchange.pack, Transport.all_gather = whole_pack, whole_gather
        if rank == 1 and case == "way":
            Transport.all_gather = damaged_on_the_way
        elif rank == 1:
            exchange.pack = damaged_by_sender(*case)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        train(ddp, optimizer, range(2))
        before = flat(ddp)
        try:
            train(ddp, optimizer, [2])
            raise SystemExit(f"{case}: rank {rank} did not notice")
        except WireError as error:
            assert wanted in str(error) and "step 2, group 0 ('2.weight' ...)" in str(error), (case, error)
        assert torch.equal(before, flat(ddp))
'''


def test_a_damaged_message_is_noticed_on_every_rank_and_named(tmp_path):
    run_ranks(tmp_path, DAMAGED, world=3)
