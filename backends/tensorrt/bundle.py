"""A folder to carry to the device: the network, the calibration cache if there is one, and scripts that build, time and compare there.

Beside a Q/DQ graph, the cache serves a second engine, from the float network: for those who compare the two ways, or whose device
(a DLA) takes no Q/DQ. TensorRT ignores a cache of another version and makes up ranges, without a word, so both scripts write the
version of the device's own TensorRT into a copy of the cache first, whichever of the two ways builds with it.

The scripts need nothing of this project. One drives ``trtexec``, the tool that comes with TensorRT; the other uses TensorRT's Python API.
Both are written for one generation of TensorRT, because flags differ: 8 and 10 have to be told of 8 bits where types are weak, 10 is
told of strong types for a Q/DQ graph, and 11 knows strong types only and refuses the old flags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from zsq_deploy.artifact import atomic_path, atomic_writer
from zsq_deploy.backends.base import Target
from zsq_deploy.backends.tensorrt.ort_table import provider_options
from zsq_deploy.backends.tensorrt.targets import generation
from zsq_deploy.errors import EngineError, UsageError
from zsq_deploy.model.graph import Graph, TensorSpec

__all__ = [
    "DEVICE_CACHE",
    "Bundle",
    "Mode",
    "trtexec_build_flags",
    "trtexec_layer_flags",
    "trtexec_time_flags",
    "write_bundle",
]

Mode = Literal["explicit", "implicit", "float"]
"""``explicit``: a Q/DQ graph. ``implicit``: the float network and a calibration cache. ``float``: the float network alone."""

_SHAPES = re.compile(r"^[A-Za-z0-9_./:-]+$")
_SAFE = re.compile(r"^[A-Za-z0-9_.-]+$")
DEVICE_CACHE = "implicit.cache"
"""The copy of the cache that the shell script makes on the device, for the TensorRT that it finds there."""

_SCRIPTS = ("trtexec.sh", "engine.py", "README.md")


@dataclass(frozen=True)
class Bundle:
    """What lies in the folder.

    Attributes:
        folder: The folder.
        network: File name of the network that the 8-bit engine is built from.
        mode: How it is quantized.
        files: All file names, the scripts included.
    """

    folder: Path
    network: str
    mode: Mode
    files: tuple[str, ...]


def trtexec_build_flags(
    target: Target, mode: Mode, *, network: str, plan: str, cache: str = "", half: bool = False
) -> tuple[str, ...]:
    """The flags with which ``trtexec`` builds an engine.

    Args:
        target: One of the ``tensorrt-...`` targets.
        mode: How the network is quantized.
        network: The ONNX file.
        plan: The engine's file.
        cache: The calibration cache, with ``implicit``.
        half: Layers that are not quantized may be computed in float16. TensorRT 10 then builds with weak types; TensorRT 11 cannot.

    Raises:
        UsageError: This generation cannot do it.
    """
    number = generation(target)
    if mode == "implicit" and number >= 11:
        raise UsageError(
            "TensorRT 11 has neither calibrators nor calibration caches",
            where=target.name,
            remedy="build the Q/DQ graph, or choose tensorrt-10",
        )
    if mode == "implicit" and not cache:
        raise UsageError(
            "an engine without Q/DQ needs a calibration cache",
            where=target.name,
            remedy="name the cache; without one trtexec builds with made-up ranges and does not say so",
        )
    if half and number >= 11:
        raise UsageError(
            "TensorRT 11 takes types as the graph says them",
            where=target.name,
            remedy="convert the float part of the graph to float16, or leave it in float32",
        )
    flags = [f"--onnx={network}", f"--saveEngine={plan}"]
    if number == 8:
        flags += [] if mode == "float" else ["--int8"]
        flags += ["--fp16"] if half else []
    elif number == 10:
        weak = mode == "implicit" or half
        flags += ["--stronglyTyped"] if mode == "explicit" and not weak else []
        flags += ["--int8"] if mode != "float" and weak else []
        flags += ["--fp16"] if half else []
    if mode == "implicit":
        flags.append(f"--calib={cache}")
    flags.append("--buildOnly" if number == 8 else "--skipInference")
    flags += ["--profilingVerbosity=detailed", f"--exportLayerInfo={Path(plan).stem}.layers.json"]
    return tuple(flags)


def trtexec_time_flags(target: Target, *, plan: str) -> tuple[str, ...]:
    """The flags with which ``trtexec`` times an engine: kernels on the GPU alone, transfers not counted."""
    flags = [f"--loadEngine={plan}", "--warmUp=500", "--duration=10", "--iterations=100"]
    if generation(target) < 11:  # 11 does all of these by itself
        flags += ["--useCudaGraph", "--useSpinWait", "--noDataTransfers"]
    flags.append("--percentile=99" if generation(target) == 8 else "--percentile=50,90,99")
    flags.append(f"--exportTimes={Path(plan).stem}.times.json")
    return tuple(flags)


def trtexec_layer_flags(target: Target, *, plan: str) -> tuple[str, ...]:
    """The flags with which ``trtexec`` says what each layer of a built engine computes in, and how long it takes.

    What it says when it builds lacks the types wherever the batch is open: they belong to shapes, and only a run has shapes.
    """
    stem = Path(plan).stem
    flags = [f"--loadEngine={plan}", "--warmUp=200", "--duration=3", "--iterations=50"]
    flags += ["--separateProfileRun"] if generation(target) < 11 else []
    flags += ["--profilingVerbosity=detailed", f"--exportLayerInfo={stem}.layers.json"]
    return (*flags, f"--exportProfile={stem}.profile.json")


def write_bundle(
    folder: Path,
    network: Path,
    target: Target,
    *,
    mode: Mode = "explicit",
    float_network: Path | None = None,
    cache: Path | None = None,
    samples: Mapping[str, npt.NDArray[Any]] | None = None,
    expected: Mapping[str, npt.NDArray[Any]] | None = None,
    more: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Bundle:
    """Write the folder that is carried to the device.

    Args:
        folder: Where; files that are there already under other names stay.
        network: The Q/DQ graph (``explicit``) or the float network (``implicit``); copied unless it lies in the folder.
        target: One of the ``tensorrt-...`` targets.
        mode: How the network is quantized.
        float_network: The float network, as the baseline.
        cache: The calibration cache in TensorRT's text form: with ``implicit`` what the engine is built with; with ``explicit`` for a second
            engine, from the float network.
        samples: Input name -> a few samples, on which the engine is compared on the device.
        expected: Output name -> what the reference gives for them.
        more: Files that lie in the folder already and belong to it, by their path in it.
        notes: What a reader should know, one sentence each.

    Raises:
        UsageError: Names that a script cannot hold, a mode that the generation does not have, or a cache too many.
        EngineError: A file is missing.
    """
    if cache is not None and (mode == "float" or (mode == "explicit" and float_network is None)):
        raise UsageError(
            "a calibration cache goes with the float network, and there is none that it could be used with",
            where=str(cache),
            remedy="leave the cache out, give the float network too, or make the bundle with mode='implicit'",
        )
    for file in (network, float_network, cache):
        if file is not None and not file.is_file():
            raise EngineError("a file of the bundle is missing", where=str(file), remedy="make the engine again")
        if file is not None and not _SAFE.match(file.name):
            raise UsageError(
                f"{file.name!r} cannot stand in a script",
                where=str(file),
                remedy="rename it: letters, digits, dot, hyphen and underscore",
            )
    graph = Graph.load(network)
    odd = [spec.name for spec in graph.inputs if not _SHAPES.match(spec.name)]
    if odd:
        raise UsageError(
            f"the input {odd[0]!r} cannot stand in a script",
            where=str(network),
            remedy="rename the network's inputs: letters, digits and underscore",
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = [_copied(file, folder) for file in (network, float_network, cache) if file is not None]
    files.extend(more)
    if samples is not None and expected is not None:
        arrays = {f"input:{name}": np.asarray(array) for name, array in samples.items()}
        arrays |= {f"output:{name}": np.asarray(array) for name, array in expected.items()}
        with atomic_writer(folder / "samples.npz") as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
        files.append("samples.npz")
    words = _words(graph, network.name, target, mode, float_network, cache, "samples.npz" in files, notes)
    words["IMPLICIT_TEXT"] = _implicit_text(words, "onnxruntime" in {Path(name).parent.as_posix() for name in more})
    for name in _SCRIPTS:
        text = resources.files("zsq_deploy.backends.tensorrt").joinpath(f"{name}.txt").read_text(encoding="utf-8")
        for key, value in words.items():
            text = text.replace(f"@{key}@", value)
        left = re.search(r"@[A-Z_]+@", text)
        assert left is None, left
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        files.append(name)
    (folder / "trtexec.sh").chmod((folder / "trtexec.sh").stat().st_mode | 0o111)
    return Bundle(folder, network.name, mode, tuple(files))


def _implicit_text(words: Mapping[str, str], table: bool) -> str:
    """What the README says of the cache beside a Q/DQ graph, and of the table of ONNX Runtime."""
    parts = []
    if words["IMPLICIT_FLAGS"]:
        parts.append(
            f"""## The float network with a calibration cache

`bash trtexec.sh implicit` builds `implicit.plan` from `{words["FLOAT"]}` and `{words["CACHE"]}` instead of the Q/DQ graph: the same ranges,
but TensorRT itself decides which layers compute in 8 bits. The first line of a cache names the version of TensorRT, and any other
version ignores the file without a word; so the script writes the device's version into a copy (`{DEVICE_CACHE}`) and builds with that.
In a program of your own, do the same and give the bytes back from `read_calibration_cache` of an `IInt8EntropyCalibrator2`.
`{words["CACHE"]}.binding.json` says which network and images the cache belongs to. Biases corrected for the Q/DQ graph and layers
excluded from it are not in a cache."""
        )
    if table:
        parts.append(
            f"""## ONNX Runtime's TensorRT provider

`onnxruntime/calibration.flatbuffers` holds the same ranges for `{words["FLOAT"]}` in a session with these options:

```python
options = {json.dumps(provider_options(Path("onnxruntime")), indent=4)}
onnxruntime.InferenceSession("{words["FLOAT"]}", providers=[("TensorrtExecutionProvider", options), "CUDAExecutionProvider"])
```

The provider looks for the table in its cache folder only. It takes `{words["NETWORK"]}` as well, without any of these files."""
        )
    return "".join(f"{part}\n\n" for part in parts)


def _copied(file: Path, folder: Path) -> str:
    place = folder / file.name
    if not place.exists() or not place.samefile(file):
        with atomic_path(place) as temporary:
            temporary.write_bytes(file.read_bytes())
    return file.name


def _shape(spec: TensorSpec, batch: str) -> str:
    sizes = [batch if place == 0 and size is None else str(size or 1) for place, size in enumerate(spec.shape)]
    return f"{spec.name}:{'x'.join(sizes)}"


def _shell(flags: Sequence[str]) -> str:
    """Flags as words of a shell script; what they hold was checked before."""
    return " ".join(flags)


def _words(
    graph: Graph,
    network: str,
    target: Target,
    mode: Mode,
    float_network: Path | None,
    cache: Path | None,
    samples: bool,
    notes: Sequence[str],
) -> dict[str, str]:
    number = generation(target)
    held = "" if cache is None else cache.name
    read = DEVICE_CACHE if mode == "implicit" else held
    build = trtexec_build_flags(target, mode, network=network, plan="int8.plan", cache=read)
    half = (
        build
        if number >= 11
        else trtexec_build_flags(target, mode, network=network, plan="int8.plan", cache=read, half=True)
    )
    base = float_network.name if float_network is not None else (network if mode == "implicit" else "")
    second = cache is not None and mode == "explicit" and number < 11
    implicit, implicit_half = (
        (
            trtexec_build_flags(target, "implicit", network=base, plan="implicit.plan", cache=DEVICE_CACHE, half=floats)
            for floats in (False, True)
        )
        if second
        else ((), ())
    )
    floating = trtexec_build_flags(target, "float", network=base, plan="float.plan", half=number < 11) if base else ()
    dynamic = any(spec.shape and spec.shape[0] is None for spec in graph.inputs)
    one = ",".join(_shape(spec, "1") for spec in graph.inputs)
    many = ",".join(_shape(spec, "${BATCH}") for spec in graph.inputs)
    command = "python3 engine.py compare" if samples else "python3 engine.py build"
    about = (
        "reads samples.npz and compares the engine with the reference"
        if samples
        else "builds with the Python API instead"
    )
    return {
        "TARGET": target.name,
        "GENERATION": str(number),
        "MODE": mode,
        "NETWORK": network,
        "CACHE": held,
        "FLOAT": base,
        "BUILD_FLAGS": _shell(build),
        "HALF_FLAGS": _shell(half),
        "HALF_ALLOWED": "yes" if number < 11 else "no",
        "FLOAT_FLAGS": _shell(floating),
        "IMPLICIT_FLAGS": _shell(implicit),
        "IMPLICIT_HALF_FLAGS": _shell(implicit_half),
        "IMPLICIT_TIME_FLAGS": _shell(trtexec_time_flags(target, plan="implicit.plan")),
        "DEVICE_CACHE": DEVICE_CACHE,
        "TIME_FLAGS": _shell(trtexec_time_flags(target, plan="int8.plan")),
        "LAYER_FLAGS": _shell(trtexec_layer_flags(target, plan="int8.plan")),
        "FLOAT_TIME_FLAGS": _shell(trtexec_time_flags(target, plan="float.plan")),
        "BUILD_SHAPES": f"--minShapes={one} --optShapes={many} --maxShapes={many}" if dynamic else "",
        "TIME_SHAPES": f"--shapes={many}" if dynamic else "",
        "SHAPES_JSON": json.dumps({spec.name: [size or 0 for size in spec.shape] for spec in graph.inputs}),
        "LAST_COMMAND": command,
        "LAST_WORDS": about,
        "NOTES": "\n".join(f"* {note}" for note in (*target.notes, *notes)),
        "FLOAT_TYPE": "float16 allowed" if number < 11 else "float32 with TF32",
    }
