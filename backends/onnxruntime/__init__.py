"""ONNX Runtime: targets, quantizer, runner, kernel arithmetic."""
