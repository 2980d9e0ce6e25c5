"""Optimizers and their companions for low-bit training."""

from gradbits.optim.companion import DeviationCounteractiveLR, attach_companion_
from gradbits.optim.onebit_adam import OneBitAdam
from gradbits.optim.quantized_adam import QuantizedAdam

__all__ = ["DeviationCounteractiveLR", "OneBitAdam", "QuantizedAdam", "attach_companion_"]
