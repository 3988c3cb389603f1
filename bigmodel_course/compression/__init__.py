"""Compression: pruning, quantization, weight sharing with entropy coding, distillation, and all of it in one call."""
