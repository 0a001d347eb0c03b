"""Unsupported operators are reported once, with all of their places."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from zsq_deploy.errors import UnsupportedOpError
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.ops import OPS, check_supported, unsupported
from zsq_deploy.model.ops.registry import op
from zsq_deploy.model.twin import Twin


def chain(*steps: tuple[str, str, dict[str, object]], opset: int = 17) -> Graph:
    """Nodes (operator, name, attributes) one behind the other."""
    nodes = []
    for index, (op_type, name, attributes) in enumerate(steps):
        domain, _, kind = op_type.rpartition("::")
        nodes.append(helper.make_node(kind, [f"v{index}"], [f"v{index + 1}"], name=name, domain=domain, **attributes))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("v0", TensorProto.FLOAT, [None, 3])],
        [helper.make_tensor_value_info(f"v{len(steps)}", TensorProto.FLOAT, None)],
    )
    return Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


def test_all_places_in_one_error() -> None:
    graph = chain(
        ("Relu", "fine", {}),
        ("acme::Swirl", "first", {}),
        ("Relu", "fine too", {}),
        ("acme::Swirl", "second", {}),
        ("Cast", "to text", {"to": TensorProto.STRING}),
        ("Gelu", "newer", {}),
    )
    with pytest.raises(UnsupportedOpError) as caught:
        Twin(graph)
    text = str(caught.value)
    assert "3 operator form(s) in 4 node(s)" in text
    assert "acme::Swirl (not in the op table): first, second" in text
    assert "STRING" in text
    assert "Gelu (defined in opsets 20 to 21, the graph says opset 17): newer" in text
    assert "zsq_deploy/model/ops" in text
    assert [use.nodes for use in unsupported(graph)] == [("first", "second"), ("to text",), ("newer",)]


def test_many_places_are_counted() -> None:
    graph = chain(*[("acme::Swirl", f"n{index}", {}) for index in range(30)])
    with pytest.raises(UnsupportedOpError, match="and 22 more"):
        check_supported(graph)


@pytest.mark.parametrize("opset", [9, 12, 22, 24])
def test_opsets_outside_the_range(opset: int) -> None:
    with pytest.raises(UnsupportedOpError, match=f"opset {opset}"):
        Twin(chain(("Relu", "r", {}), opset=opset))


def test_malformed_attributes_are_named() -> None:
    graph = chain(("SpaceToDepth", "no block size", {}), ("Concat", "no axis", {}))
    with pytest.raises(UnsupportedOpError, match="malformed attributes") as caught:
        Twin(graph)
    assert "no block size" in str(caught.value)
    assert "no axis" in str(caught.value)


def test_supported_graph_passes() -> None:
    check_supported(chain(("Relu", "r", {}), ("Softmax", "s", {})))


def test_an_operator_is_entered_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        op("Relu")(lambda _node: lambda x: x)


def test_rows_name_operators_that_onnx_knows() -> None:
    """Every row of the default domain is an operator of the opsets that it claims, and not of those that it does not."""
    for (domain, name), row in OPS.items():
        if domain:
            continue
        first = onnx.defs.get_schema(name, row.until, "")
        assert not first.deprecated
        assert onnx.defs.get_schema(name, row.since, "") is not None
        if row.since > 13:
            with pytest.raises(onnx.defs.SchemaError):
                onnx.defs.get_schema(name, row.since - 1, "")
