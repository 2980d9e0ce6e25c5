"""The shared table of codecs: every codec, alone and wrapped, passes the same checks; adding one is one line here."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from scipy import stats

from gradbits.core.errors import ArgumentError, CorruptDataError, DtypeError, NonFiniteError
from gradbits.core.noise import NoiseKey
from gradbits.wire.codec import Codec, Payload, restore
from gradbits.wire.frame import from_frame, to_frame
from gradbits.wire.registry import codec, codecs, decode

ALARM = 1e-6  # false-alarm rate of one z-test over all its values


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Args:
        name: of the codec.
        error: bound of the relative error of one encoding of normal values.
        bits: bound of the bits per element for 10,000 normal values.
        options: of the codec.
    """

    name: str
    error: float
    bits: float
    options: dict[str, Any] = field(default_factory=dict)

    def codec(self, **options: Any) -> Codec:
        return codec(self.name, **{"feedback": False, **self.options, **options})

    def __str__(self) -> str:
        return "-".join([self.name, *(str(v) for v in self.options.values())])


METHODS = [
    Method("qsgd", 1.6, 4.2),
    Method("qsgd", 0.1, 8.1, {"bits": 8, "layout": "signed"}),
    Method("qsgd", 0.6, 3.2, {"bits": 3, "bucket": 1000, "norm": "linf"}),
    Method("nuqsgd", 0.7, 4.2, {"bucket": 512}),
    Method("nuqsgd", 0.8, 5.4, {"bits": 5, "layout": "signed", "p": 0.6, "bucket": 100}),
    Method("terngrad", 1.9, 2.1),
    Method("terngrad", 1.4, 2.1, {"clip": 2.5}),
    Method("alq", 14.0, 3.1),
    Method("alq", 14.0, 3.2, {"bucket": 500, "norm_less": True}),
    Method("alq", 1.2, 2.6, {"bits": 2, "layout": "magnitude", "norm": "linf", "bucket": 64}),
    Method("alq", 1.2, 4.4, {"bits": 4, "symmetric": False, "bucket": 100}),
    Method("alq_g", 2.0, 3.4, {"bucket": 100}),
    Method("alq_g", 1.4, 3.4, {"bucket": 100, "symmetric": False, "norm_power": 1}),
    Method("amq", 14.0, 3.1),
    Method("amq", 1.2, 4.4, {"bits": 4, "layout": "magnitude", "bucket": 100}),
    Method("minmax_uint8", 0.02, 8.1),
    Method("onebit", 0.7, 1.1),
    Method("sign", 0.7, 1.1),
    Method("log_grid", 0.95, 3.1),
    Method("log_grid", 0.95, 4.1, {"k": 6}),
    Method("uniform_grid", 0.05, 8.1),
    Method("uniform_grid", 0.001, 16.1, {"k": 14}),
    Method("topk", 0.99, 0.7),
    Method("topk", 0.6, 20.0, {"ratio": 0.3}),
]
WRAPPERS: list[dict[str, Any]] = [
    {},
    {"entropy": "zstd"},
    {"entropy": "huffman", "feedback": True},
    {"feedback": True},
]
each_method = pytest.mark.parametrize("method", METHODS, ids=str)


def wrapped() -> list[Any]:
    """Every codec bare, and with every wrapper that it takes."""
    found = []
    for method in METHODS:
        for options in WRAPPERS:
            if method.codec().has_codes or "entropy" not in options:
                found.append(pytest.param(method, options, id=f"{method}-{'-'.join(map(str, options.values()))}"))
    return found


each_wrapped = pytest.mark.parametrize(("method", "options"), wrapped())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300))


def same(a: Payload, b: Payload) -> bool:
    head = ("codec", "shape", "dtype", "bits", "bucket")
    equal = all(getattr(a, name) == getattr(b, name) for name in head) and a.parts.keys() == b.parts.keys()
    return equal and all(torch.equal(a.parts[k], b.parts[k]) and a.parts[k].dtype == b.parts[k].dtype for k in a.parts)


def test_the_table_is_complete() -> None:
    missing = set(codecs()) - {m.name for m in METHODS}
    assert not missing, f"add a line to METHODS for {sorted(missing)}"
    assert len({str(m) for m in METHODS}) == len(METHODS)


@each_wrapped
def test_it_travels_as_json_and_as_frame(method: Method, options: dict[str, Any]) -> None:
    built = method.codec(**options)
    assert Codec.from_json(built.to_json()) == built
    assert built.name == method.name
    x = normal(40, 250)
    payload = built.encode(x, NoiseKey.of(1), built.init_state())
    frame = to_frame(payload)
    assert frame.dtype == torch.uint8
    assert frame.numel() <= payload.nbytes + 256
    back = from_frame(frame)
    assert same(back, payload)
    assert torch.equal(built.decode(back), built.decode(payload))
    assert torch.equal(decode(back), built.decode(payload))


@each_wrapped
def test_error_and_size(method: Method, options: dict[str, Any]) -> None:
    built, x = method.codec(**options), normal(10_000)
    payload = built.encode(x, NoiseKey.of(3))
    assert distance(built.decode(payload), x) < method.error
    assert payload.bits_per_element <= method.bits
    assert payload.nbytes == sum(p.numel() * p.element_size() for p in payload.parts.values())


@each_method
def test_unbiased_where_claimed(method: Method) -> None:
    built, runs = method.codec(), 400
    x = normal(300) * torch.linspace(0.01, 3, 300)
    x[:3] = 0
    sent = torch.stack([built.decode(built.encode(x, NoiseKey.of(i, 5))).double() for i in range(runs)])
    # sums of blocks: one value moves too rarely for its mean to be normal
    sums, truth = sent.view(runs, 10, 30).sum(2), x.double().view(10, 30).sum(1)
    error, deviation = (sums.mean(0) - truth).abs(), sums.std(0)
    z = error / (deviation / runs**0.5).clamp(min=1e-7)
    limit = float(stats.t.isf(ALARM / 2 / z.numel(), runs - 1))
    assert float(z.max()) < limit or not built.unbiased


DEGENERATE: dict[str, torch.Tensor] = {
    "empty": torch.zeros(0),
    "empty rows": torch.zeros(3, 0, 2),
    "0-d": torch.tensor(0.7),
    "one": torch.tensor([-2.0]),
    "zero": torch.zeros(700),
    "constant": torch.full((700,), 0.3),
    "tiny": normal(700) * 1e-30,
    "subnormal": normal(700) * 1e-42,
    "huge": normal(700) * 1e30,
    "largest": torch.tensor([3.4e38, -3.4e38] * 40),
    "one spike": torch.zeros(700).index_fill(0, torch.tensor([5]), -1e4),
    "transposed": normal(20, 35).mT,
    "strided": normal(1400)[::2],
    "expanded": normal(1, 7).expand(100, 7),
    "channels last": normal(2, 3, 4, 5).to(memory_format=torch.channels_last),
}


@each_wrapped
def test_degenerate_input(method: Method, options: dict[str, Any]) -> None:
    for kind, x in DEGENERATE.items():
        check_degenerate(method.codec(**options), x, kind, adapts=not options)


def check_degenerate(built: Codec, x: torch.Tensor, kind: str, adapts: bool) -> None:
    before = x.clone()
    state = built.init_state()
    payload = built.encode(x, NoiseKey.of(2), state)
    y = built.decode(payload)
    assert torch.equal(x, before)
    assert y.shape == x.shape, kind
    assert y.dtype == x.dtype, kind
    assert bool(torch.isfinite(y).all()), kind
    if kind == "zero":
        assert not y.any()
    assert same(from_frame(to_frame(payload)), payload), kind
    assert torch.equal(built.decode(built.encode(x.contiguous(), NoiseKey.of(2))), y), kind
    statistics = built.statistics(x)
    assert bool(torch.isfinite(statistics).all()), kind
    if not adapts:
        return
    adapted = built.adapt(state, statistics)
    again = built.decode(built.encode(x, NoiseKey.of(2), adapted))
    assert bool(torch.isfinite(again).all()), kind


@each_wrapped
def test_other_dtypes(method: Method, options: dict[str, Any]) -> None:
    built = method.codec(**options)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = normal(900).to(dtype)
        got = built.decode(built.encode(x, NoiseKey.of(1)))
        want = built.decode(built.encode(x.float(), NoiseKey.of(1)))
        assert got.dtype == dtype
        assert torch.equal(got, want.to(dtype)), dtype
    large = torch.full((5000,), 60000.0, dtype=torch.float16)
    assert bool(torch.isfinite(built.decode(built.encode(large, NoiseKey.of(1)))).all())


@each_wrapped
def test_what_is_refused(method: Method, options: dict[str, Any]) -> None:
    built, x = method.codec(**options), normal(64)
    state = built.init_state()
    if isinstance(state, dict):
        built.encode(x, NoiseKey.of(0), state)
    before = copy.deepcopy(state)
    for bad in (float("nan"), float("inf"), -float("inf")):
        poisoned = x.clone()
        poisoned[7] = bad
        for call in (lambda p: built.encode(p, None, state), built.statistics):
            with pytest.raises(NonFiniteError, match="x"):
                call(poisoned)
    with pytest.raises(NonFiniteError, match="x"):
        built.encode(torch.tensor([1e300], dtype=torch.float64), None, built.init_state())
    for wrong in (x.int(), x > 0, x.to(torch.complex64), [1.0], None):
        with pytest.raises(DtypeError, match="x"):
            built.encode(wrong, None, state)
        with pytest.raises(DtypeError, match="x"):
            built.statistics(wrong)
    size = built.statistics(x).numel()
    with pytest.raises(ArgumentError, match="statistics"):
        built.adapt(state, torch.zeros(size + 1, dtype=torch.float64))
    with pytest.raises(DtypeError, match="statistics"):
        built.adapt(state, torch.zeros(size))
    if size:
        with pytest.raises(NonFiniteError, match="statistics"):
            built.adapt(state, torch.full((size,), float("nan"), dtype=torch.float64))
    assert state.keys() == before.keys()
    assert all(torch.equal(state[k], before[k]) for k in state)
    with pytest.raises(DtypeError, match="payload"):
        built.decode(b"payload")


@each_wrapped
def test_payloads_of_others_and_damaged_ones(method: Method, options: dict[str, Any]) -> None:
    built, x = method.codec(**options), normal(100)
    payload = built.encode(x, NoiseKey.of(1))
    damaged = [
        Payload(codec="other", shape=payload.shape, dtype=payload.dtype, bits=payload.bits, bucket=payload.bucket,
                parts=payload.parts),
        Payload(codec=payload.codec, shape=torch.Size([10_000_000]), dtype=payload.dtype, bits=payload.bits,
                bucket=payload.bucket, parts=payload.parts),
        Payload(codec=payload.codec, shape=payload.shape, dtype=torch.int64, bits=payload.bits, bucket=payload.bucket,
                parts=payload.parts),
        Payload(codec=payload.codec, shape=payload.shape, dtype=payload.dtype, bits=9, bucket=payload.bucket,
                parts=payload.parts),
    ]  # fmt: skip
    for name, part in payload.parts.items():
        others = {k: v for k, v in payload.parts.items() if k != name}
        for parts in (others, {**others, name: part[:-1]}, {**others, name: part.long()}):
            damaged.append(
                Payload(codec=payload.codec, shape=payload.shape, dtype=payload.dtype, bits=payload.bits,
                        bucket=payload.bucket, parts=parts)
            )  # fmt: skip
        if part.is_floating_point():
            bad = part.clone()
            bad[0] = float("nan")
            damaged.append(
                Payload(codec=payload.codec, shape=payload.shape, dtype=payload.dtype, bits=payload.bits,
                        bucket=payload.bucket, parts={**others, name: bad})
            )  # fmt: skip
    for wrong in damaged:
        with pytest.raises(CorruptDataError):
            built.decode(wrong)
        with pytest.raises(CorruptDataError):
            decode(wrong) if wrong.codec != "other" else built.decode(wrong)


@each_wrapped
def test_the_key_and_the_seed_decide_everything(method: Method, options: dict[str, Any]) -> None:
    built, x = method.codec(**options), normal(3000)
    assert same(built.encode(x, NoiseKey.of(1)), built.encode(x, NoiseKey.of(1)))
    draws = not same(built.encode(x, NoiseKey.of(1)), built.encode(x, NoiseKey.of(2)))
    payloads = []
    for _ in range(2):
        torch.manual_seed(7)
        payloads += [built.encode(x), built.encode(x)]
    assert same(payloads[0], payloads[2])
    assert same(payloads[1], payloads[3])
    assert same(payloads[0], payloads[1]) is not draws
    assert draws or not built.unbiased


@each_wrapped
def test_scale_equivariance(method: Method, options: dict[str, Any]) -> None:
    built, x = method.codec(**options), normal(1200)
    if method.name == "minmax_uint8":
        built = method.codec(**options, eps=0.0)
    y = built.decode(built.encode(x, NoiseKey.of(4)))
    for factor in (0.25, 4096.0, 2.0**-60):
        assert torch.equal(built.decode(built.encode(x * factor, NoiseKey.of(4))), y * factor)


@each_wrapped
def test_states_are_plain_tensors_that_resume(method: Method, options: dict[str, Any]) -> None:
    built = method.codec(**options)
    x = [normal(2500, seed=i) * 0.1 for i in range(4)]
    state = built.adapt(built.init_state(), built.statistics(x[0]))
    built.encode(x[1], NoiseKey.of(1), state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    resumed = torch.load(file, weights_only=True)
    for i in (2, 3):
        assert same(built.encode(x[i], NoiseKey.of(i), state), built.encode(x[i], NoiseKey.of(i), resumed))
    assert state.keys() == resumed.keys()
    assert all(torch.equal(state[k], resumed[k]) for k in state)


@each_method
def test_ranks_find_the_same_state(method: Method) -> None:
    """Statistics add up over ranks; the order of ranks does not matter beyond rounding, equal sums give equal bits."""
    built = method.codec()
    parts = [normal(5000, seed=i) * (0.5 + i) for i in range(3)]
    total = sum(built.statistics(p) for p in parts)
    states = [built.adapt(built.init_state(), total.clone()) for _ in range(2)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    untouched = built.init_state()
    assert built.adapt(untouched, torch.zeros_like(total)) is untouched  # statistics of nothing


@each_method
def test_adapting_lowers_the_error(method: Method) -> None:
    built, x = method.codec(), normal(20_000) * 0.01
    if not built.statistics(x).numel() or (method.options.get("layout") == "magnitude" and built.bits == 2):
        return
    state = built.adapt(built.init_state(), built.statistics(x))
    before = distance(built.decode(built.encode(x, NoiseKey.of(1))), x)
    assert distance(built.decode(built.encode(x, NoiseKey.of(1), state)), x) < before
    assert built.is_due(0)
    assert not built.is_due(1)


def test_values_beyond_a_narrow_dtype_are_clamped() -> None:
    limit = torch.finfo(torch.bfloat16).max
    values = torch.tensor([3.4e38, -3.4e38, 1.0])
    payload = Payload(codec="x", shape=values.shape, dtype=torch.bfloat16)
    assert restore(values, payload).tolist() == [limit, -limit, 1.0]
