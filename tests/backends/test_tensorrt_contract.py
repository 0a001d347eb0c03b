"""Our calibrators and names against NVIDIA's own Python bindings of both generations, each in its own process.

Classes, enumerations and C++ virtual functions are NVIDIA's; only the three shared libraries are stand-ins, so nothing is built here.
The calibrators are called as TensorRT calls them, through the virtual functions of NVIDIA's C++ class (Itanium ABI, x86-64).
"""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from .tensorrt_bindings import GENERATIONS, SETUP, VIRTUAL, bindings

ABI = pytest.mark.skipif(platform.machine() != "x86_64", reason="calls through a table of virtual functions of x86-64")


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_bindings_are_the_pinned_ones_and_cannot_build(generation: int) -> None:
    found = bindings(generation)
    done = found.run(
        """
        print(trt.__version__)
        try:
            trt.Builder(trt.Logger())
        except TypeError as error:
            print(error)
        """
    )
    assert done.stdout.splitlines()[0] == found.version
    assert "nullptr" in done.stdout


def test_eleven_has_no_calibrators_and_says_what_to_do() -> None:
    done = bindings(11).run(
        SETUP
        + """
assert not calibrators.has_calibrators(trt) and calibrators.major_version(trt) == 11
for algorithm in calibrators.CLASSES:
    try:
        calibrators.make_calibrator(trt, images, model_digest="m", algorithm=algorithm)
    except ZsqError as error:
        print(type(error).__name__, error.what, error.remedy)
"""
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("EngineError") and "--target tensorrt-11" in line for line in lines)


def test_classes_and_algorithms_are_those_of_ten() -> None:
    done = bindings(10).run(
        SETUP
        + """
assert calibrators.has_calibrators(trt) and calibrators.major_version(trt) == 10
for algorithm, name in calibrators.CLASSES.items():
    made = calibrators.make_calibrator(trt, images, model_digest="m", algorithm=algorithm, memory=Host())
    assert isinstance(made, getattr(trt, name)) and isinstance(made, trt.IInt8Calibrator)
    print(algorithm, made.get_algorithm().name, made.get_batch_size(), trt.IInt8Calibrator.get_batch_size(made))
"""
    )
    assert done.stdout.splitlines() == [
        "entropy-2 ENTROPY_CALIBRATION_2 12 12",
        "minmax MINMAX_CALIBRATION 12 12",
        "legacy LEGACY_CALIBRATION 12 12",
        "entropy ENTROPY_CALIBRATION 12 12",
    ]


@ABI
def test_batches_reach_tensorrt_in_the_order_in_which_it_names_the_inputs(tmp_path: Path) -> None:
    bindings(10).run(
        VIRTUAL
        + """
from zsq_deploy.progress import Silent
for algorithm in calibrators.CLASSES:
    memory = Host()
    made = calibrators.make_calibrator(trt, images, model_digest="m", algorithm=algorithm, batch_size=5, memory=memory)
    virtual = Virtual(made)
    assert virtual.batch_size() == 5
    assert virtual.algorithm() == int(made.get_algorithm())
    assert virtual.read() is None
    for start in (0, 5):
        second, first = virtual.batch("mask", "image")
        assert first == memory.held["image"].ctypes.data and second == memory.held["mask"].ctypes.data
        assert np.array_equal(memory.held["image"], arrays["image"][start : start + 5])
        assert np.array_equal(memory.held["mask"], arrays["mask"][start : start + 5])
    assert virtual.batch("mask", "image") is None and virtual.batch("mask", "image") is None
    made.check()
    assert made.batches_read == 2 and memory.freed
    assert virtual.read() is None and virtual.batch("mask", "image") is not None and made.batches_read == 1  # the next build
    assert made.notes == ["2 of 12 images did not fill a batch of 5 and were left out"]
    if algorithm == "legacy":
        assert virtual.call(9, C.c_double) == 0.9999 and virtual.call(10, C.c_double) == 1.0
        length = C.c_size_t(7)
        assert virtual.call(11, C.c_void_p, (C.c_void_p, C.addressof(length))) is None
        virtual.call(12, None, (C.c_char_p, b"x"), (C.c_size_t, 1))
"""
    )


@ABI
def test_a_cache_is_written_bound_read_and_refused(tmp_path: Path) -> None:
    bindings(10).run(
        VIRTUAL
        + """
import sys
file = Path(sys.argv[1]) / "calibration.cache"
number = cache.version_number(trt.__version__)
text = f"TRT-{number}-EntropyCalibration2\\nimage: 3c010204\\n(Unnamed Layer* 3) [Shuffle]_output: 0\\n".encode()

def make(**changes):
    return calibrators.make_calibrator(trt, **{"calibration": images, "model_digest": "m", "cache": file, "memory": Host(), **changes})

def refused(kind, *words, **changes):
    try:
        make(**changes)
    except ZsqError as error:
        assert type(error).__name__ == kind and all(word in str(error) for word in words), str(error)
    else:
        raise AssertionError(words)

made = make()
virtual = Virtual(made)
assert virtual.read() is None
virtual.batch("image", "mask")
virtual.write(text)
made.check()
assert file.read_bytes() == text
bound = cache.check_binding(file, model_digest="m", set_digest=images.digest)
assert (bound.method, bound.source) == ("tensorrt-entropy-2", f"TensorRT {trt.__version__}")

again = make()
virtual = Virtual(again)
assert virtual.read() == text and again.cache_used
again.check()  # a cache is enough: no batch was asked for

refused("StaleArtifactError", "another network", model_digest="other")
refused("StaleArtifactError", "another calibration set", calibration=images.take(0, 4))
refused("StaleArtifactError", "EntropyCalibration2", "MinMaxCalibration", algorithm="minmax")
binding = cache.CacheBinding("m", images.digest, "tensorrt-entropy-2")
cache.write_cache(file, text.replace(str(number).encode(), b"8602"), binding)
refused("StaleArtifactError", "8.6.2", "ignores it")
cache.write_cache(file, text[:-1], binding)
refused("CalibrationError", "truncated")
file.write_bytes(text)
refused("StaleArtifactError", "changed after it was written")
cache.binding_path(file).unlink()
refused("StaleArtifactError", "does not say which network")

# changed between making the calibrator and the build
cache.write_cache(file, text, binding)
late = make()
file.write_bytes(text.replace(b"3c010204", b"3c010205"))
virtual = Virtual(late)
assert virtual.read() is None and virtual.batch("image", "mask") is None
try:
    late.check()
except ZsqError as error:
    assert "changed after it was written" in str(error)
else:
    raise AssertionError

# what TensorRT writes is looked at before it is kept
before = file.read_bytes()
file.unlink()
odd = make()
Virtual(odd).write(b"nonsense")
assert not file.exists()
try:
    odd.check()
except ZsqError as error:
    assert "no calibration cache" in str(error)
else:
    raise AssertionError
""",
        str(tmp_path),
    )


@ABI
def test_what_fails_in_a_callback_is_raised_after_the_build() -> None:
    bindings(10).run(
        VIRTUAL
        + """
def failing(names, **changes):
    made = calibrators.make_calibrator(trt, images, model_digest="m", **{"memory": Host(), **changes})
    assert Virtual(made).batch(*names) is None
    try:
        made.check()
    except (ZsqError, KeyboardInterrupt) as error:
        made.close()
        return f"{type(error).__name__}: {error}"
    raise AssertionError

class Full(Host):
    def upload(self, name, array):
        raise RuntimeError("out of memory")

class Interrupted(Host):
    def upload(self, name, array):
        raise KeyboardInterrupt

assert "asks for the inputs ['data']" in failing(["data"])
assert "RuntimeError: out of memory" in failing(["image", "mask"], memory=Full())
assert failing(["image", "mask"], memory=Interrupted()).startswith("KeyboardInterrupt")
import torch
if not torch.cuda.is_available():
    said = failing(["image", "mask"], memory=None)
    assert "no CUDA runtime" in said or "sees no GPU" in said or "CUDA refused" in said, said

idle = calibrators.make_calibrator(trt, images, model_digest="m", memory=Host())
try:
    idle.check()
except ZsqError as error:
    assert "read 0 of 1 batches and no cache" in str(error) and "BuilderFlag.INT8" in str(error)
else:
    raise AssertionError
"""
    )


def test_wrong_use_is_said_before_anything_runs() -> None:
    bindings(10).run(
        SETUP
        + """
def refused(*words, **changes):
    try:
        calibrators.make_calibrator(trt, images, **{"model_digest": "m", "memory": Host(), **changes})
    except ZsqError as error:
        assert type(error).__name__ == "UsageError" and all(word in str(error) for word in words), str(error)
    else:
        raise AssertionError(words)

refused("no calibrator 'kl'", "entropy-2", algorithm="kl")
refused("12 images", "batch of 13", batch_size=13)
refused("12 images", "batch of 0", batch_size=0)
refused("quantile is 1.5", algorithm="legacy", quantile=1.5)
refused("its digest is empty", model_digest="")
"""
    )


def test_names_that_the_builder_uses_exist() -> None:
    """Flags and settings by generation: what 11 dropped is not asked of it."""
    ten = bindings(10).run("print(*trt.BuilderFlag.__members__, hasattr(trt.IBuilderConfig, 'int8_calibrator'))").stdout
    eleven = (
        bindings(11).run("print(*trt.BuilderFlag.__members__, hasattr(trt.IBuilderConfig, 'int8_calibrator'))").stdout
    )
    for flag in ("INT8", "FP16", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS", "INT4"):
        assert flag in ten.split()
        assert flag not in eleven.split()
    assert ten.split()[-1] == "True"
    assert eleven.split()[-1] == "False"
    for generation in GENERATIONS:
        bindings(generation).run(
            """
            trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
            trt.ProfilingVerbosity.DETAILED, trt.LayerInformationFormat.JSON, trt.MemoryPoolType.WORKSPACE
            trt.DataType.INT8, trt.DataType.INT4, trt.EngineInspector.get_engine_information
            trt.IBuilderConfig.add_optimization_profile
            """
        )
