"""Every native kernel is tested on every instruction set that the processor has."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gradbits.kernels.native import library


@pytest.fixture(scope="module", params=list(library.LEVELS))
def native_level(request):
    """Hold the native kernels to one instruction set."""
    found = library.library()
    if isinstance(found, str):
        pytest.skip(f"native library not built: {found}")
    level = library.LEVELS[request.param]
    if level > found.handle.gradbits_level():
        pytest.skip(f"this processor does not have {request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "loaded", lambda: replace(found, level=level))
        yield request.param
