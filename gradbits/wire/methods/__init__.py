"""The codecs: one file per method."""
