"""Integers with scales: QTensor, grains, noise, errors. Everything else stands on this package."""
