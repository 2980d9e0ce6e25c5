"""Optimizers and their companions for low-bit training."""
