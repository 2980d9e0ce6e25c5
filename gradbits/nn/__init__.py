"""Quantized layers, and the calls that put them into a model."""

from gradbits.nn.activations import pack_activations
from gradbits.nn.attention import ScaledDotProductAttention
from gradbits.nn.convert import dequantize_, quantize_
from gradbits.nn.fuse import fuse_, unfuse_
from gradbits.nn.integer_convert import convert_
from gradbits.nn.integer_model import IntegerModel
from gradbits.nn.matmul import Matmul
from gradbits.nn.norm import norm_relu
from gradbits.nn.reinforce import ReinforceNeuron
from gradbits.nn.report import Report, report
from gradbits.nn.stochastic import BinaryNeuron, NoisyRectifier, StochasticTimesSmooth

__all__ = [
    "BinaryNeuron",
    "IntegerModel",
    "Matmul",
    "NoisyRectifier",
    "ReinforceNeuron",
    "Report",
    "ScaledDotProductAttention",
    "StochasticTimesSmooth",
    "convert_",
    "dequantize_",
    "fuse_",
    "norm_relu",
    "pack_activations",
    "quantize_",
    "report",
    "unfuse_",
]
