"""Compare engines with the exact integer reference, output by output.

Without ``--engine``, every network of the evaluation assets is quantized by the runtime's own static quantizer in several ways
(types, quantized and float outputs, reduced range), fed with its real images, and compared. With ``--engine``, files that
``zsq deploy`` made are compared on noise. The table says which share of all output values is equal (1 is expected), and the
largest difference in codes or, for float outputs, in units of the output's last bit; with ``--intermediates`` every value
inside the network is compared as well.

    python tools/check_integer_reference.py --images 100
    python tools/check_integer_reference.py --engine out/ort-x86-vnni/engine.onnx --target ort-x86-vnni
    python tools/check_integer_reference.py --runtime openvino --images 100

With ``--runtime openvino`` the networks are quantized in the ways that this runtime reads: our Q/DQ graph with free scales, the same
settled on exact scales, ONNX Runtime's Q/DQ graph, and NNCF (where it is installed).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from PIL import Image

from zsq_deploy.backends import Target, get_target
from zsq_deploy.backends.onnxruntime.integer import IntegerReference
from zsq_deploy.backends.onnxruntime.runner import session_options
from zsq_deploy.model import Model, Preprocess, load_model
from zsq_deploy.quant import PlacementRules, insert_qdq
from zsq_deploy.quant.settle import settle
from zsq_deploy.quant.statistics import collect

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Network:
    """A network of the assets: its images, its preprocessing, and the size of its input."""

    data: str
    preprocess: Preprocess
    size: tuple[int, int]


NETWORKS: dict[str, Network] = {
    "resnet20_cifar10": Network("cifar10", Preprocess(**IMAGENET), (32, 32)),
    "mlperf_tiny_resnet8_cifar10": Network("cifar10", Preprocess(raw_pixels=True), (32, 32)),
    "vit_cifar10": Network(
        "cifar10", Preprocess(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)), (32, 32)
    ),
    "mobilenet_v1_025_imagenet": Network("imagenet", Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3), (224, 224)),
    "squeezenet11_imagenet": Network("imagenet", Preprocess(**IMAGENET), (224, 224)),
    "mlperf_tiny_mobilenet_v1_025_vww": Network("imagenet", Preprocess(), (96, 96)),
    "dncnn25": Network("set12", Preprocess(), (128, 128)),
    "ultraface_rfb320": Network("imagenet", Preprocess(mean=(127 / 255,) * 3, std=(128 / 255,) * 3), (240, 320)),
}

# name -> activation type, weight type, float outputs, reduced range, target whose session options are used
VARIANTS: dict[str, tuple[str, str, bool, bool, str]] = {
    "u8s8, float output": ("u8", "s8", True, False, "ort-x86-vnni"),
    "u8s8": ("u8", "s8", False, False, "ort-x86-vnni"),
    "u8s8 reduced": ("u8", "s8", True, True, "ort-x86-avx2"),
    "u8u8": ("u8", "u8", True, False, "ort-x86-vnni"),
    "s8s8": ("s8", "s8", True, False, "ort-arm64"),
}


def images(assets: Path, network: Network, count: int) -> np.ndarray:
    """uint8 [N, H, W, C] in the network's size, evenly spread over the data set."""
    height, width = network.size
    if network.data == "cifar10":
        x = np.load(assets / "data" / "cifar10_test.npz")["x"]
        return x[np.linspace(0, len(x) - 1, min(count, len(x))).astype(int)]
    if network.data == "set12":
        found = np.load(assets / "data" / "set12_gray.npz")
        return np.stack([found[name][:height, :width, None] for name in sorted(found.files)])[:count]
    files = sorted((assets / "data" / "imagenet_like_224" / "images").glob("*.jpg"))
    chosen = [files[i] for i in np.linspace(0, len(files) - 1, min(count, len(files))).astype(int)]
    return np.stack([np.asarray(Image.open(f).convert("RGB").resize((width, height))) for f in chosen])


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, x: np.ndarray) -> None:
        self._batches: Iterator[np.ndarray] = iter(np.split(x, len(x)))
        self._name = name

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}


def quantize(graph: onnx.ModelProto, x: np.ndarray, variant: tuple[str, str, bool, bool, str], folder: Path) -> Path:
    """The runtime's static quantizer, per channel, min-max ranges of `x`."""
    activation, weight, float_outputs, reduced, _ = variant
    source, path = folder / "float.onnx", folder / "engine.onnx"
    onnx.save(graph, source)
    kinds = {"u8": QuantType.QUInt8, "s8": QuantType.QInt8}
    excluded = ["Gemm", "MatMul"] if float_outputs else []
    quantize_static(
        str(source),
        str(path),
        _Reader(graph.graph.input[0].name, x),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=reduced,
        activation_type=kinds[activation],
        weight_type=kinds[weight],
        extra_options={"OpTypesToExcludeOutputQuantization": excluded} if excluded else {},
    )
    return path


OPENVINO_VARIANTS: tuple[str, ...] = ("Q/DQ", "Q/DQ settled", "Q/DQ of ORT", "NNCF performance", "NNCF mixed")


def openvino_file(model: Model, x: np.ndarray, title: str, folder: Path) -> Path:
    """A network quantized in one of the ways that OpenVINO reads; min-max ranges of `x`."""
    target = get_target("openvino-cpu")  # before the libraries: it keeps their telemetry off
    graph = model.folded().graph
    name = graph.inputs[0].name
    if title == "Q/DQ of ORT":
        return quantize(graph.editable(), x, ("u8", "s8", True, False, ""), folder)
    if title.startswith("NNCF"):
        import nncf
        import openvino as ov

        source = folder / "float.onnx"
        onnx.save(graph.editable(), source)
        preset = nncf.QuantizationPreset(title.split()[1])
        data = nncf.Dataset([x[i : i + 1] for i in range(len(x))])
        with contextlib.redirect_stdout(io.StringIO()):
            made = nncf.quantize(ov.Core().read_model(source), data, preset=preset, subset_size=len(x))
        ov.save_model(made, folder / "engine.xml", compress_to_fp16=False)
        return folder / "engine.xml"
    rules = PlacementRules(residual="skip", bias="float", always_output=frozenset())
    seen = collect(graph, ({name: x[i : i + 1]} for i in range(len(x))), device="cpu")
    ranges = {value: (seen[value].minimum, seen[value].maximum) for value in seen}
    qdq = insert_qdq(graph, ranges, activation=target.activation, weight=target.weight, rules=rules)
    if title == "Q/DQ settled":
        weights = {value: array for value in graph.initializer_names if (array := graph.constant(value)) is not None}
        qdq = settle(qdq, activation=target.activation, weight=target.weight, float_weights=weights).graph
    path = folder / "qdq.onnx"
    onnx.save(qdq.proto, path)
    return path


def compare_openvino(path: Path, x: np.ndarray, *, batch: int, row: str) -> bool:
    """Print one line for an OpenVINO engine; return whether everything is equal."""
    from zsq_deploy.backends.openvino.integer import IntegerReference as Reference
    from zsq_deploy.backends.openvino.runner import OvRunner

    reference, engine = Reference(path), OvRunner(path, get_target("openvino-cpu"))
    equal = total = 0
    largest = seconds = 0.0
    for start in range(0, len(x), batch):
        feeds = {reference.input_names[0]: x[start : start + batch]}
        results = engine.run(feeds)
        began = time.perf_counter()
        ours = reference.run(feeds)
        seconds += time.perf_counter() - began
        for name, array in results.items():
            same, gap = difference(array, ours[name])
            equal, total, largest = equal + same, total + array.size, max(largest, gap)
    print(
        f"{row:55s} {total:9d} {equal / total:11.7f} {largest:7.1f} {len(reference.integer_nodes):4d} "
        f"{len(reference.float_nodes):4d} {1000 * seconds / len(x):8.1f}",
        flush=True,
    )
    return equal == total


def difference(a: np.ndarray, b: np.ndarray) -> tuple[int, float]:
    """How many values are equal, and the largest difference in codes or in units of the last bit."""
    equal = int((a == b).sum())
    if equal == a.size:
        return equal, 0.0
    gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
    if a.dtype.kind == "f":
        gap = gap / np.spacing(np.maximum(np.abs(a), np.abs(b)).astype(np.float32))
    return equal, float(np.nanmax(gap))


def compare(path: Path, target: Target, x: np.ndarray, *, batch: int, inside: bool, structure: Any, row: str) -> bool:
    """Print one line; return whether everything is equal."""
    reference = IntegerReference(path, target, structure=structure)
    session = ort.InferenceSession(str(path), session_options(target), providers=["CPUExecutionProvider"])
    equal = total = inner_equal = inner_total = 0
    largest = seconds = 0.0
    for start in range(0, len(x), batch):
        feeds = {reference.input_names[0]: x[start : start + batch]}
        theirs = dict(zip(reference.output_names, session.run(list(reference.output_names), feeds), strict=True))
        began = time.perf_counter()
        ours = reference.run(feeds)
        seconds += time.perf_counter() - began
        for name, array in theirs.items():
            same, gap = difference(array, ours[name])
            equal, total, largest = equal + same, total + array.size, max(largest, gap)
        if inside:
            outer = reference.engine_intermediates(feeds)
            for name, array in reference.intermediates(feeds).items():
                inner_equal, inner_total = inner_equal + difference(outer[name], array)[0], inner_total + array.size
    line = (
        f"{row:55s} {total:9d} {equal / total:11.7f} {largest:7.1f} {len(reference.integer_nodes):4d} "
        f"{len(reference.float_nodes):4d} {1000 * seconds / len(x):8.1f}"
    )
    print(line + (f"  {inner_equal}/{inner_total} inside" if inside else ""), flush=True)
    if equal != total:
        print(f"    first: {reference.first_divergence({reference.input_names[0]: x[:batch]})}")
    return equal == total and inner_equal == inner_total


def noise(path: Path, count: int) -> np.ndarray:
    """Standard normal inputs for an engine file; unknown sizes become 64."""
    sizes = [d.dim_value or 64 for d in onnx.load(path).graph.input[0].type.tensor_type.shape.dim]
    return np.random.default_rng(0).standard_normal((count, *sizes[1:])).astype(np.float32)


def main() -> int:
    """Parse the command line, print the table, return 0 if everything is equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=Path(os.environ.get("ZSQ_ASSETS", "../shared/assets")))
    parser.add_argument("--network", action="append", choices=sorted(NETWORKS), help="only these networks")
    parser.add_argument(
        "--variant", action="append", choices=[*VARIANTS, *OPENVINO_VARIANTS], help="only these ways to quantize"
    )
    parser.add_argument("--images", type=int, default=20, help="images a network (default 20)")
    parser.add_argument("--batch", type=int, default=10, help="images at a time (1 where the network's batch is fixed)")
    parser.add_argument("--engine", type=Path, action="append", help="engine files to compare instead of the assets")
    parser.add_argument("--target", default="ort-x86-vnni", help="target of the engine files")
    parser.add_argument("--intermediates", action="store_true", help="compare every value inside the networks as well")
    parser.add_argument(
        "--structure",
        choices=("runtime", "file"),
        default="runtime",
        help="who says what is fused: the runtime, or our own reading of the file",
    )
    parser.add_argument("--runtime", choices=("onnxruntime", "openvino"), default="onnxruntime")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ort.set_default_logger_severity(3)
    logging.disable(logging.WARNING)  # the quantizer's advice to preprocess, which was done by load_model
    print(
        f"{'engine':55s} {'outputs':>9s} {'equal share':>11s} {'max LSB':>7s} {'int':>4s} {'flt':>4s} {'ms/image':>8s}"
    )
    fine = True
    options: dict[str, Any] = {"inside": arguments.intermediates, "structure": arguments.structure}
    if arguments.engine:
        for path in arguments.engine:
            if arguments.runtime == "openvino":
                x = noise(path.with_name("qdq.onnx") if path.suffix == ".xml" else path, arguments.images)
                fine &= compare_openvino(path, x, batch=arguments.batch, row=str(path)[-55:])
                continue
            x = noise(path, arguments.images)
            fine &= compare(
                path, get_target(arguments.target), x, batch=arguments.batch, row=str(path)[-55:], **options
            )
        return 0 if fine else 1
    for name in arguments.network or NETWORKS:
        network = NETWORKS[name]
        x = network.preprocess.apply(images(arguments.assets, network, arguments.images))
        path = next(iter(sorted((arguments.assets / "models").rglob(f"{name}.onnx"))))
        model = load_model(path, preprocess=network.preprocess, input_shape=(1, *x.shape[1:]))
        if arguments.runtime == "openvino":
            for title in arguments.variant or OPENVINO_VARIANTS:
                with tempfile.TemporaryDirectory() as folder:
                    made = openvino_file(model, x[:8], title, Path(folder))
                    fine &= compare_openvino(made, x, batch=arguments.batch, row=f"{name} {title}")
            continue
        for title in arguments.variant or VARIANTS:
            variant = VARIANTS[title]
            with tempfile.TemporaryDirectory() as folder:
                engine = quantize(model.folded().graph.editable(), x[:8], variant, Path(folder))
                target = get_target(variant[4])
                fine &= compare(engine, target, x, batch=arguments.batch, row=f"{name} {title}", **options)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
