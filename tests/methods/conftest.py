"""What the generic checks share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for table.py


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than they bring on layers this small; one test below shows that they change nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
