"""The reference runs behind ``gradbits train``: data sets, small models, the loop."""

from gradbits.train.companion import Companion as Companion
from gradbits.train.experiment import Experiment as Experiment
from gradbits.train.options import TrainOptions as TrainOptions
