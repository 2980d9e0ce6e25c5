"""QSGD, TernGrad, NUQSGD, sign, TopK, MinMaxUInt8 and error feedback against the official implementations.

Where a code depends on noise, the stored noise is used. A code may differ only where the noise lies within rounding
errors of the threshold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch

from gradbits.kernels.buckets import bucket_norms, decode_buckets, encode_buckets
from gradbits.wire.bucketed import exponential_magnitudes, uniform_magnitudes, with_mirror
from gradbits.wire.codec import Codec
from gradbits.wire.feedback import ErrorFeedback
from gradbits.wire.methods.minmax_uint8 import MinMaxUInt8
from gradbits.wire.methods.nuqsgd import NUQSGD
from gradbits.wire.methods.onebit import OneBit, Sign
from gradbits.wire.methods.qsgd import QSGD
from gradbits.wire.methods.terngrad import TernGrad
from gradbits.wire.methods.topk import TopK

Arrays = dict[str, torch.Tensor]
Golden = Callable[[str], Arrays]
WHOLE = 1 << 20  # a bucket larger than any of these tensors
NEAR = 1e-5  # of the noise to a threshold: what rounding to float32 may move


def cases(data: Arrays, pattern: str) -> Iterator[re.Match[str]]:
    found = [m for name in data if (m := re.fullmatch(pattern, name))]
    assert found, f"no array matches {pattern}"
    yield from found


def up_in_magnitude(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return the rounding noise v with which "the magnitude goes up where u < p" becomes "the value goes up where"."""
    return torch.where(x < 0, 1 - u, u).float() - 0.5


def stored(data: Arrays, name: str) -> torch.Tensor:
    return (data[name].to(torch.int64).double() + 0.5) / 65536


def close(got: torch.Tensor, want: torch.Tensor, where: torch.Tensor | None = None, name: str = "") -> None:
    """The files' tolerance: 1e-6 of the largest, 1e-5 relative; ``where`` says which elements are compared."""
    got, want = got.double().reshape(-1), want.double().reshape(-1)
    if where is not None:
        assert float((~where).double().mean()) < 0.01, name
        got, want = got[where.reshape(-1)], want[where.reshape(-1)]
    atol = 1e-6 * float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got, want, rtol=1e-5, atol=atol, msg=lambda m: f"{name}: {m}")


def decided(x: torch.Tensor, norms: torch.Tensor, levels: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return where the noise is not within ``NEAR`` of the threshold, nor the value within a rounding of a level."""
    r = (x.double() / norms.double().clamp(min=1e-300)).clamp(-1, 1)
    levels = levels.double()
    j = (torch.bucketize(r, levels, right=True) - 1).clamp(0, levels.numel() - 2)
    p = (r - levels[j]) / (levels[j + 1] - levels[j])
    return (p - v.double() - 0.5).abs() > NEAR


def test_qsgd(golden: Golden) -> None:
    data = golden("grad_compress.npz")
    for m in cases(data, r"(grace/[^/]+)/qsgd_s(\d+)/codes"):
        x, steps, base = data[f"{m[1]}/x"], int(m[2]), m[0].rpartition("/")[0]
        u = stored(data, f"{m[1]}/u_k16").reshape(-1)
        flat = x.reshape(-1)
        norms = bucket_norms(flat, WHOLE, 2.0)
        close(norms, data[f"{base}/norm"])
        # the magnitudes alone, so that any number of steps fits
        bits, grid = steps.bit_length(), torch.arange(steps + 1) / steps
        packed = encode_buckets(flat.abs(), norms, grid, WHOLE, bits, (u - 0.5).float())
        magnitudes = decode_buckets(packed, torch.ones(1), torch.arange(steps + 1.0), WHOLE, bits, flat.numel())
        sure = decided(flat.abs(), norms, grid, u - 0.5)
        assert torch.equal((magnitudes * flat.sign())[sure], data[m[0]].float()[sure]), m[0]
        if bits < 8:
            codec = QSGD(bits=bits + 1, bucket=WHOLE)
            payload = codec.encode(x, up_in_magnitude(x, u.view(x.shape)))
            close(codec.decode(payload), data[f"{base}/deq"], sure, m[0])


def test_terngrad(golden: Golden) -> None:
    data = golden("grad_compress.npz")
    for m in cases(data, r"(grace/[^/]+)/terngrad/codes"):
        x, u = data[f"{m[1]}/x"], stored(data, f"{m[1]}/u_k16")
        codec = TernGrad(clip=2.5, bucket=WHOLE)
        payload = codec.encode(x, up_in_magnitude(x, u.view(x.shape)))
        scale = data[f"{m[1]}/terngrad/scale"]
        close(payload.parts["norms"], scale)
        sure = ((x.abs().double() / scale.double()).clamp(max=1) - u.view(x.shape)).abs() > NEAR
        close(codec.decode(payload), data[f"{m[1]}/terngrad/deq"], sure, m[0])
        close(codec.decode(payload) / scale, data[m[0]], sure, m[0])


DETERMINISTIC = {"onebit": OneBit(), "efsign": Sign(), "topk0.1": TopK(ratio=0.1)}


def test_deterministic_codecs(golden: Golden) -> None:
    data = golden("grad_compress.npz")
    for name, codec in DETERMINISTIC.items():
        for m in cases(data, rf"(grace/[^/]+)/{re.escape(name)}/deq"):
            close(codec.decode(codec.encode(data[f"{m[1]}/x"])), data[m[0]], name=m[0])
    for m in cases(data, r"(grace/[^/]+)/onebit/mask_neg"):
        payload = OneBit().encode(data[f"{m[1]}/x"])
        means = torch.stack([data[f"{m[1]}/onebit/mean_neg"], data[f"{m[1]}/onebit/mean_pos"]])
        close(payload.parts["values"], means, name=m[0])


def test_minmax_uint8(golden: Golden) -> None:
    data = golden("grad_compress.npz")
    for m in cases(data, r"(bagua/([^/]+))/codes"):
        x, codec = data[f"grace/{m[2]}/x"], MinMaxUInt8()
        payload = codec.encode(x)
        close(payload.parts["ends"][:2], data[f"{m[1]}/minmax"], name=m[0])
        # where max * scale lies on a half, their code of the least value is -1 and wraps round to 255; ours stays at 0
        got, want = payload.parts["codes"], data[m[0]].reshape(-1)
        wrapped = (x.reshape(-1) == x.min()) & (got == 0) & (want == 255)
        assert torch.equal(got[~wrapped], want[~wrapped]), m[0]
        kept = ~wrapped.view(x.shape)
        close(codec.decode(payload)[kept], data[f"{m[1]}/deq"][kept], name=m[0])


def test_mean_and_variance(golden: Golden) -> None:
    data, runs, theirs = golden("grad_compress.npz"), 1000, 4000
    for m in cases(data, r"(grace/[^/]+)/(qsgd_s7|terngrad)/mc_err_mean"):
        x = data[f"{m[1]}/x"]
        size = x.numel()
        codec = QSGD(bits=4, bucket=size) if m[2] == "qsgd_s7" else TernGrad(clip=2.5, bucket=size)
        torch.manual_seed(0)
        drawn = codec.decode(codec.encode(x.reshape(-1).repeat(runs)))  # every run is a bucket
        errors = drawn.view(runs, *x.shape).double() - x
        variance = data[m[0].replace("err_mean", "var")].double()
        scale = variance.sum().sqrt() * 1e-4
        limit = 5 * (torch.maximum(variance, errors.var(0)) * (1 / runs + 1 / theirs)).sqrt() + scale
        assert bool(((errors.mean(0) - data[m[0]]).abs() <= limit).all()), m[0]
        assert abs(float(errors.var(0).sum() / variance.sum()) - 1) < 0.1, m[0]


def feedback_codec(name: str) -> tuple[Codec, str]:
    """Return the codec of a trace and the kind of its inner codec."""
    kind, *options = name.split("_")
    if kind == "qsgd":
        kind = f"{kind}_{options.pop(0)}"
    numbers = {re.match(r"[a-z]+", o)[0]: float(re.search(r"[\d.]+", o)[0]) for o in options}
    inner: Codec
    if kind.startswith("qsgd"):
        inner = QSGD(bits=int(kind[6:]).bit_length() + 1, bucket=WHOLE)
    elif kind == "terngrad":
        inner = TernGrad(clip=2.5, bucket=WHOLE)
    else:
        inner = DETERMINISTIC[kind]
    gamma = numbers.get("gamma", numbers.get("lr", 1.0))
    return ErrorFeedback(codec=inner, beta=numbers.get("beta", 1.0), gamma=gamma), kind


def test_error_feedback(golden: Golden) -> None:
    """Theirs leaves both factors out at the first step; here they hold from the first step on."""
    data = golden("grad_compress.npz")
    gradients, noise = data["ef/grads"], stored(data, "ef/u_k16")
    for m in cases(data, r"ef/([^/]+)/compensated"):
        codec, kind = feedback_codec(m[1])
        assert isinstance(codec, ErrorFeedback)
        state = codec.init_state()
        for step, gradient in enumerate(gradients):
            given = gradient / codec.gamma if step == 0 else gradient
            want = {part: data[f"ef/{m[1]}/{part}"][step] for part in ("compensated", "sent", "residual")}
            values = codec.compensate(given, state)
            peak = float(want["compensated"].abs().max())
            torch.testing.assert_close(values, want["compensated"], rtol=1e-4, atol=1e-6 * peak)
            v = up_in_magnitude(values, noise[step])
            sent = codec.decode(codec.encode(given, v, state))
            torch.testing.assert_close(sent, want["sent"], rtol=1e-4, atol=1e-6 * peak, msg=f"{m[1]} {step} {kind}")
            torch.testing.assert_close(state["residual"], want["residual"], rtol=1e-4, atol=2e-6 * peak)


def test_level_sets(golden: Golden) -> None:
    data = golden("grad_compress.npz")
    for m in cases(data, r"nuq/levels_uniform_b(\d+)"):
        close(QSGD(bits=int(m[1]), layout="signed").levels(), data[m[0]])
    for m in cases(data, r"nuq/levels_exp_b(\d+)_p([\d.]+)"):
        levels = NUQSGD(bits=int(m[1]), layout="signed", p=float(m[2])).levels().double()
        torch.testing.assert_close(levels, data[m[0]].double(), rtol=1e-5, atol=0.0)


def test_nuqsgd_of_one_draw(golden: Golden) -> None:
    """``qdqL2``: up where v + u gap > l_up, so its noise is ours turned round."""
    data = golden("grad_compress.npz")
    x, u = data["nuq/x64"], stored(data, "nuq/u_k16")
    for m in cases(data, r"nuq/qdqL2_(uniform|exp)(?:_p([\d.]+))?_b(\d+)_bucket(\d+)/deq64"):
        bits, bucket = int(m[3]), int(m[4])
        magnitudes = (
            uniform_magnitudes(bits, "signed")
            if m[1] == "uniform"
            else exponential_magnitudes(bits, "signed", float(m[2]))
        )
        levels = with_mirror(magnitudes, "signed").float()
        norms = bucket_norms(x.float(), bucket, 2.0)
        v = (0.5 - u).float()
        codes = encode_buckets(x.float(), norms, levels, bucket, bits, v)
        got = decode_buckets(codes, norms, levels, bucket, bits, x.numel())
        spread = norms.repeat_interleave(bucket)[: x.numel()]
        close(got, data[m[0]], decided(x, spread, levels, v), m[0])


def test_nuqsgd_with_many_buckets(golden: Golden) -> None:
    """Theirs divides by the norm + 1e-7 and multiplies by the norm, which biases small buckets; ours does not."""
    data = golden("grad_compress.npz")
    x = data["nuq/mb/x"]
    u = data["nuq/mb/r"].double() / 1e6
    codecs = {
        "q": lambda **o: QSGD(layout="signed", **o),
        "nuq": lambda **o: NUQSGD(layout="signed", **o),
        "qinf": lambda **o: QSGD(layout="signed", norm="linf", **o),
    }
    for m in cases(data, r"nuq/mb/(q|nuq|qinf)_b(\d+)_bucket(\d+)/deq"):
        codec = codecs[m[1]](bits=int(m[2]), bucket=int(m[3]))
        v = (0.5 - u).float()
        payload = codec.encode(x, v)
        spread = payload.parts["norms"].repeat_interleave(codec.bucket)[: x.numel()]
        sure = decided(x, spread, codec.levels(), v)
        sure &= decided(x, spread + 1e-7, codec.levels(), v)
        close(codec.decode(payload), data[m[0]], sure, m[0])
