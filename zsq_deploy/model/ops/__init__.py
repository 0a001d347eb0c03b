"""The op table: what each ONNX operator means in torch."""
