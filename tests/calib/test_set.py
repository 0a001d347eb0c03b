"""Calibration sets: what is read back is what was written, however it is cut, and nothing changed goes unnoticed."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tracemalloc
import zipfile
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zsq_deploy.calib import CalibrationManifest, CalibrationSet, CalibrationWriter
from zsq_deploy.errors import CalibrationError, OutputExistsError, StaleArtifactError
from zsq_deploy.model.graph import TensorSpec


def images(count: int, *, seed: int = 0, size: int = 5) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "input/pixels:0": random.normal(1.5, 2.0, (count, 3, size, size)).astype(np.float32),
        "file": random.integers(0, 9, (count, 4)),
    }


def manifest(**fields: Any) -> CalibrationManifest:
    return CalibrationManifest(method="gaussian", model_name="net", **fields)


@dataclass(frozen=True)
class FakeModel:
    """What `check_fits` and `CalibrationManifest.of` need of a model."""

    name: str = "net"
    digest: str = "a" * 64
    inputs: tuple[TensorSpec, ...] = (
        TensorSpec("input/pixels:0", (None, 3, 5, None), np.dtype(np.float32)),
        TensorSpec("file", (None, 4), np.dtype(np.int64)),
    )
    preprocess: Any = field(default_factory=lambda: SimpleNamespace(mean=None, std=None, raw_pixels=False))


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype
        np.testing.assert_array_equal(left[name], right[name])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 23),
    cuts=st.lists(st.integers(1, 23), max_size=4),
    shard_bytes=st.integers(1, 4000),
    batch=st.integers(1, 30),
    part=st.tuples(st.integers(-25, 25), st.integers(-25, 25)),
)
def test_content_does_not_depend_on_the_cut(tmp_path_factory, count, cuts, shard_bytes, batch, part):
    whole = images(count)
    folder = tmp_path_factory.mktemp("sets") / "set"
    edges = sorted({0, count, *(cut for cut in cuts if cut < count)})
    with CalibrationWriter(folder, manifest(), shard_bytes=shard_bytes) as writer:
        for low, high in itertools.pairwise(edges):
            writer.append({name: array[low:high] for name, array in whole.items()})
            assert len(writer) == high
        written = writer.finish(seconds=1.5)
    memory = CalibrationSet.from_arrays(whole, manifest())
    opened = CalibrationSet.open(folder)
    for each in (written, opened, memory):
        assert len(each) == count
        assert each.digest == memory.digest
        assert each.manifest.statistics == memory.manifest.statistics
        same(each.arrays(), whole)
        pieces = list(each.batches(batch))
        assert [len(piece["file"]) for piece in pieces[:-1]] == [batch] * (len(pieces) - 1)
        same({name: np.concatenate([piece[name] for piece in pieces]) for name in whole}, whole)
    expected = {name: array[part[0] : part[1]] for name, array in whole.items()}
    if len(expected["file"]) == 0:
        with pytest.raises(CalibrationError, match="empty"):
            opened.take(*part)
    else:
        taken = opened.take(*part)
        same(taken.arrays(), expected)
        direct = CalibrationSet.from_arrays(expected, manifest())
        assert taken.digest == direct.digest
        assert taken.manifest.statistics == direct.manifest.statistics
        assert taken.manifest.images == len(taken) == len(expected["file"])
        assert taken.take(0, 1).digest == direct.take(0, 1).digest


def test_a_part_of_a_part_and_saving_it(tmp_path):
    whole = images(40)
    held_out = CalibrationSet.from_arrays(whole, manifest()).take(10, 30).take(5, None)
    saved = held_out.save(tmp_path / "part", shard_bytes=700)
    assert len(saved.manifest.shards) > 1
    same(CalibrationSet.open(tmp_path / "part").arrays(), {name: array[15:30] for name, array in whole.items()})
    assert saved.digest == held_out.digest


def test_digest_sees_every_kind_of_difference():
    base = images(6)
    digests = {CalibrationSet.from_arrays(base, manifest()).digest}
    swapped = {name: array[::-1] for name, array in base.items()}
    nudged = {name: array.copy() for name, array in base.items()}
    nudged["input/pixels:0"][5, 2, 4, 4] = np.nextafter(nudged["input/pixels:0"][5, 2, 4, 4], np.float32(9))
    renamed = {"x": base["input/pixels:0"], "file": base["file"]}
    reshaped = {**base, "input/pixels:0": base["input/pixels:0"].reshape(6, 5, 3, 5)}
    retyped = {**base, "file": base["file"].astype(np.uint64)}
    shorter = {name: array[:5] for name, array in base.items()}
    for other in (swapped, nudged, renamed, reshaped, retyped, shorter):
        digests.add(CalibrationSet.from_arrays(other, manifest()).digest)
    assert len(digests) == 7
    # ... and nothing else: neither the manifest nor the order of the bytes in memory counts
    again = CalibrationSet.from_arrays(
        {name: np.asfortranarray(array.astype(array.dtype.newbyteorder(">"))) for name, array in base.items()},
        CalibrationManifest(method="real", seed=9),
    )
    assert again.digest in digests


def test_statistics_equal_numpy_in_float64():
    arrays = images(17)
    found = CalibrationSet.from_arrays(arrays, manifest()).manifest.statistics
    pixels = arrays["input/pixels:0"].astype(np.float64)
    np.testing.assert_allclose(found["input/pixels:0"].mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(found["input/pixels:0"].std, pixels.std((0, 2, 3)), rtol=1e-12)
    np.testing.assert_array_equal(found["input/pixels:0"].min, pixels.min((0, 2, 3)))
    np.testing.assert_array_equal(found["input/pixels:0"].max, pixels.max((0, 2, 3)))
    np.testing.assert_allclose(found["file"].mean, [arrays["file"].mean()], rtol=1e-12)


def test_a_set_does_not_change_with_the_arrays_it_came_from(tmp_path):
    arrays = images(3)
    memory = CalibrationSet.from_arrays(arrays, manifest())
    writer = CalibrationWriter(tmp_path / "set", manifest())
    writer.append(arrays)
    arrays["file"][:] = 0
    on_disk = writer.finish()
    assert memory.digest == on_disk.digest
    same(memory.arrays(), on_disk.arrays())
    for each in (memory, on_disk):
        with pytest.raises(ValueError, match="read-only"):
            each.arrays()["file"][0] = 1
    with pytest.raises(CalibrationError, match="finished"):
        writer.append(arrays)


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        CalibrationSet.from_arrays(images(9), manifest()).save(tmp_path / name, shard_bytes=900)
    left = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    assert left == {file.name: file.read_bytes() for file in (tmp_path / "b").iterdir()}
    assert len(left) > 2


def test_shards_are_plain_npz_and_the_manifest_is_plain_json(tmp_path):
    CalibrationSet.from_arrays(images(2), manifest()).save(tmp_path / "set")
    with np.load(tmp_path / "set" / "shard-00000.npz", allow_pickle=False) as file:
        same({name: file[name] for name in file.files}, images(2))
    found = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert found["images"] == 2
    assert found["inputs"] == {"input/pixels:0": [3, 5, 5], "file": [4]}
    assert found["schema_version"] == 1
    assert found["versions"]["numpy"] == np.__version__


def test_every_changed_byte_is_refused(tmp_path):
    folder = tmp_path / "set"
    CalibrationSet.from_arrays(images(3, size=2), manifest()).save(folder)
    for file in sorted(folder.iterdir()):
        good = file.read_bytes()
        step = max(1, len(good) // 150)
        for at in range(0, len(good), step):
            file.write_bytes(good[:at] + bytes([good[at] ^ 0x21]) + good[at + 1 :])
            with pytest.raises((StaleArtifactError, CalibrationError)) as caught:
                CalibrationSet.open(folder)
            assert str(folder) in str(caught.value)
        file.write_bytes(good)
    CalibrationSet.open(folder)


def test_a_changed_method_name_in_the_manifest_is_refused(tmp_path):
    CalibrationSet.from_arrays(images(3), manifest()).save(tmp_path)
    file = tmp_path / "manifest.json"
    file.write_text(file.read_text().replace('"gaussian"', '"real"'))
    with pytest.raises(StaleArtifactError, match="manifest was changed"):
        CalibrationSet.open(tmp_path)


def test_a_missing_or_foreign_shard_is_named(tmp_path):
    CalibrationSet.from_arrays(images(3), manifest()).save(tmp_path / "a")
    CalibrationSet.from_arrays(images(3, seed=1), manifest()).save(tmp_path / "b")
    shard = tmp_path / "a" / "shard-00000.npz"
    shard.write_bytes((tmp_path / "b" / "shard-00000.npz").read_bytes())
    with pytest.raises(StaleArtifactError, match="changed"):
        CalibrationSet.open(tmp_path / "a")
    shard.unlink()
    with pytest.raises(CalibrationError, match="missing"):
        CalibrationSet.open(tmp_path / "a")
    late = CalibrationSet.open(tmp_path / "a", verify=False)
    with pytest.raises(CalibrationError, match="missing"):
        late.arrays()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "version 2"),
        ({"surprise": 1}, "surprise"),
        ({"images": "many"}, "images"),
        ({"shards": [{"file": "../elsewhere.npz", "images": 3, "sha256": "0" * 64}]}, "plain file name"),
    ],
)
def test_a_manifest_of_another_format_is_refused(tmp_path, change, message):
    CalibrationSet.from_arrays(images(3), manifest()).save(tmp_path)
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CalibrationError, match=message):
        CalibrationSet.open(tmp_path)


def test_a_manifest_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(Exception, match="not a JSON file"):
        CalibrationSet.open(tmp_path)


def test_object_arrays_are_never_unpickled(tmp_path):
    """A shard with a pickle inside fails before anything in it runs, even when its digest is made to fit."""
    CalibrationSet.from_arrays({"x": np.zeros((1, 2), np.float32)}, manifest()).save(tmp_path)
    shard = tmp_path / "shard-00000.npz"
    np.savez(shard, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(CalibrationError, match=r"cannot be read|changed"):
        CalibrationSet.open(tmp_path, verify=False).arrays()


def test_an_interrupted_writer_leaves_something_that_says_so(tmp_path):
    """A process that is killed while it writes (no cleanup at all)."""
    folder = tmp_path / "set"
    code = (
        "import os, sys, numpy as np\n"
        "from zsq_deploy.calib import CalibrationManifest, CalibrationWriter\n"
        f"writer = CalibrationWriter({str(folder)!r}, CalibrationManifest(method='x'), shard_bytes=64)\n"
        "writer.append({'x': np.zeros((100, 8), np.float32)})\n"
        "os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert list(folder.glob("shard-*.npz"))
    with pytest.raises(CalibrationError, match="unfinished"):
        CalibrationSet.open(folder)
    with pytest.raises(OutputExistsError, match="unfinished"):
        CalibrationWriter(folder, manifest())
    CalibrationSet.from_arrays(images(2), manifest()).save(folder, force=True)
    assert len(CalibrationSet.open(folder)) == 2
    assert sorted(file.name for file in folder.iterdir()) == ["manifest.json", "shard-00000.npz"]


def test_an_error_while_writing_leaves_nothing(tmp_path):
    folder = tmp_path / "set"

    def work() -> None:
        with CalibrationWriter(folder, manifest(), shard_bytes=100) as writer:
            writer.append(images(5))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not folder.exists()
    with (
        pytest.raises(CalibrationError, match="would be empty"),
        CalibrationWriter(folder, manifest()) as writer,
    ):
        writer.finish()
    assert not folder.exists()


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "set"

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def work() -> None:
        with CalibrationWriter(folder, manifest()) as writer:
            monkeypatch.setattr(zipfile.ZipFile, "open", full)
            writer.append(images(5))
            writer.finish()

    with pytest.raises(Exception, match="disk is full"):
        work()
    assert not folder.exists()


def test_nothing_is_overwritten_without_force(tmp_path):
    first = CalibrationSet.from_arrays(images(5), manifest()).save(tmp_path / "set", shard_bytes=100)
    other = CalibrationSet.from_arrays(images(2, seed=3), manifest())
    (tmp_path / "set" / "mine.txt").write_text("keep")
    with pytest.raises(OutputExistsError, match="already"):
        other.save(tmp_path / "set")
    assert CalibrationSet.open(tmp_path / "set").digest == first.digest
    other.save(tmp_path / "set", force=True)
    assert CalibrationSet.open(tmp_path / "set").digest == other.digest
    assert (tmp_path / "set" / "mine.txt").read_text() == "keep"
    assert len(list((tmp_path / "set").glob("shard-*"))) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError, match="not a folder"):
        other.save(tmp_path / "file")
    with pytest.raises(OutputExistsError, match="over itself"):
        CalibrationSet.open(tmp_path / "set").save(tmp_path / "set", force=True)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "no input"),
        ({"x": np.zeros((0, 3), np.float32)}, "nothing in it"),
        ({"x": np.float32(1)}, "no image axis"),
        ({"x": np.array(["a"])}, "type"),
        ({"x": np.array([None], dtype=object)}, "type"),
        ({"x": np.zeros((2, 3)), "y": np.zeros((3, 3))}, "different numbers"),
        ({"x": np.array([[1.0], [np.nan]], np.float32)}, r"NaN.*\[1\]"),
        ({"x": np.array([[np.inf], [1]], np.float32)}, r"infinite.*\[0\]"),
    ],
)
def test_bad_arrays_are_refused(tmp_path, arrays, message):
    with pytest.raises(CalibrationError, match=message):
        CalibrationSet.from_arrays(arrays, manifest())
    writer = CalibrationWriter(tmp_path / "set", manifest())
    with pytest.raises(CalibrationError, match=message):
        writer.append(arrays)


def test_images_of_one_set_have_one_shape(tmp_path):
    writer = CalibrationWriter(tmp_path / "set", manifest())
    writer.append(images(2))
    with pytest.raises(CalibrationError, match="changes from"):
        writer.append(images(2, size=6))
    with pytest.raises(CalibrationError, match="batches before"):
        writer.append({"file": images(2)["file"]})
    bad = images(2)
    bad["input/pixels:0"][1, 0, 0, 0] = np.nan
    with pytest.raises(CalibrationError, match=r"NaN.*\[3\]"):
        writer.append(bad)
    assert writer.finish().digest == CalibrationSet.from_arrays(images(2), manifest()).digest


def test_opening_what_is_no_set(tmp_path):
    with pytest.raises(CalibrationError, match="no calibration set here"):
        CalibrationSet.open(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibrationError, match="this is a file"):
        CalibrationSet.open(tmp_path / "file")
    with pytest.raises(CalibrationError, match="no manifest"):
        CalibrationSet.open(tmp_path)


def test_parameters_that_json_cannot_say_are_refused_and_leave_nothing(tmp_path):
    bad = manifest(parameters={"rate": float("nan")})
    with pytest.raises(CalibrationError, match="JSON"):
        CalibrationSet.from_arrays(images(1), bad).save(tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_fits_its_own_network():
    model = FakeModel()
    made = CalibrationSet.from_arrays(images(2), CalibrationManifest.of(model, method="zeroq", seed=3))
    made.check_fits(model)
    assert made.manifest.model_digest == model.digest
    assert made.manifest.seed == 3
    CalibrationSet.from_arrays(images(2), manifest()).check_fits(model)  # belongs to no network in particular


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (FakeModel(digest="b" * 64), StaleArtifactError, "another network"),
        (FakeModel(inputs=FakeModel().inputs[:1]), CalibrationError, "unknown: .'file'"),
        (
            FakeModel(inputs=(*FakeModel().inputs, TensorSpec("z", (None, 1), np.dtype(np.float32)))),
            CalibrationError,
            "missing: .'z'",
        ),
        (
            FakeModel(
                inputs=(TensorSpec("input/pixels:0", (None, 1, 5, 5), np.dtype(np.float32)), FakeModel().inputs[1])
            ),
            CalibrationError,
            "shape",
        ),
        (
            FakeModel(inputs=(FakeModel().inputs[0], TensorSpec("file", (None, 4), np.dtype(np.float32)))),
            CalibrationError,
            "int64 in the set and float32",
        ),
    ],
)
def test_does_not_fit_another_network(model, kind, message):
    made = CalibrationSet.from_arrays(images(2), CalibrationManifest.of(FakeModel(), method="zeroq"))
    with pytest.raises(kind, match=message):
        made.check_fits(model)


def test_other_preprocessing_is_refused():
    def model(mean: tuple[float, ...] | None) -> FakeModel:
        return FakeModel(preprocess=SimpleNamespace(mean=mean, std=mean, raw_pixels=False))

    made = CalibrationSet.from_arrays(images(2), CalibrationManifest.of(model((0.5, 0.5, 0.5)), method="zeroq"))
    made.check_fits(model((0.5, 0.5, 0.5)))
    made.check_fits(model(None))
    with pytest.raises(StaleArtifactError, match="--mean"):
        made.check_fits(model((0.4, 0.5, 0.5)))


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """Writing and reading a set of 48 MiB keeps less than two shards and a few batches in memory."""
    shard = 4 * 2**20
    batch = np.zeros((16, 3, 64, 64), np.float32)
    tracemalloc.start()
    with CalibrationWriter(tmp_path / "set", manifest(), shard_bytes=shard) as writer:
        for index in range(64):
            batch[:] = index
            writer.append({"x": batch})
        writer.finish()
    opened = CalibrationSet.open(tmp_path / "set")
    total = sum(float(piece["x"][:, 0, 0, 0].sum()) for piece in opened.batches(10))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 16 * sum(range(64))
    assert len(opened.manifest.shards) == 12 + 1
    assert peak < 4 * shard
