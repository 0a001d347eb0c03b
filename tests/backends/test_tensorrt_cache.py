"""TensorRT's calibration caches and ONNX Runtime's tables: hand-computed bytes, round trips, and everything that is refused."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsq_deploy.backends.tensorrt import ort_table
from zsq_deploy.backends.tensorrt.cache import (
    CacheBinding,
    CalibrationCache,
    binding_path,
    check_binding,
    compare_caches,
    read_cache,
    scale_bits,
    version_number,
    version_text,
    write_binding,
    write_cache,
)
from zsq_deploy.backends.tensorrt.scale_files import compare_files, is_scale_file, read_scale_file
from zsq_deploy.errors import CalibrationError, StaleArtifactError, UsageError
from zsq_deploy.quant.ranges import Ranges

HEAD = "TRT-8602-EntropyCalibration2\n"
BOUND = CacheBinding("network", "images", "tensorrt-entropy")


# -- the format --


@pytest.mark.parametrize(
    ("version", "number"),
    [
        ("7.1.3", 7103),
        ("8.4.1.5", 8401),
        ("8.6.2", 8602),
        ("8.5.2-1+cuda11.4", 8502),
        ("10.3.0.26", 100300),
        ("10.14.1", 101401),
    ],
)
def test_versions(version: str, number: int) -> None:
    assert version_number(version) == number
    assert version_text(number) == ".".join(version.replace("-", ".").split(".")[:3])


@pytest.mark.parametrize("version", ["", "ten", "8.6", "10", "8.6.200", "11.4.0", "v8.6.2"])
def test_what_is_no_version(version: str) -> None:
    with pytest.raises(UsageError):
        version_number(version)


def test_hand_computed_bytes() -> None:
    # 1/127 in float32 has the bits 0x3c010204 (also in a cache that TensorRT 10.3 wrote for inputs in [0, 1]);
    # 2.54/127 = 0.02 -> 0x3ca3d70a; 127/127 = 1 -> 0x3f800000; 2**-140 is a denormal whose leading zeros are dropped
    ranges = {"images": (0.0, 1.0), "a:0": (-2.54, 1.0), "out put": (-127.0, 127.0), "tiny": (0.0, 127 * 2.0**-140)}
    cache = CalibrationCache.from_ranges(ranges, version="10.3.0", algorithm="MinMaxCalibration")
    assert cache.to_bytes() == (
        b"TRT-100300-MinMaxCalibration\nimages: 3c010204\na:0: 3ca3d70a\nout put: 3f800000\ntiny: 200\n"
    )
    assert struct.unpack("!f", bytes.fromhex("3c010204"))[0] == np.float32(1) / np.float32(127)
    assert CalibrationCache.parse(cache.to_bytes()) == cache


def test_a_file_that_tensorrt_wrote() -> None:
    text = (
        "TRT-8401-EntropyCalibration2\ninput: 3caa54fc\n(Unnamed Layer* 64) [Shuffle]_output: 0\n366: 0\n"
        "(Unnamed Layer* 82) [Shuffle]_output: 3c56713e\n405: 3c209a08\n"
    )
    cache = CalibrationCache.parse(text, zeros=True)
    assert (cache.version, cache.algorithm, len(cache)) == (8401, "EntropyCalibration2", 5)
    assert cache.amax("input") == pytest.approx(2.6406446, rel=1e-7)
    assert cache.unexcited == ("(Unnamed Layer* 64) [Shuffle]_output", "366")
    assert cache.to_bytes() == text.encode()
    assert CalibrationCache.parse(text.replace("\n", "\r\n"), zeros=True) == cache
    assert cache.check_names(["input", "366", "405", "new"]) == ["366", "new"]
    assert set(cache.to_ranges()) == {"input", "(Unnamed Layer* 82) [Shuffle]_output", "405"}


scales = st.floats(min_value=2.0**-149, max_value=2.0**120, width=32)
names = st.text(
    st.characters(codec="utf-8", exclude_characters="\r\n", exclude_categories=("Cs",)), min_size=1, max_size=12
)


@given(st.dictionaries(names, scales, min_size=1, max_size=8))
def test_every_cache_survives_the_file_and_our_ranges(content: dict[str, float]) -> None:
    cache = CalibrationCache(8602, "EntropyCalibration2", content)
    assert dict(CalibrationCache.parse(cache.to_bytes()).scales) == content
    again = CalibrationCache.from_ranges(cache.to_ranges(), version="8.6.2")
    assert again == cache
    for name, scale in content.items():
        assert struct.unpack(">f", bytes.fromhex(scale_bits(scale).zfill(8)))[0] == scale, name


@given(st.floats(min_value=2.0**-100, max_value=2.0**100, width=32))
def test_the_scale_is_the_float32_quotient(amax: float) -> None:
    cache = CalibrationCache.from_ranges({"x": (-amax, 0.0)}, version="8.6.2")
    assert np.float32(cache.scales["x"]) == np.float32(amax) / np.float32(127)


def test_from_ranges_leaves_out_what_is_always_zero_and_refuses_what_is_missing() -> None:
    ranges = Ranges({"a": (0.0, 0.0), "b": (-1.0, 3.0)}, "minmax", "network", "images")
    cache = CalibrationCache.from_ranges(ranges, version="8.6.2")
    assert cache.left_out == ("a",)
    assert list(cache.scales) == ["b"]
    assert list(CalibrationCache.from_ranges(ranges, version="8.6.2", names=["b"]).scales) == ["b"]
    with pytest.raises(CalibrationError, match="1 tensors have no range: c"):
        CalibrationCache.from_ranges(ranges, version="8.6.2", names=["b", "c"])
    with pytest.raises(CalibrationError, match="'x' is not usable"):
        CalibrationCache.from_ranges({"x": (math.nan, 1.0)}, version="8.6.2")
    with pytest.raises(CalibrationError, match="'x' is not usable"):
        CalibrationCache.from_ranges({"x": (0.0, 1e39 * 127)}, version="8.6.2")
    with pytest.raises(UsageError, match="no calibration algorithm"):
        CalibrationCache.from_ranges(ranges, version="8.6.2", algorithm="KL")
    with pytest.raises(UsageError, match="removed in 11"):
        CalibrationCache.from_ranges(ranges, version="11.4.0")
    with pytest.raises(CalibrationError, match="line breaks"):
        CalibrationCache(8602, "EntropyCalibration2", {"a\nb": 1.0})


# -- what is refused --


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("", "first line is empty", 1),
        ("images: 3c010204\n", "first line is 'images: 3c010204'", 1),
        ("TRT-8XXX-EntropyCalibration2\nx: 3c010204\n", "first line is 'TRT-8XXX", 1),
        ("TRT-8602-KlCalibration\nx: 3c010204\n", "algorithm is 'KlCalibration'", 1),
        ("TRT-8602-EntropyCalibration2", "ends with its header", 1),
        (HEAD + "x: 3c010204\ny: 3c01", "truncated: its last line has no end", 3),
        (HEAD + "x: 3c010204\ny: 3c010204\nx: 3c010205\n", "'x' stands in the cache twice", 4),
        (HEAD + "x: 7fc00000\n", "NaN", 2),
        (HEAD + "x: 7f800000\n", "infinite", 2),
        (HEAD + "x: bc010204\n", "negative", 2),
        (HEAD + "x: 0\n", "zero", 2),
        (HEAD + "x: 80000000\n", "zero", 2),
        (HEAD + "x 3c010204\n", "no entry", 2),
        (HEAD + "x: 0.0078\n", "no entry", 2),
        (HEAD + "x: 3c0102040\n", "no entry", 2),
        (HEAD + "x: \n", "no entry", 2),
        (HEAD + ": 3c010204\n", "no entry", 2),
        (HEAD + "x: 3c010204\n\n", "no entry", 3),
    ],
)
def test_one_clear_error_each(text: str, message: str, line: int, tmp_path: Path) -> None:
    file = tmp_path / "calibration.cache"
    file.write_text(text, encoding="utf-8", newline="")
    with pytest.raises(CalibrationError, match=message) as refused:
        read_cache(file)
    assert f"line {line}" in str(refused.value)
    assert str(file) in str(refused.value)
    assert refused.value.remedy


def test_no_file_no_text_no_tensor(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no such calibration cache"):
        read_cache(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"TRT-\xff\xfe")
    with pytest.raises(CalibrationError, match="not text"):
        read_cache(tmp_path / "binary")
    with pytest.raises(CalibrationError, match="holds no tensor"):
        CalibrationCache.parse(HEAD)


def test_names_of_another_network() -> None:
    cache = CalibrationCache.parse(HEAD + "a: 3c010204\nb: 3c010204\n")
    assert cache.check_names(["b", "a", "c"]) == ["c"]
    with pytest.raises(CalibrationError, match="1 of 2 tensors of the cache are not in the network: b"):
        cache.check_names(["a"])


def test_the_reader_that_would_ignore_it() -> None:
    cache = CalibrationCache.parse(HEAD + "a: 3c010204\n")
    cache.check_reader("8.6.2.3", "EntropyCalibration2")
    with pytest.raises(StaleArtifactError, match=r"made for TensorRT 8\.6\.2; TensorRT 10\.3\.0 ignores it"):
        cache.check_reader("10.3.0.30")
    with pytest.raises(StaleArtifactError, match="MinMaxCalibration ignores it"):
        cache.check_reader("8.6.2", "MinMaxCalibration")
    cache.for_version("10.3.0.30", "MinMaxCalibration").check_reader("10.3.0", "MinMaxCalibration")


# -- the binding --


def test_a_cache_is_bound_to_network_and_set(tmp_path: Path) -> None:
    file = tmp_path / "calibration.cache"
    cache = CalibrationCache.parse(HEAD + "a: 3c010204\n")
    write_cache(file, cache, BOUND)
    assert read_cache(file) == cache
    assert check_binding(file, model_digest="network", set_digest="images") == BOUND
    assert check_binding(file, model_digest="network") == BOUND
    with pytest.raises(StaleArtifactError, match="another network"):
        check_binding(file, model_digest="other")
    with pytest.raises(StaleArtifactError, match="another calibration set"):
        check_binding(file, model_digest="network", set_digest="other")
    file.write_bytes(file.read_bytes() + b"b: 3c010204\n")
    with pytest.raises(StaleArtifactError, match="changed after it was written"):
        check_binding(file, model_digest="network")
    write_binding(file, BOUND)
    check_binding(file, model_digest="network")
    binding_path(file).write_text("[]", encoding="utf-8")
    with pytest.raises(StaleArtifactError, match="damaged"):
        check_binding(file, model_digest="network")
    binding_path(file).unlink()
    with pytest.raises(StaleArtifactError, match="does not say"):
        check_binding(file, model_digest="network")
    with pytest.raises(UsageError, match="digest is empty"):
        CacheBinding("", "images", "minmax")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["calibration.cache"]  # no temporary files


# -- for people --


def test_a_cache_in_human_terms() -> None:
    cache = CalibrationCache.parse(HEAD + "images: 3c010204\ndead: 0\n", zeros=True)
    shown = cache.describe()
    assert shown["tensorrt"] == "8.6.2"
    assert shown["unexcited"] == ["dead"]
    assert shown["tensors"][0] == {
        "name": "images",
        "bits": "3c010204",
        "scale": pytest.approx(1 / 127),
        "low": -1.0,
        "high": 1.0,
    }
    json.dumps(shown, allow_nan=False)
    lines = list(cache.lines())
    assert "TensorRT 8.6.2" in lines[0]
    assert "-1 .. 1" in lines[2]
    assert "stays in float" in lines[3]


def test_comparison() -> None:
    first = CalibrationCache(
        8602, "EntropyCalibration2", {"same": 0.5, "half": 1.0, "lost": 1.0, "dead": 0.0, "off": 2.0}
    )
    second = CalibrationCache(
        100300, "MinMaxCalibration", {"same": 0.5, "half": 0.5, "off": 2.25, "dead": 1.0, "more": 1.0}
    )
    found = compare_caches(first, second)
    assert [t.name for t in found.tensors] == ["dead", "half", "off", "same"]
    assert [t.ratio for t in found.tensors] == [math.inf, 0.5, 1.125, 1.0]
    assert (found.only_first, found.only_second) == (("lost",), ("more",))
    assert not found.equal
    assert not found.inverse
    json.dumps(found.to_json(), allow_nan=False)
    lines = list(found.lines(most=1))
    assert lines[0] == "8602-EntropyCalibration2 against 100300-MinMaxCalibration: 4 tensors in both, 3 differ"
    assert lines[2] == "... and 2 more"
    assert compare_caches(first, first.for_version("10.3.0")).equal


def test_the_inverse_mistake_is_recognized() -> None:
    right = CalibrationCache.from_ranges({"a": (0.0, 6.0), "b": (-1.5, 1.0)}, version="8.6.2")
    wrong = CalibrationCache(8602, right.algorithm, {name: 1.0 / scale for name, scale in right.scales.items()})
    assert compare_caches(right, wrong).inverse
    assert any("127/amax" in line for line in compare_caches(right, wrong).lines())
    assert not compare_caches(right, right).inverse


# -- ONNX Runtime's table --

RANGES = {"b": (-5.0, 2.0), "a:0": (0.0, 3.3), "ü": (-1e-20, 1e-20), "zero": (0.0, 0.0)}


def test_the_table_is_what_onnx_runtime_reads(tmp_path: Path) -> None:
    from onnxruntime.quantization.CalTableFlatBuffers.TrtTable import TrtTable

    values = ort_table.write_table(tmp_path, RANGES)
    assert values == {"b": 5.0, "a:0": float(np.float32(3.3)), "ü": float(np.float32(1e-20))}
    table = TrtTable.GetRootAs((tmp_path / ort_table.FILES[0]).read_bytes(), 0)
    entries = [(table.Dict(i).Key(), table.Dict(i).Value()) for i in range(table.DictLength())]
    assert [key for key, _ in entries] == [b"a:0", b"b", "ü".encode()]
    assert [float(np.float32(float(value))) for _, value in entries] == [values["a:0"], 5.0, values["ü"]]
    for name in ort_table.FILES[:2]:
        read = ort_table.read_table(tmp_path / name)
        assert {key: np.float32(value) for key, value in read.items()} == {k: np.float32(v) for k, v in values.items()}
    assert (tmp_path / ort_table.FILES[2]).read_text(encoding="utf-8").splitlines()[1] == "b 5.0"
    assert ort_table.native_unreadable(values) == ["a:0"]
    options = ort_table.provider_options(tmp_path)
    assert options["trt_int8_calibration_table_name"] == "calibration.flatbuffers"


def test_tables_that_onnx_runtime_wrote_are_read(tmp_path: Path) -> None:
    from onnxruntime.quantization.calibrate import TensorData
    from onnxruntime.quantization.quant_utils import write_calibration_table

    write_calibration_table(
        {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in RANGES.items() if high},
        str(tmp_path),
    )  # fmt: skip
    assert ort_table.read_table(tmp_path / "calibration.json")["b"] == 5.0
    # its flatbuffers hold the larger end instead of the larger magnitude
    assert ort_table.read_table(tmp_path / "calibration.flatbuffers")["b"] == 2.0


def test_damaged_tables(tmp_path: Path) -> None:
    file = tmp_path / "calibration.flatbuffers"
    with pytest.raises(CalibrationError, match="no such calibration table"):
        ort_table.read_table(file)
    whole = ort_table.table_bytes({f"tensor {i}": float(i + 1) for i in range(20)})
    for length in (0, 4, 9, 40, len(whole) // 2, len(whole) - 9):
        file.write_bytes(whole[:length])
        with pytest.raises(CalibrationError, match=r"no calibration table|no tensor|magnitude"):
            ort_table.read_table(file)
    file.write_bytes(HEAD.encode() + b"x: 3c010204\n")
    with pytest.raises(CalibrationError):
        ort_table.read_table(file)
    text = tmp_path / "calibration.json"
    for content, message in (
        ('{"a": 1, "a": 2}', "twice"),
        ('{"a": 0}', "largest magnitude"),
        ('{"a": NaN}', "largest magnitude"),
        ('{"a": "1"}', "holds str"),
        ("[1]", "not an object"),
        ("{}", "no tensor"),
        ("nonsense", "no calibration table"),
    ):
        text.write_text(content, encoding="utf-8")
        with pytest.raises(CalibrationError, match=message):
            ort_table.read_table(text)
    with pytest.raises(CalibrationError, match="not usable"):
        ort_table.write_table(tmp_path, {"x": (0.0, math.inf)})


# -- files of every kind --


def test_files_are_told_apart_by_what_they_hold_and_compared(tmp_path: Path) -> None:
    ranges = Ranges({"a": (-3.0, 1.0), "b": (0.0, 2.0)}, "minmax", "network", "images")
    cache, other = tmp_path / "any.name", tmp_path / "ranges.json"
    write_cache(cache, CalibrationCache.from_ranges(ranges, version="8.6.2"), BOUND)
    ranges.save(other)
    ort_table.write_table(tmp_path, ranges)
    files = [cache, other, *(tmp_path / name for name in ort_table.FILES[:2])]
    titles = [read_scale_file(file).title for file in files]
    assert titles == [
        "TensorRT 8.6.2 EntropyCalibration2",
        "ranges (minmax)",
        "ONNX Runtime calibration table",
        "ONNX Runtime calibration table",
    ]
    assert [is_scale_file(file) for file in files] == [True, False, True, False]
    for first in files:
        for second in files:
            assert compare_files(first, second).equal
        json.dumps(read_scale_file(first).describe(), allow_nan=False)
    assert read_scale_file(cache).describe()["belongs_to"]["model_digest"] == "network"
    zeros = tmp_path / "zeros"
    zeros.write_text(HEAD + "a: 0\nc: 3c010204\n", encoding="utf-8")
    found = compare_files(zeros, other)
    assert (found.only_first, found.only_second) == (("c",), ("b",))
    with pytest.raises(CalibrationError, match="neither a calibration cache"):
        read_scale_file(tmp_path / ort_table.FILES[2])
    with pytest.raises(CalibrationError, match="no such file"):
        read_scale_file(tmp_path / "none")
    assert not is_scale_file(tmp_path / "none")
