"""Optimizers and their companions for low-bit training."""

from gradbits.optim.companion import DeviationCounteractiveLR, attach_companion_
from gradbits.optim.delta_schedule import DeltaSchedule
from gradbits.optim.gradient_l1 import gradient_l1, record_activations
from gradbits.optim.hessian import hutchinson, measure_deltas_
from gradbits.optim.onebit_adam import OneBitAdam
from gradbits.optim.quantized_adam import QuantizedAdam

__all__ = [
    "DeltaSchedule",
    "DeviationCounteractiveLR",
    "OneBitAdam",
    "QuantizedAdam",
    "attach_companion_",
    "gradient_l1",
    "hutchinson",
    "measure_deltas_",
    "record_activations",
]
