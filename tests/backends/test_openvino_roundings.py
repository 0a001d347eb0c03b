"""Roundings that no integer kernel reads are left out: what stays, what goes, and what the engine computes then."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from zsq_deploy.backends import get_target
from zsq_deploy.backends.openvino import quantizer
from zsq_deploy.backends.openvino.convert import convert, save
from zsq_deploy.backends.openvino.lint import lint
from zsq_deploy.backends.openvino.options import BuildOptions, NncfOptions
from zsq_deploy.backends.openvino.quantizer import build
from zsq_deploy.backends.openvino.roundings import Lean, drop_float_roundings
from zsq_deploy.backends.openvino.runner import OvRunner
from zsq_deploy.model import Model
from zsq_deploy.model.editing import Net
from zsq_deploy.model.graph import Graph
from zsq_deploy.quant import PlacementRules, insert_qdq
from zsq_deploy.quant.reader import read_qdq

from .openvino_engines import noise, twin_outputs
from .ort_engines import Builder, calibration_set, convnet, everything, loaded, ranges_of, transformer

CPU = get_target("openvino-cpu")

TOKENS, WIDTH, HEADS = 17, 32, 4
PRODUCTS = ("Conv", "Gemm", "MatMul")


class Deep(Builder):
    """A transformer with layer normalization behind (or in front of) every residual sum."""

    def dense(self, x: str, name: str, inputs: int, outputs: int) -> str:
        weight = self.constant(f"{name}_w", self.rng.standard_normal((inputs, outputs)) * 0.25)
        bias = self.constant(f"{name}_b", self.rng.normal(0, 0.1, outputs))
        return self.node("Add", [self.node("MatMul", [x, weight], f"{name}_mm"), bias], name)

    def normed(self, x: str, name: str) -> str:
        gamma = self.constant(f"{name}_g", self.rng.uniform(0.5, 1.5, WIDTH))
        beta = self.constant(f"{name}_be", self.rng.normal(0, 0.2, WIDTH))
        return self.node("LayerNormalization", [x, gamma, beta], name, axis=-1)

    def attention(self, x: str, name: str) -> str:
        parts = []
        for part, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            y = self.dense(x, f"{name}_{part}", WIDTH, WIDTH)
            y = self.node("Reshape", [y, "split"], f"{name}_{part}_split")
            parts.append(self.node("Transpose", [y], f"{name}_{part}_heads", perm=order))
        scores = self.node("MatMul", parts[:2], f"{name}_scores")
        scores = self.node("Mul", [scores, "temperature"], f"{name}_scaled")
        y = self.node("MatMul", [self.node("Softmax", [scores], f"{name}_soft", axis=-1), parts[2]], f"{name}_mixed")
        y = self.node(
            "Reshape", [self.node("Transpose", [y], f"{name}_back", perm=[0, 2, 1, 3]), "join"], f"{name}_join"
        )
        return self.dense(y, f"{name}_out", WIDTH, WIDTH)

    def hidden(self, x: str, name: str) -> str:
        y = self.node("Relu", [self.dense(x, f"{name}_up", WIDTH, 2 * WIDTH)], f"{name}_act")
        return self.dense(y, f"{name}_down", 2 * WIDTH, WIDTH)


def deep(layers: int, *, before: bool = False, seed: int = 0) -> onnx.ModelProto:
    b = Deep(seed)
    b.constant("split", [0, TOKENS, HEADS, WIDTH // HEADS], np.int64)
    b.constant("join", [0, TOKENS, WIDTH], np.int64)
    b.constant("temperature", (WIDTH // HEADS) ** -0.5)
    x = b.dense("x", "embed", 12, WIDTH)
    for i in range(layers):
        for place, part in enumerate((b.attention, b.hidden)):
            name = f"layer{i}_{place}"
            y = part(b.normed(x, f"{name}_norm") if before else x, name)
            x = b.node("Add", [x, y], f"{name}_sum")
            x = x if before else b.normed(x, f"{name}_norm")
    x = b.normed(x, "last") if before else x
    b.gemm(b.node("ReduceMean", [x], "pooled", axes=[1], keepdims=0), "logits", WIDTH, 10)
    return b.model(["n", TOKENS, 12], {"logits": ["n", 10]})


def rounded_everywhere(model: Model, feeds: dict[str, np.ndarray]) -> Graph:
    """Every float number that the network computes is rounded, for all its readers; and the weights of products, for each output."""
    graph = model.folded().graph
    net = Net(graph.proto)
    readers = {name: list(nodes) for name, nodes in net.consumers().items()}

    def pair(value: str, scale: np.ndarray, zero: np.ndarray, axis: int | None, nodes: list[onnx.NodeProto]) -> None:
        names = [net.add_constant(f"{value}_scale", scale.astype(np.float32)), net.add_constant(f"{value}_zero", zero)]
        more = {} if axis is None else {"axis": axis}
        net.insert_before(
            min(nodes, key=net.nodes.index),
            net.new_node("QuantizeLinear", [value, *names], [f"{value}_codes"], f"{value}_Q", **more),
            net.new_node("DequantizeLinear", [f"{value}_codes", *names], [f"{value}_rounded"], f"{value}_DQ", **more),
        )
        for node in nodes:
            node.input[:] = [f"{value}_rounded" if name == value else name for name in node.input]

    for value, array in everything(graph, feeds).items():
        nodes = readers.get(value, [])
        if nodes:
            low, high = min(float(array.min()), 0.0), max(float(array.max()), 0.0)
            scale = np.asarray((high - low) / 255)
            pair(value, scale, np.asarray(np.rint(-low / scale), np.uint8), None, nodes)
    for node in graph:
        if node.op_type in PRODUCTS and (weight := graph.constant(node.input[1])) is not None:
            axis = 1 if node.op_type == "MatMul" else 0
            rest = tuple(place for place in range(weight.ndim) if place != axis)
            scale = np.abs(weight).max(rest) / 127
            pair(node.input[1], scale, np.zeros(scale.shape, np.int8), axis, readers[node.input[1]])
    net.touch()
    return Graph(net.proto())


def origins(graph: Graph, value: str) -> list[str]:
    """Types of what made a number, through what only moves or scales it."""
    maker = graph.producer(value)
    if maker is None:
        return ["constant" if graph.constant(value) is not None else "input"]
    if maker.op_type in ("Transpose", "Reshape", "ReduceMean", "Relu"):
        return origins(graph, maker.input[0])
    return [maker.op_type]


@pytest.mark.parametrize("before", [False, True], ids=["norm behind", "norm in front"])
def test_what_is_rounded_is_read_by_integer_kernels(before: bool, tmp_path: Path) -> None:
    model = loaded(deep(2, before=before), tmp_path)
    feeds = {"x": noise((8, TOKENS, 12))}
    full = rounded_everywhere(model, feeds)
    lean = drop_float_roundings(full)
    onnx.checker.check_model(lean.graph.proto, full_check=True)
    kinds = {node.name: node.op_type for node in model.folded().graph}
    for name, kind in kinds.items():
        operands = [origins(lean.graph, value) for value in lean.graph.node(name).input]
        if kind == "MatMul":  # each still multiplies codes
            assert operands == [["DequantizeLinear"]] * 2, name
        elif kind in ("LayerNormalization", "Softmax") or name.endswith("_sum_node"):  # none is behind a rounding
            assert ["DequantizeLinear"] not in operands, name
    scales = {tensor.name: (tensor.scale.tolist(), tensor.zero_point.tolist()) for tensor in read_qdq(full)}
    kept = {tensor.name: (tensor.scale.tolist(), tensor.zero_point.tolist()) for tensor in read_qdq(lean.graph)}
    assert kept.items() < scales.items()
    assert scales.keys() - kept.keys() == set(lean.dropped)
    # What a layer normalization gives is rounded for the products and taken unrounded by the sum, where a sum reads it.
    assert ("layer0_0_norm" in lean.bypassed) == (not before)
    assert {"layer0_0_sum", "layer0_0_scaled"} <= set(lean.dropped)
    again = drop_float_roundings(lean.graph)
    assert again == Lean(lean.graph)
    assert "13 are rounded" in Lean(lean.graph, ("a",), ("b",) * 13).notes("POT")[0]
    assert again.notes("POT") == ()


def test_convolutional_networks_stay_as_they_are(tmp_path: Path) -> None:
    """Sums, pools, concatenations and moves between convolutions compute on codes."""
    model = loaded(convnet(), tmp_path)
    feeds = {"x": noise((8, 3, 16, 16))}
    for residual in ("both", "skip"):
        graph = insert_qdq(
            model.folded().graph,
            ranges_of(model, feeds),
            activation=CPU.activation,
            weight=CPU.weight,
            rules=PlacementRules(residual=residual, bias="float"),
        )
        assert drop_float_roundings(graph) == Lean(graph)


def test_a_product_of_a_float_number_needs_no_rounding(tmp_path: Path) -> None:
    """The values of attention are multiplied by a softmax that is not rounded: rounding them buys nothing."""
    model = loaded(transformer(), tmp_path)
    feeds = {"x": noise((8, 5, 8))}
    net = Net(rounded_everywhere(model, feeds).proto)
    for node in net.nodes:
        node.input[:] = ["attention" if name == "attention_rounded" else name for name in node.input]
    net.touch()
    net.sweep()
    lean = drop_float_roundings(Graph(net.proto()))
    assert "v" in lean.dropped
    assert not {"q", "kt"} & set(lean.dropped)
    assert list(lean.graph.node("mixed_node").input) == ["attention", "v"]


@pytest.mark.parametrize(
    ("kind", "zero", "added", "moves"),
    [
        (np.int8, 0, False, True),
        (np.uint8, 128, False, True),
        (np.uint8, 0, False, True),
        (np.uint8, 100, False, False),
        (np.int8, 0, True, True),
        (np.uint8, 100, True, True),
    ],
)
def test_a_rounding_in_front_of_a_normalization_changes_its_epsilon(
    kind: type[np.integer], zero: int, added: bool, moves: bool, tmp_path: Path
) -> None:
    """OpenVINO normalizes the codes and keeps epsilon as it is; the rule and the lint are there for that."""
    epsilon, step = 1e-3, float(np.float32(0.05))
    b = Builder()
    names = [b.constant("step", step), b.constant("zero", zero, kind)]
    y = b.node("DequantizeLinear", [b.node("QuantizeLinear", ["x", *names], "codes"), *names], "rounded")
    y = b.node("Add", [y, "x"], "sum") if added else y
    ones, zeros = b.constant("ones", np.ones(64)), b.constant("zeros", np.zeros(64))
    b.node("LayerNormalization", [y, ones, zeros], "y", axis=-1, epsilon=epsilon)
    graph = Graph(b.model([1, 8, 64], {"y": [1, 8, 64]}))
    feeds = {"x": noise((1, 8, 64)) * 3 * step}

    def normalized(values: np.ndarray, variance: float) -> np.ndarray:
        centred = values - values.mean(-1, keepdims=True)
        return np.asarray(centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + variance))

    def computed(of: Graph, name: str) -> np.ndarray:
        save(convert(of), tmp_path / f"{name}.xml")
        return OvRunner(tmp_path / f"{name}.xml", CPU).run(feeds)["y"]

    wide = feeds["x"].astype(np.float64)
    limits = np.iinfo(kind)
    read = (np.clip(np.rint(wide / step) + zero, limits.min, limits.max) - zero) * step + (wide if added else 0)
    np.testing.assert_allclose(twin_outputs(graph, feeds)["y"], normalized(read, epsilon), atol=1e-6)
    engine = computed(graph, "rounded")
    np.testing.assert_allclose(engine, normalized(read, epsilon * (step**2 if moves else 1)), atol=1e-5)
    assert (np.abs(engine - normalized(read, epsilon)).max() > 0.01) == moves  # not what the graph says
    assert [finding.rule for finding in lint(graph, CPU)] == ["rounded-before-normalization"] * moves

    lean = drop_float_roundings(graph)
    assert lean.dropped == ("x",)
    assert lint(lean.graph, CPU) == []
    np.testing.assert_allclose(computed(lean.graph, "lean"), normalized(wide * (2 if added else 1), epsilon), atol=1e-5)


@pytest.mark.parametrize("vendor", ["nncf", pytest.param("pot", marks=(pytest.mark.pot, pytest.mark.slow))])
def test_a_deep_transformer_computes_what_its_graph_says(
    vendor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if vendor == "pot":
        request.getfixturevalue("pot_environment")
    model = loaded(deep(6), tmp_path)
    images = calibration_set(model, {"x": noise((8, TOKENS, 12), 1)})
    feeds = {"x": noise((200, TOKENS, 12), 2)}
    options = BuildOptions(quantizer=vendor, exact_scales=True, nncf=NncfOptions(fast_bias_correction=True))

    def measured(name: str) -> tuple[float, float, float, list[str]]:
        """Share of outputs within 2 LSB, top-1 agreement, error against float, and who computes products in integers."""
        made = build(model, None, CPU, tmp_path / name, options=options, calibration=images)
        runner = OvRunner(made.path, CPU)
        got, wanted = runner.run(feeds)["logits"], twin_outputs(made, feeds)["logits"]
        step = np.ptp(wanted) / 255
        floating = twin_outputs(model.folded().graph, feeds)["logits"]
        kernels = [record for record in runner.kernels({"x": feeds["x"][:1]}) if record.macs]
        return (
            float((np.abs(got - wanted) <= 2 * step).mean()),
            float((got.argmax(1) == wanted.argmax(1)).mean()),
            float(np.square(got - floating).sum()),
            sorted(record.node for record in kernels if record.integer),
        )

    within, agreement, error, integer = measured("lean")
    assert within >= 0.995
    assert agreement >= 0.995
    made = build(model, None, CPU, tmp_path / "lean", options=options, calibration=images)
    assert made.choices["roundings_left_out"]["everywhere"]
    assert any(vendor.upper() in note for note in made.choices["notes"])
    assert not [finding for finding in lint(made.qdq_path, CPU) if finding.rule == "rounded-before-normalization"]

    monkeypatch.setattr(quantizer, "drop_float_roundings", Lean)
    vendors_within, _, vendors_error, vendors_integer = measured("as the vendor rounds")
    assert vendors_within < within
    assert error < 1.2 * vendors_error
    assert len(vendors_integer) == len(integer)  # nothing that ran in integers went back to float
