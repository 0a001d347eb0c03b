"""Bad input through the command line: one clear error that names the thing and the remedy, exit code 2, nothing half-written."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
import small
import torch
from onnx import numpy_helper
from PIL import Image

from zsq_deploy import artifact
from zsq_deploy.calib import CalibrationSet
from zsq_deploy.cli import main


@pytest.fixture
def deploy(zsq, tmp_path):
    """A quick deployment into a new folder."""

    def call(model, *more, out=None):
        return zsq("deploy", model, "-o", out or tmp_path / "out", "--images", 4, "--method", "gaussian", "-q", *more)

    return call


def refused(said, out, *words):
    """One clear error, exit code 2, no folder left behind."""
    assert said.code == 2, (said.out, said.err)
    assert said.out == ""
    assert said.err.startswith("error: "), said.err
    assert said.err.count("error: ") == 1
    assert "  to do: " in said.err
    for word in words:
        assert str(word) in said.err, (word, said.err)
    assert out is None or not out.exists()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return small.write_onnx(tmp_path_factory.mktemp("good") / "net.onnx")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def initializer(model, name):
    return next(item for item in model.graph.initializer if item.name == name)


def external(model, location):
    held = initializer(model, "3.weight")
    held.ClearField("raw_data")
    held.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(16 * 8 * 9 * 4))):
        entry = held.external_data.add()
        entry.key, entry.value = key, value
    return model


def with_nan(model):
    held = initializer(model, "3.weight")
    array = numpy_helper.to_array(held).copy()
    array[0, 0, 0, 0] = np.nan
    held.CopyFrom(numpy_helper.from_array(array, "3.weight"))
    return model


def with_unknown_op(model):
    model.graph.node[2].op_type = "Frobnicate"
    model.graph.node[5].op_type = "Frobnicate"
    return model


NETWORKS = {
    "missing": (None, ("does not exist",)),
    "empty": (lambda _: b"", ("empty",)),
    "truncated": (lambda m: m.SerializeToString()[:3000], ("damaged",)),
    "noise": (lambda _: np.random.default_rng(0).bytes(3000), ("damaged",)),
    "text": (lambda _: b"version https://git-lfs.github.com/spec/v1\n", ("text",)),
    "unknown operator": (lambda m: with_unknown_op(m).SerializeToString(), ("Frobnicate",)),
    "NaN weights": (lambda m: with_nan(m).SerializeToString(), ("NaN", "3.weight")),
    "external data elsewhere": (lambda m: external(m, "../../etc/passwd").SerializeToString(), ("outside", "3.weight")),
    "external data missing": (lambda m: external(m, "gone.bin").SerializeToString(), ("gone.bin", "missing")),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_networks(case, deploy, tmp_path):
    make, words = NETWORKS[case]
    file = tmp_path / "net.onnx"
    if make is not None:
        file.write_bytes(make(small.onnx_model()))
    refused(deploy(file), tmp_path / "out", file, *words)


def test_open_sizes_need_a_shape_and_the_example_given_works(deploy, tmp_path):
    file = small.write_onnx(tmp_path / "net.onnx", shape=("n", 3, "h", "w"))
    said = deploy(file)
    refused(said, tmp_path / "out", "--input-shape 1x3x64x64", "?x3x?x?")
    assert deploy(file, "--input-shape", "1x3x8x8", "--no-search").code == 0


OPTIONS = {
    "shape that is none": (("--input-shape", "1x3xlarge"), ("--input-shape", "1x3xlarge")),
    "shape that contradicts": (("--input-shape", "1x3x16x16"), ("?x3x8x8", "1x3x16x16")),
    "target": (("--target", "ort-x86-vni"), ("--target", "did you mean 'ort-x86-vnni'")),
    "method": (("--method", "zerq"), ("--method", "did you mean 'zeroq'")),
    "ranges": (("--ranges", "minmx"), ("--ranges", "did you mean 'minmax'")),
    "mean alone": (("--mean", "0.5,0.5,0.5"), ("--mean", "--std")),
    "two means for three channels": (("--mean", "0.5,0.5", "--std", "1,1"), ("--mean", "3 channel")),
    "a word for a mean": (("--mean", "a,b,c", "--std", "1,1,1"), ("--mean", "'a'")),
    "std of zero": (("--mean", "0,0,0", "--std", "1,0,1"), ("std", "above 0")),
    "raw and mean": (("--raw-pixels", "--mean", "0,0,0", "--std", "1,1,1"), ("--raw-pixels excludes --mean",)),
    "parameter without a value": (("--param", "steps"), ("--param", "steps=200")),
    "unknown parameter": (("--method", "zeroq", "--param", "stepz=3"), ("--param", "did you mean 'steps'")),
    "parameter of another type": (("--method", "zeroq", "--param", "steps=abc"), ("steps", "abc")),
    "parameter that is no value": (("--method", "zeroq", "--param", "steps=[1"), ("--param", "steps=[1")),
    "negative steps": (("--method", "zeroq", "--param", "steps=-5"), ("--param", "-5")),
    "a generator of nothing": (("--method", "genie", "--param", "latent=0"), ("--param", "latent", "1 or more")),
    "a blur without width": (("--method", "kw", "--param", "sigma=0"), ("--param", "sigma", "above 0")),
    "parameters that exclude each other": (
        ("--method", "intraq", "--param", "lower=1.0"),
        ("--param", "0.8", "lower=1.0"),
    ),
    "more images than the disk holds": (("--images", "1000000000000"), ("--images", "at most")),
    "precision": (("--image-precision", "float64"), ("--image-precision", "bfloat16")),
    "no images": (("--images", "0"), ("--images",)),
    "seed": (("--seed", "-1"), ("--seed",)),
    "one bit": (("--bits", "w1a8"), ("--bits", "w8a8")),
    "no bits": (("--bits", "eight"), ("--bits", "w8a8")),
    "a device that is none": (("--device", "gpu"), ("--device", "cpu")),
    "a device that is not here": (("--device", "cuda:17"), ("--device", "zsq doctor")),
    "a node that is none": (("--exclude", "conv9"), ("--exclude", "did you mean 'conv")),
    "gate": (("--min-agreement", "99.5"), ("--min-agreement", "less than or equal to 1")),
    "target twice": (("--target", "ort-arm64", "--target", "ort-arm64"), ("twice",)),
    "calibrator without images": (("--method", "bn-analytic", "--ranges", "ort-entropy"), ("--ranges", "bn-analytic")),
    "real without a set": (("--method", "real"), ("--calibration",)),
    "a set that is none": (("--calibration", "/nowhere"), ("/nowhere", "zsq synth")),
    "data that is none": (("--eval-data", "/nowhere.npz"), ("/nowhere.npz",)),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case, deploy, good, tmp_path):
    more, words = OPTIONS[case]
    refused(deploy(good, *more), tmp_path / "out", *words)


@pytest.mark.parametrize("more", [["--imges", "3"], ["--images", "many"], ["--threads", "0"], ["--target"]])
def test_options_that_the_parser_refuses(zsq, good, tmp_path, more):
    said = zsq("deploy", good, "-o", tmp_path / "out", *more)
    assert said.code == 2
    assert "Error: " in said.err
    assert more[0] in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [["deploy"], ["deploy", "net.onnx"], ["dploy"], ["run", "nowhere.yaml", "-o", "out"]]
)
def test_incomplete_commands(zsq, arguments):
    said = zsq(*arguments)
    assert said.code == 2
    assert "rror: " in said.err


WEIGHTS = {
    "pickle.pt": (lambda file: file.write_bytes(pickle.dumps(Evil())), "was not opened"),
    "pickle.safetensors": (lambda file: file.write_bytes(pickle.dumps(Evil())), "was not opened"),
    "objects.pt": (lambda file: torch.save({"a": Evil()}, file), "was not opened"),
    "keys.pt": (
        lambda file: torch.save({f"module.{k}": v for k, v in small.network(seed=1).state_dict().items()} | {"x": torch.ones(1)}, file),
        "do not belong to this network",
    ),
    "empty.pt": (lambda file: file.write_bytes(b""), "empty"),
    "cut.safetensors": (lambda file: file.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{"), ""),
    "missing.pt": (lambda file: None, "does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, deploy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "netcode.py").write_text(small.TORCH_CODE)
    make, words = WEIGHTS[name]
    make(tmp_path / name)
    said = deploy("netcode:build", "--path", tmp_path, "--weights", tmp_path / name, "--input-shape", "1x3x8x8")
    refused(said, tmp_path / "out", words, name)
    assert not (tmp_path / "pwned").exists()


def test_code_that_is_not_there(deploy, tmp_path):
    (tmp_path / "netcode2.py").write_text(small.TORCH_CODE)
    refused(deploy("nowhere_at_all:build"), tmp_path / "out", "nowhere_at_all", "--path")
    refused(deploy("netcode2:bild", "--path", tmp_path), tmp_path / "out", "bild", "build")
    refused(deploy("netcode2:build", "--path", tmp_path), tmp_path / "out", "--input-shape")


def save(**arrays):
    return lambda place: np.savez(place / "data.npz", **arrays) or place / "data.npz"


def images(*sizes, labels=None, names=None):
    def make(place):
        folder = place / "data"
        folder.mkdir()
        for index, size in enumerate(sizes):
            Image.new("RGB", (size, size)).save(folder / f"{index}.png")
        if labels is not None:
            (folder / "labels.csv").write_text(labels)
        for name in names or ():
            (folder / name).mkdir()
        return folder

    return make


X, Y = np.zeros((6, 8, 8, 3), np.uint8), np.arange(6) % 5
DATA = {
    "nothing in it": (save(x=X[:0], y=Y[:0]), "no images"),
    "no labels": (save(x=X), "y"),
    "no images": (save(y=Y), "x"),
    "one label too few": (save(x=X, y=Y[:5]), "5"),
    "labels that the network does not know": (save(x=X, y=Y + 3), "0..4"),
    "negative labels": (save(x=X, y=Y - 1), "0..4"),
    "labels that are no integers": (save(x=X, y=Y + 0.5), "integer"),
    "images that are no bytes": (save(x=X.astype(np.float32), y=Y), "uint8"),
    "gray images": (save(x=X[..., :1], y=Y), "channel"),
    "channels first": (save(x=np.moveaxis(X, -1, 1), y=Y), "store the channels last"),
    "images of another size": (save(x=np.zeros((6, 16, 16, 3), np.uint8), y=Y), "--resize"),
    "objects": (save(x=np.array([{}, {}], dtype=object), y=Y[:2]), "data.npz"),
    "an empty folder": (images(), "no images"),
    "a folder without labels": (images(8, 8), "without labels"),
    "a table without columns": (images(8, labels="0.png,1\n"), "column"),
    "a table of missing files": (images(8, labels="file,label\nx.png,1\n"), "x.png"),
    "a table of words": (images(8, labels="file,label\n0.png,cat\n"), "cat"),
    "a table without lines": (images(8, labels="file,label\n"), "names no image"),
    "folder of another size": (images(16, labels="file,label\n0.png,1\n"), "--resize"),
}


@pytest.mark.parametrize("case", DATA)
def test_evaluation_data(case, deploy, good, tmp_path):
    make, word = DATA[case]
    refused(deploy(good, "--eval-data", make(tmp_path)), tmp_path / "out", word)


def test_damaged_evaluation_files(deploy, good, tmp_path):
    whole = small.write_eval(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    refused(deploy(good, "--eval-data", tmp_path / "cut.npz"), tmp_path / "out", "cut.npz")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "data" / "labels.csv").write_text("file,label\n0.png,1\n")
    refused(deploy(good, "--eval-data", tmp_path / "data"), tmp_path / "out", "0.png", "decoded")


def test_a_set_of_another_network(deploy, place, good, tmp_path, zsq):
    other = small.write_onnx(tmp_path / "other.onnx", seed=9)
    said = deploy(other, "--calibration", place.out / "calibration")
    refused(said, tmp_path / "out", "another network", "zsq synth")
    gray = small.write_onnx(tmp_path / "gray.onnx", channels=1)
    refused(deploy(gray, "--calibration", place.out / "calibration"), tmp_path / "out", "(3, 8, 8)", "calibration")


def test_a_set_that_was_changed(deploy, place, tmp_path):
    shutil.copytree(place.out / "calibration", tmp_path / "set")
    shard = next((tmp_path / "set").glob("*.npz"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    refused(deploy(place.network, "--calibration", tmp_path / "set"), tmp_path / "out", "changed", shard)


def test_outputs_that_cannot_be(deploy, good, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    refused(deploy(good, out=file), None, file, "is a file")
    refused(deploy(good, out=file / "below"), None, file, "is a file")
    assert file.read_text() == "mine"


def test_a_folder_of_somebody_else(deploy, good, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    for more in ((), ("--force",), ("--resume",)):
        refused(deploy(good, *more), None, "thesis.tex", "-o")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_result_is_replaced_with_force_only_and_nothing_else_is_removed(deploy, good, tmp_path):
    out = tmp_path / "out"
    assert deploy(good, "--no-search").code == 0
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    refused(deploy(good, "--no-search"), None, out, "--force")
    refused(deploy(good, "--no-search", "--resume"), None, out, "--force", "complete")
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    mine = [out / "notes.txt", out / "ort-x86-vnni" / "measured-on-device.csv", out / "other" / "x"]
    mine[2].parent.mkdir()
    for file in mine:
        file.write_text("mine")
    assert deploy(good, "--no-search", "--force", "--target", "ort-arm64").code == 0
    assert all(file.read_text() == "mine" for file in mine)
    assert not (out / "ort-x86-vnni" / "engine.onnx").exists()
    assert (out / "ort-arm64" / "engine.onnx").exists()


def test_mistakes_are_found_before_an_old_result_is_removed(deploy, good, tmp_path):
    assert deploy(good, "--no-search").code == 0
    engine = (tmp_path / "out" / "ort-x86-vnni" / "engine.onnx").read_bytes()
    for more in (["--eval-data", "/nowhere.npz"], ["--ranges", "minmx"], ["--exclude", "nope"], ["--method", "nope"]):
        assert deploy(good, "--force", *more).code == 2
    assert (tmp_path / "out" / "ort-x86-vnni" / "engine.onnx").read_bytes() == engine
    assert (tmp_path / "out" / "report.json").is_file()


@pytest.mark.parametrize("stage", ["shard-00000.npz", "ranges.json", "engine.onnx", "report.json", "report.html"])
def test_a_full_disk(stage, deploy, good, tmp_path, monkeypatch):
    """The disk fills up while one certain file is written: no half file is left, and the run can be resumed."""
    real = artifact.os.fsync
    state = {"full": True}

    def fsync(handle):
        name = Path(f"/proc/self/fd/{handle}").readlink().name
        if state["full"] and stage.split(".")[0] in name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(artifact.os, "fsync", fsync)
    out = tmp_path / "out"
    said = deploy(good, "--no-search")
    assert said.code == 2, said.err
    assert "disk is full" in said.err
    assert stage.split(".")[0] in said.err
    assert not list(out.rglob(f"*{stage}"))
    assert not [file for file in out.rglob(".*") if file.is_file() and file.name not in (".zsq-run.json", ".zsq-lock")]
    state["full"] = False
    assert deploy(good, "--no-search", "--resume").code == 0
    assert (out / "report.html").is_file()


@pytest.mark.parametrize(("room", "said"), [(64, "kB are free"), (204, "disk is full")])
def test_a_file_system_that_is_really_full(tmp_path, room, said):
    """64 kB do not hold the images, which is told before any is made; 204 kB hold them and nothing else."""
    small_disk = tmp_path / "disk"
    small_disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={room}k", "tmpfs", str(small_disk)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        network = small.write_onnx(tmp_path / "net.onnx")
        done = small.zsq(
            "deploy", network, "-o", small_disk / "out", "--images", 64, "--method", "gaussian", "--no-search", "-q"
        )
        assert done.returncode == 2, done.stderr
        assert said in done.stderr.replace("\u00a0", " ")
        assert "Traceback" not in done.stderr
        left = [file for file in small_disk.rglob("*") if file.suffix in (".npz", ".onnx")]
        for file in left:  # what is left is whole: a set that the next run goes on with
            assert len(CalibrationSet.open(file.parent)), file
    finally:
        subprocess.run(["umount", str(small_disk)], check=True)


def test_a_limit_on_file_sizes(tmp_path):
    network = small.write_onnx(tmp_path / "net.onnx")
    command = f"ulimit -f 8; exec {small.executable()} deploy {network} -o {tmp_path / 'out'} --images 16 --method gaussian -q"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "ulimit" in done.stderr
    assert not list((tmp_path / "out").rglob("*.npz"))


def test_two_runs_in_one_folder(good, tmp_path, deploy):
    out = tmp_path / "out"
    with artifact.OutputFolder(out):
        for more in ((), ("--force",), ("--resume",)):
            refused(deploy(good, *more), None, out, "another run")
    assert deploy(good, "--no-search").code == 0


def test_defects_are_called_defects(good, tmp_path, zsq, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("inner workings")

    monkeypatch.setattr("zsq_deploy.pipeline.deploy", broken)
    said = zsq("deploy", good, "-o", tmp_path / "out")
    assert said.code == 3
    assert "defect of zsq-deploy" in said.err
    assert "ZSQ_DEBUG=1" in said.err
    monkeypatch.setenv("ZSQ_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["deploy", str(good), "-o", str(tmp_path / "out")])
