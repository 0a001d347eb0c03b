"""The rule behind `--method auto`, on small tables whose answer can be seen, and on the table that is shipped."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.calib.evidence import Evidence, Kind, Measured, Row, kind_of, load_evidence
from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.recommend import recommend
from zsq_deploy.errors import CalibrationError
from zsq_deploy.model import Graph, Model

SMALL = Kind(True, True, False, 1024, 1000)


def network(*, norm: bool = True, depthwise: bool = False, size: int = 8, classes: int | None = 5) -> Model:
    random = np.random.default_rng(0)
    constants = {
        "w": random.normal(size=(4, 4, 1, 1)),
        "d": random.normal(size=(4, 1, 1, 1)),
        "l": random.normal(size=(4, 5)),
    }
    constants |= {name: np.ones(4) for name in "gbmv"}
    nodes = [helper.make_node("Conv", ["x", "d" if depthwise else "w"], ["z"], "conv", group=4 if depthwise else 1)]
    nodes += [helper.make_node("BatchNormalization", ["z", "g", "b", "m", "v"], ["y"], "norm")] if norm else []
    value = "y" if norm else "z"
    shape: list[object] = ["n", 4, size, size]
    if classes is not None:
        nodes += [
            helper.make_node("GlobalAveragePool", [value], ["p"], "pool"),
            helper.make_node("Flatten", ["p"], ["f"], "flatten"),
            helper.make_node("MatMul", ["f", "l"], ["out"], "last"),
        ]
        shape = ["n", classes]
    else:
        nodes.append(helper.make_node("Relu", [value], ["out"], "relu"))
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, size, size])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items() if k in used],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(proto)
    return Model(Graph(proto), name="net")


def row(method: str, drop: float | None, agreement: float, seconds: float | None = 10.0, **more: object) -> Row:
    bits = {"w8a8": Measured(drop, agreement, 10_000)}
    fields = {"network": "a", "kind": SMALL, "protocol": "p", "images": 256, **more}
    return Row(method=method, seconds=seconds, results=fields.pop("results", bits), **fields)


def table(*rows: Row) -> Evidence:
    return Evidence(rows)


def test_kinds_of_networks():
    kind = kind_of(network())
    assert kind == Kind(True, True, False, 64, 4 * 4 * 64 + 20)
    assert kind_of(network(norm=False)).batch_norm is False
    assert kind_of(network(depthwise=True)).depthwise is True
    assert kind_of(network(classes=None)).classifier is False
    assert not kind_of(network(size=64)).large
    assert kind_of(network(size=65)).large


def test_what_loses_clearly_less_is_taken_whatever_it_takes():
    found = recommend(network(), evidence=table(row("zeroq", 0.10, 0.8, 1), row("genie", 0.01, 0.95, 9_000)))
    assert found.method == "genie"
    assert any("worse: zeroq (+10.00" in reason for reason in found.reasons)
    assert [each.method for each in found.candidates] == ["genie", "zeroq"]


def test_of_equals_the_fastest_is_taken():
    rows = (row("zeroq", 0.0100, 0.95, 100), row("genie", 0.0101, 0.951, 9_000))
    found = recommend(network(), evidence=table(*rows))
    assert found.method == "zeroq"
    # 9,000 s on a network of 1,000 multiply-accumulates
    macs = kind_of(network()).macs
    assert {each.method: each.seconds for each in found.candidates}["genie"] == pytest.approx(9_000 * macs / 1000)


def test_below_a_minute_agreement_decides():
    rows = (row("gaussian", 0.01, 0.9500, 1), row("fractal", 0.0101, 0.9515, 4))
    assert recommend(network(), evidence=table(*rows)).method == "fractal"


def test_a_method_that_agrees_less_is_no_equal():
    rows = (row("fractal", 0.0100, 0.95, 100), row("ones", 0.0101, 0.90, 1))
    found = recommend(network(), evidence=table(*rows))
    assert found.method == "fractal"
    assert "worse: ones" in found.reasons[-1]


def test_the_time_limit_takes_steps_and_then_methods_away():
    rows = (row("zeroq", 0.001, 0.99, 100.0, parameters={"steps": 200}), row("fractal", 0.2, 0.7, 0.001))
    scale = kind_of(network()).macs / 1000
    evidence = table(*rows)
    assert dict(recommend(network(), evidence=evidence, time_limit=101 * scale).parameters) == {"steps": 200}
    tight = recommend(network(), evidence=evidence, time_limit=60 * scale)
    assert (tight.method, dict(tight.parameters)) == ("zeroq", {"steps": 120})
    assert tight.expected_seconds == pytest.approx(60 * scale)
    late = recommend(network(), evidence=evidence, time_limit=49 * scale)
    assert late.method == "fractal"
    assert any("not within" in reason and "zeroq" in reason for reason in late.reasons)


def test_networks_of_the_same_kind_come_first():
    large = dataclasses.replace(SMALL, pixels=224 * 224)
    rows = (row("genie", 0.2, 0.8, kind=large, network="b"), row("zeroq", 0.1, 0.8, kind=large, network="b"))
    near = (row("genie", 0.0, 0.99), row("zeroq", 0.1, 0.8))
    assert recommend(network(), evidence=table(*rows, *near)).method == "genie"
    assert recommend(network(size=80), evidence=table(*rows, *near)).method == "zeroq"
    far = recommend(network(), evidence=table(*rows))
    assert far.method == "zeroq"
    assert any("the size of the images" in reason for reason in far.reasons)


def test_a_network_that_no_method_saves_says_nothing():
    lost = [row("zeroq", 0.6, 0.12, network="lost", kind=SMALL), row("genie", 0.5, 0.2, network="lost", kind=SMALL)]
    kept = [row("zeroq", 0.1, 0.8, network="kept", kind=SMALL), row("genie", 0.3, 0.6, network="kept", kind=SMALL)]
    assert recommend(network(), evidence=table(*lost, *kept)).method == "zeroq"
    alone = recommend(network(), evidence=table(*lost))
    assert "nothing has been measured" in alone.reasons[0]


def test_a_method_that_fails_elsewhere_is_not_relied_on():
    here = (row("uniform", 0.0, 0.95, seconds=0.1), row("zeroq", 0.0, 0.94, seconds=50.0))
    assert recommend(network(), evidence=table(*here)).method == "uniform"
    far = dataclasses.replace(SMALL, depthwise=True)
    there = (row("uniform", 0.4, 0.6, kind=far, network="b"), row("zeroq", 0.0, 0.9, kind=far, network="b"))
    found = recommend(network(), evidence=table(*here, *there))
    assert found.method == "zeroq"
    assert any("uniform" in reason and "fail" in reason for reason in found.reasons)


def test_batch_norm_is_never_mixed():
    found = recommend(network(norm=False), evidence=table(row("gaussian", 0.0, 1.0)))
    assert "nothing has been measured" in found.reasons[0]
    assert found.method != "zeroq"


def test_other_bits_are_not_guessed():
    found = recommend(network(), bits="w4a4", evidence=table(row("genie", 0.0, 1.0)))
    assert found.method == "zeroq"
    assert "nothing has been measured in w4a4" in found.reasons[0]
    other = row("genie", None, 1.0, results={"w4a4": Measured(0.1, 0.8, 100)})
    assert recommend(network(), bits="W4A4", evidence=table(other)).method == "genie"


def test_methods_are_compared_under_one_protocol_and_on_the_same_networks():
    rows = (
        row("zeroq", 0.03, 0.9), row("fractal", 0.02, 0.95), row("fractal", 0.02, 0.95, network="b"), row("zeroq", 0.03, 0.9, network="b"),
        row("genie", 0.0, 1.0), row("ones", -0.5, 1.0, protocol="q"),
    )  # fmt: skip
    found = recommend(network(), evidence=table(*rows))
    assert found.method == "fractal"  # genie was measured on one of the two networks only
    assert {each.method for each in found.candidates} == {"zeroq", "fractal"}


def test_engines_count_more_than_simulations():
    simulated = [row(name, 0.0, 1.0, protocol="a") for name in ("zeroq", "genie", "fractal")]
    built = [
        row("gaussian", 0.1, 0.9, protocol="b", engines=True),
        row("uniform", 0.4, 0.6, protocol="b", engines=True),
    ]
    assert recommend(network(), evidence=table(*simulated, *built)).method == "gaussian"


def test_methods_that_the_network_cannot_use_are_left_out():
    evidence = table(row("deepinversion", 0.0, 1.0), row("fractal", 0.5, 0.5))
    assert recommend(network(), evidence=evidence).method == "deepinversion"
    assert recommend(network(classes=None), evidence=evidence).method == "fractal"
    unknown = table(row("no-such-method", 0.0, 1.0), row("real", 0.0, 1.0), row("fractal", 0.5, 0.5))
    assert recommend(network(), evidence=unknown).method == "fractal"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["zeroq", "genie", "fractal", "gaussian"]),
            st.floats(-0.05, 0.5),
            st.floats(0.2, 1.0),
            st.floats(0.01, 5_000),
        ),
        min_size=1,
        unique_by=lambda each: each[0],
    ),
    st.none() | st.floats(0.1, 1e4),
)
@settings(max_examples=60, deadline=None)
def test_the_choice_keeps_its_promises(rows, limit):
    evidence = table(*(row(*each) for each in rows))
    found = recommend(network(), evidence=evidence, time_limit=limit)
    shuffled = recommend(network(), evidence=table(*(row(*each) for each in reversed(rows))), time_limit=limit)
    assert shuffled == found
    assert found.method in METHODS
    assert json.loads(json.dumps(found.to_json()))["method"] == found.method
    if limit is not None and found.expected_seconds is not None:
        assert found.expected_seconds <= limit * (1 + 1e-9)
    chosen = [each for each in found.candidates if each.method == found.method]
    if chosen and limit is None:  # nothing that is measurably better was left
        best = found.candidates[0]
        assert chosen[0].loss - best.loss <= math.hypot(chosen[0].error, best.error)


def test_the_error_of_a_paired_difference():
    assert Measured(0.0, 0.99, 2000).error == pytest.approx(math.sqrt(0.01 / 2000))
    assert Measured(0.0, 1.0, 100).error == pytest.approx(0.01)  # no disagreement seen is not none
    assert Measured(0.0, 0.9, 1000, 4, 0.02).error == pytest.approx(math.sqrt(0.1 / 1000 + 0.02**2 / 4))
    assert Measured(None, 0.9, 1000).loss == pytest.approx(0.1)


def test_the_shipped_table():
    evidence = load_evidence()
    assert Evidence.from_json(json.loads(json.dumps(evidence.to_json()))) == evidence
    assert evidence.notes
    for each in evidence.rows:
        assert each.method in METHODS
        assert each.protocol
        assert each.results
        assert set(each.parameters) <= set(METHODS[each.method].defaults)
        for measured in each.results.values():
            assert 0 <= measured.agreement <= 1
            assert measured.images > 0
    with pytest.raises(CalibrationError, match="no table of evidence"):
        Evidence.from_json({"rows": []})
