"""Simulated quantization: schemes, ranges, fake-quant, Q/DQ graphs."""
