r"""Attention in 8 bits: what every backend computes, here with torch operations.

Each head has one scale for each of its queries, keys and values, :math:`Q \approx s_q\,q`. With :math:`c = s_q s_k
\sigma \log_2 e`, row i of the scores :math:`S = q\,k^\top` and its largest entry :math:`m_i`,

.. math:: p_{ij} = \mathrm{round}\big((2^{21} - 1)\, 2^{c (S_{ij} - m_i)}\big), \quad l_i = \sum_j p_{ij}, \quad
    O = \frac{s_v}{l}\, p\, v

Probabilities have 21 bits, three digits of 7: they span orders of magnitude, and many small ones beside a large one, as
thousands of keys that share what one of them leaves, must not round to nothing.
The backward pass takes 32 queries at a time. Their gradient G is rounded stochastically to codes g of one scale
:math:`s_g`, and

.. math:: dP = s_g s_v\, g\, v^\top, \qquad dS_{ij} = \frac{p_{ij}}{l_i} \Big(dP_{ij} - \sum_j \frac{p_{ij}}{l_i}
    dP_{ij}\Big)

dS gets stochastically rounded codes too, of one scale for the 32 queries, and gives the gradients of queries and keys;
:math:`\mathrm{round}(p \cdot \min l / l)` and g give that of the values. All products multiply integers; what is summed
over blocks is summed in float32, from the first to the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from gradbits.core.noise import NoiseKey, noise_bits
from gradbits.kernels.dispatch import INT32_TERMS, Kernel, Request
from gradbits.kernels.quantize import TINY
from gradbits.kernels.reference import int_product

BLOCK = 32  # queries of a block
DIGITS, DIGIT = 3, 7  # of a probability; bits of one
TOP = (1 << DIGITS * DIGIT) - 1  # code of a row's largest probability
NOTHING = 23  # 2^-23 of the largest probability rounds to 0
STEEPEST = 2.0**100  # exponents stay finite where scales are huge
CURVE = (0.01355575, 0.05203237, 0.24137977, 0.69303215, 1.0)  # 2^f for f in [0, 1), within 4e-6
AT_ONCE = 1 << 22  # scores that are in memory at once
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Attended:
    """What attention gives, and what its backward pass needs.

    Args:
        output: [batch, heads, queries, value width], in memory [batch, queries, heads, value width].
        query, key, value: int8 codes [batch * heads, length, width].
        scales: float32 [3, batch * heads], of queries, keys and values; NaN where a head holds NaN or Inf.
        tops: int32 [batch * heads, queries], the largest score of each.
        sums: int64 [batch * heads, queries], the sum of each one's probabilities.
    """

    output: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scales: torch.Tensor
    tops: torch.Tensor
    sums: torch.Tensor

    @property
    def saved(self) -> tuple[torch.Tensor, ...]:
        """What the backward pass needs."""
        return self.query, self.key, self.value, self.scales, self.tops, self.sums


@dataclass(frozen=True)
class Attending:
    """How attention is computed.

    Args:
        causal: whether query i sees keys 0 to i only.
        scale: ``σ``, by which scores are multiplied; positive.
    """

    causal: bool
    scale: float

    @property
    def steepness(self) -> float:
        """``σ log2 e``."""
        return self.scale * math.log2(math.e)

    def hidden(self, queries: range, keys: int, device: torch.device) -> torch.Tensor:
        """Return which keys some queries do not see, bool [queries, keys]."""
        rows = torch.arange(queries.start, queries.stop, device=device).unsqueeze(1)
        return (torch.arange(keys, device=device) > rows) & self.causal


def empty_output(query: torch.Tensor, width: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return room like ``query`` [batch, heads, length, *] for vectors of ``width``; in memory heads follow length."""
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, width, dtype=dtype or query.dtype).transpose(1, 2)


def _codes(x: torch.Tensor, dims: tuple[int, ...], noise: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codes of ``x``, and their scale; one scale for all that lies along ``dims``."""
    widest = x.abs().amax(dims, keepdim=True)
    scale = torch.where(widest < math.inf, widest / 127, math.nan)
    inverse = torch.where(scale >= TINY, scale.reciprocal(), 0.0)
    codes = torch.round(x * inverse + noise).nan_to_num_().clamp_(-127, 127)
    return codes.to(torch.int8).contiguous(), scale


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Return queries, keys or values [..., length, width] as the products see them."""
    codes, scale = _codes(x.detach().float(), (-2, -1), 0.0)
    return (codes * scale).to(x.dtype)


def _digits(p: torch.Tensor) -> list[torch.Tensor]:
    """Return the digits of probabilities, the highest first."""
    return [((p >> DIGIT * i) & ((1 << DIGIT) - 1)).to(torch.int8) for i in reversed(range(DIGITS))]


def _joined(products: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the product of probabilities from those of their digits."""
    first, *others = products
    total = first.float()
    for product in others:
        total = total * float(1 << DIGIT) + product.float()
    return total


def _probabilities(
    scores: torch.Tensor, tops: torch.Tensor, scales: torch.Tensor, how: Attending, hidden: torch.Tensor
) -> torch.Tensor:
    """Return int32 ``p`` for scores [N, queries, keys]."""
    steep = (scales[0] * scales[1]).view(-1, 1, 1) * torch.tensor(how.steepness, dtype=torch.float32).to(scales.device)
    steep = torch.where(steep <= STEEPEST, steep, torch.where(steep.isnan(), 0.0, STEEPEST))
    t = ((scores - tops.unsqueeze(-1)).float() * steep).clamp_(-float(NOTHING), 0)  # above: codes kept in few bits
    whole = (t + float(NOTHING)).to(torch.int32) - NOTHING
    f = t - whole.float()
    power = torch.full_like(f, CURVE[0])
    for coefficient in CURVE[1:]:
        power = power * f + coefficient
    size = ((whole + 127) << 23).view(torch.float32) * float(TOP)
    return torch.round(power * size).to(torch.int32).masked_fill_(hidden, 0)


def _blocks(length: int, step: int) -> Iterator[range]:
    for start in range(0, length, step):
        yield range(start, min(start + step, length))


def _attention(
    product: Product, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: Attending
) -> Attended:
    """Return attention of [batch, heads, length, width]; ``product`` multiplies batches of code matrices."""
    flat = [x.float().reshape(-1, *x.shape[2:]) for x in (query, key, value)]
    (q, sq), (k, sk), (v, sv) = (_codes(x, (1, 2), 0.0) for x in flat)
    scales = torch.stack([sq, sk, sv]).view(3, -1)
    scales = torch.where(scales.isnan().any(0), math.nan, scales)
    heads, length, keys = q.shape[0], q.shape[1], k.shape[1]
    output = empty_output(query, value.shape[-1])
    flat_output = torch.empty(heads, length, v.shape[2], device=q.device)
    tops = torch.empty(heads, length, dtype=torch.int32, device=q.device)
    sums = torch.empty(heads, length, dtype=torch.int64, device=q.device)
    for block in _blocks(length, max(BLOCK, AT_ONCE // (heads * keys))):
        rows, hidden = slice(block.start, block.stop), how.hidden(block, keys, q.device)
        scores = product(q[:, rows], k.mT)
        tops[:, rows] = scores.masked_fill(hidden, torch.iinfo(torch.int32).min).amax(-1)
        p = _probabilities(scores, tops[:, rows], scales, how, hidden)
        sums[:, rows] = p.sum(-1)
        size = scales[2].view(-1, 1) / sums[:, rows].float()
        flat_output[:, rows] = _joined(product(digit, v) for digit in _digits(p)) * size.unsqueeze(-1)
    output.copy_(flat_output.view(output.shape))
    return Attended(output, q, k, v, scales, tops, sums)


def _gradients(
    product: Product,
    g: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    how: Attending,
    noise: tuple[NoiseKey, NoiseKey],
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of queries, keys and values, [batch, heads, length, width] in the dtype of ``g``."""
    q, k, v, scales, tops, sums = saved
    flat = g.float().reshape(-1, *g.shape[2:])
    (heads, length), keys, device = q.shape[:2], k.shape[1], q.device
    sigma = torch.tensor(how.scale, dtype=torch.float32).to(device)
    sq, sk, sv = (s.view(-1, 1, 1) for s in scales)
    along = _noise(noise[0], flat.shape, device)
    across = _noise(noise[1], (heads, keys, length), device).transpose(1, 2)
    dq, dk, dv = (torch.zeros(x.shape, device=device) for x in (q, k, v))
    for block in _blocks(length, BLOCK):
        seen = min(keys, block.stop) if how.causal else keys
        rows, hidden = slice(block.start, block.stop), how.hidden(block, seen, device)
        codes, sg = _codes(flat[:, rows], (1, 2), along[:, rows])
        scores, x = (product(a, b[:, :seen].mT) for a, b in ((q[:, rows], k), (codes, v)))
        p = _probabilities(scores, tops[:, rows], scales, how, hidden)
        total = sums[:, rows].float().unsqueeze(-1)
        mean = (p.long() * x).sum(-1, keepdim=True).float() / total
        slope = (p.float() * (x.float() - mean)) * ((sg * sv) / total)
        ds, sd = _codes(slope, (1, 2), across[:, rows, :seen])
        dq[:, rows] = product(ds, k[:, :seen]).float() * ((sd * sk) * sigma)
        dk[:, :seen] += product(ds.mT, q[:, rows]).float() * ((sd * sq) * sigma)
        least = sums[:, rows].amin(-1).float().view(-1, 1, 1)
        even = torch.round(p.float() * (least / total)).to(torch.int32)
        poison = torch.where(sv.isnan(), sv, sg)
        dv[:, :seen] += _joined(product(digit.mT, codes) for digit in _digits(even)) * (poison / least)
    return tuple(_in_heads(x, g) for x in (dq, dk, dv))


def _in_heads(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Return gradients [batch * heads, length, width] as those of heads, in the dtype of ``g``."""
    heads = x.view(*g.shape[:2], *x.shape[1:])
    return empty_output(heads, x.shape[-1], g.dtype).copy_(heads)


def _noise(key: NoiseKey, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    bits = noise_bits(key, 0, math.prod(shape), device)
    return ((bits.float() + 0.5) * 2.0**-16).view(shape)


def _of_integers(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.stack([int_product(x, y) for x, y in zip(a, b, strict=True)])


def _in_float(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the product of all heads at once, in the narrower float that surely holds its sums."""
    dtype = torch.float32 if a.shape[-1] * 127 * 127 < 1 << 24 else torch.float64
    return (a.to(dtype) @ b.to(dtype)).to(torch.int32)


def kernels() -> tuple[Kernel, ...]:
    """Return attention with products of integers, and simulated in float."""

    def why_not(request: Request) -> str | None:
        return None if request.terms <= INT32_TERMS else f"{request.terms} keys are more than {INT32_TERMS}"

    found = []
    # integers by torch operations are multiplied head by head: as fast as floats on a processor, far slower elsewhere
    for backend, product in (("simulate", _in_float), ("reference", _of_integers)):
        for op, run in (("attention", _attention), ("attention_gradients", _gradients)):
            found.append(Kernel(op, backend, partial(run, product), why_not))
    return tuple(found)
