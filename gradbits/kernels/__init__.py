"""Integer products, quantization and coding: a torch reference each, and one dispatcher that picks a backend."""
