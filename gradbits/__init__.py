"""gradbits: low-bit training for PyTorch."""

from gradbits import nn, observe, optim, quantizers
from gradbits.core.qtensor import QTensor
from gradbits.nn import Report, dequantize_, fuse_, pack_activations, quantize_, report
from gradbits.recipes import Recipe, recipe, recipes

__version__ = "0.1.0"
__all__ = [
    "QTensor",
    "Recipe",
    "Report",
    "dequantize_",
    "fuse_",
    "nn",
    "observe",
    "optim",
    "pack_activations",
    "quantize_",
    "quantizers",
    "recipe",
    "recipes",
    "report",
]
