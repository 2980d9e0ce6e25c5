"""What all tests share: the same generated examples in every run, so that a green suite stays green."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# new examples are looked for with --hypothesis-profile=explore
settings.register_profile("explore", deadline=None)
settings.register_profile("same", deadline=None, derandomize=True)
settings.load_profile("same")


@pytest.fixture
def one_thread():
    """One thread: on layers this small, threads that wait for one another cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def inductor():
    """The backend of ``torch.compile`` that needs a C++ compiler when it is used, whoever built gradbits."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("no C++ compiler works here, and inductor needs one")
    return "inductor"
