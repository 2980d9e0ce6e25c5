"""Codecs: a gradient to a payload and back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from gradbits.core.checks import FLOAT_DTYPES, check_float_tensor, check_instance, check_integer
from gradbits.core.errors import ArgumentError, CorruptDataError, DtypeError, NonFiniteError
from gradbits.core.noise import NoiseKey, draw_seed
from gradbits.core.spec import Spec
from gradbits.kernels.quantize import Noise

State = dict[str, torch.Tensor]

MAX_ELEMENTS = 1 << 40  # of one tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Payload:
    """What travels: named parts, plain tensors of one axis, and what is needed to read them.

    Args:
        codec: name of the codec that can decode it.
        shape: of the tensor.
        dtype: of the tensor.
        bits: bits of one symbol; 0 where there are none.
        bucket: values that share one norm; 0 where nothing is shared by position.
        parts: ``"codes"`` packed symbols (uint8), ``"norms"`` and ``"levels"`` or ``"grid"`` float32, or what the codec
            defines.
    """

    codec: str
    shape: torch.Size
    dtype: torch.dtype
    bits: int = 0
    bucket: int = 0
    parts: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, without the frame around them."""
        return sum(p.numel() * p.element_size() for p in self.parts.values())

    @property
    def device(self) -> torch.device:
        """Where the parts are; the processor where there are none."""
        return next((part.device for part in self.parts.values()), torch.device("cpu"))

    @property
    def bits_per_element(self) -> float:
        """Bits of all parts per element of the tensor; 0 for an empty tensor."""
        return 8 * self.nbytes / self.numel if self.numel else 0.0

    def part(self, name: str, dtype: torch.dtype, count: int) -> torch.Tensor:
        """Return the part ``name`` if it has this dtype and number of elements.

        Raises:
            CorruptDataError: it has not, or is missing.
        """
        found = self.parts.get(name)
        if found is None or found.dtype != dtype or found.dim() != 1 or found.numel() != count:
            seen = "missing" if found is None else f"{found.dtype} of shape {list(found.shape)}"
            raise CorruptDataError(f"payload: part {name!r} is {seen}; must be {dtype} of shape [{count}]")
        return found


@dataclass(frozen=True, kw_only=True)
class Codec(Spec):
    """How a gradient becomes a payload; the base of all codecs and of the wrappers around them.

    A codec is a frozen spec. What it learns is in a state, a dict of plain tensors that the caller keeps, one per
    tensor or one per group of tensors; it is empty unless the codec adapts or remembers. Nothing that is not finite
    ever enters a state.
    """

    @property
    def name(self) -> str:
        """The codec's name in payloads and in ``codec(name)``."""
        raise NotImplementedError

    @property
    def unbiased(self) -> bool:
        """Whether the mean of what is decoded is what was encoded."""
        return True

    @property
    def wants_feedback(self) -> bool:
        """Whether error feedback is advised: the codec is biased, and what it loses is less than what it gets."""
        return not self.unbiased

    @property
    def has_codes(self) -> bool:
        """Whether its payloads have a part ``"codes"`` of packed symbols, so that entropy coding applies."""
        return True

    def init_state(self) -> State:
        """Return the state before the first tensor; empty unless the codec adapts."""
        return {}

    def encode(self, x: torch.Tensor, key: Noise = None, state: State | None = None) -> Payload:
        """Return the payload of ``x``.

        Args:
            x: floating-point tensor of any shape; computed in float32.
            key: key of the rounding noise, or the noise ``v`` in (-1/2, 1/2) itself in the shape of ``x``; None draws
                a seed from PyTorch's default generator. Codecs that draw nothing ignore it.
            state: from ``init_state``; None means a fresh one.

        Raises:
            DtypeError: ``x`` is not a real floating-point tensor.
            NonFiniteError: ``x`` holds NaN or Inf (in float32); the state is as it was.
        """
        raise NotImplementedError

    def decode(self, payload: Payload) -> torch.Tensor:
        """Return the tensor of ``payload``; needs nothing else, so every rank decodes the same bytes to the same bits.

        Raises:
            CorruptDataError: the payload is not one that this codec makes.
        """
        raise NotImplementedError

    def decode_into(self, payload: Payload, out: torch.Tensor, *, add: bool = False) -> None:
        """Write the values of ``payload`` to ``out``, or add them to it: no new tensor where the codec can do without.

        Args:
            payload: of as many elements as ``out``.
            out: flat contiguous float32.
            add: whether ``out`` keeps what it holds, as a sum over ranks does.

        Raises:
            CorruptDataError: as for ``decode``; ``out`` may have been changed in part.
        """
        values = self.decode(payload).reshape(-1)
        if add:
            out += values.to(out)
        else:
            out.copy_(values)

    def statistics(self, x: torch.Tensor) -> torch.Tensor:
        """Return what ``adapt`` needs to know of ``x``: a float64 vector of fixed length that ranks and steps add up.

        Empty for codecs that do not adapt.

        Raises:
            DtypeError, NonFiniteError: as for ``encode``.
        """
        check_values(x)
        return torch.zeros(0, dtype=torch.float64, device=x.device)

    def adapt(self, state: State, statistics: torch.Tensor) -> State:
        """Return the state that fits ``statistics``; equal inputs give equal bits, so ranks agree without talking.

        Statistics of nothing (all zero) return the state as it is.

        Raises:
            ArgumentError: the vector has another length.
            NonFiniteError: it holds NaN or Inf.
        """
        self.check_statistics(statistics, 0)
        return state

    def is_due(self, step: int) -> bool:
        """Return whether the levels are to be adapted before step ``step``, counted from 0."""
        return False

    def check_statistics(self, statistics: torch.Tensor, size: int) -> None:
        """Raise unless ``statistics`` is a finite float64 vector of ``size`` numbers."""
        check_instance(statistics, "statistics", torch.Tensor)
        if statistics.dtype != torch.float64:
            raise DtypeError(f"statistics: dtype {statistics.dtype} is not supported; must be torch.float64")
        if statistics.shape != (size,):
            raise ArgumentError(f"statistics: shape {list(statistics.shape)}; {self.name!r} has [{size}]")
        if not bool(torch.isfinite(statistics).all()):
            raise NonFiniteError("statistics: hold NaN or Inf; the levels stay as they are")


def flat_values(x: torch.Tensor, name: str = "x") -> torch.Tensor:
    """Return the values of ``x`` as a flat contiguous float32 tensor.

    Raises:
        DtypeError: not a real floating-point tensor.

    >>> flat_values(torch.tensor([[1.0, 2.0]], dtype=torch.float16))
    tensor([1., 2.])
    """
    return check_float_tensor(x, name).detach().reshape(-1).to(torch.float32).contiguous()


def check_values(x: torch.Tensor, name: str = "x") -> torch.Tensor:
    """Return the values of ``x`` as a flat contiguous float32 tensor; all of them are finite.

    Raises:
        DtypeError: not a real floating-point tensor.
        NonFiniteError: NaN or Inf, or a value that float32 cannot hold.

    >>> check_values(torch.tensor([[1.0, 2.0]], dtype=torch.float16))
    tensor([1., 2.])
    """
    flat = flat_values(x, name)
    if flat.numel():
        check_finite(torch.stack(torch.aminmax(flat)), name)
    return flat


def check_finite(found: torch.Tensor, name: str = "x") -> None:
    """Raise if ``found``, extremes or norms of ``name``, are not finite: then ``name`` is not.

    Raises:
        NonFiniteError: NaN or Inf.
    """
    if not bool(torch.isfinite(found).all()):
        raise NonFiniteError(f"{name}: holds NaN or Inf, or values beyond float32; it was not encoded")


def noise_key(key: Noise, count: int) -> NoiseKey | torch.Tensor:
    """Return ``key``, or a fresh key from PyTorch's default generator where it is None.

    Raises:
        DtypeError: neither a key nor a tensor.
        ArgumentError: noise of another number of elements than ``count``.
    """
    if key is None:
        return NoiseKey.of(draw_seed())
    check_instance(key, "key", NoiseKey, torch.Tensor)
    if isinstance(key, torch.Tensor):
        if key.numel() != count:
            raise ArgumentError(f"key: noise of {key.numel()} elements for a tensor of {count}")
        return key.reshape(-1)
    return key


def restore(values: torch.Tensor, payload: Payload) -> torch.Tensor:
    """Return flat float32 ``values`` in the payload's shape and dtype; what a narrow dtype cannot hold is clamped."""
    if payload.dtype in (torch.float16, torch.bfloat16):
        limit = torch.finfo(payload.dtype).max
        values = values.clamp(-limit, limit)
    return values.to(payload.dtype).reshape(payload.shape)


def check_payload(payload: Payload, codec: str, *, least_bits: int = 0, most_bits: int = 8) -> int:
    """Return the number of elements of a payload whose head makes sense for ``codec``.

    Raises:
        DtypeError: not a payload.
        CorruptDataError: a payload of another codec, or an impossible shape, dtype, number of bits or bucket.
    """
    check_instance(payload, "payload", Payload)
    if payload.codec != codec:
        raise CorruptDataError(f"payload: of codec {payload.codec!r}; this is {codec!r}")
    if payload.dtype not in FLOAT_DTYPES:
        raise CorruptDataError(f"payload: dtype {payload.dtype} is not supported")
    extent = 1
    for size in payload.shape:
        extent *= max(size, 1)
    if any(size < 0 for size in payload.shape) or extent > MAX_ELEMENTS:
        raise CorruptDataError(f"payload: shape {list(payload.shape)} is not possible")
    if not least_bits <= payload.bits <= most_bits:
        raise CorruptDataError(f"payload: bits={payload.bits}; {codec!r} has {least_bits} to {most_bits}")
    if payload.bucket < 0:
        raise CorruptDataError(f"payload: bucket={payload.bucket}; must be at least 0")
    return payload.numel


def check_bucket(bucket: int) -> int:
    """Return ``bucket`` if it is a legal number of values per norm, 1 to 2^32 - 1."""
    return check_integer(bucket, "bucket", 1, (1 << 32) - 1)
