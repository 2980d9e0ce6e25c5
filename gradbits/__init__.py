"""gradbits: low-bit training for PyTorch."""

from gradbits import export, nn, observe, optim, quantizers, wire
from gradbits.core.qtensor import QTensor
from gradbits.nn import Report, convert_, dequantize_, fuse_, pack_activations, quantize_, report
from gradbits.optim import gradient_l1, record_activations
from gradbits.recipes import Recipe, recipe, recipes
from gradbits.wire import compress_

__version__ = "0.1.0"
__all__ = [
    "QTensor",
    "Recipe",
    "Report",
    "compress_",
    "convert_",
    "dequantize_",
    "export",
    "fuse_",
    "gradient_l1",
    "nn",
    "observe",
    "optim",
    "pack_activations",
    "quantize_",
    "quantizers",
    "recipe",
    "recipes",
    "record_activations",
    "report",
    "wire",
]
