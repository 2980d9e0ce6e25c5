"""Bits per layer chosen by a budget: a file of so many bytes, or an accuracy that may drop by so much."""

from __future__ import annotations

import glob
import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from gradbits.core.checks import check_bits, check_integer, check_number
from gradbits.core.errors import ArgumentError, NothingToQuantizeError
from gradbits.storage.compress import KEPT_VALUES, compress_tensor, split_aliases
from gradbits.storage.config import CompressConfig
from gradbits.storage.dtypes import SHAREABLE, dtype_name
from gradbits.storage.prune import magnitude_mask
from gradbits.storage.shared_section import IndexCosts
from gradbits.storage.sharing import REUSE, WeightValues, all_finite
from gradbits.storage.writer import Section, build_head

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A configuration that meets a budget: its file size in bytes, and the scores if they were measured."""

    config: CompressConfig
    size: int
    bits: Mapping[str, int]
    score: float | None = None
    baseline: float | None = None
    evaluations: int = 0


@dataclass(frozen=True)
class _Point:
    bits: int
    size: int
    loss: float


class _Path:
    """From the most bits to the least, one layer at a time, always where a byte saved costs the least error.

    The error of a layer is ``n * sum (w - c)^2 / sum (w - mean)^2``: noise over signal, times its number of weights.
    """

    def __init__(
        self, state: State, config: CompressConfig, metadata: Mapping[str, str] | None, limits: tuple[int, int]
    ) -> None:
        self.state, self.config, self.metadata = state, config, metadata
        low, high = limits
        self.own, self.aliases = split_aliases(state)
        self._coded: dict[tuple[str, int | None], Section] = {}
        curves = {name: curve for name in self.own if (curve := self._curve(name, low, high)) is not None}
        if not curves:
            raise NothingToQuantizeError(
                "state: holds no tensor whose bits are free: floats of two axes without override"
            )
        self.start = {name: curve[0].bits for name, curve in curves.items()}
        self.moves: list[tuple[str, int]] = []
        heap = [(_slope(curve, 0), name, 0) for name, curve in curves.items() if len(curve) > 1]
        heapq.heapify(heap)
        while heap:
            _, name, place = heapq.heappop(heap)
            self.moves.append((name, curves[name][place + 1].bits))
            if place + 2 < len(curves[name]):
                heapq.heappush(heap, (_slope(curves[name], place + 1), name, place + 1))

    def _curve(self, name: str, low: int, high: int) -> list[_Point] | None:
        tensor = self.state[name]
        named, _ = self.config.override(name)
        free = dtype_name(tensor, name) in SHAREABLE and self.config.bits(name, tensor.dim()) is not None
        if named or not free or not tensor.numel() or not all_finite(tensor):
            return None
        if self.config.sparsity:
            tensor = tensor * magnitude_mask(tensor, sparsity=self.config.sparsity)
        values = WeightValues(tensor, name)
        if self.config.keep_shared and values.sorted.distinct(min(KEPT_VALUES, values.nonzero // REUSE)) is not None:
            return None
        costs = IndexCosts(values.mask)
        _, energy = values.cost(values.sorted.values.mean(keepdims=True, dtype=float))
        points = []
        for bits in range(high, low - 1, -1):
            codebook, _ = values.codebook(bits, init=self.config.init, seed=self.config.seed)
            counts, squares = values.cost(codebook)
            size = costs.best(counts, codebook.size * tensor.element_size())
            points.append(_Point(bits, size, squares / energy * values.nonzero if energy else 0.0))
        return _lower_hull(points)

    def config_at(self, steps: int) -> CompressConfig:
        """Return the configuration after ``steps`` moves."""
        chosen = tuple((glob.escape(name), bits) for name, bits in self.bits_at(steps).items())
        return replace(self.config, overrides=(*chosen, *self.config.overrides))

    def bits_at(self, steps: int) -> dict[str, int]:
        """Return the bits per free layer after ``steps`` moves."""
        return {**self.start, **dict(self.moves[:steps])}

    def size_at(self, steps: int) -> int:
        """Return the exact size of the file after ``steps`` moves."""
        bits, config = self.bits_at(steps), self.config_at(steps)
        sections = []
        for name in self.own:
            key = (name, bits.get(name))
            if key not in self._coded:
                self._coded[key] = compress_tensor(name, self.state[name], config)[0]
            sections.append(self._coded[key])
        by_name = {section.name: section for section in sections}
        for name, target in self.aliases.items():
            like = replace(by_name[target], name=name, coding="alias", data=b"", extra={"of": target})
            sections.append(like)
        head, body = build_head(sections, self.metadata)
        return len(head) + body

    def state_at(self, steps: int) -> dict[str, torch.Tensor]:
        """Return the tensors as they come out of a file after ``steps`` moves."""
        bits, found = self.bits_at(steps), dict(self.state)
        for name in (*bits, *(name for name in self.own if self.config.override(name)[1] is not None)):
            tensor = self.state[name]
            wanted = bits.get(name, self.config.override(name)[1])
            if wanted is None or dtype_name(tensor, name) not in SHAREABLE or not all_finite(tensor):
                continue
            if self.config.sparsity:
                tensor = tensor * magnitude_mask(tensor, sparsity=self.config.sparsity)
            found[name] = (
                WeightValues(tensor, name).share(wanted, init=self.config.init, seed=self.config.seed).tensor()
            )
        for name, target in self.aliases.items():
            found[name] = found[target]
        return found


def _slope(curve: list[_Point], place: int) -> float:
    here, after = curve[place], curve[place + 1]
    return (after.loss - here.loss) / (here.size - after.size)


def _lower_hull(points: list[_Point]) -> list[_Point]:
    """Keep the points, by falling size, at which error per byte saved only grows."""
    hull: list[_Point] = []
    for point in points:
        if hull and point.size >= hull[-1].size:
            if point.loss < hull[-1].loss:
                hull[-1] = point
            continue
        while len(hull) > 1 and _slope([hull[-2], hull[-1]], 0) >= _slope([hull[-1], point], 0):
            hull.pop()
        hull.append(point)
    return hull


def fit_size(
    state: State,
    max_bytes: int,
    config: CompressConfig | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    min_bits: int = 2,
    max_bits: int = 8,
) -> Fit:
    """Return the configuration of least error whose whole file takes at most ``max_bytes``.

    Bits move from layer to layer along the lower hull of size against noise-to-signal ratio, and the size is that of
    the real file, metadata included. Overrides in ``config`` are kept.

    Args:
        state: tensors by name.
        max_bytes: budget for the whole file.
        config: overrides, sparsity and index to start from.
        metadata: strings that the file will hold.
        min_bits, max_bits: limits per layer, 1 to 8.

    Raises:
        ArgumentError: the budget cannot be met; says what the smallest file is.
        NothingToQuantizeError: no layer's bits are free.

    >>> state = {"a.weight": torch.randn(64, 64), "b.weight": torch.randn(64, 64)}
    >>> fit_size(state, 4500).size <= 4500
    True
    """
    check_integer(max_bytes, "max_bytes", 1)
    path = _Path(state, config or CompressConfig(), metadata, _limits(min_bits, max_bits))
    low, high = 0, len(path.moves)
    if path.size_at(high) > max_bytes:
        raise ArgumentError(
            f"max_bytes={max_bytes}: the smallest file at {min_bits} bits has {path.size_at(high)} bytes; "
            "prune the model (sparsity) or allow fewer bits"
        )
    while low < high:  # the first step that is small enough
        middle = (low + high) // 2
        low, high = (low, middle) if path.size_at(middle) <= max_bytes else (middle + 1, high)
    return Fit(config=path.config_at(low), size=path.size_at(low), bits=path.bits_at(low))


def fit_accuracy(
    state: State,
    evaluate: Callable[[State], float],
    max_drop: float,
    config: CompressConfig | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    min_bits: int = 2,
    max_bits: int = 8,
) -> Fit:
    """Return the smallest configuration found whose score is at least ``baseline - max_drop``.

    Bisection along the path of ``fit_size``: about log2(6 * layers) evaluations. The score of what is returned was
    measured, so the budget is met on the calibration set even where the score does not fall evenly.

    Args:
        state: tensors by name.
        evaluate: returns a score of a state dict, higher is better, on a calibration set.
        max_drop: how much of the uncompressed score may be lost, in its own unit, at least 0.
        config: overrides, sparsity and index to start from.
        metadata: strings that the file will hold.
        min_bits, max_bits: limits per layer, 1 to 8.

    Raises:
        ArgumentError: even ``max_bits`` lose more than that.
        NothingToQuantizeError: no layer's bits are free.

    >>> state = {"a.weight": torch.randn(64, 64)}
    >>> def score(found):
    ...     return -float((found["a.weight"] - state["a.weight"]).norm() / state["a.weight"].norm())
    >>> fit = fit_accuracy(state, score, 0.1)
    >>> fit.score >= fit.baseline - 0.1, fit.bits["a.weight"] < 8
    (True, True)
    """
    check_number(max_drop, "max_drop", 0.0)
    path = _Path(state, config or CompressConfig(), metadata, _limits(min_bits, max_bits))
    baseline = float(evaluate(state))
    goal = baseline - max_drop
    score = float(evaluate(path.state_at(0)))
    evaluations = 2
    if not score >= goal:
        raise ArgumentError(
            f"max_drop={max_drop}: at {max_bits} bits the score is {score:.6g}, uncompressed {baseline:.6g}; "
            "allow more bits or a larger drop"
        )
    low, high = 0, len(path.moves)  # the score at low is good
    while low < high:
        middle = (low + high + 1) // 2
        found = float(evaluate(path.state_at(middle)))
        evaluations += 1
        if found >= goal:
            low, score = middle, found
        else:
            high = middle - 1
    return Fit(
        config=path.config_at(low),
        size=path.size_at(low),
        bits=path.bits_at(low),
        score=score,
        baseline=baseline,
        evaluations=evaluations,
    )


def _limits(min_bits: int, max_bits: int) -> tuple[int, int]:
    check_bits(max_bits, "max_bits", 1, 8)
    return check_bits(min_bits, "min_bits", 1, max_bits), max_bits
