"""The straight-through family and stochastic neurons: exact enumeration, golden numbers, and what is refused.

z-tests have fixed seeds and fail a right implementation with a probability below 1e-6 on a fresh one.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import gradbits as gb
from gradbits.core.errors import ArgumentError, DtypeError
from gradbits.nn.reinforce import reinforce_gradient
from gradbits.nn.stochastic import bernoulli, firing_probability
from gradbits.quantizers.estimators import STE, ClippedSTE, HardSigmoidSTE, SigmoidSTE
from gradbits.quantizers.ewgs import EWGS
from gradbits.quantizers.grids import Symmetric
from gradbits.quantizers.lsq import LSQ
from gradbits.quantizers.quantizer import Quantizer
from gradbits.recipes import Output

FAMILY = [STE(), ClippedSTE(), SigmoidSTE(), HardSigmoidSTE()]
D = torch.float64


def gradient(layer, a, g=None):
    a = a.clone().requires_grad_()
    h = layer(a)
    h.backward(torch.ones_like(h) if g is None else g)
    return a.grad


def outcomes(p: torch.Tensor):
    """Every outcome of independent units [n] with its probability."""
    for bits in itertools.product((0.0, 1.0), repeat=p.numel()):
        h = torch.tensor(bits, dtype=D)
        yield h, float(torch.where(h > 0, p, 1 - p).prod())


# REINFORCE, by exact enumeration


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("baseline", [0.0, 1.7, "best"])
def test_reinforce_is_unbiased_exactly(n, baseline):
    torch.manual_seed(n)
    a, c = torch.randn(n, dtype=D), torch.randn(n, n, dtype=D)

    def loss(h):
        return (h @ c @ h + c[0] @ h).square() + h.sum()

    p = a.clone().requires_grad_()
    s = torch.sigmoid(a)
    fires = torch.sigmoid(p)
    expected = sum(torch.where(h > 0, fires, 1 - fires).prod() * loss(h) for h, _ in outcomes(s))
    (want,) = torch.autograd.grad(expected, p)
    if baseline == "best":
        top = sum(w * (h - s).square() * loss(h) for h, w in outcomes(s))
        baseline = top / sum(w * (h - s).square() for h, w in outcomes(s))
    got = sum(w * reinforce_gradient(h[None], s[None], loss(h)[None], baseline)[0] for h, w in outcomes(s))
    assert torch.allclose(got, want, rtol=0, atol=1e-12)


def test_one_unit_with_its_best_baseline_has_no_variance():
    a = torch.tensor(0.4, dtype=D)
    p = torch.sigmoid(a)
    assert float(p) == pytest.approx(0.598687660112452, abs=1e-15)
    high, low = 3.0, -1.0
    best = (1 - p) * high + p * low
    assert float(best) == pytest.approx(0.605249359550192, abs=1e-14)
    for h, loss in ((1.0, high), (0.0, low)):
        got = reinforce_gradient(torch.tensor([[h]], dtype=D), p.view(1, 1), torch.tensor([loss], dtype=D), best)
        assert float(got) == pytest.approx(0.9610429829661166, abs=1e-14)


def test_the_variance_is_least_at_the_best_baseline():
    p = torch.tensor([0.3, 0.8], dtype=D)

    def loss(h):
        return (h[0] + 2 * h[1] - 1.3).square()

    def variance(baseline: float) -> float:
        values = [
            (w, float(reinforce_gradient(h[None], p[None], loss(h)[None], baseline)[0, 0])) for h, w in outcomes(p)
        ]
        mean = sum(w * v for w, v in values)
        return sum(w * (v - mean) ** 2 for w, v in values)

    top = sum(w * float((h[0] - p[0]) ** 2 * loss(h)) for h, w in outcomes(p))
    best = top / sum(w * float((h[0] - p[0]) ** 2) for h, w in outcomes(p))
    assert best == pytest.approx(1.85, abs=1e-12)
    for baseline, want in ((best, 0.198912), (0.0, 0.917637), (1.21, 0.284928), (1.95, 0.201012), (1.75, 0.201012)):
        assert variance(baseline) == pytest.approx(want, abs=1e-6)


def test_the_running_baseline_is_per_unit_and_renewed_after_use():
    torch.manual_seed(0)
    neuron = gb.nn.ReinforceNeuron(2, decay=0.5)
    a = torch.tensor([[0.4, -1.0]]).repeat(6, 1).requires_grad_()
    losses = torch.randn(6)
    h, p = neuron(a), torch.sigmoid(a.detach())
    (grad,) = torch.autograd.grad(neuron.term(losses), a)
    assert torch.allclose(grad, (h - p) * losses[:, None] / 6)  # the first baseline is 0, whatever this batch says
    square = (h - p).square()
    want = (square * losses[:, None]).mean(0) / square.mean(0)
    assert torch.allclose(neuron.current_baseline(), want, rtol=1e-5)
    before = neuron.current_baseline()
    h = neuron(a)
    (grad,) = torch.autograd.grad(neuron.term(losses), a)
    assert torch.allclose(grad, (h - p) * (losses[:, None] - before) / 6, rtol=1e-5, atol=1e-7)
    assert not torch.equal(neuron.current_baseline(), before)


def test_the_running_baseline_finds_the_best_one():
    torch.manual_seed(0)
    neuron = gb.nn.ReinforceNeuron(1, decay=0.0)
    a = torch.full((40_000, 1), 0.4, requires_grad=True)
    h = neuron(a)
    neuron.term(torch.where(h[:, 0] > 0, 3.0, -1.0))
    assert float(neuron.current_baseline()) == pytest.approx(0.605249, abs=0.05)


def test_the_term_has_no_value_and_is_used_once():
    neuron = gb.nn.ReinforceNeuron(3)
    a = torch.zeros(4, 3, requires_grad=True)
    neuron(a)
    assert neuron.term(torch.arange(4.0)).item() == 0.0
    with pytest.raises(ArgumentError, match="no forward pass"):
        neuron.term(torch.arange(4.0))
    neuron.eval()
    neuron(a)
    with pytest.raises(ArgumentError, match="no forward pass"):
        neuron.term(torch.arange(4.0))


def test_a_loss_that_is_not_finite_does_not_reach_the_baseline():
    torch.manual_seed(0)
    neuron = gb.nn.ReinforceNeuron(2)
    a = torch.zeros(4, 2, requires_grad=True)
    neuron(a)
    neuron.term(torch.ones(4))
    before = neuron.current_baseline()
    neuron(a)
    neuron.term(torch.tensor([1.0, float("nan"), 1.0, 1.0]))
    assert torch.equal(neuron.current_baseline(), before)


def test_the_baseline_travels_in_the_state_dict():
    neuron, other = gb.nn.ReinforceNeuron(2), gb.nn.ReinforceNeuron(2)
    neuron(torch.zeros(4, 2))
    neuron.term(torch.ones(4))
    other.load_state_dict(neuron.state_dict())
    assert torch.equal(other.current_baseline(), neuron.current_baseline())


# the straight-through family


def test_estimators_of_a_linear_loss():
    a = torch.linspace(-3, 3, 13, dtype=D)
    p = torch.sigmoid(a)
    c = torch.full_like(a, 1.7)
    neuron = {type(e): gb.nn.BinaryNeuron("sigmoid", e) for e in FAMILY}
    assert torch.allclose(gradient(neuron[SigmoidSTE], a, c), 1.7 * p * (1 - p), rtol=1e-12)  # exact
    assert torch.equal(gradient(neuron[STE], a, c), c)
    assert bool((gradient(neuron[STE], a, c) / gradient(neuron[SigmoidSTE], a, c) >= 4.0 - 1e-9).all())
    hard = gb.nn.BinaryNeuron("hard_sigmoid", HardSigmoidSTE())
    want = torch.where(a.abs() < 1, 0.85, 0.0).to(D)
    assert torch.allclose(gradient(hard, a, c), want)


def test_identity_has_the_sign_of_the_true_gradient_for_a_monotone_loss():
    for slope in (2.0, -0.3):
        a = torch.randn(50, dtype=D)
        p = torch.sigmoid(a)
        got = gradient(gb.nn.BinaryNeuron("sigmoid"), a, torch.full_like(a, slope))
        assert torch.equal(got.sign(), (slope * p * (1 - p)).sign())


@pytest.mark.parametrize("ends", [True, False])
def test_the_clip_mask_and_its_ends(ends):
    a = torch.tensor([-2.1, -2.0, -1.0, 0.0, 2.0, 2.5])
    got = gradient(gb.nn.BinaryNeuron(estimator=ClippedSTE(limit=2.0, ends=ends)), a, torch.full_like(a, 3.0))
    end = 3.0 if ends else 0.0
    assert got.tolist() == [0.0, end, 3.0, 3.0, end, 0.0]


@pytest.mark.parametrize("estimator", FAMILY, ids=lambda e: type(e).__name__)
def test_estimators_serve_any_quantizer_and_layer(estimator):
    torch.manual_seed(0)
    x, g = torch.randn(6, 8) * 1.5, torch.randn(6, 8)
    q = Quantizer(grid=Symmetric(bits=4), estimator=estimator)
    limits = (x.new_full((), -torch.inf), x.new_full((), torch.inf))
    factor = estimator.mask(x, *limits)
    want = g if factor is None else g * factor
    leaf = x.clone().requires_grad_()
    q.fake_quantize(leaf).backward(g)
    assert torch.allclose(leaf.grad, want)
    recipe = gb.Recipe(name="mine", output=Output(input=q, weight=Quantizer()))
    layer = torch.nn.Linear(8, 8, bias=False)
    torch.nn.init.eye_(layer.weight)
    gb.quantize_(layer, recipe)
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(g)
    assert torch.allclose(leaf.grad, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, D])
@pytest.mark.parametrize("estimator", FAMILY, ids=lambda e: type(e).__name__)
def test_dtypes(dtype, estimator):
    a = torch.tensor([-14.0, -0.5, 0.5, 14.0], dtype=dtype)
    grad = gradient(gb.nn.BinaryNeuron("threshold", estimator), a)
    assert grad.dtype == dtype
    assert bool(torch.isfinite(grad).all())
    if isinstance(estimator, SigmoidSTE):  # in half precision 1 - sigma(14) alone would be 0
        assert float(grad[3]) == pytest.approx(8.3e-7, rel=0.2)


# stochastic neurons


@pytest.mark.parametrize("fires", ["sigmoid", "hard_sigmoid"])
def test_units_fire_with_their_probability(fires):
    torch.manual_seed(0)
    a, count = torch.tensor([-3.0, -0.9, 0.0, 0.4, 2.0]), 40_000
    h = gb.nn.BinaryNeuron(fires)(a.expand(count, 5))
    assert set(h.unique().tolist()) == {0.0, 1.0}
    p = firing_probability(a, fires)
    z = (h.mean(0) - p).abs() / (p * (1 - p) / count).sqrt().clamp(min=1e-9)
    assert float(z.max()) < 5.3


def test_codomains_and_evaluation():
    torch.manual_seed(0)
    a = torch.randn(2000)
    sts = gb.nn.StochasticTimesSmooth()
    root = torch.sigmoid(a).sqrt()
    h = sts(a)
    assert bool(((h == 0) | torch.isclose(h, root)).all())
    assert float(gb.nn.NoisyRectifier()(a).min()) == 0.0
    threshold = (a > 0).float()
    assert torch.equal(gb.nn.BinaryNeuron()(a), threshold)
    assert gb.nn.BinaryNeuron()(torch.zeros(1)).item() == 0.0
    for layer in (gb.nn.BinaryNeuron("sigmoid"), gb.nn.ReinforceNeuron(1)):
        assert torch.equal(layer.eval()(a[:, None]), threshold[:, None])
    assert torch.allclose(sts.eval()(a), torch.sigmoid(a))
    assert torch.equal(gb.nn.NoisyRectifier().eval()(a), a.relu())


def test_stochastic_times_smooth_has_the_right_mean_and_derivative():
    torch.manual_seed(0)
    value, count = 0.7, 40_000
    a = torch.full((count,), value, dtype=D, requires_grad=True)
    h = gb.nn.StochasticTimesSmooth()(a)
    p = 1 / (1 + math.exp(-value))
    assert math.sqrt(p) * math.sqrt(p) == pytest.approx(p)  # exact expectation
    deviation = math.sqrt(p * (math.sqrt(p) - p) / count)
    assert abs(float(h.detach().mean()) - p) < 5.3 * deviation
    h.sum().backward()
    want = torch.where(h > 0, math.sqrt(p) * (1 - p) / 2, 0.0).to(D)
    assert torch.allclose(a.grad, want, rtol=1e-9)


def test_stochastic_times_smooth_far_from_zero():
    a = torch.tensor([-200.0, 200.0], requires_grad=True)
    gb.nn.StochasticTimesSmooth()(a).sum().backward()
    assert bool(torch.isfinite(a.grad).all())


def test_logistic_noise_makes_the_rectifier_a_softplus_on_average():
    torch.manual_seed(0)
    count = 200_000
    a = torch.full((count,), 0.4, requires_grad=True)
    h = gb.nn.NoisyRectifier("logistic")(a)
    h.sum().backward()
    p = 0.598687660112452
    assert abs(float((h > 0).float().mean()) - p) < 5.3 * math.sqrt(p * (1 - p) / count)
    assert float(h.detach().mean()) == pytest.approx(0.9130, abs=5.3 * float(h.detach().std()) / math.sqrt(count))
    assert torch.equal(a.grad, (h > 0).float())  # pathwise


@pytest.mark.parametrize(
    "layer",
    [gb.nn.BinaryNeuron("sigmoid"), gb.nn.ReinforceNeuron(8), gb.nn.StochasticTimesSmooth(), gb.nn.NoisyRectifier()],
    ids=lambda m: type(m).__name__,
)
def test_the_seed_decides(layer):
    a = torch.randn(16, 8)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(layer(a))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    layer.generator = torch.Generator().manual_seed(5)
    first = layer(a)
    layer.generator.manual_seed(5)
    assert torch.equal(layer(a), first)
    layer.generator = None


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0)])
def test_degenerate_shapes(shape):
    a = torch.zeros(shape, requires_grad=True)
    for layer in (gb.nn.BinaryNeuron("sigmoid"), gb.nn.StochasticTimesSmooth(), gb.nn.NoisyRectifier()):
        h = layer(a)
        assert h.shape == a.shape
        (grad,) = torch.autograd.grad(h, a, torch.ones_like(h))
        assert grad.shape == a.shape


def test_nan_is_seen():
    a = torch.tensor([float("nan"), 1.0])
    binary = (gb.nn.BinaryNeuron(), gb.nn.BinaryNeuron("sigmoid"))
    for layer in (*binary, gb.nn.StochasticTimesSmooth(), gb.nn.NoisyRectifier()):
        assert bool(torch.isnan(layer(a)[0])), layer


# what is refused


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_limits_and_temperatures_that_are_none(value):
    for estimator, name in ((ClippedSTE, "limit"), (SigmoidSTE, "temperature"), (HardSigmoidSTE, "temperature")):
        with pytest.raises(ArgumentError, match=name):
            estimator(**{name: value})


def test_refusals():
    for p in (-0.1, 1.1):
        with pytest.raises(ArgumentError, match="probability"):
            bernoulli(torch.tensor([p]))
    for make, what in (
        (lambda: gb.nn.BinaryNeuron("often"), "fires"),
        (lambda: gb.nn.BinaryNeuron(estimator=LSQ()), "learns"),
        (lambda: gb.nn.NoisyRectifier("uniform"), "noise"),
        (lambda: gb.nn.NoisyRectifier(scale=-1.0), "scale"),
        (lambda: gb.nn.ReinforceNeuron(0), "units"),
        (lambda: gb.nn.ReinforceNeuron(1, "mean"), "baseline"),
        (lambda: gb.nn.ReinforceNeuron(1, float("nan")), "baseline"),
        (lambda: gb.nn.ReinforceNeuron(1, decay=1.0), "decay"),
        (lambda: gb.nn.ReinforceNeuron(1, epsilon=0.0), "epsilon"),
    ):
        with pytest.raises(ArgumentError, match=what):
            make()
    with pytest.raises(DtypeError, match="estimator"):
        gb.nn.BinaryNeuron(estimator="straight")
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(DtypeError, match="a: dtype"):
            gb.nn.BinaryNeuron()(torch.ones(3, dtype=dtype))


def test_losses_must_be_one_for_each_example():
    neuron = gb.nn.ReinforceNeuron(2)
    for losses in (torch.tensor(0.3), torch.ones(3), torch.ones(4, 2)):
        neuron(torch.zeros(4, 2))
        with pytest.raises(ArgumentError, match="loss of each example"):
            neuron.term(losses)
    with pytest.raises(DtypeError, match="losses"):
        neuron.term(0.3)
    with pytest.raises(ArgumentError, match="a: shape"):
        neuron(torch.zeros(4, 3))
    with pytest.raises(ArgumentError, match="baseline"):
        reinforce_gradient(torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), float("inf"))


@pytest.mark.parametrize("estimator", [STE, ClippedSTE, SigmoidSTE, HardSigmoidSTE, LSQ, EWGS])
@pytest.mark.parametrize("value", ["no", 1, None])
def test_clip_is_yes_or_no(estimator, value):
    with pytest.raises(DtypeError, match=f"{estimator.__name__}.clip={value!r}: must be bool"):
        estimator(clip=value)


@pytest.mark.parametrize("estimator", [SigmoidSTE, HardSigmoidSTE])
def test_the_coldest_temperature_gives_no_nan(estimator):
    for value in (1e-300, 9e-31):
        with pytest.raises(ArgumentError, match=f"temperature={value}"):
            estimator(temperature=value)
    x = torch.tensor([-3.0, -1e-30, 0.0, 1e-35, 3.0], requires_grad=True)
    gb.nn.BinaryNeuron("sigmoid", estimator(temperature=1e-30))(x).sum().backward()
    assert bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("x", ArgumentError),
        (float("inf"), ArgumentError),
        (float("nan"), ArgumentError),
        (None, DtypeError),
        (True, DtypeError),
    ],
)
def test_a_baseline_is_a_name_or_a_number(value, error):
    with pytest.raises(error, match=f"baseline={value!r}: must be 'minimum_variance' or a finite number"):
        gb.nn.ReinforceNeuron(4, baseline=value)
