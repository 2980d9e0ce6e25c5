"""How a model is compressed: bits per kind of layer, exceptions by name, and what is kept as it is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from gradbits.core.checks import check_bits, check_choice, check_integer, check_number
from gradbits.core.errors import ArgumentError
from gradbits.storage.lloyd import INITS
from gradbits.storage.lossless import CODERS
from gradbits.storage.sharing import MAX_BITS


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """What ``save_compressed`` does to each tensor.

    Floating-point tensors of two axes are linear layers, of three and more convolutions; others (biases, norms) are
    kept exactly unless an override names them. Integers, bools and tensors with NaN or Inf are always kept exactly.

    Attributes:
        conv_bits: codebook bits of convolutions, 1 to 11.
        linear_bits: codebook bits of linear layers and embeddings, 1 to 11.
        overrides: (glob, bits) pairs, the first match wins; bits None keeps the tensor exactly.
        sparsity: part of the weights of every shared tensor to set to zero first, those of least magnitude; 0 to 1.
        index_bits: 3 to 8, or None for the cheapest of all forms of the index.
        init: start of the clustering: ``linear``, ``density`` or ``random``.
        seed: for ``random``.
        keep_shared: a tensor that holds at most 256 distinct non-zero values, each four times on average, was shared
            before: keep it exactly, unless an override names it.
        lossless: keep every tensor exactly.
        coder: ``huffman`` or ``zstd`` for tensors that are kept exactly.

    Raises:
        ArgumentError: a value that is not legal.

    >>> config = CompressConfig(overrides=(("head.*", None), ("*.embed.*", 8)))
    >>> config.bits("head.weight", 2), config.bits("x.embed.weight", 2), config.bits("fc.weight", 2)
    (None, 8, 5)
    """

    conv_bits: int = 8
    linear_bits: int = 5
    overrides: tuple[tuple[str, int | None], ...] = ()
    sparsity: float = 0.0
    index_bits: int | None = None
    init: str = "linear"
    seed: int = 0
    keep_shared: bool = True
    lossless: bool = False
    coder: str = "huffman"

    def __post_init__(self) -> None:
        check_bits(self.conv_bits, "conv_bits", 1, MAX_BITS)
        check_bits(self.linear_bits, "linear_bits", 1, MAX_BITS)
        for pattern, bits in self.overrides:
            if not isinstance(pattern, str):
                raise ArgumentError(f"overrides: {pattern!r} must be a glob of tensor names")
            if bits is not None:
                check_bits(bits, f"overrides[{pattern!r}]", 1, MAX_BITS)
        check_number(self.sparsity, "sparsity", 0.0, 1.0)
        if self.index_bits is not None:
            check_bits(self.index_bits, "index_bits", 3, 8)
        check_choice(self.init, "init", INITS)
        check_integer(self.seed, "seed", 0)
        check_choice(self.coder, "coder", CODERS)

    def override(self, name: str) -> tuple[bool, int | None]:
        """Return (whether an override names the tensor, its bits)."""
        for pattern, bits in self.overrides:
            if fnmatchcase(name, pattern):
                return True, bits
        return False, None

    def bits(self, name: str, dims: int) -> int | None:
        """Return the codebook bits for a floating-point tensor of ``dims`` axes; None means: keep it exactly."""
        if self.lossless:
            return None
        named, bits = self.override(name)
        if named:
            return bits
        return None if dims < 2 else self.linear_bits if dims == 2 else self.conv_bits

    def to_json(self) -> str:
        """Return the configuration as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> CompressConfig:
        """Return the configuration that ``to_json`` wrote.

        Raises:
            ArgumentError: not such JSON.

        >>> CompressConfig.from_json(CompressConfig(linear_bits=4).to_json()).linear_bits
        4
        """
        try:
            tree: Any = json.loads(text)
        except ValueError as error:
            raise ArgumentError(f"compress configuration: not JSON ({error})") from error
        legal = {one.name for one in fields(cls)}
        if not isinstance(tree, dict) or not set(tree) <= legal:
            raise ArgumentError(f"compress configuration: must be an object with keys among {', '.join(sorted(legal))}")
        if "overrides" in tree:
            try:
                tree["overrides"] = tuple((pattern, bits) for pattern, bits in tree["overrides"])
            except (TypeError, ValueError) as error:
                raise ArgumentError(f"overrides={tree['overrides']!r}: must be pairs of glob and bits") from error
        return cls(**tree)
