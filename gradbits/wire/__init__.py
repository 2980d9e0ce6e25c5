"""Gradients on the wire: codecs, error feedback, entropy coding, frames, and the DDP and FSDP2 adapters."""

from gradbits.wire.codec import Codec, Payload
from gradbits.wire.compress import compress_
from gradbits.wire.hook import hook
from gradbits.wire.registry import codec, codecs, decode
from gradbits.wire.state import CommState

__all__ = ["Codec", "CommState", "Payload", "codec", "codecs", "compress_", "decode", "hook"]
