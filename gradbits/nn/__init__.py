"""Quantized layers, and the calls that put them into a model."""

from gradbits.nn.activations import pack_activations
from gradbits.nn.convert import dequantize_, quantize_
from gradbits.nn.matmul import Matmul
from gradbits.nn.norm import fuse_, norm_relu, unfuse_
from gradbits.nn.report import Report, report

__all__ = [
    "Matmul",
    "Report",
    "dequantize_",
    "fuse_",
    "norm_relu",
    "pack_activations",
    "quantize_",
    "report",
    "unfuse_",
]
