"""One thread in all of these tests; one of them shows that threads change nothing. Makes ``table.py`` importable."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """See ``one_thread``."""
