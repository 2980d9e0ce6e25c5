"""The block Householder quantizer's rotation: one large row shares its size with the small rows of its block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from gradbits.core.qtensor import Rotation
from gradbits.quantizers.ranges import State
from gradbits.quantizers.rotation import RotationRule

SMALLEST_RATIO = 1e-4  # of the two column scales: followers that are zero would ask for an infinite one


@dataclass(frozen=True)
class HouseholderBlocks:
    r"""A block-diagonal :math:`T = H\,\mathrm{diag}(s)` along one axis, in the order of the rows as they came.

    Every row knows its block's leader. A row of T x is :math:`a\,z_L + b\,z + c \sum_\text{followers} z` with
    :math:`z = s\,x` and L the leader, so a product with T or its inverse takes a few operations per element: the
    matrix is never built.

    Args:
        leader: int64 index of each row's leader; a leader has its own index.
        scale: ``s``.
        lead, own, total: ``a``, ``b`` and ``c`` of the reflection H.
        follower: 1 for followers, 0 for leaders.
        norm: squared norm of each row's column of the inverse.
        axis: the axis whose entries are the rows.
        group: consecutive entries along the axis that make one row: the tokens of one sample.
    """

    leader: torch.Tensor
    scale: torch.Tensor
    lead: torch.Tensor
    own: torch.Tensor
    total: torch.Tensor
    follower: torch.Tensor
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

    def _reflect(self, z: torch.Tensor) -> torch.Tensor:
        """Return H z for rows along axis 0; H is its own inverse."""

        def column(value: torch.Tensor) -> torch.Tensor:
            return value.view(-1, *(1,) * (z.dim() - 1))

        sums = torch.zeros_like(z).index_add_(0, self.leader, z * column(self.follower))
        y = z.index_select(0, self.leader) * column(self.lead)
        y += z * column(self.own)
        y += sums.index_select(0, self.leader) * column(self.total)
        return y

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        x = x.movedim(self.axis, 0).float()
        return x.reshape(x.shape[0] // self.group, self.group, *x.shape[1:]) if self.group > 1 else x

    def _back(self, y: torch.Tensor) -> torch.Tensor:
        return (y.flatten(0, 1) if self.group > 1 else y).movedim(0, self.axis)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return T x in float32."""
        z = self._rows(x)
        return self._back(self._reflect(z * self.scale.view(-1, *(1,) * (z.dim() - 1))))

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Return the inverse of T times x in float32."""
        y = self._rows(x)
        return self._back(self._reflect(y) / self.scale.view(-1, *(1,) * (y.dim() - 1)))

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
    t = blocks.size.double()
    alone = t < 2
    root = t.sqrt()
    wide = t.clamp(min=2.0)
    beta = 1.0 / (wide - wide.sqrt())
    largest = torch.maximum(1.0 / wide.sqrt(), torch.maximum((1.0 - beta).abs(), torch.where(t > 2, beta, 0.0)))
    w1 = blocks.leader_range / root
    w2 = blocks.follower_range * largest
    cube = torch.where(w1 > 0, w2 / ((wide - 1.0) * w1), 1.0)
    ratio = cube.pow(1.0 / 3.0).clamp(min=SMALLEST_RATIO)  # s1 / s2
    rank = torch.arange(t.numel(), device=t.device)
    leads = blocks.leader == rank
    s1, s2 = (1.0 + ratio * ratio).sqrt(), (1.0 + 1.0 / (ratio * ratio)).sqrt()
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    norm = torch.where(alone, one, 1.0 / (t * s1 * s1) + (1.0 - 1.0 / t) / (s2 * s2))
    return HouseholderBlocks(
        leader=blocks.leader,
        scale=torch.where(alone, one, torch.where(leads, s1, s2)).float(),
        lead=torch.where(alone, one, 1.0 / root).float(),
        own=torch.where(leads, zero, one).float(),
        total=torch.where(alone, zero, torch.where(leads, 1.0 / root, -beta)).float(),
        follower=torch.where(leads, zero, one).float(),
        norm=norm.float(),
    )


def _row_ranges(x: torch.Tensor) -> torch.Tensor:
    low, high = torch.aminmax(x.flatten(1), dim=1)
    return high - low


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
            difference = torch.zeros_like(bound).index_add_(0, turn.leader, bound - plain)
            worse = (difference >= 0.0).index_select(0, turn.leader)
            turn = _undo(turn, worse)
            y = torch.where(worse.view(-1, *(1,) * (x.dim() - 1)), x.float(), y)
        return y.movedim(0, axis), turn.along(axis)


def _undo(turn: HouseholderBlocks, where: torch.Tensor) -> HouseholderBlocks:
    """Return ``turn`` with the rows of some blocks left as they are."""
    rank = torch.arange(where.numel(), device=where.device)

    def put(value: torch.Tensor, plain: float) -> torch.Tensor:
        return torch.where(where, plain, value)

    return HouseholderBlocks(
        torch.where(where, rank, turn.leader),
        put(turn.scale, 1.0),
        put(turn.lead, 1.0),
        put(turn.own, 0.0),
        put(turn.total, 0.0),
        put(turn.follower, 0.0),
        put(turn.norm, 1.0),
    )
