"""Grids, range rules, rounding, estimators, and how they compose into a quantizer."""
