"""Every unusable input gives one error that says what is wrong, where, and what to do."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper, numpy_helper

from zsq_deploy.errors import ModelError, UnsupportedOpError, UsageError, ZsqError
from zsq_deploy.model import load_model

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
    def forward(self, x):
        return self.bn(self.conv(x)).mean((2, 3))

def net(): return Net()
def number(): return 7
def broken(): raise ValueError("no such size")
def wants(size): return Net()
instance = Net()
constant = 3
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "bad_input_nets.py").write_text(CODE)
    return tmp_path


def small(
    nodes=None, *, constants=None, shape=("N", 3, 4, 4), opset=17, ir_version=8, outputs=("y",)
) -> onnx.ModelProto:
    nodes = nodes or [helper.make_node("Relu", ["x"], ["y"], name="relu")]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=ir_version,
    )


def saved(tmp_path: Path, model: onnx.ModelProto, name: str = "net.onnx") -> Path:
    path = tmp_path / name
    path.write_bytes(model.SerializeToString())
    return path


def refuses(kind: type[ZsqError], words: str, *args, **kwargs) -> ZsqError:
    with pytest.raises(ZsqError, match=words) as caught:
        load_model(*args, **kwargs)
    assert type(caught.value) is kind
    assert caught.value.where
    assert caught.value.remedy
    assert caught.value.exit_code == 2
    assert "Traceback" not in str(caught.value)
    return caught.value


# -- ONNX files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\x00\xff" * 100, "damaged"),
        (os.urandom(4000), "damaged|breaks the ONNX rules|pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "text"),
        (b"PK\x03\x04 and so on", "zip archive"),
        (pickle.dumps({"a": 1}), "pickle, which can run code"),
        (b"\x89HDF\r\n\x1a\n....", "HDF5"),
    ],
)
def test_files_of_another_kind(tmp_path, content, words):
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    assert refuses(ModelError, words, path).where.startswith(str(path))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
def test_truncated_file(tmp_path, share):
    weight = np.ones((64, 3, 3, 3), np.float32)
    content = small([helper.make_node("Conv", ["x", "w"], ["y"])], constants={"w": weight}).SerializeToString()
    path = tmp_path / "net.onnx"
    path.write_bytes(content[: int(len(content) * share)])
    refuses(ModelError, "damaged|breaks the ONNX rules", path)


def test_missing_file_and_folder(tmp_path):
    refuses(ModelError, "does not exist", tmp_path / "none.onnx")
    (tmp_path / "folder.onnx").mkdir()
    refuses(ModelError, "folder", str(tmp_path / "folder.onnx"))


def external(location: str, offset: int = 0, length: int = 48) -> onnx.ModelProto:
    model = small([helper.make_node("Add", ["x", "w"], ["y"])], constants={"w": np.ones((3, 1, 4), np.float32)})
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return model


def test_external_data_beside_the_file_are_read(tmp_path):
    (tmp_path / "w.bin").write_bytes(np.full(12, 2, np.float32).tobytes())
    model = load_model(saved(tmp_path, external("w.bin")))
    np.testing.assert_array_equal(model.graph.constant("w"), np.full((3, 1, 4), 2, np.float32))


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "a/../../secret.bin", "link.bin", ""])
def test_external_data_outside_of_the_folder(tmp_path, location):
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    folder = tmp_path / "models"
    (folder / "a").mkdir(parents=True)
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    error = refuses(ModelError, "outside of its own folder", saved(folder, external(location)))
    assert "'w'" in error.where


def test_external_data_missing_or_too_short(tmp_path):
    path = saved(tmp_path, external("w.bin"))
    assert "w.bin" in refuses(ModelError, "missing", path).remedy
    (tmp_path / "w.bin").write_bytes(bytes(40))
    refuses(ModelError, "too short: 48 bytes are needed, it has 40", path)


def test_unknown_operators_are_named_once_with_all_places(tmp_path):
    nodes = [
        helper.make_node("Warp", ["x"], ["a"], name="one", domain="acme"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Warp", ["b"], ["c"], name="two", domain="acme"),
        helper.make_node("Weft", ["c"], ["y"], name="three", domain="acme"),
    ]
    model = small(nodes)
    model.opset_import.append(helper.make_opsetid("acme", 1))
    text = str(refuses(UnsupportedOpError, "Warp", saved(tmp_path, model)))
    assert all(word in text for word in ("Warp", "Weft", "one", "two", "three"))


def test_open_sizes_need_input_shape(tmp_path):
    weight = {"w": np.ones((2, 1, 3, 3), np.float32)}
    path = saved(
        tmp_path, small([helper.make_node("Conv", ["x", "w"], ["y"])], constants=weight, shape=("N", 1, "H", "W"))
    )
    error = refuses(UsageError, "leaves open", path)
    assert "--input-shape 1x1x64x64" in error.remedy
    model = load_model(path, input_shape=(1, 1, 10, 12))
    assert model.inputs[0].shape == (None, 1, 10, 12)
    assert model.outputs[0].shape == (None, 2, 8, 10)
    refuses(UsageError, "4 dimensions .* has 3", path, input_shape=(1, 10, 12))
    refuses(UsageError, "fixed at", path, input_shape=(1, 3, 10, 12))
    refuses(UsageError, "the size 0", path, input_shape=(1, 1, 0, 12))
    refuses(UsageError, "no input called z", path, input_shape={"z": (1, 1, 10, 12)})


def test_sizes_that_do_not_fit(tmp_path):
    weight = {"w": np.ones((2, 1, 3, 3), np.float32)}
    path = saved(
        tmp_path,
        small([helper.make_node("Conv", ["x", "w"], ["y"], name="c")], constants=weight, shape=("N", 5, "H", "W")),
    )
    refuses(ModelError, "does not run", path, input_shape=(1, 5, 8, 8))
    other = {"w": np.ones((3, 7, 4), np.float32)}
    refuses(
        ModelError, "do not fit", saved(tmp_path, small([helper.make_node("Add", ["x", "w"], ["y"])], constants=other))
    )


def test_numbers_that_are_none_are_named(tmp_path):
    bad = np.ones((2, 3, 1, 1), np.float32)
    bad[1, 2] = np.nan
    nodes = [helper.make_node("Conv", ["x", "head.weight"], ["y"], name="head")]
    error = refuses(ModelError, "1 of 6 are NaN", saved(tmp_path, small(nodes, constants={"head.weight": bad})))
    assert "head.weight" in error.what
    bad[1, 2] = np.inf
    refuses(ModelError, "1 of 6 are infinite", saved(tmp_path, small(nodes, constants={"head.weight": bad})))


def test_infinities_in_masks_are_fine(tmp_path):
    mask = np.asarray([0, -np.inf, 0, 0], np.float32)
    load_model(saved(tmp_path, small([helper.make_node("Add", ["x", "m"], ["y"])], constants={"m": mask})))


def test_negative_running_variance(tmp_path):
    one = np.ones(3, np.float32)
    constants = {"g": one, "b": one, "m": one, "v": np.asarray([1, -1, 1], np.float32)}
    nodes = [helper.make_node("BatchNormalization", ["x", *constants], ["y"], name="bn")]
    refuses(ModelError, "running variance that is negative", saved(tmp_path, small(nodes, constants=constants)))


def test_control_flow_that_depends_on_the_data(tmp_path):
    branch = [
        helper.make_graph(
            [helper.make_node(op, ["x"], [op])], op, [], [helper.make_tensor_value_info(op, TensorProto.FLOAT, None)]
        )
        for op in ("Relu", "Neg")
    ]
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["y"], name="choice", then_branch=branch[0], else_branch=branch[1]),
    ]
    path = saved(tmp_path, small(nodes, constants={"zero": np.zeros((), np.float32)}))
    assert "choice" in refuses(ModelError, "control flow", path).what


def test_inputs_that_are_no_tensors(tmp_path):
    model = small([helper.make_node("SequenceAt", ["x", "i"], ["y"])], constants={"i": np.zeros((), np.int64)})
    model.graph.input[0].type.CopyFrom(
        helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    )
    refuses(ModelError, "not a tensor", saved(tmp_path, model))


def test_operator_sets_out_of_reach(tmp_path):
    model = small(opset=17)
    model.opset_import[0].version = 1000
    refuses(ModelError, "operator set|ONNX rules", saved(tmp_path, model))


def test_a_network_without_inputs(tmp_path):
    model = small([helper.make_node("Identity", ["w"], ["y"])], constants={"w": np.ones(3, np.float32)})
    del model.graph.input[:]
    refuses(ModelError, "no input", saved(tmp_path, model))


# -- torch ----------------------------------------------------------------------------------------------------------------

SHAPE = (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        ("bad_input_nets:nothing", UsageError, "has no 'nothing'"),
        ("no_such_module_here:net", UsageError, "no module 'no_such_module_here'"),
        ("bad_input_nets:number", ModelError, "returned a int"),
        ("bad_input_nets:constant", UsageError, "is a int"),
        ("bad_input_nets:broken", ModelError, "broken\\(\\) failed: ValueError: no such size"),
        ("bad_input_nets:wants", ModelError, "wants\\(\\) failed: TypeError"),
        ("bad_input_nets:", UsageError, "not module:callable"),
        ("resnet18", UsageError, "does not name a network"),
    ],
)
def test_sources_that_lead_nowhere(code, source, kind, words):
    refuses(kind, words, source, path=code if ":" in source else None, input_shape=SHAPE)


def test_torch_modules_need_a_shape(code):
    assert "--input-shape" in refuses(UsageError, "how large", "bad_input_nets:net", path=code).remedy
    refuses(UsageError, "positive", "bad_input_nets:net", path=code, input_shape=(1, 3, 0, 8))
    refuses(
        ModelError, "does not run on an input of 1x5x8x8", "bad_input_nets:net", path=code, input_shape=(1, 5, 8, 8)
    )


def test_search_path_has_to_exist(code):
    refuses(UsageError, "--path is not a folder", "bad_input_nets:net", path=code / "none", input_shape=SHAPE)


def test_module_that_cannot_be_imported(code):
    (code / "bad_input_syntax.py").write_text("def net(:\n")
    refuses(ModelError, "cannot be imported: SyntaxError", "bad_input_syntax:net", path=code, input_shape=SHAPE)
    (code / "bad_input_needs.py").write_text("import not_installed_anywhere\n")
    refuses(ModelError, "needs 'not_installed_anywhere'", "bad_input_needs:net", path=code, input_shape=SHAPE)


def state(code: Path) -> dict[str, torch.Tensor]:
    namespace: dict[str, object] = {}
    exec(CODE, namespace)
    return namespace["Net"]().state_dict()


def weights(code: Path, name: str, content: dict[str, torch.Tensor]) -> Path:
    path = code / name
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_wrong_keys_are_listed(code, name):
    content = state(code)
    content["stem.weight"] = content.pop("conv.weight")
    content["bn.bias"] = torch.zeros(9)
    error = refuses(
        ModelError,
        "do not belong",
        "bad_input_nets:net",
        path=code,
        weights=weights(code, name, content),
        input_shape=SHAPE,
    )
    assert "1 missing: conv.weight" in error.what
    assert "1 unexpected: stem.weight" in error.what
    assert "1 of another shape: bn.bias (file (9,), network (4,))" in error.what


def test_long_lists_of_keys_are_cut(code):
    content = {f"other.{index}": torch.zeros(1) for index in range(40)}
    path = weights(code, "w.safetensors", content)
    error = refuses(ModelError, "and 35 more", "bad_input_nets:net", path=code, weights=path, input_shape=SHAPE)
    assert len(error.what) < 500


class Evil:
    ran = False

    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle ran')",))


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.safetensors"])
def test_pickles_are_not_opened(code, name):
    path = code / name
    torch.save({"conv.weight": Evil()}, path)
    refuses(ModelError, "can run code .* not opened", "bad_input_nets:net", path=code, weights=path, input_shape=SHAPE)
    path.write_bytes(pickle.dumps({"conv.weight": Evil()}))
    refuses(ModelError, "can run code .* not opened", "bad_input_nets:net", path=code, weights=path, input_shape=SHAPE)


def test_whole_pickled_module_is_not_opened(code):
    path = code / "module.pt"
    torch.save(torch.nn.Conv2d(3, 4, 3), path)
    error = refuses(ModelError, "not opened", "bad_input_nets:net", path=code, weights=path, input_shape=SHAPE)
    assert "state_dict" in error.remedy


@pytest.mark.parametrize(
    ("name", "content", "kind", "words"),
    [
        ("w.safetensors", b"", ModelError, "empty"),
        ("w.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{bad json........", ModelError, "damaged"),
        ("w.pt", b"PK\x03\x04 broken", ModelError, "damaged"),
        ("w.h5", b"\x89HDF\r\n", UsageError, "cannot be read"),
    ],
)
def test_damaged_weights(code, name, content, kind, words):
    (code / name).write_bytes(content)
    refuses(kind, words, "bad_input_nets:net", path=code, weights=code / name, input_shape=SHAPE)


def test_weights_without_tensors_or_file(code):
    torch.save({"epoch": 3}, code / "w.pt")
    refuses(ModelError, "no named tensors", "bad_input_nets:net", path=code, weights=code / "w.pt", input_shape=SHAPE)
    refuses(ModelError, "does not exist", "bad_input_nets:net", path=code, weights=code / "no.pt", input_shape=SHAPE)


def test_nan_in_torch_weights(code):
    content = state(code)
    content["conv.bias"][2] = float("nan")
    path = weights(code, "w.safetensors", content)
    refuses(ModelError, "conv.bias", "bad_input_nets:net", path=code, weights=path, input_shape=SHAPE)


def test_weights_in_place_of_a_network(code):
    path = weights(code, "w.safetensors", state(code))
    assert "module:callable --weights" in refuses(UsageError, "holds weights, not a network", path).remedy


def test_options_that_do_not_go_with_files(tmp_path):
    path = saved(tmp_path, small())
    refuses(UsageError, "--weights does not go with", path, weights=tmp_path / "w.pt")
    refuses(UsageError, "--path does not go with", path, path=tmp_path)


# -- exported programs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"nothing", "damaged or is not"),
        (b"PK\x03\x04 broken", "damaged"),
        (pickle.dumps(Evil()), "pickle, which can run code"),
    ],
)
def test_exported_programs_of_another_kind(tmp_path, content, words):
    path = tmp_path / "net.pt2"
    path.write_bytes(content)
    refuses(ModelError, words, path)
    refuses(ModelError, "does not exist", tmp_path / "none.pt2")


def _exported(tmp_path: Path) -> Path:
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(3, 2).eval(), (torch.zeros(2, 3),)), path)
    return path


def _rewritten(path: Path, change) -> Path:
    """The archive with some members changed: `change(name, content)` gives the new content."""
    target = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for item in source.namelist():
            archive.writestr(item, change(item, source.read(item)))
    return target


def test_exported_program_with_a_pickle_inside_does_not_run_it(tmp_path):
    evil = tmp_path / "evil.pt"
    torch.save(Evil(), evil)

    def change(name: str, content: bytes) -> bytes:
        return evil.read_bytes() if "sample_inputs" in name else content

    path = _rewritten(_exported(tmp_path), change)
    with zipfile.ZipFile(path) as archive:
        assert any("sample_inputs" in name for name in archive.namelist())
    refuses(ModelError, "cannot be read", path)


def test_exported_program_with_objects_is_not_opened(tmp_path):
    path = _exported(tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{path.stem}/data/constants/custom_obj_0", pickle.dumps(Evil()))
    refuses(ModelError, "objects besides tensors", path)


def test_truncated_exported_program(tmp_path):
    path = _exported(tmp_path)
    path.write_bytes(path.read_bytes()[:-300])
    refuses(ModelError, "damaged|cannot be read", path)


# -- timm -----------------------------------------------------------------------------------------------------------------


def test_timm_that_is_not_installed(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "timm", None)
    assert "zsq-deploy[timm]" in refuses(ModelError, "timm", "timm:resnet18").remedy


# -- files that somebody has tampered with --------------------------------------------------------------------------------


def test_a_few_numbers_cannot_ask_for_terabytes(tmp_path):
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["big"], name="fill"),
        helper.make_node("ReduceSum", ["big"], ["sum"], name="sum", keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["y"], name="add"),
    ]
    path = saved(tmp_path, small(nodes, constants={"s": np.asarray([2**20, 2**20], np.int64)}))
    refuses(ModelError, "fill|memory", path)


@pytest.mark.parametrize("seed", range(40))
def test_changed_bytes_are_read_or_refused(tmp_path, seed):
    """No other error than ours, whatever the file holds."""
    generator = np.random.default_rng(seed)
    constants = {"w": np.ones((4, 3, 3, 3), np.float32), "s": np.asarray([0, 4, 4], np.int64)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("MaxPool", ["a"], ["b"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Reshape", ["b", "s"], ["c"], name="reshape"),
        helper.make_node("Softmax", ["c"], ["y"], name="softmax", axis=-1),
    ]
    content = bytearray(small(nodes, constants=constants).SerializeToString())
    for _ in range(int(generator.integers(1, 4))):
        content[int(generator.integers(len(content)))] = int(generator.integers(256))
    path = tmp_path / "net.onnx"
    path.write_bytes(bytes(content))
    refused: list[ZsqError] = []
    try:
        load_model(path).folded()
    except ZsqError as error:
        refused.append(error)
    assert all(error.where and error.remedy for error in refused)


def test_operators_that_nobody_knows_are_named_with_all_of_their_places(tmp_path):
    # ONNX's own checker would stop at the first one; the wrong version of a known operator counts too
    nodes = [
        helper.make_node("Fumble", ["x"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="fine"),
        helper.make_node("Fumble", ["b"], ["c"], name="second"),
        helper.make_node("Wobble", ["c"], ["d"]),
        helper.make_node("Swirl", ["d"], ["e"], name="third", domain="acme"),
        helper.make_node("HardSwish", ["e"], ["y"], name="too_new"),
    ]
    proto = small(nodes, opset=13)
    proto.opset_import.append(helper.make_opsetid("acme", 1))
    file = tmp_path / "net.onnx"
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(UnsupportedOpError) as caught:
        load_model(file)
    text = str(caught.value)
    for said in ("Fumble", "first, second", "Wobble", "makes 'd'", "acme::Swirl", "third", "too_new"):
        assert said in text
    assert "fine" not in text
