"""Time of a training step over real thin links: four hosts as network namespaces behind a switch, everybody in turns.

sudo python benchmarks/thin_links.py [--rate 100mbit --rate 1gbit] [--rounds N] [--log FILE]
sudo python benchmarks/thin_links.py --train     only check that ``gradbits train --wire`` runs across the hosts

Needs root and iproute2. The hosts and the switch are namespaces of their own, joined by veth pairs, each direction held
to the rate by a token bucket filter; the network of the machine is not touched, and all of it is gone afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

HOSTS = 4
HERE = Path(__file__).resolve().parent
BURST = {"100mbit": "128kb", "1gbit": "1mb"}  # more than one packet of 64 KiB, and a few ticks at the rate
PLAIN, HALF = "fp32 all-reduce", "fp16 hook"
TARGETS = {"100mbit": ((PLAIN, 6.0), (HALF, 1.0)), "1gbit": ((PLAIN, 1.0), (HALF, 1.0))}


def call(*command: str) -> None:
    """Run a command that says nothing unless it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")


@contextmanager
def network(rate: str) -> Iterator[list[str]]:
    """Build the hosts and the switch, yield the hosts' namespaces, and remove everything, whatever happens."""
    mark = f"gbthin{os.getpid()}"
    hosts, switch = [f"{mark}h{i}" for i in range(HOSTS)], f"{mark}s"
    made = []
    try:
        for name in (switch, *hosts):
            call("ip", "netns", "add", name)
            made.append(name)
            call("ip", "-n", name, "link", "set", "lo", "up")
        call("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        call("ip", "-n", switch, "link", "set", "br0", "up")
        for i, host in enumerate(hosts):
            pair = ("link", "add", "eth0", "netns", host, "type", "veth", "peer", "name", f"port{i}", "netns", switch)
            call("ip", *pair)
            call("ip", "-n", switch, "link", "set", f"port{i}", "master", "br0", "up")
            call("ip", "-n", host, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            call("ip", "-n", host, "link", "set", "eth0", "up")
            limit = ("root", "tbf", "rate", rate, "burst", BURST.get(rate, "512kb"), "latency", "200ms")
            call("ip", "netns", "exec", host, "tc", "qdisc", "add", "dev", "eth0", *limit)
            call("ip", "netns", "exec", switch, "tc", "qdisc", "add", "dev", f"port{i}", *limit)
        yield hosts
    finally:
        for name in reversed(made):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def run_everywhere(hosts: Sequence[str], program: Sequence[str], port: int, timeout: float) -> str:
    """Run ``program`` under torchrun on every host and return what the first one printed.

    Raises:
        SystemExit: it failed somewhere, or took too long.
    """
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    running: list[subprocess.Popen[str]] = []
    try:
        for rank, host in enumerate(hosts):
            launch = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(hosts)}", "--nproc-per-node=1"]
            launch += [f"--node-rank={rank}", "--master-addr=10.77.0.1", f"--master-port={port}", *program]
            process = subprocess.Popen(
                ["ip", "netns", "exec", host, *launch],
                env=environment,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
            running.append(process)
        out, errors = running[0].communicate(timeout=timeout)
        codes = [process.wait(60) for process in running]
        if any(codes):
            raise SystemExit(f"{' '.join(program)}: exit codes {codes}\n{errors[-2000:]}")
        return out
    except subprocess.TimeoutExpired as late:
        raise SystemExit(f"{' '.join(program)}: not done after {timeout:g} s") from late
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def measure(rate: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what the ranks measured at one rate."""
    program = [str(HERE / "thin_links_rank.py"), f"--rounds={options.rounds}", f"--hidden={options.hidden}"]
    with network(rate) as hosts:
        out = run_everywhere(hosts, program, 29_517, options.timeout)
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def table(rate: str, found: dict[str, Any]) -> list[str]:
    """Return the lines of one rate, with what was to be reached."""
    times = {name: statistics.median(each) for name, each in found["seconds"].items()}
    lines = [
        f"{rate}, {HOSTS} hosts, {found['parameters']:,} parameters, batch {found['batch']} per host; "
        f"medians of {found['rounds']} rounds, one step each",
        f"{'':28} {'step':>9} {'least':>9} {'MB sent':>9} {'fp32 / it':>10} {'fp16 / it':>10}",
    ]
    for name, seconds in times.items():
        sent, least = found["sent"][name] / 1e6, min(found["seconds"][name])
        ratios = f"{times[PLAIN] / seconds:10.2f} {times[HALF] / seconds:10.2f}"
        lines.append(f"{name:28} {1e3 * seconds:6.0f} ms {1e3 * least:6.0f} ms {sent:9.2f} {ratios}")
    for other, factor in TARGETS.get(rate, ()):
        beaten = [
            n for n, t in times.items() if n not in (PLAIN, HALF, "powersgd rank 1") and times[other] > factor * t
        ]
        lines.append(f"more than {factor:g} times as fast as {other}: {', '.join(beaten) or 'none'}")
    return [*lines, ""]


def check_training() -> None:
    """Train across the hosts as a user would, and show what was sent."""
    with tempfile.TemporaryDirectory() as folder, network("1gbit") as hosts:
        program = ["-m", "gradbits", "train", "--data", "digits", "--model", "mlp", "--recipe", "none", "--steps", "30"]
        program += ["--wire", "alq", "--wire-bits", "3", "--entropy", "huffman", "--out", f"{folder}/run"]
        print(run_everywhere(hosts, program, 29_518, 600.0))


def stop(number: int, frame: object) -> None:
    """End as Ctrl-C does, so that the namespaces are removed."""
    raise KeyboardInterrupt


def main() -> None:
    """Measure every rate, print, and write the log where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", action="append", help="as tc writes it; repeatable; default: 100mbit and 1gbit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=4096, help="width of the network's widest layer")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for one rate")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--train", action="store_true")
    options = parser.parse_args()
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))):
        raise SystemExit("thin_links.py: needs root and iproute2 (the commands ip and tc)")
    signal.signal(signal.SIGTERM, stop)
    if options.train:
        check_training()
        return
    rates = options.rate or ["100mbit", "1gbit"]
    lines = [
        f"python benchmarks/thin_links.py {' '.join(f'--rate {r}' for r in rates)} --rounds {options.rounds}",
        f"torch {torch.__version__}, gloo, one thread a host, {os.cpu_count()} processors for all {HOSTS} hosts",
        "wall time of the slowest rank, between barriers; MB sent: counted at the interface of the busiest host",
        "",
    ]
    print("\n".join(lines))
    records = []
    for rate in rates:
        records.append({"rate": rate, **measure(rate, options)})
        part = table(rate, records[-1])
        print("\n".join(part), flush=True)
        lines += part
    if options.log:
        options.log.write_text("\n".join(lines).rstrip() + "\n")
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
