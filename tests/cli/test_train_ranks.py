"""``gradbits train`` under torchrun, as a user runs it: two processes of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

TINY = [
    "--model", "nets:net", "--limit", "256", "--threads", "1", "--log-every", "2", "--recipe", "fp32", "--steps", "8",
]  # fmt: skip

NET = """
import os, signal
from torch import nn

class Net(nn.Sequential):
    calls = 0
    def forward(self, x):
        if self.training and os.environ.get("STOP_RANK") == os.environ.get("RANK"):
            Net.calls += 1
            if Net.calls == 5:
                os.kill(os.getpid(), signal.SIGINT)
        return super().forward(x)

def net(in_channels, classes):
    layers = [nn.Conv2d(in_channels, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten()]
    return Net(*layers, nn.Linear(256, classes))
"""


def torchrun(*arguments, cwd, ranks=2, code=0, **environment):
    (cwd / "nets.py").write_text(NET)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
            "-m", "gradbits", "train", *map(str, arguments),
        ],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment},
    )  # fmt: skip
    assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr
    return done


def record(out):
    (found,) = json.loads((out / "results.json").read_text())
    return found


def log(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "step_ms"} for line in lines]


def test_a_stopped_run_goes_on_bit_identically_and_the_record_says_what_was_sent(tmp_path):
    wire = ["--wire", "qsgd", "--wire-bits", "3", "--wire-feedback", "--entropy", "huffman"]
    done = torchrun(*TINY, *wire, "--out", "whole", cwd=tmp_path)
    assert "2 ranks, wire qsgd" in done.stdout
    assert done.stdout.count("step 8/8") == 1  # one rank speaks
    found = record(tmp_path / "whole")
    assert (found["ranks"], found["wire"], found["wire_bits"], found["entropy"]) == (2, "qsgd", 3, "huffman")
    assert found["wire_bytes_per_step"] * 8 == log(tmp_path / "whole")[-2]["sent_bytes"]
    assert found["wire_ratio"] > 3
    # the signal reaches one rank only; both stop after the same step
    stopped = torchrun(*TINY, *wire, "--out", "stopped", cwd=tmp_path, code=130, STOP_RANK="1")
    assert "stopped, the state is saved; to go on: torchrun" in stopped.stdout
    assert not (tmp_path / "stopped" / "results.json").exists()
    torchrun("--out", "stopped", "--resume", cwd=tmp_path)
    assert log(tmp_path / "stopped") == log(tmp_path / "whole")
    ends = [
        torch.load(next((tmp_path / name / "checkpoints").iterdir()), weights_only=True)["tensors"]
        for name in ("whole", "stopped")
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    assert any("ranks.1.wire.residual" in key for key in ends[0])


@pytest.mark.parametrize("arguments", [["--wire", "powersgd"], ["--optimizer", "quantized_adam", "--lr", "0.002"]])
def test_baselines_and_optimizers_that_talk_themselves(tmp_path, arguments):
    torchrun(*TINY, *arguments, "--out", "run", cwd=tmp_path)
    found = record(tmp_path / "run")
    assert found["wire"] == arguments[1]
    assert found["wire_bytes_per_step"] > 0
    assert found["wire_ratio"] > 1


def test_what_is_wrong_is_said_once(tmp_path):
    done = torchrun(*TINY, "--wire", "qsgd", "--batch-size", "33", cwd=tmp_path, code=2)
    assert done.stderr.count("gradbits: error: batch_size=33: must be a multiple of the number of ranks") <= 2
    assert "Traceback (most recent call last):\n  File" not in done.stderr.split("torch/distributed")[0]
    alone = subprocess.run(
        [sys.executable, "-m", "gradbits", "train", "--wire", "qsgd"],
        cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert alone.returncode == 2
    assert "torchrun" in alone.stderr
    assert not (tmp_path / "runs").exists()
