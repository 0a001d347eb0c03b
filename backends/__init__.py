"""One folder a runtime: targets, quantizer, runner."""
