"""gradbits: low-bit training for PyTorch."""

from gradbits import nn, observe, optim, quantizers, wire
from gradbits.core.qtensor import QTensor
from gradbits.nn import Report, dequantize_, pack_activations, quantize_, report
from gradbits.recipes import Recipe, recipe, recipes
from gradbits.wire import compress_

__version__ = "0.1.0"
__all__ = [
    "QTensor",
    "Recipe",
    "Report",
    "compress_",
    "dequantize_",
    "nn",
    "observe",
    "optim",
    "pack_activations",
    "quantize_",
    "quantizers",
    "recipe",
    "recipes",
    "report",
    "wire",
]
