"""Codecs for gradients on the wire: encode, decode, error feedback, entropy coding, frames."""
