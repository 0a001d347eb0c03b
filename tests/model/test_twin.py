"""The twin's own promises: values by name, taps, freeing, slicing, types, copies, errors."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from zsq_deploy.errors import ModelError, UsageError
from zsq_deploy.model.graph import Graph
from zsq_deploy.model.twin import Twin

Array = np.ndarray[Any, np.dtype[Any]]


def make(
    nodes: list[onnx.NodeProto],
    constants: dict[str, Array],
    *,
    inputs: dict[str, tuple[int, list[int | None]]],
    outputs: list[str],
    opset: int = 17,
) -> Graph:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return Graph(onnx.shape_inference.infer_shapes(model))


def network() -> Graph:
    """Conv, BN, ReLU, a residual branch, a flattening through shape arithmetic, and a linear layer."""
    rng = np.random.default_rng(0)

    def floats(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    nodes = [
        helper.make_node("Conv", ["x", "stem.weight"], ["a"], name="stem", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["a", "bn.g", "bn.b", "bn.m", "bn.v"], ["b"], name="bn"),
        helper.make_node("Relu", ["b"], ["c"], name="relu"),
        helper.make_node("Conv", ["c", "branch.weight", "branch.bias"], ["d"], name="branch", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "d"], ["e"], name="add"),
        helper.make_node("GlobalAveragePool", ["e"], ["f"], name="pool"),
        helper.make_node("Shape", ["f"], ["s"], name="shape"),
        helper.make_node("Gather", ["s", "zero"], ["n"], name="batch", axis=0),
        helper.make_node("Unsqueeze", ["n", "zeros"], ["n1"], name="unsqueeze"),
        helper.make_node("Concat", ["n1", "rest"], ["shape2"], name="shape2", axis=0),
        helper.make_node("Reshape", ["f", "shape2"], ["g"], name="flatten"),
        helper.make_node("Gemm", ["g", "fc.weight", "fc.bias"], ["y"], name="fc", transB=1),
    ]
    constants = {
        "stem.weight": floats(4, 3, 3, 3),
        "bn.g": floats(4),
        "bn.b": floats(4),
        "bn.m": floats(4),
        "bn.v": np.abs(floats(4)) + 0.5,
        "branch.weight": floats(4, 4, 3, 3),
        "branch.bias": floats(4),
        "fc.weight": floats(5, 4),
        "fc.bias": floats(5),
        "zero": np.array(0, np.int64),
        "zeros": np.array([0], np.int64),
        "rest": np.array([-1], np.int64),
    }
    return make(nodes, constants, inputs={"x": (TensorProto.FLOAT, [None, 3, 6, 6])}, outputs=["y"])


def images(n: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(7).standard_normal((n, 3, 6, 6)).astype(np.float32))


def by_hand(twin: Twin, x: torch.Tensor) -> torch.Tensor:
    w = {
        name: twin.parameter_of(name)
        for name in ("stem.weight", "branch.weight", "branch.bias", "fc.weight", "fc.bias")
    }
    g, b, m, v = (twin.parameter_of(f"bn.{letter}") for letter in "gbmv")
    f = torch.nn.functional
    a = f.conv2d(x, w["stem.weight"], padding=1)
    c = f.relu((a - m[:, None, None]) / torch.sqrt(v + 1e-5)[:, None, None] * g[:, None, None] + b[:, None, None])
    e = c + f.conv2d(c, w["branch.weight"], w["branch.bias"], padding=1)
    return e.mean((2, 3)) @ w["fc.weight"].T + w["fc.bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 3])
def test_forward(dtype: torch.dtype, batch: int) -> None:
    twin = Twin(network(), dtype=dtype, device="cpu")
    x = images(batch)
    found = twin(x)  # float32 input is converted
    assert found.dtype is dtype
    torch.testing.assert_close(found, by_hand(twin, x.to(dtype)), rtol=1e-4, atol=1e-5)


def test_values_by_name() -> None:
    twin = Twin(network(), device="cpu")
    found = twin.run({"x": images()}, ["c", "e", "shape2"])
    assert list(found) == ["c", "e", "shape2"]
    assert torch.equal(found["c"], torch.relu(twin.run({"x": images()}, ["b"])["b"]))
    assert found["shape2"].tolist() == [2, -1]
    assert torch.equal(twin.run({}, ["fc.bias"])["fc.bias"], twin.parameter_of("fc.bias"))


def test_only_what_is_needed_runs() -> None:
    """Nothing behind the wanted value is executed: an input of a wrong size for the linear layer does not matter."""
    twin = Twin(network(), device="cpu")
    seen: list[str] = []
    twin.run({"x": images()}, ["c"], {"b": lambda _: seen.append("b")})
    assert seen == ["b"]
    twin.run({"c": torch.zeros(1, 4, 2, 2)}, ["e"])  # x is not needed then
    with pytest.raises(UsageError, match="'x' is needed"):
        twin.run({"e": torch.zeros(1, 4, 2, 2)}, ["c"])


def test_taps_see_and_replace() -> None:
    twin = Twin(network(), device="cpu")
    order: list[str] = []

    def note(name: str) -> Any:
        def tap(_value: torch.Tensor) -> None:
            order.append(name)

        return tap

    names = ["e", "x", "a", "y", "shape2", "fc.weight"]
    twin.run({"x": images()}, taps={name: note(name) for name in names})
    assert order == ["fc.weight", "x", "a", "e", "shape2", "y"]

    doubled = twin.run({"x": images()}, ["c", "d"], {"c": lambda value: value * 2})
    plain = twin.run({"x": images()}, ["c", "d"])
    torch.testing.assert_close(doubled["c"], plain["c"] * 2)
    bias = twin.parameter_of("branch.bias")[:, None, None]
    torch.testing.assert_close(doubled["d"] - bias, (plain["d"] - bias) * 2, rtol=1e-4, atol=1e-4)
    moved = twin.run({"x": images()}, ["x"], {"x": lambda value: value + 1})
    assert torch.equal(moved["x"], images() + 1)


def test_values_that_nobody_needs_any_more_are_freed() -> None:
    twin = Twin(network(), device="cpu")
    alive: dict[str, weakref.ref[torch.Tensor]] = {}
    at_the_end: dict[str, bool] = {}

    def watch(name: str) -> Any:
        def tap(value: torch.Tensor) -> None:
            alive[name] = weakref.ref(value)

        return tap

    def look(_value: torch.Tensor) -> None:
        gc.collect()
        at_the_end.update({name: reference() is not None for name, reference in alive.items()})

    taps = {name: watch(name) for name in ("a", "b", "c", "d", "e")} | {"f": look}
    with torch.no_grad():
        twin.run({"x": images()}, ["y", "b"], taps)
    assert at_the_end == {"a": False, "b": True, "c": False, "d": False, "e": True}


def test_gradient_to_the_input_and_to_parameters() -> None:
    twin = Twin(network(), device="cpu")
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    weight = twin.parameter_of("branch.weight").requires_grad_()
    x = images().requires_grad_()
    twin(x).square().sum().backward()
    ours = (x.grad, weight.grad)
    x.grad = weight.grad = None
    by_hand(twin, x).square().sum().backward()
    for found, expected in zip(ours, (x.grad, weight.grad), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_parameters_have_stable_names() -> None:
    twin = Twin(network(), device="cpu")
    names = dict(twin.named_parameters())
    assert names["stem/weight"] is twin.parameter_of("stem.weight")
    assert list(twin.state_dict()) == list(Twin(network(), device="cpu").state_dict())
    with pytest.raises(UsageError, match=r"'rest'.*not a float initializer"):
        twin.parameter_of("rest")
    twin.load_state_dict({key: torch.zeros_like(value) for key, value in twin.state_dict().items()})
    assert twin(images()).abs().max() == 0


def test_names_that_collide_with_attributes() -> None:
    """An initializer may be called like a method of the module, or differ from another in a dot only."""
    nodes = [
        helper.make_node("Add", ["x", "forward"], ["a"]),
        helper.make_node("Add", ["a", "w.b"], ["b"]),
        helper.make_node("Add", ["b", "w/b"], ["y"]),
    ]
    constants = {name: np.full(2, value, np.float32) for name, value in (("forward", 1), ("w.b", 10), ("w/b", 100))}
    twin = Twin(make(nodes, constants, inputs={"x": (TensorProto.FLOAT, [2])}, outputs=["y"]), device="cpu")
    assert twin(torch.zeros(2)).tolist() == [111.0, 111.0]
    assert twin.parameter_of("w/b")[0] == 100


def test_fed_initializer_replaces_the_parameter_for_one_run() -> None:
    twin = Twin(network(), device="cpu")
    before = twin(images())
    found = twin.run({"x": images(), "fc.bias": torch.zeros(5)})["y"]
    torch.testing.assert_close(found + twin.parameter_of("fc.bias"), before)
    assert torch.equal(twin(images()), before)


def test_slices_share_parameters() -> None:
    twin = Twin(network(), device="cpu")
    values = twin.run({"x": images()}, ["c", "e", "y"])
    block = twin.slice(["c"], ["e"])
    assert block.input_names == ("c",)
    assert [node.name for node in block.graph] == ["branch", "add"]
    torch.testing.assert_close(block(values["c"]), values["e"])
    assert block.parameter_of("branch.weight") is twin.parameter_of("branch.weight")
    head = twin.slice(["e"], ["y"])
    torch.testing.assert_close(head(values["e"]), values["y"])
    copied = copy.deepcopy(block)
    with torch.no_grad():
        copied.parameter_of("branch.bias").zero_()
    assert twin.parameter_of("branch.bias").abs().sum() > 0
    with pytest.raises(UsageError, match="depends on 'x'"):
        twin.slice(["c"], ["a"])
    with pytest.raises(UsageError, match="no value called 'nothing'"):
        twin.slice(["nothing"], ["e"])


def test_copies_are_independent() -> None:
    twin = Twin(network(), device="cpu")
    before = twin(images())
    other = copy.deepcopy(twin)
    assert other.graph is twin.graph
    with torch.no_grad():
        other.parameter_of("fc.weight").zero_()
    assert torch.equal(twin(images()), before)
    torch.testing.assert_close(other(images()), other.parameter_of("fc.bias").expand(2, -1))


def test_changes_of_type_and_layout() -> None:
    twin = Twin(network(), device="cpu")
    expected = Twin(network(), dtype=torch.float64, device="cpu")(images())
    double = copy.deepcopy(twin).double()
    assert double.dtype is torch.float64
    assert torch.equal(double(images()), expected)
    last = copy.deepcopy(twin).to(memory_format=torch.channels_last)
    assert last.parameter_of("stem.weight").is_contiguous(memory_format=torch.channels_last)
    seen: list[bool] = []
    found = last.run(
        {"x": images().to(memory_format=torch.channels_last)},
        taps={"e": lambda value: seen.append(value.is_contiguous(memory_format=torch.channels_last))},
    )
    assert seen == [True]
    torch.testing.assert_close(found["y"].double(), expected, rtol=1e-4, atol=1e-4)
    half = copy.deepcopy(twin).to(torch.bfloat16)
    assert half(images()).dtype is torch.bfloat16


def test_casts_follow_the_twin_type() -> None:
    """What the graph calls float32 is float64 in a float64 twin, wherever it comes from."""
    nodes = [
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["k"], value_float=0.1),
        helper.make_node("Mul", ["f", "k"], ["m"]),
        helper.make_node("Cast", ["m"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["h"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = make(nodes, {}, inputs={"i": (TensorProto.INT64, [3])}, outputs=["y"])
    given = torch.tensor([1, 2, 3])
    twin = Twin(graph, device="cpu")
    torch.testing.assert_close(twin(given), (given * torch.tensor(0.1)).half().float(), rtol=0, atol=0)
    for exact in (Twin(graph, dtype=torch.float64, device="cpu"), twin.double()):
        torch.testing.assert_close(exact(given), given.double() * float(np.float32(0.1)), rtol=0, atol=0)


def test_shape_arithmetic_is_settled_when_built() -> None:
    """What follows from integer constants alone is computed once; it can still be fetched."""
    nodes = [
        helper.make_node("Constant", [], ["two"], value_ints=[2]),
        helper.make_node("Mul", ["two", "three"], ["six"]),
        helper.make_node("Concat", ["minus", "six"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["y"]),
    ]
    constants = {"three": np.array([3], np.int64), "minus": np.array([-1], np.int64)}
    twin = Twin(make(nodes, constants, inputs={"x": (TensorProto.FLOAT, [None, 3])}, outputs=["y"]), device="cpu")
    seen: list[str] = []
    found = twin.run({"x": torch.zeros(4, 3)}, ["y", "target"], {"six": lambda _: seen.append("six")})
    assert found["y"].shape == (2, 6)
    assert found["target"].tolist() == [-1, 6]
    assert seen == ["six"]


def test_many_inputs_and_outputs() -> None:
    nodes = [
        helper.make_node("Add", ["a", "b"], ["sum"]),
        helper.make_node("Split", ["sum"], ["left", ""], axis=1),
        helper.make_node("TopK", ["sum", "k"], ["", "places"]),
    ]
    graph = make(
        nodes,
        {"k": np.array([1], np.int64)},
        inputs={"a": (TensorProto.FLOAT, [None, 4]), "b": (TensorProto.FLOAT, [None, 4])},
        outputs=["left", "places", "a"],
    )
    twin = Twin(graph, device="cpu")
    x = torch.tensor([[1.0, 5.0, 2.0, 3.0]])
    left, places, same = twin(x, torch.zeros(1, 4))
    assert left.tolist() == [[1.0, 5.0]]
    assert places.tolist() == [[1]]
    assert torch.equal(same, x)
    with pytest.raises(UsageError, match=r"1 input\(s\) given, the network has 2"):
        twin(x)


def test_errors_name_the_node_or_the_value() -> None:
    twin = Twin(network(), device="cpu")
    with pytest.raises(ModelError, match=r"node 'stem' \(Conv\)") as caught:
        twin(torch.zeros(1, 7, 6, 6))
    assert "(1, 7, 6, 6)" in str(caught.value)
    for call in (
        lambda: twin.run({"x": images()}, ["nothing"]),
        lambda: twin.run({"x": images(), "nothing": images()}),
        lambda: twin.run({"x": images()}, taps={"nothing": lambda _: None}),
    ):
        with pytest.raises(UsageError, match="no value called 'nothing'"):
            call()


def test_a_tap_may_raise_what_it_likes() -> None:
    class StopHereError(RuntimeError):
        pass

    def stop(_value: torch.Tensor) -> None:
        raise StopHereError

    with pytest.raises(StopHereError):
        Twin(network(), device="cpu").run({"x": images()}, taps={"c": stop})


def test_nothing_is_read_on_the_device() -> None:
    """Tensors of the meta device have no numbers: a run on them succeeds only when no kernel waits for any."""
    nodes = [
        helper.make_node("Reshape", ["x", "target"], ["r"]),
        helper.make_node("Shape", ["r"], ["s"]),
        helper.make_node("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Sqrt", ["f"], ["q"]),
        helper.make_node("Div", ["r", "q"], ["y"]),
    ]
    inputs = {"x": (TensorProto.FLOAT, [None, 4]), "target": (TensorProto.INT64, [2])}
    twin = Twin(make(nodes, {}, inputs=inputs, outputs=["y"]), device="meta")
    found = twin.run({"x": torch.zeros(3, 4, device="meta"), "target": torch.tensor([-1, 2])})["y"]
    assert found.shape == (6, 2)
    assert found.device.type == "meta"
    assert Twin(network(), device="meta")(images().to("meta")).shape == (2, 5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu() -> None:
    expected = Twin(network(), dtype=torch.float64, device="cpu")(images())
    twin = Twin(network(), dtype=torch.float64)
    assert twin.device.type == "cuda"
    torch.testing.assert_close(twin(images()).cpu(), expected)
    torch.testing.assert_close(Twin(network(), dtype=torch.float64, device="cpu").cuda()(images()).cpu(), expected)
