"""What a quantized run does: saved bytes, gradient bits, statistics, plots."""

from gradbits.observe.bits import gradient_bits as gradient_bits
from gradbits.observe.memory import saved_bytes as saved_bytes
