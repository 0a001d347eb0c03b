"""Layer information as the inspectors of TensorRT 8, 10 and 11 write it, made by hand for the network ``residual``.

The forms follow NVIDIA's documentation and layer files that others made public; the names and sizes are those of our small network.
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["EIGHT", "ELEVEN", "TEN", "text"]


def text(layers: list[Any], **more: Any) -> str:
    """The JSON text."""
    return json.dumps({"Layers": layers, **more})


def _eight(name: str, form: str) -> dict[str, Any]:
    return {"Name": name, "Location": "Device", "Dimensions": [1, 8, 8, 8], "Format/Datatype": form}


_LINEAR, _NARROW = "Row major linear FP32", "Thirty-two wide channel vectorized row major Int8 format"
_I8I8 = "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_tilesize64x64x64_stage6"
_I8F32 = "sm80_xmma_fprop_implicit_gemm_interleaved_i8f32_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_nchw_tilesize64x32x64"

EIGHT = text(
    [
        {
            "Name": "image_QuantizeLinear",
            "LayerType": "Reformat",
            "Inputs": [_eight("image", _LINEAR)],
            "Outputs": [_eight("image_q", "Four wide channel vectorized row major Int8 format")],
            "ParameterType": "Reformat",
            "Origin": "QDQ",
            "TacticValue": "0x00000000000003ea",
        },
        {
            "Name": "c0 + c0_QuantizeLinear + n_stem + n_stem_relu",
            "LayerType": "ConvActPool",
            "Inputs": [_eight("image_q", "Four wide channel vectorized row major Int8 format")],
            "Outputs": [_eight("stem_q", _NARROW)],
            "ConvWeights": {"Type": "Int8", "Count": 216},
            "ConvBias": {"Type": "Float", "Count": 8},
            "TacticValue": "0x0000000000000461",
        },
        {
            "Name": "c2 + c2_QuantizeLinear + n_left + PWN(n_left_relu)",
            "LayerType": "CaskConvolution",
            "Inputs": [_eight("stem_q", _NARROW)],
            "Outputs": [_eight("left_q", _NARROW)],
            "Weights": {"Type": "Int8", "Count": 576},
            "TacticName": _I8I8,
        },
        {
            "Name": "c4 + c4_QuantizeLinear + n_right + n_sum + n_out",
            "LayerType": "CaskConvolution",
            "Inputs": [_eight("left_q", _NARROW), _eight("stem_q", _NARROW)],
            "Outputs": [_eight("out", "Channel major FP16 format where channel % 8 == 0")],
            "Weights": {"Type": "Int8", "Count": 576},
            "TacticName": _I8F32,
        },
        {
            "Name": "n_pool",
            "LayerType": "CudaPooling",
            "Inputs": [_eight("out", "Channel major FP16 format where channel % 8 == 0")],
            "Outputs": [_eight("pooled", _LINEAR)],
        },
        {
            "Name": "c6 + n_logits + c7 + (Unnamed Layer* 36) [Shuffle] + unsqueeze_node_after_c7",
            "LayerType": "CaskGemmConvolution",
            "Inputs": [_eight("pooled", _LINEAR)],
            "Outputs": [_eight("(Unnamed Layer* 37) [ElementWise]_out_tensor", _LINEAR)],
            "Weights": {"Type": "Float", "Count": 40},
            "TacticName": "sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize32x32x64_stage3",
        },
        {
            "Name": "copied_squeeze_after_(Unnamed Layer* 37) [ElementWise]",
            "LayerType": "NoOp",
            "Inputs": [_eight("(Unnamed Layer* 37) [ElementWise]_out_tensor", _LINEAR)],
            "Outputs": [_eight("logits", _LINEAR)],
            "TacticValue": "0x0000000000000000",
        },
    ],
    Bindings=["image", "logits"],
)


def _ten(name: str, dtype: str) -> dict[str, Any]:
    return {"Name": name, "Dimensions": [1, 8, 8, 8], "Format/Datatype": dtype}


def _nodes(*names: str, between: str = "\x1e") -> str:
    return between.join(f"[ONNX Layer: {name}]" for name in names)


TEN = text(
    [
        {
            "Name": "__myl_Quan_myl0_0",
            "LayerType": "kgen",
            "Inputs": [_ten("image", "Float")],
            "Outputs": [_ten("__myln_k_arg__bb1_2", "Int8")],
            "TacticName": "__myl_Quan_0xfa6c1858aea1b13b03f90165d7149ec6",
            "StreamId": 0,
            "Metadata": _nodes("image_QuantizeLinear"),
        },
        {
            "Name": "n_stem + n_stem_relu",
            "LayerType": "CaskConvolution",
            "Inputs": [_ten("__myln_k_arg__bb1_2", "Int8")],
            "Outputs": [_ten("stem", "Int8")],
            "Weights": {"Type": "Int8", "Count": 216},
            "TacticName": "ampere_first_layer_filter3x3_imma_fwd",
            "Metadata": _nodes("c0_DequantizeLinear", "n_stem", "n_stem_relu"),
        },
        {
            "Name": "n_left_myl1_3",
            "LayerType": "fusion",
            "Inputs": [_ten("stem", "Int8")],
            "Outputs": [_ten("left", "Int8")],
            "TacticName": "sm80_xmma_fprop_implicit_gemm_indexed_i8i8_i8i32_f32_nhwckrsc_nhwc_tilesize64x64",
            "Metadata": _nodes("n_left", "n_left_relu", "left_relu_QuantizeLinear", between=""),
        },
        {
            "Name": "__myl_Move_myl1_4",
            "LayerType": "kgen",
            "Inputs": [_ten("left", "Int8")],
            "Outputs": [_ten("left2", "Int8")],
            "TacticName": "__myl_Move_0x12",
            "Metadata": _nodes("n_right"),
        },
        {
            "Name": "__myl_ConvAddRelu_myl1_5",
            "LayerType": "kgen",
            "Inputs": [_ten("left2", "Int8"), _ten("stem", "Int8")],
            "Outputs": [_ten("out", "Half")],
            "TacticName": "__myl_ConvAddRelu_0x34",
            "Metadata": _nodes("n_right", "n_sum", "n_out"),
        },
        {
            "Name": "n_pool + n_flat",
            "LayerType": "CaskPooling",
            "Inputs": [_ten("out", "Half")],
            "Outputs": [_ten("flat", "Half")],
            "TacticName": "sm50_xmma_pooling_fw_4d_FP16FP32NHWC_Average",
            "Metadata": _nodes("n_pool", "n_flat"),
        },
    ],
    Bindings=["image", "logits"],
)
"""``n_logits`` is missing: no layer names it."""


def _eleven(name: str, dtype: str) -> dict[str, Any]:
    return {"Name": name, "Dimensions": [1, 8, 8, 8], "Format": "Row major linear", "DataType": dtype}


ELEVEN = text(
    [
        {
            "Name": "__mye116_myl0_0",
            "LayerType": "signal",
            "Inputs": [],
            "Outputs": [],
            "Metadata": "",
        },
        {
            "Name": "__myl_QuanTran_myl0_1",
            "LayerType": "kgen",
            "Inputs": [_eleven("image", "Float")],
            "Outputs": [_eleven("q", "Int8")],
            "TacticName": "__myl_QuanTran_0x1",
            "Metadata": _nodes("image_QuantizeLinear", between="\x1f"),
        },
        *(
            {
                "Name": f"{name}_myl0_{place}",
                "LayerType": "correlation",
                "Inputs": [_eleven("q", "Int8")],
                "Outputs": [_eleven(name, "Int8")],
                "TacticName": "sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32_nhwckrsc_nhwc_tilesize128x64x64",
                "Metadata": _nodes(name, f"{name}_relu", between="\x1f"),
            }
            for place, name in enumerate(("n_stem", "n_left", "n_right"), 2)
        ),
        {
            "Name": "n_logits_myl0_6",
            "LayerType": "gemm",
            "Inputs": [_eleven("flat", "Int8"), _eleven("w", "Int8")],
            "Outputs": [_eleven("logits", "Float")],
            "TacticName": "cublasLt_0x5",
            "Metadata": _nodes("n_logits", between="\x1f"),
        },
        {
            "Name": "n_logits_myl0_6 [profile 1]",
            "LayerType": "gemm",
            "Inputs": [_eleven("flat", "Float")],
            "Outputs": [_eleven("logits", "Float")],
            "TacticName": "",
            "Metadata": _nodes("n_logits", between="\x1f"),
        },
    ],
    **{"I/O Tensors": [{"Name": "image", "IOMode": "Input", "DataType": "Float"}]},
)
