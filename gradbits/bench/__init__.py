"""Benchmarks behind ``gradbits bench``: everything that competes runs in turns in one process."""
