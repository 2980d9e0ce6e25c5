"""The native backend: kernels in C++ for the processor, compiled at install where a compiler is found.

The environment variable ``GRADBITS_NATIVE`` is read when the first kernel is chosen: ``0`` switches the backend off,
``portable``, ``avx2``, ``avx512`` or ``amx`` hold it to an instruction set.
"""

from __future__ import annotations

from gradbits.kernels.dispatch import Kernel, Request


def kernels() -> tuple[Kernel, ...]:
    """Return the kernels of this backend."""
    from gradbits.kernels.native import buckets, convolutions, huffman, library, packing, products, sums
    from gradbits.kernels.native.attention import attention, attention_gradients
    from gradbits.kernels.native.columns import column_sums
    from gradbits.kernels.native.digest import digest
    from gradbits.kernels.native.quantize import min_max, quantize, quantize_symmetric

    def why_not(request: Request) -> str | None:
        if request.device != "cpu":
            return f"runs on the processor only, not on {request.device}"
        return library.why_not()

    wire = (
        *(buckets.pack_symbols, buckets.unpack_symbols),
        *(buckets.bucket_norms, buckets.encode_buckets, buckets.decode_buckets),
        *(huffman.count_symbols, huffman.huffman_encode, huffman.huffman_decode),
    )
    functions = (
        *(quantize, quantize_symmetric, min_max, packing.pack, packing.unpack, sums.sum_codes, digest, column_sums),
        *(products.matmul, attention, attention_gradients),
        *(convolutions.conv_output, convolutions.conv_grad_input, convolutions.conv_grad_weight),
        *wire,
    )
    return tuple(Kernel(f.__name__, "native", f, why_not) for f in functions)


def describe() -> str:
    """Return the instruction set of the native kernels and their threads, or why there are none."""
    from gradbits.kernels.native import library

    found = library.library()
    if isinstance(found, str):
        return f"none: {found}"
    shared = "PyTorch's threads" if found.pooled else "one thread: PyTorch's OpenMP runtime was not found"
    return f"{found.name}, {shared}"
