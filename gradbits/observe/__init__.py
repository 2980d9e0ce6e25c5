"""What a quantized run does: saved bytes, gradient bits, statistics, plots."""

from gradbits.observe.bits import gradient_bits as gradient_bits
from gradbits.observe.memory import saved_bytes as saved_bytes
from gradbits.observe.post_training import calibrate as calibrate
from gradbits.observe.post_training import evaluate_bits as evaluate_bits
from gradbits.observe.variance import VarianceReport as VarianceReport
from gradbits.observe.variance import measure_variance as measure_variance
from gradbits.observe.variance_plot import save_variance as save_variance
