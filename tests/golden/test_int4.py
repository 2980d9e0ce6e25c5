"""4-bit training against the official implementation, for every case the file holds.

The official digits clip at 6 of 7 (``special``) or at 105 of 127.5 (``two_layer``) and are biased; ``BitSplit`` takes
those limits as arguments, so its arithmetic is checked code for code, and its default for what it is: unbiased.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import pytest
import torch

from gradbits.core.grain import PerChannel, PerTensor
from gradbits.core.qtensor import QTensor
from gradbits.nn.matrix_products import LinearProducts
from gradbits.nn.sampling import add_groups, add_rows
from gradbits.quantizers.bit_split import BitSplit
from gradbits.quantizers.grids import Affine, TwosComplement
from gradbits.quantizers.hadamard import HadamardBlocks, hadamard
from gradbits.quantizers.leverage import draw, grouped, row_norms, water_fill
from gradbits.quantizers.lsq import MeanStep, initial_step, learned_step_quantize, step_gradient
from gradbits.quantizers.quantizer import Quantizer
from gradbits.quantizers.ranges import MinMax

PRODUCTS = LinearProducts()
FOUR_BIT = Quantizer(grid=TwosComplement(bits=4), range=MeanStep())
LEVELS = (-8, 7)


@pytest.fixture(scope="module")
def data(golden):
    return golden("int4.npz")


def find(data: Iterable[str], pattern: str) -> list[tuple[str, ...]]:
    """The groups of every array name that matches; a file without any is not what these tests were written for."""
    found = sorted({m.groups() for key in data if (m := re.fullmatch(pattern, key))})
    assert found, f"the file holds nothing like {pattern}"
    return found


def uniform(k: torch.Tensor) -> torch.Tensor:
    return (k.double() + 0.5) / 65536


def noise(k: torch.Tensor) -> torch.Tensor:
    return (uniform(k) - 0.5).float()


def close(got: torch.Tensor, want: torch.Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Equal within the tolerance the data's own description gives."""
    largest = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got.double().reshape(want.shape), want.double(), rtol=rtol, atol=atol * largest)


def same_codes(got: torch.Tensor, want: torch.Tensor, exact: torch.Tensor) -> None:
    """Equal, but for values within float32 of the boundary between two codes."""
    different = got.int() != want.int()
    to_boundary = (exact.double() - torch.floor(exact.double()) - 0.5).abs()
    assert bool((to_boundary[different] < 1e-4).all())


def split(x: torch.Tensor, v: torch.Tensor | None, **options) -> QTensor:
    return Quantizer(grid=BitSplit(bits=4, **options), rounding="stochastic").quantize(x, noise=v)


def test_hadamard_matrix(data):
    for (size,) in find(data, r"hadamard/H(\d+)"):
        close(hadamard(torch.eye(int(size)), int(size)), data[f"hadamard/H{size}"])


def test_learned_steps(data):
    x, g = data["lsq/x"], data["lsq/grad_out"]
    for kind, mode, bits, factor in find(data, r"lsq/(sym|asym)_(layer|row|column)_b(\d+)_mul([\d.]+)/alpha"):
        prefix = f"lsq/{kind}_{mode}_b{bits}_mul{factor}"
        grain = {"layer": PerTensor(), "row": PerChannel(axis=0), "column": PerChannel(axis=1)}[mode]
        half = 1 << (int(bits) - 1)
        levels = (-half, half - 1) if kind == "sym" else (0, 2 * half - 1)
        lowest = x.min() if kind == "asym" else torch.zeros(())
        # the stored step is the initial one times the case's factor
        first = initial_step(x, levels[1], grain) * (2 if kind == "asym" else 1)
        close(first.flatten() * float(factor), data[f"{prefix}/alpha"].flatten())
        step = data[f"{prefix}/alpha"].reshape(grain.scale_shape(x.shape)).clone().requires_grad_()
        values = x.clone().requires_grad_()
        out = learned_step_quantize(values - lowest, step, levels, grain) + lowest
        out.backward(g)
        close(out.detach(), data[f"{prefix}/out"])
        close(values.grad, data[f"{prefix}/grad_x"])
        close(step.grad.flatten(), data[f"{prefix}/grad_alpha"].flatten())


def test_hadamard_linear(data):
    for (size,) in find(data, r"hq/g(\d+)/x"):
        case = {name: data[f"hq/g{size}/{name}"] for name in ("x", "w", "b", "grad_out")}
        g, turn = case["grad_out"], HadamardBlocks(int(size))
        found: dict[str, QTensor] = {}
        for name in ("x", "w"):
            turned = turn.forward(case[name])
            close(turned, data[f"hq/g{size}/h{name}"])
            q = FOUR_BIT.quantize(turned)
            close(q.scale, data[f"hq/g{size}/step_{name}"])
            same_codes(q.codes, data[f"hq/g{size}/q{name}_codes"], turned / q.scale)
            found[name] = QTensor(codes=q.codes, scale=q.scale, bits=4, shape=q.shape, rotation=turn)
        out = PRODUCTS.product("output", found["x"], found["w"], bias=case["b"])
        close(out, data[f"hq/g{size}/out"], atol=1e-5)
        # exact backward products, the step's gradients and the mask in rotated coordinates, then back
        codes = {name: q.codes.float() * q.scale for name, q in found.items()}
        gradients = {"x": g @ codes["w"], "w": g.t() @ codes["x"]}
        for name, other in gradients.items():
            masked, step = step_gradient(turn.forward(case[name]), found[name].scale, other, LEVELS, PerTensor())
            close(turn.inverse(masked), data[f"hq/g{size}/grad_{name}"], rtol=1e-4, atol=1e-5)
            close(step, data[f"hq/g{size}/grad_step_{name}"], rtol=1e-4, atol=1e-4)
        close(g.sum(0), data[f"hq/g{size}/grad_b"], atol=1e-5)


def test_digits_with_the_official_limits(data):
    for (case,) in find(data, r"split/(\w+)/x"):
        prefix = f"split/{case}"
        x, v, stacked = data[f"{prefix}/x"], noise(data[f"{prefix}/u_k16"]), noise(data[f"{prefix}/u2_k16"])
        q = split(x, v, limit=6)
        close(1.0 / q.rest.scale, data[f"{prefix}/special/scale1"])
        t = x / q.rest.scale
        same_codes(q.codes, data[f"{prefix}/special/hi"], t / 14)
        same_codes(q.rest.codes, data[f"{prefix}/special/lo"], t - 14 * q.codes + v)
        for digit, name in ((q, "x1_len"), (q.rest, "x2_len")):
            lengths = row_norms(digit) / digit.scale.double().flatten()
            close(lengths, data[f"{prefix}/special/{name}"])
        q = split(x, stacked[len(x) :], top=127.5)
        close(1.0 / q.rest.scale, data[f"{prefix}/two_layer/scale1"])
        t = x / q.rest.scale
        codes = data[f"{prefix}/two_layer/codes"]
        same_codes(q.codes, codes[: len(x)], t / 14)
        same_codes(q.rest.codes, codes[len(x) :], t - 14 * q.codes + stacked[len(x) :])
        close(torch.cat([d.dequantize() for d in q.digits()]), data[f"{prefix}/two_layer/deq2"])


def two_affine_digits(x: torch.Tensor, v: torch.Tensor) -> QTensor:
    """The official unbiased variant: an affine digit to nearest, another for what it leaves."""
    high = Quantizer(grid=Affine(bits=4, zero="widen"), range=MinMax()).quantize(x)
    low = Quantizer(grid=Affine(bits=4, zero="widen"), range=MinMax(), rounding="stochastic")
    return QTensor(
        codes=high.codes,
        scale=high.scale,
        bits=4,
        shape=x.shape,
        zero_point=high.zero_point,
        rest=low.quantize(x - high.dequantize(), noise=v),
    )


def test_two_affine_digits(data):
    for (case,) in find(data, r"split/(\w+)/two_layer_asym/codes"):
        prefix = f"split/{case}"
        x, v = data[f"{prefix}/x"], noise(data[f"{prefix}/u2_k16"])
        q, codes = two_affine_digits(x, v[len(x) :]), data[f"{prefix}/two_layer_asym/codes"]
        for number, digit in enumerate(q.digits(), 1):  # the official ranges have an epsilon of 1e-8
            close(1.0 / digit.scale, data[f"{prefix}/two_layer_asym/scale{number}"], rtol=1e-4)
        different = torch.cat([d.codes.int() + 8 for d in q.digits()]) != codes.int()
        assert float(different.double().mean()) <= 2e-3
        values = torch.cat([d.dequantize() for d in q.digits()])
        close(values[~different], data[f"{prefix}/two_layer_asym/deq2"][~different], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", ["special", "two_layer"])
def test_official_digits_are_biased_and_ours_are_not(data, variant):
    """Bernstein's inequality for the mean of our draws, false alarm 1e-6 per case; the official mean is far outside."""
    draws = 600
    torch.manual_seed(3)
    for (case,) in find(data, rf"split/(\w+)/{variant}/mc_err_mean"):
        x = data[f"split/{case}/x"]
        top = float(x.abs().max())
        official = float(data[f"split/{case}/{variant}/mc_err_mean"].abs().max())
        assert official > 0.05 * top
        options = {"limit": 6} if variant == "special" else {"top": 127.5}
        ours, reproduced = torch.zeros_like(x), torch.zeros_like(x)
        for _ in range(draws):
            ours += split(x, None).dequantize() - x
            reproduced += split(x, None, **options).dequantize() - x
        step = top / 98
        weight = math.log(2 * x.numel() / 1e-6)
        limit = math.sqrt(2 * step**2 / 4 * weight / draws) + step * weight / (3 * draws)
        assert float((ours / draws).abs().max()) <= limit
        want = data[f"split/{case}/{variant}/mc_err_mean"]
        assert float((reproduced / draws - want).abs().max()) <= 1.5 * limit


def test_moments_of_the_official_digits(data):
    """The variance over our draws agrees in total with the official one, whose limits are given."""
    torch.manual_seed(4)
    for case, variant in find(data, r"split/(\w+)/(special|two_layer|two_layer_asym)/mc_var"):
        x, want = data[f"split/{case}/x"], data[f"split/{case}/{variant}/mc_var"].double()
        make = {
            "special": lambda x: split(x, None, limit=6),
            "two_layer": lambda x: split(x, None, top=127.5),
            "two_layer_asym": lambda x: two_affine_digits(x, torch.rand(x.shape) - 0.5),
        }[variant]
        draws = torch.stack([make(x).dequantize().double() for _ in range(250)])
        assert float(draws.var(0).sum()) == pytest.approx(float(want.sum()), rel=0.05)


def test_leverage_probabilities(data):
    for (case,) in find(data, r"leverage/(\w+)/score"):
        score = data[f"leverage/{case}/score"]
        p = water_fill(score, score.numel() / 2)
        torch.testing.assert_close(p, data[f"leverage/{case}/prob"].double(), rtol=0, atol=1e-6)
        kept = draw(p, uniform(data[f"leverage/{case}/u_k16"]))
        assert kept.nonzero().flatten().tolist() == data[f"leverage/{case}/index"].tolist()


def stacked(q: QTensor) -> torch.Tensor:
    return torch.cat([d.dequantize() for d in q.digits()])


def sampled(data, prefix: str, case: str, q: QTensor) -> None:
    """Probabilities, kept rows and both products of one draw, in integers."""
    x, w = (data[f"lss/{case}/{name}"] for name in ("input", "weight"))
    n = len(x)
    close(stacked(q), data[f"{prefix}/deq2"], rtol=1e-3, atol=1e-4)
    norms = torch.cat([row_norms(d) for d in q.digits()])
    if prefix.endswith("asym"):  # the official affine digits leave 1e-9 where ours are zero, and sample those rows too
        norms = data[f"{prefix}/deq2"].double().norm(dim=1)
    uniforms = {name: uniform(data[f"lss/{case}/u_bern_{name}_k16"]) for name in ("w", "a")}
    p_w = water_fill(norms * x.double().norm(dim=1).repeat(2), n)
    p_a = water_fill(norms, n)
    torch.testing.assert_close(p_w, data[f"{prefix}/prob_w"].double(), rtol=0, atol=2e-6)
    torch.testing.assert_close(p_a, data[f"{prefix}/prob_a"].double(), rtol=0, atol=2e-6)
    kept = draw(p_w, uniforms["w"])
    assert int(kept.sum()) == int(data[f"{prefix}/n_kept_w"])
    # the official operands are floats: rounded to 8 bits they are ours, and the products of the values must agree
    for name, other, chance, add in (("gw", x, p_w, add_groups), ("ga", w, p_a, add_rows)):
        qo = Quantizer().quantize(other)
        keep = draw(chance, uniforms["w" if name == "gw" else "a"])
        shape = torch.Size((q.shape[1], x.shape[1]) if name == "gw" else x.shape)
        got = add(PRODUCTS, q.digits(), qo, chance, keep, shape)
        z = stacked(q).double() * torch.where(keep, 1 / chance, 0.0).unsqueeze(1)
        for dense, want in ((qo.dequantize().double(), got.double()), (other.double(), data[f"{prefix}/{name}_draw"])):
            exact = z.t() @ dense.repeat(2, 1) if name == "gw" else (z[:n] + z[n:]) @ dense
            close(exact, want, rtol=1e-3 if prefix.endswith("asym") else 1e-4, atol=1e-4)


def test_sampled_products(data):
    for (case,) in find(data, r"lss/(\w+)/gw_draw"):
        g, v = data[f"lss/{case}/grad_out"], noise(data[f"lss/{case}/u_sr_k16"])
        sampled(data, f"lss/{case}", case, split(g, v[len(g) :], top=127.5))
    for (case,) in find(data, r"lss/(\w+)/asym/gw_draw"):
        g, v = data[f"lss/{case}/grad_out"], noise(data[f"lss/{case}/u_sr_k16"])
        sampled(data, f"lss/{case}/asym", case, two_affine_digits(g, v[len(g) :]))


def test_sampling_moments(data):
    """Conditional mean and variance: the closed form, for the optimal probabilities and for powers of two."""
    for (case,) in find(data, r"lss/(\w+)/gw_cond_var_exact"):
        prefix = f"lss/{case}"
        x, z = data[f"{prefix}/input"].double(), data[f"{prefix}/deq2"].double()
        p = data[f"{prefix}/prob_w"].double()
        both = x.repeat(2, 1)
        spread = torch.where(p > 0, (1 - p) / p.clamp(min=1e-12), 0.0).unsqueeze(1)
        close((z * spread.sqrt()).square().t() @ both.square(), data[f"{prefix}/gw_cond_var_exact"], rtol=1e-4)
        close(z.t() @ both, data[f"{prefix}/gw_cond_mean_exact"], rtol=1e-4, atol=1e-5)
        scores = z.norm(dim=1) * both.norm(dim=1)
        exact = water_fill(scores, len(x))
        total = float(data[f"{prefix}/gw_cond_var_exact"].double().sum())
        assert float((torch.where(exact > 0, (1 - exact) / exact.clamp(min=1e-12), 0.0) * scores.square()).sum()) == (
            pytest.approx(total, rel=1e-3, abs=1e-12)
        )
        few = grouped(exact, len(x), 7, 2)
        moment = [float((scores.square() / q.clamp(min=1e-12)).sum()) for q in (exact, few)]
        assert moment[1] <= 1.04 * moment[0]
        assert few.unique().numel() <= 16


def test_unbiased_products_of_the_clean_digits(data):
    """Our default over digits and rows: the mean is the unquantized gradient (z-test, false alarm about 1e-5)."""
    torch.manual_seed(8)
    draws = 150
    for (case,) in find(data, r"lss/(\w+)/asym/gw_full_exact"):
        prefix = f"lss/{case}"
        g, x, w = (data[f"{prefix}/{name}"] for name in ("grad_out", "input", "weight"))
        qx, qw, n = Quantizer().quantize(x), Quantizer().quantize(w), len(g)
        drawn: dict[str, list[torch.Tensor]] = {"gw": [], "ga": []}
        for _ in range(draws):
            q = split(g, None)
            norms = torch.cat([row_norms(d) for d in q.digits()])
            p_w = grouped(water_fill(norms * row_norms(qx).repeat(2), n), n, 7, 2)
            p_a = water_fill(norms, n)
            kept = {"gw": draw(p_w, torch.rand(2 * n)), "ga": draw(p_a, torch.rand(2 * n))}
            drawn["gw"].append(add_groups(PRODUCTS, q.digits(), qx, p_w, kept["gw"], w.shape))
            drawn["ga"].append(add_rows(PRODUCTS, q.digits(), qw, p_a, kept["ga"], x.shape))
        for name, dense in (("gw", g.t() @ qx.dequantize()), ("ga", g @ qw.dequantize())):
            stack = torch.stack(drawn[name]).double()
            spread = stack.var(0).div(draws).sqrt()
            spread = spread.clamp(min=float(spread.max()) / 5)
            assert float(((stack.mean(0) - dense.double()).abs() / spread).max()) < 6.0
            # the 8-bit operands of this test are close to the official floats
            close(dense, data[f"{prefix}/asym/{name}_full_exact"], rtol=0.1, atol=0.02)
            official = float(data[f"{prefix}/asym/{name}_full_mc_var"].double().sum())
            # affine digits have 15 steps over [min, max], ours 14 over [-max, max], and lo steps by as much larger
            assert float(stack.var(0).sum()) <= 2.0 * official, (case, name)


def test_official_layer_gradients(data):
    """``special``: sampled grad_input, unsampled grad_weight, both masked, with their step gradients."""
    for (case,) in find(data, r"lss/(\w+)/sp/grad_input"):
        prefix = f"lss/{case}"
        g, x, w = (data[f"{prefix}/{name}"] for name in ("grad_out", "input", "weight"))
        q = split(g, noise(data[f"{prefix}/sp/u_k16"]), limit=6)
        close(1.0 / q.rest.scale, data[f"{prefix}/sp/scale1"])
        qx, qw = FOUR_BIT.quantize(x), FOUR_BIT.quantize(w)
        close(qx.scale, data[f"{prefix}/sp/step_x"])
        close(qw.scale, data[f"{prefix}/sp/step_w"])
        p = water_fill(torch.cat([row_norms(d) for d in q.digits()]), len(x))
        kept = draw(p, uniform(data[f"{prefix}/sp/u_bern_k16"]))
        to_x = add_rows(PRODUCTS, q.digits(), qw, p, kept, x.shape)
        to_w = PRODUCTS.product("grad_weight", q, qx)
        for grad, value, scale, name, step in (
            (to_x, x, qx.scale, "grad_input", "grad_step_x"),
            (to_w, w, qw.scale, "grad_weight_nosample", "grad_step_w_nosample"),
        ):
            masked, of_step = step_gradient(value, scale, grad, LEVELS, PerTensor())
            close(masked, data[f"{prefix}/sp/{name}"], rtol=1e-4, atol=1e-5)
            # a sum that nearly cancels: relative to the size of its terms
            terms = float(grad.abs().sum()) / math.sqrt(value.numel() * 7)
            assert float(of_step) == pytest.approx(float(data[f"{prefix}/sp/{step}"]), rel=1e-3, abs=1e-5 * terms)


def test_half_precision_weight_gradient(data):
    """The official fp16 path, the only one that samples grad_weight."""
    find(data, r"half_gw/(grad_weight)")
    g, codes, ratio = (data[f"half_gw/{name}"] for name in ("grad_out", "q_input", "lsq_w"))
    q = split(g, noise(data["half_gw/u_k16"]), limit=6)
    close(1.0 / q.rest.scale, data["half_gw/scale1"], rtol=2e-3)
    assert torch.equal(q.codes, data["half_gw/hi"])
    different = q.rest.codes != data["half_gw/lo"]
    assert float(different.double().mean()) < 0.02  # fp16 arithmetic
    qx = QTensor(
        codes=codes.to(torch.int8), scale=data["half_gw/step_x"].reshape(1, 1).float(), bits=4, shape=codes.shape
    )
    p = water_fill(torch.cat([row_norms(d) for d in q.digits()]) * row_norms(qx).repeat(2), len(g))
    kept = draw(p, uniform(data["half_gw/u_bern_k16"]))
    grad = add_groups(PRODUCTS, q.digits(), qx, p, kept, ratio.shape)
    masked, step = step_gradient(ratio, torch.ones(1, 1), grad, LEVELS, PerTensor())
    close(masked, data["half_gw/grad_weight"], rtol=5e-3, atol=5e-3)
    terms = float(grad.abs().sum()) / math.sqrt(ratio.numel() * 7)
    assert float(step) == pytest.approx(float(data["half_gw/grad_step_w"]), rel=5e-3, abs=1e-3 * terms)
