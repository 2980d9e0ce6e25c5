"""Optimizers and their companions for low-bit training."""

from gradbits.optim.companion import DeviationCounteractiveLR, attach_companion_
from gradbits.optim.delta_schedule import DeltaSchedule
from gradbits.optim.hessian import hutchinson, measure_deltas_

__all__ = ["DeltaSchedule", "DeviationCounteractiveLR", "attach_companion_", "hutchinson", "measure_deltas_"]
