"""What engines say of their layers, in the forms of three generations, and the integer proof that is made of it."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from rich.console import Console

from zsq_deploy.backends import get_target
from zsq_deploy.backends.tensorrt.evidence import holds_layers, read_evidence
from zsq_deploy.backends.tensorrt.inspector import kernel_types, read_layers
from zsq_deploy.backends.tensorrt.options import BuildOptions
from zsq_deploy.backends.tensorrt.placement import place_qdq
from zsq_deploy.backends.tensorrt.proof import kernel_records
from zsq_deploy.cli.inspecting import describe_thing, print_description
from zsq_deploy.errors import EngineError
from zsq_deploy.model.graph import Graph
from zsq_deploy.verify import prove

from .tensorrt_layer_samples import EIGHT, ELEVEN, TEN, text
from .tensorrt_networks import network, ranges_of

# Multiply-accumulates of "residual" by hand: positions x outputs x inputs x kernel.
STEM, BLOCK, HEAD = 8 * 8 * 8 * 3 * 9, 8 * 8 * 8 * 8 * 9, 8 * 5


@pytest.fixture(scope="module")
def graph() -> Graph:
    model = network("residual")
    return place_qdq(model.folded().graph, ranges_of(model), get_target("tensorrt-10"), BuildOptions()).graph


def proof(graph: Graph, layers: str, times: dict[str, float] | None = None, mode: str = "engine"):
    return {record.node: record for record in kernel_records(read_layers(layers), graph, times, mode=mode)}


def test_types_are_read_from_words_of_every_generation() -> None:
    by_name = {layer.name: layer for layer in read_layers(EIGHT)}
    assert [tensor.dtype for tensor in by_name["image_QuantizeLinear"].inputs] == ["float32"]
    assert by_name["image_QuantizeLinear"].outputs[0].dtype == "int8"
    assert by_name["n_pool"].inputs[0].dtype == "float16"
    assert by_name["c0 + c0_QuantizeLinear + n_stem + n_stem_relu"].weights == "int8"
    assert [layer.outputs[0].dtype for layer in read_layers(TEN)] == ["int8"] * 4 + ["float16"] * 2
    assert [layer.outputs[0].dtype for layer in read_layers(ELEVEN) if layer.outputs] == ["int8"] * 4 + ["float32"]
    odd = text(
        [{"Name": "a", "LayerType": "b", "Inputs": [{"Name": "x", "Format/Datatype": "N/A due to dynamic shapes"}]}]
    )
    assert read_layers(odd)[0].inputs[0].dtype == ""
    assert (
        read_layers(text([{"Name": "a", "Inputs": [{"DataType": "BFloat16"}, {"Format": "x", "DataType": "UInt8"}]}]))[
            0
        ]
        .inputs[0]
        .dtype
        == "bfloat16"
    )


def test_a_bare_list_of_layers_is_read_too() -> None:
    assert read_layers(json.dumps(json.loads(EIGHT)["Layers"])) == read_layers(EIGHT)


def test_of_several_profiles_the_first_is_read() -> None:
    assert len(read_layers(ELEVEN)) == 6
    (second,) = read_layers(ELEVEN, profile=1)
    assert second.inputs[0].dtype == "float32"


@pytest.mark.parametrize(
    ("kernel", "types"),
    [
        ("sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs", ("int8", "int8")),
        ("sm80_xmma_gemm_i8f32_i8i32_f32_nn_n_tilesize64x128x32", ("int8", "int8")),
        ("sm80_xmma_gemm_f16f16_f16f32_f32_nn_n", ("float16", "float16")),
        ("sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize32x32x64", ("float32", "float32")),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", ("bfloat16", "bfloat16")),
        ("ampere_first_layer_filter3x3_imma_fwd_swish_execute_filter3x3_swish_kernel_trt", ("int8", "int8")),
        ("volta_int8x4_icudnn_int8x4_128x64_relu_small_nn_v1", ("int8", "int8")),
        ("trt_turing_int8_i8816cudnn_int8_256x64_ldg16_relu_singleBuffer_medium_nt_v1", ("int8", "int8")),
        ("sm70_xmma_fprop_conv1x1_i8f32_f32_f32_nchw_vect_c_4kcrs_vect_c_4_nchw", None),
        ("sm50_xmma_pooling_fw_4d_FP16FP32NHWC_Average_FastDiv", None),
        ("__myl_FcMulAdd_0xfa6c1858", None),
        ("", None),
    ],
)
def test_kernels_spell_their_types(kernel: str, types: tuple[str, str] | None) -> None:
    assert kernel_types(kernel) == types


def test_eight_tells_by_names_what_it_fused(graph: Graph) -> None:
    times = {"n_pool": 3.0, "c2 + c2_QuantizeLinear + n_left + PWN(n_left_relu)": 5.0}
    found = proof(graph, EIGHT, times)
    assert [record.sources for record in found.values()] == [
        (),
        ("n_stem", "n_stem_relu"),
        ("n_left", "n_left_relu"),
        ("n_right", "n_sum", "n_out"),
        ("n_pool",),
        ("n_logits",),
    ]
    assert [record.macs for record in found.values()] == [0, STEM, BLOCK, BLOCK, 0, HEAD]
    assert [record.integer for record in found.values()] == [False, True, True, True, False, False]
    assert [record.microseconds for record in found.values()] == [0, 0, 5, 0, 3, 0]
    reasons = [record.reason for record in found.values() if not record.integer]
    assert reasons[0] == "conversion from float to 8-bit integers"
    assert "TensorRT computes CudaPooling in float" in reasons[1]
    assert reasons[2] == "Gemm: TensorRT chose a kernel that multiplies float32 and float32"
    made = prove(found.values())
    assert made.macs == STEM + 2 * BLOCK + HEAD
    assert made.integer_macs == STEM + 2 * BLOCK
    assert made.time_share == 5 / 8


def test_ten_tells_by_metadata_and_what_nobody_names_counts_as_float(graph: Graph) -> None:
    found = proof(graph, TEN)
    stem, left = found["n_stem + n_stem_relu"], found["n_left_myl1_3"]
    assert (stem.integer, stem.macs, left.integer, left.macs) == (True, STEM, True, BLOCK)
    assert left.sources == ("n_left", "n_left_relu")
    # A layer that moves the input of a convolution names it too; the one that looks like a product has its arithmetic.
    assert found["__myl_Move_myl1_4"].macs == 0
    right = found["__myl_ConvAddRelu_myl1_5"]
    assert (right.macs, right.integer, right.sources) == (BLOCK, True, ("n_right", "n_sum", "n_out"))
    lost = found["n_logits"]
    assert (lost.op, lost.macs, lost.integer) == ("Gemm", HEAD, False)
    assert "does not say which layer" in lost.reason
    assert "TensorRT computes CaskPooling in float" in found["n_pool + n_flat"].reason
    assert found["__myl_Quan_myl0_0"].reason == "conversion from float to 8-bit integers"


def test_eleven_splits_types_and_formats(graph: Graph) -> None:
    found = proof(graph, ELEVEN)
    assert "__mye116_myl0_0" not in found  # it does no work
    assert prove(found.values()).macs_share == 1.0
    assert found["n_logits_myl0_6"].integer  # both factors are 8 bits, although float comes out


def test_a_float_kernel_of_a_quantized_layer_is_called_so(graph: Graph) -> None:
    def one(**changes):
        row = {
            "Name": "n_left",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x", "Format/Datatype": "Int8"}],
            "Outputs": [{"Name": "y", "Format/Datatype": "Half"}],
            "Metadata": "[ONNX Layer: n_left]",
            **changes,
        }
        return proof(graph, text([row]))["n_left"]

    assert one(Weights={"Type": "Int8", "Count": 1}).integer
    float_weights = one(Weights={"Type": "Half", "Count": 1})
    assert not float_weights.integer
    assert "does not say that it multiplies them" in float_weights.reason
    # The kernel's name is believed more than the types around it.
    assert not one(Weights={"Type": "Int8"}, TacticName="sm80_xmma_gemm_f16f16_f16f16_f16_nn_n").integer
    dynamic = one(Inputs=[{"Name": "x", "Format/Datatype": "N/A due to dynamic shapes"}])
    assert not dynamic.integer
    assert "does not say in which type" in dynamic.reason
    assert one(Inputs=[{"Format/Datatype": "N/A"}], TacticName="sm80_xmma_fprop_i8i8_i8i32_f32_nhwc").integer
    small, large = {"Dimensions": [8], "DataType": "Float"}, {"Dimensions": [8, 8, 3, 3], "DataType": "Int8"}
    assert one(LayerType="correlation", Constants=[small, large]).integer  # compiled layers list their weights so
    assert not one(
        LayerType="correlation", Constants=[{**small, "Dimensions": [8, 8, 3, 3]}, {**large, "Dimensions": [8]}]
    ).integer
    halves = one(Inputs=[{"Name": "x", "Format/Datatype": "Half"}])
    assert halves.reason == "Conv: TensorRT gives this layer float16 numbers"


def test_what_the_graph_left_in_float_is_said(graph: Graph) -> None:
    model = network("residual")
    options = BuildOptions(exclude=("n_left",))
    partly = place_qdq(model.folded().graph, ranges_of(model), get_target("tensorrt-10"), options).graph
    row = {"Name": "n_left", "LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "Float"}], "Outputs": []}
    assert "is not quantized in the graph" in proof(partly, text([row]))["n_left"].reason
    floats = proof(graph, text([row]), mode="built in float (float16)")
    assert {record.reason for record in floats.values()} == {
        "built in float (float16)",
        "TensorRT's layer information does not say which layer computed it",
    }


def test_a_region_that_is_not_described_counts_as_float(graph: Graph) -> None:
    row = {
        "Name": "{ForeignNode[n_left...n_logits]}",
        "LayerType": "Myelin",
        "Inputs": [{"Name": "x", "Format/Datatype": "Row major Int8 format"}],
        "Outputs": [{"Name": "y", "Format/Datatype": "Row major Int8 format"}],
    }
    found = proof(graph, text([row]))["{ForeignNode[n_left...n_logits]}"]
    assert (found.integer, found.macs) == (False, 2 * BLOCK + HEAD)
    assert "does not describe" in found.reason


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("Layers: none", "is not JSON"),
        ("[]", "lists no layers"),
        (json.dumps({"Bindings": []}), "lists no layers"),
        (json.dumps({"Layers": ["conv1 + relu1"], "Bindings": []}), "only the names"),
    ],
)
def test_what_is_no_layer_information_is_refused(given: str, said: str) -> None:
    with pytest.raises(EngineError, match=said) as caught:
        read_layers(given, where="x.layers.json")
    assert caught.value.where == "x.layers.json"
    assert caught.value.remedy


def folder_with(tmp_path: Path, graph: Graph, layers: str, **expected: str) -> Path:
    onnx.save(graph.editable(), tmp_path / "qdq.onnx")
    groups = [{"nodes": words.split(), "kind": kind, "computes": "int8"} for kind, words in expected.items()]
    manifest = {"engine": {"file": "qdq.onnx"}, "choices": {"mode": "explicit", "expected_kernels": groups}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "int8.layers.json").write_text(layers)
    return tmp_path / "int8.layers.json"


def test_files_of_a_device_are_held_against_the_network(tmp_path: Path, graph: Graph, capsys) -> None:
    file = folder_with(
        tmp_path,
        graph,
        EIGHT,
        stem="n_stem n_stem_relu",
        head="n_logits",
        right="n_right n_sum n_out",
        left="n_left n_pool",
    )
    times = [{"count": 50}, {"name": "n_pool", "timeMs": 1, "averageMs": 0.002, "medianMs": 0.003}]
    times.append({"name": "c2 + c2_QuantizeLinear + n_left + PWN(n_left_relu)", "timeMs": 1, "averageMs": 0.005})
    (tmp_path / "int8.profile.json").write_text(json.dumps(times))
    found = read_evidence(file)
    assert found.network == tmp_path / "qdq.onnx"
    assert found.timed
    assert prove(found.records).time_share == 5 / 8
    assert found.surprises == (
        "n_logits (head): expected in 8 bits, is float: Gemm: TensorRT chose a kernel that multiplies float32 and float32",
        "n_left (left): in 8 bits, but n_pool is a layer of its own",
    )
    described = describe_thing(str(file))
    assert (described["macs"], described["integer_macs"]) == (STEM + 2 * BLOCK + HEAD, STEM + 2 * BLOCK)
    assert described["time_share"] == 5 / 8
    assert [row["computes"] for row in described["layers"]].count("8 bits") == 3
    print_description(described, Console(width=200))
    assert "is a layer of its own" in capsys.readouterr().out


def test_the_network_of_layers_is_found_by_what_lies_beside_them(tmp_path: Path, graph: Graph) -> None:
    file = folder_with(tmp_path, graph, EIGHT)
    onnx.save(network("residual").folded().graph.editable(), tmp_path / "float.onnx")
    assert not read_evidence(file).timed
    for stem, record, name, mode in (
        ("implicit", None, "float.onnx", "TensorRT"),
        ("float", None, "float.onnx", "built in float"),
        ("float16", {"mode": "float", "floats": "float16"}, "float.onnx", "built in float (float16)"),
        ("engine", {"mode": "explicit"}, "qdq.onnx", "conversion"),
    ):
        other = tmp_path / f"{stem}.layers.json"
        other.write_text(EIGHT)
        if record is not None:
            (tmp_path / f"{stem}.plan.json").write_text(json.dumps({"network": name, "settings": record}))
        found = read_evidence(other)
        assert found.network.name == name
        assert any(one.reason.startswith(mode) for one in found.records), stem
    assert holds_layers(file)
    renamed = tmp_path / "mine.json"
    renamed.write_text(EIGHT)
    assert holds_layers(renamed)
    assert not holds_layers(tmp_path / "manifest.json")
    (tmp_path / "int8.profile.json").write_text("[]")
    with pytest.raises(EngineError, match="no times of layers"):
        read_evidence(file)
    (tmp_path / "int8.profile.json").unlink()
    (tmp_path / "qdq.onnx").unlink()
    with pytest.raises(EngineError, match=r"not beside them \(qdq\.onnx\)"):
        read_evidence(file)
    with pytest.raises(EngineError, match="no such file"):
        read_evidence(tmp_path / "nobody.layers.json")
