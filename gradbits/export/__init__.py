"""Models for other runtimes: ONNX files and exported PyTorch programs of integer models."""

from gradbits.export.onnx_model import onnx
from gradbits.export.torch_program import torch_export

__all__ = ["onnx", "torch_export"]
