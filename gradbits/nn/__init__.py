"""Quantized layers, and the calls that put them into a model."""

from gradbits.nn.activations import pack_activations
from gradbits.nn.convert import dequantize_, quantize_
from gradbits.nn.integer import IntegerModel
from gradbits.nn.integer_convert import convert_
from gradbits.nn.matmul import Matmul
from gradbits.nn.report import Report, report

__all__ = ["IntegerModel", "Matmul", "Report", "convert_", "dequantize_", "pack_activations", "quantize_", "report"]
