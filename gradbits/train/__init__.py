"""The reference runs behind ``gradbits train``: data sets, small models, the loop."""
