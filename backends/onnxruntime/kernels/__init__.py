"""The integer kernels of ONNX Runtime's CPU provider, written again from their mathematics.

One module a family; each docstring states the formula and where the runtime rounds. :data:`KERNELS` maps an operator to the
class that computes it. A class is built once a node (constants prepared, tables filled) and called once a batch.
"""

from __future__ import annotations

from zsq_deploy.backends.onnxruntime.kernels import (
    activation,
    conv,
    elementwise,
    matmul,
    movement,
    pool,
    quantize,
    resize,
    softmax,
)
from zsq_deploy.backends.onnxruntime.kernels.arithmetic import (
    Arithmetic,
    Arm64Arithmetic,
    arithmetic_for,
    arithmetic_here,
)
from zsq_deploy.backends.onnxruntime.kernels.base import KERNELS, Kernel, NodeSpec

__all__ = ["KERNELS", "Arithmetic", "Arm64Arithmetic", "Kernel", "NodeSpec", "arithmetic_for", "arithmetic_here"]

# The modules are imported for their registrations.
_FAMILIES = (activation, conv, elementwise, matmul, movement, pool, quantize, resize, softmax)
