r"""What codecs cost and save for one gradient, and when a link is too fast for them.

For n values, W ranks and links of B bits a second, a step takes

.. math:: T = t_\mathrm{compute} + t_\mathrm{encode} + \Big(2 - \frac1W\Big)\,t_\mathrm{decode}
              + \frac{2\,(W-1)}{W}\cdot\frac{n\,b}{B}

with the times to encode and to decode all n values and b bits per value: every rank encodes W - 1 rows of n / W values
and its mean, and decodes the W - 1 rows that it gets and then all W. fp32 has b = 32 and no other times. Latency, and
what of it hides behind the backward pass, are left out. The break-even bandwidth is where T equals that of fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from gradbits.bench.gradients import Gradients
from gradbits.bench.timing import interleaved
from gradbits.core.checks import check_integer, check_number
from gradbits.core.errors import ArgumentError
from gradbits.core.noise import NoiseKey
from gradbits.wire.codec import Codec
from gradbits.wire.frame import from_frame, to_frame
from gradbits.wire.registry import codec as find_codec
from gradbits.wire.registry import codecs

PLAIN = ("fp32", "fp16")


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured for one codec.

    Args:
        name: of the codec and its options.
        bits_per_element: of whole frames.
        encode, decode: milliseconds for the gradient.
        encode_gb, decode_gb: GB of float32 a second; infinite where nothing is done.
        error: of one round trip, relative to the norm of the gradient.
        break_even: Gbit/s above which fp32 is faster; infinite where it never is, 0 where it always is.
        steps: predicted milliseconds of a step, one for each link.
    """

    name: str
    bits_per_element: float
    ratio: float
    encode: float
    decode: float
    encode_gb: float
    decode_gb: float
    error: float
    break_even: float
    steps: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be measured.

    Args:
        names: codecs; all where empty.
        bits: bits to try, where a codec has such an option; its default where empty.
        entropy: entropy coders to try, ``"none"`` among them.
        bucket: of the codecs that have buckets; None: their default.
        world: ranks.
        gbps: links, Gbit/s.
        repeats: rounds.
        clock: ``wall``, or ``cpu`` for processor time.
    """

    names: tuple[str, ...] = ()
    bits: tuple[int, ...] = ()
    entropy: tuple[str, ...] = ("none",)
    bucket: int | None = None
    world: int = 4
    gbps: tuple[float, ...] = (0.1, 1.0, 10.0)
    repeats: int = 5
    clock: str = "wall"

    def __post_init__(self) -> None:
        check_integer(self.world, "world", 2)
        check_integer(self.repeats, "repeats", 1)
        if not self.gbps:
            raise ArgumentError("gbps='': must name at least one link, in Gbit/s")
        for speed in self.gbps:
            check_number(speed, "gbps", 0.0, open_low=True)

    def codecs(self) -> dict[str, Codec]:
        """Return the codecs to measure, by what to call them.

        Raises:
            ArgumentError: an unknown codec, or options that none of them has.
        """
        found: dict[str, Codec] = {}
        for name in self.names or tuple(codecs()):
            known = codecs().get(name)
            legal = {f.name for f in fields(known)} if known is not None else set()
            options: dict[str, Any] = {} if self.bucket is None or "bucket" not in legal else {"bucket": self.bucket}
            for bits in self.bits if "bits" in legal and self.bits else (None,):
                chosen = options if bits is None else {**options, "bits": bits}
                for entropy in self.entropy:
                    coder = None if entropy == "none" else entropy
                    try:
                        plain = find_codec(name, feedback=False, **chosen)
                    except ArgumentError:  # of all codecs, those are meant that have so many bits
                        if self.names or bits is None:
                            raise
                        continue
                    if coder is not None and not plain.has_codes:
                        continue
                    label = name if (used := getattr(plain, "bits", None)) is None else f"{name} {used} bit"
                    found[label if coder is None else f"{label} + {coder}"] = find_codec(
                        plain, entropy=coder, feedback=False
                    )
        had = {getattr(getattr(c, "codec", c), "bits", None) for c in found.values()}
        if unknown := [bits for bits in self.bits if not self.names and bits not in had]:
            raise ArgumentError(f"bits={unknown[0]}: no codec has so many; most have 2 to 8")
        if not found:
            raise ArgumentError(f"entropy={','.join(self.entropy)!r}: none of the codecs has symbols to code")
        return found


@dataclass(kw_only=True)
class _Trial:
    """A codec at work: its pieces, the frames of the last encoding, the values of the last decoding."""

    codec: Codec
    pieces: list[torch.Tensor]
    frames: list[torch.Tensor]
    state: dict[str, torch.Tensor]
    turn: int = 0

    def encode(self) -> None:
        self.turn += 1
        keys = (NoiseKey.of(self.turn, i) for i in range(len(self.pieces)))
        self.frames = [
            to_frame(self.codec.encode(p, key, self.state)) for p, key in zip(self.pieces, keys, strict=True)
        ]

    def decode(self) -> list[torch.Tensor]:
        return [self.codec.decode(from_frame(frame)) for frame in self.frames]


def measure(gradients: Gradients, question: Question, tell: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Return one row per codec, fp32 and fp16 first; all take turns.

    Args:
        gradients: what is encoded: as a whole by codecs with buckets, else parameter by parameter, as in training.
        question: what is measured.
        tell: is told what is being done.
    """
    trials = {}
    for name, codec in question.codecs().items():
        tell(f"{name}: adapting")
        trials[name] = _trial(codec, gradients)
    runs: dict[str, Callable[[], object]] = {}
    half = gradients.values.half()
    runs["fp16 encode"] = gradients.values.half
    runs["fp16 decode"] = half.float
    for name, trial in trials.items():
        runs[f"{name} encode"] = trial.encode
        runs[f"{name} decode"] = trial.decode
    for name, run in runs.items():
        tell(f"{name}: warming up")
        run()
    tell("measuring")
    times = {
        name: sorted(each)[len(each) // 2] for name, each in interleaved(runs, question.repeats, question.clock).items()
    }
    rows = [_row("fp32", 32.0, 0.0, 0.0, 0.0, gradients, question)]
    error = _relative(half.float(), gradients.values)
    rows.append(_row("fp16", 16.0, times["fp16 encode"], times["fp16 decode"], error, gradients, question))
    for name, trial in trials.items():
        bits = 8.0 * sum(f.numel() for f in trial.frames) / gradients.values.numel()
        error = _relative(torch.cat([v.reshape(-1) for v in trial.decode()]), gradients.values)
        rows.append(_row(name, bits, times[f"{name} encode"], times[f"{name} decode"], error, gradients, question))
    return rows


def _trial(codec: Codec, gradients: Gradients) -> _Trial:
    inner: Any = codec
    while hasattr(inner, "codec"):
        inner = inner.codec
    whole = hasattr(inner, "bucket")
    pieces = [gradients.values] if whole else list(gradients.values.split(list(gradients.sizes)))
    state, total = codec.init_state(), None
    for piece in pieces:
        seen = codec.statistics(piece)
        total = seen if total is None else total + seen
    if total is not None and total.numel():
        state = codec.adapt(state, total)
    return _Trial(codec=codec, pieces=pieces, frames=[], state=state)


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    norm = float(wanted.double().norm())
    return float((found - wanted).double().norm()) / norm if norm else 0.0


def _row(
    name: str, bits: float, encode: float, decode: float, error: float, gradients: Gradients, question: Question
) -> Row:
    count, world = gradients.values.numel(), question.world
    sent = 2 * (world - 1) / world * count  # values that a rank sends
    coding = encode + (2 - 1 / world) * decode  # milliseconds
    saved = sent * (32.0 - bits)  # bits

    def speed(milliseconds: float) -> float:
        return 4e-6 * count / milliseconds if milliseconds else math.inf

    return Row(
        name=name,
        bits_per_element=bits,
        ratio=32.0 / bits,
        encode=encode,
        decode=decode,
        encode_gb=speed(encode),
        decode_gb=speed(decode),
        error=error,
        break_even=max(0.0, saved) * 1e-6 / coding if coding else math.inf,
        steps=tuple(1e3 * gradients.compute + coding + sent * bits * 1e-6 / gbps for gbps in question.gbps),
    )


def verdicts(rows: Sequence[Row], question: Question) -> list[str]:
    """Return one sentence per link: which codec is fastest there, or that none helps."""
    found = []
    plain = next(row for row in rows if row.name == "fp32")
    coded = [row for row in rows if row.name not in PLAIN]
    for index, gbps in enumerate(question.gbps):
        best = min(rows, key=lambda row: row.steps[index])
        if best.name in PLAIN:
            other = min(coded, key=lambda row: row.steps[index])
            found.append(
                f"{gbps:g} Gbit/s: too fast for compression to help: a step takes {best.steps[index]:.4g} ms "
                f"with {best.name}, {other.steps[index]:.4g} ms with {other.name}"
            )
        else:
            found.append(
                f"{gbps:g} Gbit/s: {best.name} is fastest, {best.steps[index]:.4g} ms a step, "
                f"{plain.steps[index] / best.steps[index]:.2f} times as fast as fp32"
            )
    return found


def record(rows: Sequence[Row], question: Question, gradients: Gradients, command: str) -> dict[str, Any]:
    """Return everything as JSON values; infinite numbers are null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    made: dict[str, Any] = plain(
        {
            "command": command,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "clock": question.clock,
            "world": question.world,
            "gbps": question.gbps,
            "gradient": {
                "origin": gradients.origin,
                "numel": gradients.values.numel(),
                "compute_ms": 1e3 * gradients.compute,
            },
            "rows": [asdict(row) for row in rows],
            "verdicts": verdicts(rows, question),
        }
    )
    return made
