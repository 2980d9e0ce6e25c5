"""Optimizers and their companions for low-bit training."""

from gradbits.optim.companion import DeviationCounteractiveLR, attach_companion_

__all__ = ["DeviationCounteractiveLR", "attach_companion_"]
