"""``gradbits.nn.ScaledDotProductAttention``, in float and in 8 bits, as its user sees it."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradbits as gb
from gradbits.core.errors import ArgumentError, DoubleBackwardError, DtypeError, NonFiniteError, UnsupportedError
from gradbits.nn.twice import twice_differentiable


def attention(**options):
    """Return a model of nothing but quantized attention."""
    net = gb.nn.ScaledDotProductAttention(**options)
    gb.quantize_(net, "int8_dynamic")
    return net


def operands(*lead, length=20, keys=20, width=16, value_width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((length, width), (keys, width), (keys, value_width))
    return [torch.randn(*lead, *size, generator=generator).requires_grad_() for size in sizes]


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


class Block(nn.Module):
    """Self-attention with its projections."""

    def __init__(self, heads: int = 2, width: int = 16) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.qkv, self.attend = nn.Linear(width, 3 * width), gb.nn.ScaledDotProductAttention(causal=True)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = self.qkv(x).view(*x.shape[:2], 3, self.heads, self.width // self.heads)
        y = self.attend(*(part.transpose(1, 2) for part in split.unbind(2)))
        return self.out(y.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"scale": 0.3}])
def test_in_float_it_is_pytorchs(options):
    q, k, v = operands(2, 3)
    y = gb.nn.ScaledDotProductAttention(**options)(q, k, v)
    causal, scale = options.get("causal", False), options.get("scale")
    assert torch.equal(y, F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 2)])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"scale": 0.3}])
def test_values_and_gradients_are_close(lead, options):
    torch.manual_seed(0)
    given_ = operands(*lead, keys=30, value_width=24)
    exact, y = gb.nn.ScaledDotProductAttention(**options)(*given_), attention(**options)(*given_)
    assert (y.shape, y.dtype) == (exact.shape, exact.dtype)
    assert 0 < relative(y, exact) < 0.02
    g = torch.randn_like(y)
    for found, wanted in zip(*(torch.autograd.grad(x, given_, g) for x in (y, exact)), strict=True):
        assert 0 < relative(found, wanted) < 0.06


def test_leading_axes_are_broadcast():
    q, k, v = operands(2, 4)
    one = [x[:, :1] for x in (k, v)]
    torch.manual_seed(0)
    y = attention()(q, *one)
    (grad,) = torch.autograd.grad(y.sum(), k)
    assert torch.equal(y, attention()(q, *(x.expand(-1, 4, -1, -1) for x in one)))
    assert bool((grad[:, 1:] == 0).all())


@pytest.mark.parametrize("sizes", [{"length": 0}, {"keys": 0}, {"width": 0}, {"value_width": 0}])
def test_nothing_to_multiply(sizes):
    """It is what PyTorch makes of it."""
    given_ = operands(2, 3, **sizes)
    y, wanted = attention(scale=1.0)(*given_), gb.nn.ScaledDotProductAttention(scale=1.0)(*given_)
    torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)
    assert [g.shape for g in torch.autograd.grad(y.sum(), given_)] == [x.shape for x in given_]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    given_ = [x.detach().to(dtype).requires_grad_() for x in operands(2, 3)]
    y = attention()(*given_)
    assert y.dtype == dtype
    assert all(g.dtype == dtype for g in torch.autograd.grad(y.sum(), given_))


def test_autocast_gives_its_dtype():
    given_ = operands(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention()(*given_)
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), given_))


def test_seeds_govern_the_noise():
    given_, net = operands(2, 3), attention()

    def gradient(seed):
        torch.manual_seed(seed)
        return torch.autograd.grad(net(*given_).square().sum(), given_)

    first, again, other = gradient(0), gradient(0), gradient(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_evaluation_draws_nothing():
    net = attention().eval()
    before = torch.get_rng_state()
    with torch.no_grad():
        net(*operands(2, 3))
    assert torch.equal(before, torch.get_rng_state())


def test_it_is_the_same_integers_simulated_or_not():
    found = []
    for compute in ("auto", "integer", "simulate"):
        net = gb.nn.ScaledDotProductAttention(causal=True)
        gb.quantize_(net, "int8_dynamic", compute=compute)
        given_ = operands(2, 3)
        torch.manual_seed(0)
        y = net(*given_)
        found.append((y, *torch.autograd.grad(y.square().sum(), given_)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_report_and_rules():
    net = Block()
    assert gb.report(net).left_alone[1].reason == "quantize_ was not asked to"
    row = next(r for r in gb.quantize_(net, "int8_dynamic").rows if r.name == "attend")
    assert (row.kind, row.recipe, row.output) == ("ScaledDotProductAttention", "int8_dynamic", "8×8, 21×8")
    assert str(gb.report(net)).endswith("3 of 3 layers quantized")
    speeds = gb.report(net, (torch.randn(2, 9, 16),))
    assert all(r.speed is not None for r in speeds.rows)
    for rules in (gb.recipe("int8_dynamic", attention=False), {"attend": None, "*": "int8_dynamic"}, "statquant_psq"):
        assert [r.name for r in gb.quantize_(net, rules).left_alone] == ["attend"]
        assert type(net.attend) is gb.nn.ScaledDotProductAttention
    gb.quantize_(net, "int8_dynamic")
    gb.dequantize_(net)
    assert type(net.attend) is gb.nn.ScaledDotProductAttention
    assert "assignment" not in vars(net.attend)


def test_copies_and_files():
    net, x = Block(), torch.randn(2, 9, 16)
    names = list(net.state_dict())
    gb.quantize_(net, "int8_dynamic")
    assert list(net.state_dict()) == names
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    with torch.no_grad():
        wanted = net(x)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant):
    net, x = Block(), torch.randn(2, 9, 16).requires_grad_()
    gb.quantize_(net, "int8_dynamic")
    found = []
    for run in (net, lambda x: checkpoint(net, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        x.grad = None
        run(x).square().sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_what_it_saves_can_be_kept_in_few_bits(bits):
    given_, net = operands(2, 4, length=64, keys=64), attention(causal=True)
    exact = torch.autograd.grad(net(*given_).square().sum(), given_)
    with gb.pack_activations(bits=bits, min_elements=1) as packing:
        y = net(*given_)
    found = torch.autograd.grad(y.square().sum(), given_)
    assert packing.tally.after < packing.tally.before
    for a, b in zip(found, exact, strict=True):
        assert bool(a.isfinite().all())
        assert relative(a, b) < {8: 0.1, 4: 0.6, 2: 8}[bits]


def test_second_derivatives_where_they_were_asked_for():
    net, x = Block(), torch.randn(2, 9, 16).requires_grad_()
    gb.quantize_(net, "int8_dynamic")
    given_ = operands(2, 3)
    with pytest.raises(DoubleBackwardError, match="cannot be differentiated twice"):
        torch.autograd.grad(attention()(*given_).sum(), given_[0], create_graph=True)
    with twice_differentiable(net):
        (g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    g.abs().sum().backward()
    assert all(p.grad is not None for p in net.qkv.parameters())


@pytest.mark.parametrize("lead", [(2,), (2, 3)])
def test_its_output_can_be_changed_in_place(lead):
    given_ = operands(*lead)
    y = attention()(*given_)
    wanted = torch.autograd.grad(2 * attention().eval()(*given_), given_, torch.ones_like(y))
    y.mul_(2)
    y.transpose(-2, -3).flatten(-2).add_(1)
    assert [g.shape for g in torch.autograd.grad(y.sum(), given_)] == [g.shape for g in wanted]


def test_hooks_may_give_back_other_strides():
    given_, net = operands(2, 3), attention()
    found = []
    for unpack in (lambda t: t, lambda t: t.mT.contiguous().mT):
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = net(*given_)
        found.append(torch.autograd.grad(y.square().sum(), given_))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_report_times_calls_by_name_and_of_mixed_dtypes():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = gb.nn.ScaledDotProductAttention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.attend(query=x, value=x.bfloat16(), key=x)

    net = Named()
    gb.quantize_(net, "int8_dynamic")
    assert gb.report(net, (torch.randn(2, 2, 9, 16),)).rows[0].speed is not None


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_what_is_not_a_float(dtype):
    with pytest.raises(DtypeError, match=r"query: dtype .* is not supported"):
        attention()(*(torch.ones(2, 3, 4, 8, dtype=dtype) for _ in range(3)))


def test_sums_that_int32_cannot_hold():
    x = torch.ones(1, 1, 1, 131_072)
    with pytest.raises(ArgumentError, match="at most 131071 terms"):
        attention()(x, x, x)
    with pytest.raises(ArgumentError, match="at most 131071 terms"):
        attention()(x[..., :1], x.mT, x.mT)


def test_second_derivatives_see_the_same_values():
    net, given_ = attention(), operands(2, 3)
    with twice_differentiable(net):
        y = net(*given_)
    assert relative(y, net(*given_)) < 1e-5


@pytest.mark.parametrize("which", range(3))
def test_what_is_not_finite(which):
    given_ = operands(2, 3)
    with torch.no_grad():
        given_[which][0, 0, 0, 0] = math.nan
    assert bool(attention()(*given_)[0, 0].isnan().all())
    net = gb.nn.ScaledDotProductAttention()
    gb.quantize_(net, "int8_dynamic", on_nonfinite="raise")
    with pytest.raises(NonFiniteError, match="an operand of layer '' holds NaN or Inf"):
        net(*given_)
    y = net(*(good := operands(2, 3)))
    with pytest.raises(NonFiniteError, match="gradient of layer ''"):
        torch.autograd.grad(y, good, torch.full_like(y, math.inf))
    gb.quantize_(net, "int8_dynamic", on_nonfinite="skip")
    with pytest.warns(RuntimeWarning, match="its gradients are zero in this step"):
        found = torch.autograd.grad(y := net(*good), good, torch.full_like(y, math.inf))
    assert all(bool((g == 0).all()) for g in found)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"causal": 1}, DtypeError, "causal=1: must be bool"),
        ({"scale": "1"}, DtypeError, "scale='1': must be float or int or None"),
        ({"scale": 0.0}, ArgumentError, "scale=0.0: must be positive and finite, or None"),
        ({"scale": math.nan}, ArgumentError, "must be positive and finite"),
    ],
)
def test_wrong_options(options, error, match):
    with pytest.raises(error, match=match):
        gb.nn.ScaledDotProductAttention(**options)


def test_wrong_operands():
    q, k, v = operands(2, 3)
    for given_ in ((q, k[..., :5], v), (q, k, v[..., :7, :])):
        with pytest.raises(ArgumentError, match="do not fit together"):
            attention()(*given_)
    with pytest.raises(ArgumentError, match=r"query: shape \(4,\) of layer '' must be"):
        attention()(torch.ones(4), k, v)
    with pytest.raises(ArgumentError, match="leading axes"):
        attention()(torch.ones(3, 3, 20, 16), k, v)
    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        torch.func.grad(lambda x: attention()(x, k, v).sum())(q)
    old = pytest.warns(DeprecationWarning, match="deprecated")
    with old, pytest.raises(UnsupportedError, match="cannot be scripted"):
        torch.jit.script(attention())
