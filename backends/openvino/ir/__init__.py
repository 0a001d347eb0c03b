"""Reading an OpenVINO IR back into an ONNX Q/DQ graph: the contract of every engine, whoever quantized it."""

from zsq_deploy.backends.openvino.ir.convert import IrReading, ir_to_qdq, read_ir
from zsq_deploy.backends.openvino.ir.load import load_ir

__all__ = ["IrReading", "ir_to_qdq", "load_ir", "read_ir"]
