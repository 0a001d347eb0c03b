"""Exported sets, read back by code that knows the formats and not the exporters."""

from __future__ import annotations

import base64
import io
import json
import struct

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.calib.exporters import EXPORTERS, OrtReader, export, export_npy, export_polygraphy, export_test_data
from zsq_deploy.errors import CalibrationError, OutputExistsError, UsageError


def make(count: int = 5, *, two: bool = False) -> CalibrationSet:
    random = np.random.default_rng(1)
    arrays = {"a/b:0": random.normal(size=(count, 2, 3, 4)).astype(np.float32)}
    if two:
        arrays["tokens"] = random.integers(0, 100, (count, 6))
    return CalibrationSet.from_arrays(arrays, CalibrationManifest(method="gaussian"))


def read_npy(data: bytes) -> np.ndarray:
    """A reader of the .npy format by its specification (version 1.0), without numpy's own."""
    assert data[:6] == b"\x93NUMPY"
    assert data[6] == 1
    (length,) = struct.unpack("<H", data[8:10])
    header = eval(data[10 : 10 + length])
    assert not header["fortran_order"]
    return np.frombuffer(data[10 + length :], header["descr"]).reshape(header["shape"])


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_reader_gives_everything_in_order(two, batch):
    made = make(two=two)
    reader = OrtReader(made, batch_size=batch)
    assert issubclass(OrtReader, CalibrationDataReader)
    for _ in range(2):
        got = []
        while (piece := reader.get_next()) is not None:
            got.append(piece)
        assert reader.get_next() is None
        assert len(got) == len(reader) == -(-5 // batch)
        for name, array in made.arrays().items():
            np.testing.assert_array_equal(np.concatenate([piece[name] for piece in got]), array)
        reader.rewind()
    assert len(list(reader)) == len(reader)


def test_reader_ranges():
    reader = OrtReader(make(5), batch_size=2)
    reader.set_range(start_index=1, end_index=3)
    assert [len(piece["a/b:0"]) for piece in reader] == [2, 1]
    reader.rewind()
    np.testing.assert_array_equal(reader.get_next()["a/b:0"], make(5).arrays()["a/b:0"][2:4])
    reader.set_range(start_index=3, end_index=9)
    assert reader.get_next() is None
    for bad in ((2, 2), (-1, 2), (3, 1)):
        with pytest.raises(CalibrationError, match="range"):
            reader.set_range(*bad)
    with pytest.raises(CalibrationError, match="batch"):
        OrtReader(make(), batch_size=0)


def test_onnxruntime_calibrates_with_the_reader(tmp_path):
    """The ranges that onnxruntime writes into its graph are the extremes of the set."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]>'
        "g (float[N,4] x) => (float[N,4] y) <float[4,4] w = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}> { y = MatMul(x, w) }"
    )
    onnx.save(model, tmp_path / "m.onnx")
    x = np.random.default_rng(0).uniform(-3, 5, (64, 4)).astype(np.float32)
    made = CalibrationSet.from_arrays({"x": x}, CalibrationManifest(method="real"))
    reader = OrtReader(made, batch_size=5)
    quantize_static(
        tmp_path / "m.onnx",
        tmp_path / "q.onnx",
        reader,
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        extra_options={"CalibStridedMinMax": 13},
    )
    scales = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "q.onnx").graph.initializer}
    assert scales["x_scale"] == pytest.approx((x.max() - x.min()) / 255, rel=1e-6)
    onnxruntime.InferenceSession(tmp_path / "q.onnx", providers=["CPUExecutionProvider"])


def test_test_data_folders(tmp_path):
    made = make(5, two=True)
    (tmp_path / "model.onnx").write_text("the user's own file")
    export_test_data(made, tmp_path, batch_size=2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "model.onnx",
        "test_data_set_0",
        "test_data_set_1",
        "test_data_set_2",
    ]
    for index, (name, array) in enumerate(made.arrays().items()):
        pieces = []
        for number in range(3):
            tensor = onnx.TensorProto()
            tensor.ParseFromString((tmp_path / f"test_data_set_{number}" / f"input_{index}.pb").read_bytes())
            assert tensor.name == name
            kind = {onnx.TensorProto.FLOAT: "<f4", onnx.TensorProto.INT64: "<i8"}[tensor.data_type]
            pieces.append(np.frombuffer(tensor.raw_data, kind).reshape(tuple(tensor.dims)))
        np.testing.assert_array_equal(np.concatenate(pieces), array)
    with pytest.raises(OutputExistsError):
        export_test_data(made, tmp_path)


def test_polygraphy_json(tmp_path):
    made = make(3, two=True)
    export_polygraphy(made, tmp_path / "inputs.json")
    found = json.loads((tmp_path / "inputs.json").read_text())
    assert isinstance(found, list)
    assert len(found) == 3
    for number, feed in enumerate(found):
        assert list(feed) == list(made.input_names)
        for name, value in feed.items():
            assert set(value) == {"array", "polygraphy_class"}
            assert value["polygraphy_class"] == "ndarray"
            array = read_npy(base64.b64decode(value["array"], validate=True))
            np.testing.assert_array_equal(array, made.arrays()[name][number : number + 1])
            np.testing.assert_array_equal(array, np.load(io.BytesIO(base64.b64decode(value["array"]))))
    with pytest.raises(OutputExistsError):
        export_polygraphy(made, tmp_path / "inputs.json")


def test_npy_files_and_their_list(tmp_path):
    made = make(4)
    export_npy(made, tmp_path / "a")
    lines = (tmp_path / "a" / "list.txt").read_text().splitlines()
    assert len(lines) == 4
    got = [read_npy((tmp_path / "a" / line).read_bytes()) for line in lines]
    np.testing.assert_array_equal(np.concatenate(got), made.arrays()["a/b:0"])
    export_npy(made, tmp_path / "b", batch_axis=False, absolute=True)
    lines = (tmp_path / "b" / "list.txt").read_text().splitlines()
    np.testing.assert_array_equal(np.stack([np.load(line) for line in lines]), made.arrays()["a/b:0"])
    with pytest.raises(OutputExistsError):
        export_npy(made, tmp_path / "a")


def test_npy_of_a_network_with_two_inputs(tmp_path):
    made = make(2, two=True)
    export_npy(made, tmp_path / "a")
    for listing, name in json.loads((tmp_path / "a" / "inputs.json").read_text()).items():
        lines = (tmp_path / "a" / listing).read_text().splitlines()
        got = np.concatenate([np.load(tmp_path / "a" / line) for line in lines])
        np.testing.assert_array_equal(got, made.arrays()[name])


@pytest.mark.parametrize("kind", sorted(EXPORTERS))
def test_an_interrupted_export_leaves_nothing(tmp_path, kind, monkeypatch):
    made = make(4)
    original = made.batches

    def interrupted(size: int):
        for number, batch in enumerate(original(size)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(made, "batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(made, kind, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(made, "batches", original)
    export(made, kind, tmp_path / "out")
    assert (tmp_path / "out").exists()
    with pytest.raises(OutputExistsError):
        export(made, kind, tmp_path / "out")


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(CalibrationError, match="No space left"):
        export(make(), "npy", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_unknown_format_and_a_file_in_the_way(tmp_path):
    with pytest.raises(UsageError, match="tfrecord"):
        export(make(), "tfrecord", tmp_path / "out")
    (tmp_path / "file").write_text("")
    for kind in EXPORTERS:
        with pytest.raises(OutputExistsError):
            export(make(), kind, tmp_path / "file")
