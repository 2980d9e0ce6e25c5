"""Reference data of the methods' official implementations; tests skip, saying so, where the folder is absent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

Arrays = dict[str, torch.Tensor]


def golden_folder() -> Path:
    """Return the folder in GRADBITS_GOLDEN, or ../shared/golden next to the repository."""
    default = Path(__file__).resolve().parents[3] / "shared" / "golden"
    return Path(os.environ.get("GRADBITS_GOLDEN", default))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Arrays]:
    """Return a function that loads a file of the folder as tensors by array name."""

    def load(name: str) -> Arrays:
        path = golden_folder() / name
        if not path.exists():
            pytest.skip(f"no golden data: {path.name} is not in {path.parent}")
        with np.load(path) as file:
            return {key: torch.from_numpy(np.array(file[key])) for key in file.files}

    return load
