"""Models on disk in few bits: pruning, weight sharing, the compressed container."""
