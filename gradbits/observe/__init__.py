"""What a quantized run does: saved bytes, gradient bits, statistics, plots."""
