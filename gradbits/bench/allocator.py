"""The C allocator in a benchmark: memory that was freed stays with the process, for everybody alike."""

from __future__ import annotations

import ctypes
import gc

# <malloc.h>; without them large tensors are mapped afresh each time, and page faults cost more than the arithmetic
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGEST = 2**31 - 1


class _Mallinfo2(ctypes.Structure):
    """What glibc's ``mallinfo2`` returns."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
        )
    )  # fmt: skip


def keep_freed_memory() -> str:
    """Tell the C allocator to keep what is freed; return what was set, in words.

    It changes the whole process for good, so only a benchmark's own process may call it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return "as it is (no mallopt here)"
    done = mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, LARGEST)
    return "mallopt M_MMAP_MAX=0, M_TRIM_THRESHOLD=max" if done else "as it is (mallopt refused)"


def start_afresh() -> None:
    """Give memory that earlier work has left behind back to the system.

    A process that trains one network has none: pieces of it between the tensors of the next network make everybody
    slower, those most who need the least time.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library


def allocated_bytes() -> int | None:
    """Return the bytes that the C allocator has given out, or None where it does not say."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return None
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return int(info.uordblks) + int(info.hblkhd)
