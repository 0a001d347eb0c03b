"""Cleaning: each kind of exporter noise on a small graph, judged by ONNX Runtime on the original."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from zsq_deploy.model import Graph, Model, load_model
from zsq_deploy.model.batch import reshape_batch_axis, scales_for
from zsq_deploy.model.clean import clean


def text(body: str, *, signature: str = "(float[N,4,8,8] x) => (float y)", opset: int = 17) -> onnx.ModelProto:
    head = f'<ir_version: 8, opset_import: ["" : {opset}]>'
    model = onnx.parser.parse_model(f"{head} g {signature} {{ {body} }}")
    for value in model.graph.output:  # the text form cannot leave the rank open
        value.type.tensor_type.ClearField("shape")
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}{index}"
    return model


def ops(graph: Graph) -> Counter[str]:
    return Counter(node.op_type for node in graph)


@pytest.fixture
def cleaned(tmp_path, ort_run, relative_error, images):
    """Load a model and compare it with the original at batch 1 and 3."""

    def check(model: onnx.ModelProto, batches=(1, 3), **options) -> Model:
        path = tmp_path / "net.onnx"
        onnx.save(model, path)
        loaded = load_model(path, **options)
        onnx.checker.check_model(loaded.graph.proto, full_check=True)
        for batch in batches:
            feeds = images(loaded.graph, batch)
            for found, wanted in zip(ort_run(loaded.graph, feeds), ort_run(path, feeds), strict=True):
                assert relative_error(found, wanted) < 1e-5
        return loaded

    return check


def test_computed_reshape_becomes_one_constant(cleaned):
    model = cleaned(
        text("""
        s = Shape (x)
        zero = Constant <value = int64 {0}> ()
        n = Gather (s, zero)
        axes = Constant <value_ints = [0]> ()
        n1 = Unsqueeze (n, axes)
        rest = Constant <value_ints = [2, 128]> ()
        shape = Concat <axis = 0> (n1, rest)
        r = Reshape (x, shape)
        y = Relu (r)
    """)
    )
    assert ops(model.graph) == {"Reshape": 1, "Relu": 1}
    node = next(node for node in model.graph if node.op_type == "Reshape")
    np.testing.assert_array_equal(model.graph.constant(node.input[1]), [-1, 2, 128])
    assert model.graph.shape("y") == (None, 2, 128)


def test_batch_that_moves_to_another_axis(cleaned):
    """Heads are folded into the batch and unfolded again, as attention is spelled."""
    model = cleaned(
        text("""
        s = Shape (x)
        zero = Constant <value = int64 {0}> ()
        n = Gather (s, zero)
        two = Constant <value = int64 {2}> ()
        n2 = Mul (n, two)
        axes = Constant <value_ints = [0]> ()
        a = Unsqueeze (n2, axes)
        b = Unsqueeze (n, axes)
        rest = Constant <value_ints = [2, 64]> ()
        shape = Concat <axis = 0> (a, rest)
        r = Reshape (x, shape)
        t = Softmax <axis = -1> (r)
        back = Constant <value_ints = [4, 8, 8]> ()
        old = Concat <axis = 0> (b, back)
        y = Reshape (t, old)
    """)
    )
    assert ops(model.graph) == {"Reshape": 2, "Softmax": 1}


def test_repeated_constant_keeps_the_shortest_form(cleaned):
    model = cleaned(
        text("""
        s = Shape (x)
        zero = Constant <value = int64 {0}> ()
        n = Gather (s, zero)
        axes = Constant <value_ints = [0]> ()
        n1 = Unsqueeze (n, axes)
        one = Constant <value_ints = [1, 8, 8]> ()
        shape = Concat <axis = 0> (n1, one)
        token = ConstantOfShape <value = float[1] {2.0}> (shape)
        y = Concat <axis = 1> (token, x)
    """)
    )
    assert ops(model.graph) == {"Shape": 1, "Concat": 2, "Expand": 1}


def test_expanding_before_an_operator_that_broadcasts_is_dropped(cleaned):
    model = cleaned(
        text("""
        s = Shape (x)
        half = Constant <value_floats = [0.5]> ()
        e = Expand (half, s)
        y = Mul (x, e)
    """)
    )
    assert ops(model.graph) == {"Mul": 1}


def test_scalar_that_counts_samples_stays_computed(cleaned):
    model = cleaned(
        text("""
        s = Shape (x)
        zero = Constant <value = int64 {0}> ()
        n = Gather (s, zero)
        one = Constant <value = int64 {1}> ()
        r = Range (zero, n, one)
        f = Cast <to = 1> (r)
        shape = Constant <value_ints = [-1, 1, 1, 1]> ()
        q = Reshape (f, shape)
        y = Add (x, q)
    """)
    )
    assert ops(model.graph)["Range"] == 1
    assert ops(model.graph)["Gather"] == 0


def test_resize_to_computed_sizes_gets_scales(cleaned):
    model = cleaned(
        text("""
        s = Shape (x)
        start = Constant <value_ints = [0]> ()
        end = Constant <value_ints = [2]> ()
        nc = Slice (s, start, end)
        hw = Constant <value_ints = [16, 24]> ()
        sizes = Concat <axis = 0> (nc, hw)
        y = Resize <mode = "linear"> (x, , , sizes)
    """)
    )
    assert ops(model.graph) == {"Resize": 1}
    node = model.graph.nodes[0]
    np.testing.assert_array_equal(model.graph.constant(node.input[2]), np.float32([1, 1, 2, 3]))
    assert len(node.input) == 3


def test_identities_of_every_kind_are_removed(cleaned):
    model = cleaned(
        text("""
        a = Identity (x)
        ratio = Constant <value_float = 0.5> ()
        b = Dropout (a, ratio)
        c = Cast <to = 1> (b)
        d = Transpose <perm = [0, 1, 2, 3]> (c)
        pads = Constant <value_ints = [0, 0, 0, 0, 0, 0, 0, 0]> ()
        e = Pad (d, pads)
        start = Constant <value_ints = [0]> ()
        end = Constant <value_ints = [1000]> ()
        axis = Constant <value_ints = [2]> ()
        f = Slice (e, start, end, axis)
        shape = Constant <value_ints = [0, 4, 8, 8]> ()
        g = Reshape (f, shape)
        h = Concat <axis = 1> (g)
        r = Relu (h)
        y = Identity (r)
    """)
    )
    assert [node.op_type for node in model.graph] == ["Relu"]
    assert list(model.graph.nodes[0].input) == ["x"]
    assert list(model.graph.nodes[0].output) == ["y"]


def test_a_reversing_slice_is_no_identity(cleaned):
    model = cleaned(
        text("""
        start = Constant <value_ints = [7]> ()
        end = Constant <value_ints = [-100]> ()
        axis = Constant <value_ints = [3]> ()
        step = Constant <value_ints = [-1]> ()
        y = Slice (x, start, end, axis, step)
    """)
    )
    assert ops(model.graph) == {"Slice": 1}


def test_input_that_is_also_an_output(cleaned):
    model = cleaned(text("y = Identity (x) z = Relu (y)", signature="(float[N,4] x) => (float y, float z)"))
    assert [spec.name for spec in model.outputs] == ["y", "z"]


def test_two_outputs_with_one_value(cleaned):
    model = cleaned(
        text("a = Relu (x) y = Identity (a) z = Identity (a)", signature="(float[N,4] x) => (float y, float z)")
    )
    assert [spec.name for spec in model.outputs] == ["y", "z"]


def test_constant_output(cleaned):
    model = cleaned(
        text(
            "y = Relu (x) a = Constant <value_floats = [1.0, 2.0]> () z = Neg (a)",
            signature="(float[N,4] x) => (float y, float z)",
        )
    )
    assert [spec.name for spec in model.outputs] == ["y", "z"]


def test_views_and_transpositions_in_a_row_are_one(cleaned):
    model = cleaned(
        text("""
        one = Constant <value_ints = [0, 256]> ()
        a = Reshape (x, one)
        two = Constant <value_ints = [1]> ()
        b = Unsqueeze (a, two)
        c = Squeeze (b, two)
        three = Constant <value_ints = [-1, 4, 8, 8]> ()
        d = Reshape (c, three)
        e = Relu (d)
        f = Transpose <perm = [0, 2, 3, 1]> (e)
        y = Transpose <perm = [0, 3, 2, 1]> (f)
    """)
    )
    assert ops(model.graph) == {"Relu": 1, "Transpose": 1}
    assert list(model.graph.nodes[1].attribute[0].ints) == [0, 1, 3, 2]


def test_writing_every_row_is_no_write(cleaned):
    """``x += y``: what torch's exporter makes of it."""
    body = """
        s = Shape (x)
        zero = Constant <value = int64 {0}> ()
        one = Constant <value = int64 {1}> ()
        n = Gather (s, zero)
        r = Range (zero, n, one)
        axes = Constant <value_ints = [-1]> ()
        rows = Unsqueeze (r, axes)
        a = Relu (x)
        b = Add (a, x)
        y = ScatterND (a, rows, b)
    """
    assert ops(cleaned(text(body)).graph) == {"Relu": 1, "Add": 1}
    backwards = body.replace("Range (zero, n, one)", "Range (m, minus, minus)").replace(
        "r =", "minus = Constant <value = int64 {-1}> () m = Sub (n, one) r ="
    )
    assert ops(cleaned(text(backwards)).graph)["ScatterND"] == 1


def test_gathering_everything_in_order_is_a_reshape(cleaned):
    """A strided view of the whole tensor: what torch's exporter makes of channels-last memory."""
    body = """
        s = Shape (x)
        zero = Constant <value = int64 {0}> ()
        one = Constant <value = int64 {1}> ()
        n = Gather (s, zero)
        all = Constant <value = int64 {256}> ()
        total = Mul (n, all)
        i = Range (zero, total, one)
        shape = Constant <value_ints = [-1, 64, 4]> ()
        places = Reshape (i, shape)
        minus = Constant <value_ints = [-1]> ()
        flat = Reshape (x, minus)
        y = Gather (flat, places)
    """
    assert ops(cleaned(text(body)).graph) == {"Reshape": 1}
    some = body.replace("places = Reshape (i, shape)", "q = Reshape (i, shape) places = Mod (q, all)")
    assert ops(cleaned(text(some)).graph)["Gather"] == 1


def test_slices_in_a_row_are_one(cleaned):
    model = cleaned(
        text("""
        zero = Constant <value_ints = [0]> ()
        large = Constant <value_ints = [9223372036854775807]> ()
        two = Constant <value_ints = [2]> ()
        last = Constant <value_ints = [-1]> ()
        one = Constant <value_ints = [1]> ()
        a = Slice (x, zero, large, two, two)
        b = Slice (a, one, last, last)
        y = Slice (b, zero, two, one)
    """)
    )
    assert ops(model.graph) == {"Slice": 1}


def test_slices_along_one_axis_stay_two(cleaned):
    model = cleaned(
        text("""
        one = Constant <value_ints = [1]> ()
        two = Constant <value_ints = [2]> ()
        seven = Constant <value_ints = [7]> ()
        a = Slice (x, one, seven, two, two)
        y = Slice (a, one, seven, two)
    """)
    )
    assert ops(model.graph) == {"Slice": 2}


def test_transpose_between_unsqueeze_and_squeeze(cleaned):
    model = cleaned(
        text("""
        zero = Constant <value_ints = [0]> ()
        a = Unsqueeze (x, zero)
        b = Transpose <perm = [4, 1, 2, 0, 3]> (a)
        three = Constant <value_ints = [-2]> ()
        y = Squeeze (b, three)
    """)
    )
    assert ops(model.graph) == {"Transpose": 1}


@pytest.mark.parametrize(
    ("pads", "attributes", "left"),
    [
        ("0, 0, 1, 2, 0, 0, 3, 1", "", {"Conv": 1}),
        ("0, 0, 1, 2, 0, 0, 3, 1", "<pads = [1, 0, 0, 2], strides = [2, 2]>", {"Conv": 1}),
        ("0, 0, 1, 2, 0, 0, 3, 1", '<auto_pad = "VALID">', {"Conv": 1}),
        ("0, 0, 1, 2, 0, 0, 3, 1", '<auto_pad = "SAME_UPPER">', {"Conv": 1, "Pad": 1}),
        ("0, 0, -1, 0, 0, 0, 0, 0", "", {"Conv": 1, "Pad": 1}),
        ("0, 1, 0, 0, 0, 1, 0, 0", "", {"Conv": 1, "Pad": 1}),
    ],
)
def test_padding_moves_into_the_convolution(cleaned, pads, attributes, left):
    channels = 6 if pads.startswith("0, 1") else 4
    model = cleaned(
        text(f"""
        pads = Constant <value_ints = [{pads}]> ()
        a = Pad (x, pads)
        shape = Constant <value_ints = [2, {channels}, 3, 3]> ()
        w = ConstantOfShape <value = float[1] {{0.5}}> (shape)
        y = Conv {attributes} (a, w)
    """)
    )
    assert ops(model.graph) == left


def test_padding_that_is_not_zero_stays(cleaned):
    body = """
        pads = Constant <value_ints = [0, 0, 1, 1, 0, 0, 1, 1]> ()
        one = Constant <value_float = 1.0> ()
        a = Pad {mode} (x, pads{value})
        shape = Constant <value_ints = [2, 4, 3, 3]> ()
        w = ConstantOfShape <value = float[1] {{0.5}}> (shape)
        y = Conv (a, w)
    """
    assert ops(cleaned(text(body.format(mode="", value=", one"))).graph)["Pad"] == 1
    assert ops(cleaned(text(body.format(mode='<mode = "reflect">', value=""))).graph)["Pad"] == 1


@pytest.mark.parametrize(
    ("attributes", "left"),
    [
        ("axes = [2, 3]", {"GlobalAveragePool": 1}),
        ("axes = [-1, -2], keepdims = 0", {"GlobalAveragePool": 1, "Flatten": 1}),
        ("axes = [2]", {"ReduceMean": 1}),
        ("axes = [1, 2, 3]", {"ReduceMean": 1}),
    ],
)
def test_mean_over_positions_is_a_pool(cleaned, attributes, left):
    assert ops(cleaned(text(f"y = ReduceMean <{attributes}> (x)")).graph) == left


def test_bias_of_zeros_is_dropped(cleaned):
    model = cleaned(
        text("""
        shape = Constant <value_ints = [2, 4, 1, 1]> ()
        w = ConstantOfShape <value = float[1] {0.5}> (shape)
        two = Constant <value_ints = [2]> ()
        b = ConstantOfShape (two)
        y = Conv (x, w, b)
    """)
    )
    assert len(model.graph.nodes[0].input) == 2


def test_weights_that_are_computed_from_constants_become_constants(cleaned):
    model = cleaned(
        text("""
        shape = Constant <value_ints = [3, 8]> ()
        w = ConstantOfShape <value = float[1] {0.5}> (shape)
        t = Transpose (w)
        y = MatMul (x, t)
    """)
    )
    assert ops(model.graph) == {"MatMul": 1}
    assert model.graph.constant("t").shape == (8, 3)


def test_quantizers_of_constants_stay(cleaned):
    model = cleaned(
        text("""
        q = Constant <value = int8[4] {-3, 1, 2, 127}> ()
        s = Constant <value_float = 0.1> ()
        zp = Constant <value = int8 {0}> ()
        w = DequantizeLinear (q, s, zp)
        shape = Constant <value_ints = [4, 1, 1]> ()
        v = Reshape (w, shape)
        y = Mul (x, v)
    """)
    )
    assert ops(model.graph)["DequantizeLinear"] == 1


def test_branches_with_a_known_condition_are_taken(cleaned):
    model = cleaned(
        text("""
        s = Shape (x)
        one = Constant <value = int64 {1}> ()
        c = Gather (s, one)
        four = Constant <value = int64 {4}> ()
        yes = Equal (c, four)
        y = If (yes) <
            then_branch = a () => (float[N,4,8,8] t) { u = Relu (x) t = Neg (u) },
            else_branch = b () => (float[N,4,8,8] e) { e = Sigmoid (x) }
        >
    """)
    )
    assert [node.op_type for node in model.graph] == ["Relu", "Neg"]


def test_local_functions_are_inlined(cleaned):
    model = text("y = Relu (x)")
    model.graph.node[0].CopyFrom(helper.make_node("Twice", ["x"], ["y"], domain="here", name="f"))
    model.functions.append(
        helper.make_function(
            "here",
            "Twice",
            ["a"],
            ["b"],
            [helper.make_node("Add", ["a", "a"], ["c"]), helper.make_node("Relu", ["c"], ["b"])],
            [helper.make_opsetid("", 17)],
        )
    )
    model.opset_import.append(helper.make_opsetid("here", 1))
    assert ops(cleaned(model).graph) == {"Add": 1, "Relu": 1}


def test_nodes_without_names_get_stable_ones(tmp_path):
    model = text("a = Relu (x) b = Relu (a) y = Relu (b)")
    for node in model.graph.node:
        node.name = "same" if node.output[0] != "b" else ""
    names = [node.name for node in Graph(clean(model).proto)]
    assert names == ["same", "Relu", "same_1"]


def test_training_mode_is_switched_off(tmp_path):
    model = text(
        """
        g = Constant <value_floats = [1.0, 1.0, 1.0, 1.0]> ()
        v = Constant <value_floats = [4.0, 4.0, 4.0, 4.0]> ()
        y, m2, v2 = BatchNormalization <training_mode = 1> (x, g, g, g, v)
    """
    )
    onnx.save(model, tmp_path / "net.onnx")
    loaded = load_model(tmp_path / "net.onnx")
    assert any("training mode" in note for note in loaded.notes)
    assert len(loaded.graph.nodes[0].output) == 1
    assert loaded.batch_norms()[0].var.tolist() == [4.0] * 4


def test_half_precision_becomes_float32(tmp_path, ort_run, relative_error):
    body = """
        f = Constant <value = float[8] {0.5, 1.0, 2.0, -1.0, 0.25, 3.0, -2.0, 0.125}> ()
        w = Cast <to = 10> (f)
        a = Mul (x, w)
        b = Cast <to = 1> (a)
        c = Softmax (b)
        y = Cast <to = 10> (c)
    """
    model = text(body, signature="(float16[N,4,8,8] x) => (float16 y)")
    onnx.save(model, tmp_path / "net.onnx")
    loaded = load_model(tmp_path / "net.onnx")
    assert any("float16" in note for note in loaded.notes)
    assert loaded.inputs[0].dtype == loaded.outputs[0].dtype == np.float32
    assert ops(loaded.graph) == {"Mul": 1, "Softmax": 1}
    x = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float16)
    (wanted,) = ort_run(tmp_path / "net.onnx", x)
    assert relative_error(ort_run(loaded.graph, x.astype(np.float32))[0], wanted) < 2e-3


# -- networks exported for one batch size ---------------------------------------------------------------------------------


@pytest.fixture
def freed(tmp_path, ort_run, relative_error):
    """Load a model that fixes its batch size, and compare samples one by one with the original."""

    def check(model: onnx.ModelProto) -> Model:
        path = tmp_path / "net.onnx"
        onnx.save(model, path)
        loaded = load_model(path)
        batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
        if loaded.dynamic_batch:
            shape = (3 * batch, *loaded.inputs[0].shape[1:])
            x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
            parts = [ort_run(path, x[start : start + batch]) for start in range(0, 3 * batch, batch)]
            for found, wanted in zip(ort_run(loaded.graph, x), zip(*parts, strict=True), strict=True):
                assert relative_error(found, np.concatenate(wanted)) < 1e-5
        return loaded

    return check


FIXED = "(float[1,4,8,8] x) => (float y)"


def test_layers_that_do_not_know_the_batch(freed):
    assert freed(text("y = Relu (x)", signature=FIXED)).dynamic_batch


def test_reshape_that_holds_the_batch(freed):
    model = freed(
        text(
            """
        a = Constant <value_ints = [1, 2, 2, 8, 8]> ()
        b = Reshape (x, a)
        c = Transpose <perm = [0, 2, 1, 3, 4]> (b)
        d = Constant <value_ints = [1, 4, 8, 8]> ()
        e = Reshape (c, d)
        f = Constant <value_ints = [1, -1, 8]> ()
        y = Reshape (e, f)
    """,
            signature=FIXED,
        )
    )
    assert model.dynamic_batch
    assert model.outputs[0].shape == (None, 32, 8)


def test_batch_in_the_middle(freed):
    """Sequence first, batch second, heads folded into the batch: how torch's attention is exported."""
    model = freed(
        text(
            """
        a = Constant <value_ints = [1, 4, 64]> ()
        b = Reshape (x, a)
        c = Transpose <perm = [1, 0, 2]> (b)
        d = Constant <value_ints = [4, 8, 8]> ()
        e = Reshape (c, d)
        f = Transpose <perm = [1, 0, 2]> (e)
        g = Softmax <axis = -1> (f)
        h = Transpose <perm = [1, 0, 2]> (g)
        i = Constant <value_ints = [4, 1, 64]> ()
        j = Reshape (h, i)
        y = Transpose <perm = [1, 0, 2]> (j)
    """,
            signature=FIXED,
        )
    )
    assert model.dynamic_batch
    assert model.outputs[0].shape == (None, 4, 64)


def test_constant_token_beside_the_batch(freed):
    model = freed(
        text(
            """
        t = Constant <value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]> ()
        s = Constant <value_ints = [1, 1, 1, 8]> ()
        u = Reshape (t, s)
        v = Constant <value_ints = [1, 1, 8, 8]> ()
        w = Expand (u, v)
        y = Concat <axis = 1> (w, x)
    """,
            signature=FIXED,
        )
    )
    assert model.dynamic_batch


def test_resize_with_stored_sizes(freed):
    model = freed(
        text(
            """
        sizes = Constant <value_ints = [1, 4, 16, 16]> ()
        y = Resize <mode = "nearest"> (x, , , sizes)
    """,
            signature=FIXED,
        )
    )
    assert model.dynamic_batch


def test_batches_of_several_samples(freed):
    model = freed(
        text(
            """
        a = Constant <value_ints = [4, 256]> ()
        y = Reshape (x, a)
    """,
            signature="(float[4,4,8,8] x) => (float y)",
        )
    )
    assert model.dynamic_batch
    assert model.inputs[0].shape == (None, 4, 8, 8)


@pytest.mark.parametrize(
    "body",
    [
        "axes = Constant <value_ints = [0]> () y = Squeeze (x, axes)",
        "y = ReduceMean <axes = [0]> (x)",
        "y = Softmax <axis = 0> (x)",
        "i = Constant <value = int64 {0}> () y = Gather <axis = 0> (x, i)",
    ],
)
def test_what_mixes_samples_stays_fixed_and_is_said(freed, body):
    model = freed(text(body, signature=FIXED))
    assert not model.dynamic_batch
    assert model.inputs[0].shape == (1, 4, 8, 8)
    assert any("batch size" in note for note in model.notes)


# -- the small rules ------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), grow=st.integers(2, 4))
def test_batch_axis_of_a_reshape_against_counting(data, batch, grow):
    """Reshape a tensor whose entries name their sample; the axis that was found is the one that tells samples apart."""
    before = data.draw(st.lists(st.integers(1, 3), max_size=2))
    after = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    axis = len(before)
    source = [*before, batch, *after]
    total = int(np.prod(source))
    target: list[int] = []
    rest = total
    while rest > 1:
        size = data.draw(st.sampled_from([d for d in range(2, rest + 1) if rest % d == 0]))
        target.append(size)
        rest //= size
    found = reshape_batch_axis(source, axis, target, batch)
    if found is None:
        return
    grown_source = [*before, batch * grow, *after]
    grown_target = [size * grow if position == found else size for position, size in enumerate(target)]
    labels = np.arange(batch * grow).reshape([1] * axis + [-1] + [1] * len(after))
    grown = np.broadcast_to(labels, grown_source).reshape(grown_target)
    first = np.broadcast_to(labels[tuple([slice(None)] * axis + [slice(0, batch)])], source).reshape(target)
    np.testing.assert_array_equal(np.take(grown, range(target[found]), axis=found), first)


def test_scales_are_refused_when_they_miss_the_size():
    assert scales_for([(2, 3, 5, 5)], [(2, 3, 10, 10)]).tolist() == [1, 1, 2, 2]
    found = scales_for([(2, 3, 49, 5)], [(2, 3, 1, 10)])
    assert found is None or int(np.floor(np.float32(49) * found[2])) == 1


def test_types_of_outputs_are_filled_in():
    graph = Graph(clean(text("i = ArgMax <axis = 1> (x) y = Cast <to = 6> (i)")).proto)
    assert graph.outputs[0].dtype == np.int32
    assert graph.outputs[0].shape == (None, 1, 8, 8)
    assert graph.proto.graph.output[0].type.tensor_type.elem_type == TensorProto.INT32
