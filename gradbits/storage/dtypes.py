"""Names and bytes of tensor elements, the same names as in safetensors; all data is little endian."""

from __future__ import annotations

import sys
from math import prod

import numpy as np
import numpy.typing as npt
import torch

from gradbits.core.errors import CorruptDataError, DtypeError, GradbitsError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
SHAREABLE = ("F64", "F32", "F16", "BF16")  # element types whose weights can be shared
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def dtype_name(tensor: torch.Tensor, name: str) -> str:
    """Return the safetensors name of the element type of a dense tensor.

    Raises:
        DtypeError: a sparse or quantized tensor, or an element type that safetensors does not know.

    >>> dtype_name(torch.zeros(2, dtype=torch.bfloat16), "weight")
    'BF16'
    """
    if tensor.layout != torch.strided or tensor.dtype not in NAMES or tensor.is_meta:
        raise DtypeError(
            f"tensor {name!r}: {tensor.dtype}, layout {tensor.layout}, device {tensor.device} cannot be stored; "
            f"legal are dense tensors with data, of {', '.join(str(dtype)[6:] for dtype in NAMES)}"
        )
    return NAMES[tensor.dtype]


def byte_size(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor. The sizes of a shape are Python integers, so no product overflows.

    >>> byte_size("BF16", (3, 5))
    30
    """
    return prod(shape) * DTYPES[dtype].itemsize


def to_bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Return the elements in row-major order as bytes, shape (numel * itemsize,).

    >>> to_bytes(torch.tensor([1, 256], dtype=torch.int16)).tolist()
    [1, 0, 0, 1]
    """
    _require_little_endian()
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 0:
        return np.zeros(0, np.uint8)
    return flat.view(torch.uint8).numpy()


def to_words(tensor: torch.Tensor) -> npt.NDArray[np.unsignedinteger]:
    """Return the elements as unsigned integers of their own width, shape (numel,): bit patterns, not values."""
    return to_bytes(tensor).view(_UNSIGNED[tensor.element_size()])


def from_bytes(data: npt.NDArray[np.generic], dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor that owns its memory.

    Args:
        data: writable array whose bytes are the elements; it is not copied.
        dtype: safetensors name.
        shape: its product times the element size is the size of ``data`` in bytes.

    Raises:
        CorruptDataError: the bytes do not fill the shape.

    >>> from_bytes(np.array([0, 0, 128, 63], np.uint8), "F32", (1,))
    tensor([1.])
    """
    _require_little_endian()
    if data.nbytes != byte_size(dtype, shape):
        raise CorruptDataError(f"{data.nbytes} bytes do not fill a tensor {dtype} of shape {list(shape)}")
    if data.nbytes == 0:
        return torch.empty(shape, dtype=DTYPES[dtype])
    if dtype == "BOOL" and int(data.view(np.uint8).max()) > 1:
        raise CorruptDataError("a bool tensor holds bytes other than 0 and 1")
    return torch.from_numpy(data.view(np.uint8)).view(DTYPES[dtype]).reshape(shape)


def unsigned(dtype: str) -> np.dtype[np.unsignedinteger]:
    """Return the numpy type of the bit patterns of ``dtype``."""
    return np.dtype(_UNSIGNED[DTYPES[dtype].itemsize])


def _require_little_endian() -> None:
    if sys.byteorder != "little":
        raise GradbitsError("gbz files are read and written on little-endian machines only")
