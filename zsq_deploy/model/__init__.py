"""One model in two forms: an ONNX graph and its differentiable torch twin."""
