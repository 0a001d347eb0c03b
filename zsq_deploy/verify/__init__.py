"""The engine against its references: parity, accuracy, integer proof, latency."""
