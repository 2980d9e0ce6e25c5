"""The block Householder quantizer's rotation: one large row shares its size with the small rows of its block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from gradbits.core.checks import check_instance
from gradbits.core.grain import PerRow
from gradbits.core.qtensor import Rotation
from gradbits.quantizers.ranges import State, min_max
from gradbits.quantizers.rotation import RotationRule

CHUNK = 1 << 16  # elements that stay in the cache through all passes
SMALLEST_RATIO = 1e-4  # of the two column scales: followers that are zero would ask for an infinite one


@dataclass(frozen=True)
class HouseholderBlocks:
    r"""A block-diagonal :math:`T = H\,\mathrm{diag}(s)` along one axis, in the order of the rows as they came.

    With :math:`z = s\,x`, a block's leader L and the sum S of its followers' z, H gives the leader
    :math:`(z_L + S)/\sqrt t` and adds :math:`z_L/\sqrt t - \beta S,\ \beta = 1/(t - \sqrt t)`, to every follower: a
    product with T or its inverse takes a few operations per element, and the matrix is never built.

    Args:
        block: int64 number of each row's block, from 0; rows that are alone have the number of blocks.
        leader: int64 index of each block's leader; every other row of the block is a follower.
        root: :math:`1/\sqrt t` of each block.
        beta: ``β`` of each block.
        scale: ``s`` of each row.
        norm: squared norm of each row's column of the inverse.
        axis: the axis whose entries are the rows.
        group: consecutive entries along the axis that make one row: the tokens of one sample.
    """

    block: torch.Tensor
    leader: torch.Tensor
    root: torch.Tensor
    beta: torch.Tensor
    scale: torch.Tensor
    norm: torch.Tensor
    axis: int = 0
    group: int = 1

    @property
    def orthogonal(self) -> bool:
        """False: the rows are scaled before they are reflected."""
        return False

    def along(self, axis: int) -> HouseholderBlocks:
        """Return the same map along another axis."""
        return replace(self, axis=axis)

    def of_group(self, group: int) -> HouseholderBlocks:
        """Return the same map where ``group`` consecutive entries make one row."""
        return replace(self, group=group)

    def _map(self, x: torch.Tensor, inverse: bool) -> torch.Tensor:
        """Return T x or its inverse times x; H is its own inverse."""
        x = x.movedim(self.axis, 0)
        rows = x.reshape(x.shape[0] // self.group, -1)
        y = torch.empty(rows.shape, dtype=torch.float32, device=x.device)
        count = self.leader.numel()
        # followers add to the sum of their block; leaders and rows that are alone to one that nobody reads
        slot = self.block.index_fill(0, self.leader, count)
        root, beta, scale = (value.unsqueeze(1) for value in (self.root, self.beta, self.scale))
        # columns that stay in the cache through all passes: fresh large buffers cost more than the arithmetic
        width = max(CHUNK // max(len(rows), 1), 16) if x.device.type == "cpu" else max(rows.shape[1], 1)
        for start in range(0, rows.shape[1], width):
            z = rows[:, start : start + width].float()
            z = z if inverse else z * scale
            leaders = z.index_select(0, self.leader)
            sums = z.new_zeros(count + 1, z.shape[1]).index_add_(0, slot, z)[:count]
            shift = torch.cat([leaders * root - sums * beta, z.new_zeros(1, z.shape[1])])
            part = shift.index_select(0, self.block).add_(z)
            part.index_copy_(0, self.leader, leaders.add_(sums).mul_(root))
            y[:, start : start + width] = part / scale if inverse else part
        return y.reshape(x.shape).movedim(0, self.axis)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return T x in float32."""
        return self._map(x, inverse=False)

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Return the inverse of T times x in float32."""
        return self._map(x, inverse=True)

    def column_norms(self, x: torch.Tensor) -> torch.Tensor:
        """Return the squared column norms of the inverse of T, to broadcast against ``x``."""
        norms = self.norm.repeat_interleave(self.group) if self.group > 1 else self.norm
        return norms.view(*(1,) * self.axis, -1, *(1,) * (x.dim() - self.axis - 1))


@dataclass(frozen=True)
class Blocks:
    """Which rows share a block.

    Args:
        leader: int64 index of each row's leader.
        size: rows of the block of each row.
        leader_range: range of the block's leader, for each row.
        follower_range: range of the block's first (largest) follower, for each row.
    """

    leader: torch.Tensor
    size: torch.Tensor
    leader_range: torch.Tensor
    follower_range: torch.Tensor


def form_blocks(ranges: torch.Tensor) -> Blocks:
    r"""Give the large rows small ones to share their size with.

    With the ranges sorted, :math:`v_1 \ge \dots \ge v_N`, the number of followers F is the smallest for which the
    smallest leader would be entitled to more than one of them, :math:`F v_{N-F} / \sum_{j \le N-F} v_j > 1`. Leader i
    then takes followers up to the rounded share :math:`\mathrm{round}(F \sum_{j\le i} v_j / \sum_j v_j)`.

    Args:
        ranges: max - min of each row, N of them; values that are not finite count as 0.

    >>> form_blocks(torch.tensor([0.1, 9.0, 0.2, 0.1])).leader.tolist()
    [1, 1, 1, 1]
    """
    v = torch.nan_to_num(ranges.double(), nan=0.0, posinf=0.0, neginf=0.0)
    count, device = v.numel(), v.device
    v, order = torch.sort(v, descending=True, stable=True)
    prefix = v.cumsum(0)
    followers = torch.arange(1, count, device=device)
    entitled = followers * v[count - 1 - followers] > prefix[count - 1 - followers]
    # the condition holds from its first F on; at F = N - 1 one leader is left, which ends the search in any case
    chosen = (entitled.logical_not().sum() + 1).clamp(max=count - 1)
    leaders = count - chosen
    rank = torch.arange(count, device=device)
    is_leader = rank < leaders
    whole = prefix.gather(0, (leaders - 1).view(1))
    share = torch.where(whole > 0, prefix / whole, (rank + 1) / leaders)
    # halves round up; the last leader takes what is left whatever the rounding
    taken = torch.floor(share * chosen + 0.5).clamp(max=chosen)
    taken = torch.where(rank >= leaders - 1, chosen, taken).to(torch.int64)
    position = torch.where(is_leader, rank, torch.searchsorted(taken, rank - leaders, right=True))
    before = torch.where(position > 0, taken[(position - 1).clamp(min=0)], 0)
    size = 1 + taken[position] - before
    first = (leaders + before).clamp(max=count - 1)
    back = torch.empty_like(order).scatter_(0, order, rank)
    return Blocks(order[position][back], size[back], v[position][back], v[first][back])


def reflections(blocks: Blocks) -> HouseholderBlocks:
    r"""Return T for given blocks.

    The reflection H of a block of t rows sends :math:`e_1` to :math:`1/\sqrt t`. The rows are scaled first, the leader
    by :math:`s_1 \propto w_1^{-1/3}` and the followers by :math:`s_2 \propto (w_2/(t-1))^{-1/3}`, with
    :math:`w_1 = v_1/\sqrt t` and :math:`w_2 = v_2 \max|H|`: among all scalings that keep the rows of T x within one
    range, these make the variance least.
    """
    rows = torch.arange(blocks.size.numel(), device=blocks.size.device)
    leads = blocks.leader == rows
    alone = blocks.size < 2
    leader = (leads & ~alone).nonzero().flatten()
    number = torch.full_like(rows, leader.numel())
    number[leader] = rows[: leader.numel()]
    t = blocks.size.double().clamp(min=2.0)
    root, beta = t.rsqrt(), 1.0 / (t - t.sqrt())
    largest = torch.maximum(root, torch.maximum((1.0 - beta).abs(), torch.where(t > 2, beta, 0.0)))
    w1, w2 = blocks.leader_range * root, blocks.follower_range * largest
    cube = torch.where(w1 > 0, w2 / ((t - 1.0) * w1), 1.0)
    ratio = cube.pow(1.0 / 3.0).clamp(min=SMALLEST_RATIO)  # s1 / s2
    s1, s2 = (1.0 + ratio * ratio).sqrt(), (1.0 + 1.0 / (ratio * ratio)).sqrt()
    norm = 1.0 / (t * s1 * s1) + (1.0 - 1.0 / t) / (s2 * s2)
    return HouseholderBlocks(
        block=number[blocks.leader],
        leader=leader,
        root=root[leader].float(),
        beta=beta[leader].float(),
        scale=torch.where(alone, 1.0, torch.where(leads, s1, s2)).float(),
        norm=torch.where(alone, 1.0, norm).float(),
    )


def _row_ranges(x: torch.Tensor) -> torch.Tensor:
    low, high = min_max(x, PerRow())
    return (high - low).flatten()


@dataclass(frozen=True, kw_only=True)
class Householder(RotationRule):
    r"""The block Householder transform of BHQ: :math:`\hat G = T^{-1}(Q(T G))` with one scale per row of T G.

    Unbiased for stochastic rounding, with variance at most

    .. math:: \tfrac{D}{4}\sum_i \big(R((TG)_i)/B\big)^2\,|T^{-1}_{:,i}|^2

    which is t times below a scale per row when one large row leads a block of t.

    Args:
        fallback: whether blocks whose bound is not below that of a scale per row (PSQ) stay as they were.

    References:
        Chen et al., A Statistical Framework for Low-bitwidth Training of Deep Neural Networks, NeurIPS 2020,
        arXiv:2010.14298.

    >>> x = torch.tensor([[8.0, -8.0], [0.1, 0.0], [0.0, 0.1], [0.1, 0.1]])
    >>> y, turn = Householder().apply(x, 0, 4, {})
    >>> bool((turn.inverse(y) - x).abs().max() < 1e-5), bool(y.abs().max() < 5.0)
    (True, True)
    """

    axis: ClassVar[int] = 0
    orthogonal: ClassVar[bool] = False

    fallback: bool = True

    def __post_init__(self) -> None:
        check_instance(self.fallback, "Householder.fallback", bool)

    def apply(self, x: torch.Tensor, axis: int, bits: int, state: State) -> tuple[torch.Tensor, Rotation | None]:
        if axis != 0:
            x = x.movedim(axis, 0)
        if x.shape[0] < 3 or x.numel() == 0:  # two rows have no leader that is entitled to more than one follower
            return x.movedim(0, axis), None
        ranges = _row_ranges(x)
        blocks = form_blocks(ranges)
        turn = reflections(blocks)
        y = turn.forward(x)
        if self.fallback:
            bound = (_row_ranges(y).double().square() * turn.norm).nan_to_num(nan=0.0)
            plain = ranges.double().square().nan_to_num(nan=0.0)
            # per block, so that the whole is never above a scale per row
            difference = torch.zeros_like(bound).index_add_(0, blocks.leader, bound - plain)
            worse = (difference >= 0.0).index_select(0, blocks.leader)
            turn = reflections(_apart(blocks, worse))
            if not turn.leader.numel():
                return x.movedim(0, axis), None
            rows = worse.nonzero().flatten()
            y.index_copy_(0, rows, x.index_select(0, rows).float())
        return y.movedim(0, axis), turn.along(axis)


def _apart(blocks: Blocks, where: torch.Tensor) -> Blocks:
    """Return ``blocks`` with some rows alone."""
    rows = torch.arange(where.numel(), device=where.device)
    return replace(blocks, leader=torch.where(where, rows, blocks.leader), size=torch.where(where, 1, blocks.size))
