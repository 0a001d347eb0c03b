"""What each of NNCF's parameters is worth on a labelled network: the measurement behind the defaults of ``--quantizer nncf``.

For every set of images (real ones from the other end of the labelled data, and any calibration sets that are named) and every variant of
the parameters: agreement with the float network, accuracy, and SQNR of the logits, on labelled images that nothing was calibrated with.
The first half of those is what parameters were chosen on, the second half is only reported.

    python tools/compare_nncf.py NETWORK.onnx DATA --mean .5 .5 .5 --std .5 .5 .5 [--set FOLDER]... [--images 436] [--real 64]
        [--variants nncf "full bias" ...] [--raw-pixels]

The engines are NNCF's own finished IRs in OpenVINO's integer kernels (``vendor.xml``); our exact scales come later and change little.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
import torch

from zsq_deploy.backends import get_target
from zsq_deploy.backends.openvino.convert import convert, read
from zsq_deploy.backends.openvino.nncf_route import design_nncf
from zsq_deploy.backends.openvino.options import BuildOptions, NncfOptions
from zsq_deploy.backends.openvino.runtime import core
from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.evaldata import load_eval_data
from zsq_deploy.model import Model, Preprocess, load_model
from zsq_deploy.pipeline.calibration import PROBES, probe_images

Array = npt.NDArray[Any]

_THEIRS: dict[str, Any] = {
    "fast_bias_correction": True,
    "activations_range": None,
    "per_channel_activations": True,
    "overflow_fix": "first_layer_only",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "nncf": _THEIRS,
    "full bias": {**_THEIRS, "fast_bias_correction": False},
    "min/max": {**_THEIRS, "activations_range": "minmax"},
    "no half range": {**_THEIRS, "overflow_fix": "disable"},
    "per tensor": {**_THEIRS, "per_channel_activations": False},
    "ours": {},
    "ours, fast bias": {"fast_bias_correction": True},
    "ours, no bias": {"bias_correction": False},
    "ours, histogram": {"activations_range": "histogram"},
    "ours, nncf's ranges": {"activations_range": None},
    "ours, half range": {"overflow_fix": "first_layer_only"},
    "ours, performance": {"preset": "performance"},
    "ours, transformer": {"model_type": "transformer"},
    "ours, transformer, no smoothing": {"model_type": "transformer", "smooth_quant_alpha": -1.0},
}
"""From NNCF's defaults to ours, one step at a time, and back."""


def _logits(ir: Any, images: Array, name: str) -> Array:
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core().compile_model(ir, "CPU", settings)
    return np.concatenate([np.array(compiled({name: images[row : row + 1]})[0]) for row in range(len(images))])


def _row(
    variant: str, source: str, model: Model, calibration: CalibrationSet, probes: Mapping[str, Array] | None, judge: Any
) -> str:
    images, labels, floating = judge
    options = BuildOptions(quantizer="nncf", nncf=NncfOptions(**VARIANTS[variant]))
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        design_nncf(model, calibration, get_target("openvino-cpu"), options, Path(folder), probes=probes)
        seconds = time.process_time() - started
        logits = _logits(read(Path(folder) / "vendor.xml"), images, model.inputs[0].name)
    same, right = logits.argmax(1) == floating.argmax(1), logits.argmax(1) == labels
    noise = float(np.square(logits - floating).sum())
    sqnr = 10 * np.log10(float(np.square(floating).sum()) / max(noise, 1e-30))
    half = len(images) // 2
    return (
        f"| {variant} | {source} | {100 * same[:half].mean():.1f} | {100 * same[half:].mean():.1f} | {100 * right.mean():.1f} | "
        f"{sqnr:.1f} | {seconds:.0f} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("data")
    parser.add_argument("--mean", nargs="+", type=float, default=[0.0])
    parser.add_argument("--std", nargs="+", type=float, default=[1.0])
    parser.add_argument("--raw-pixels", action="store_true")
    parser.add_argument("--set", action="append", default=[], help="folder of a calibration set")
    parser.add_argument("--images", type=int, default=436)
    parser.add_argument("--real", type=int, default=64)
    parser.add_argument("--variants", nargs="+", default=["nncf", "ours"], choices=list(VARIANTS))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    preprocess = Preprocess(raw_pixels=True) if given.raw_pixels else Preprocess(tuple(given.mean), tuple(given.std))
    model = load_model(given.network, preprocess=preprocess)
    spec = model.inputs[0]
    data = load_eval_data(given.data, spec)
    images = preprocess.apply(data.images(0, min(len(data), given.real + given.images)))
    labels = np.asarray(data.labels[: len(images)])
    floating = _logits(convert(model.folded().graph), images[given.real :], spec.name)
    judge = (images[given.real :], labels[given.real :], floating)
    print(f"float: {100 * (floating.argmax(1) == judge[1]).mean():.1f} % of {len(floating)} images\n")
    print("| parameters | images | agreement, chosen on % | agreement, reported % | accuracy % | SQNR dB | CPU s |")
    print("|---|---|---|---|---|---|---|", flush=True)
    real = CalibrationSet.from_arrays({spec.name: images[: given.real]}, CalibrationManifest(method="real"))
    sets = {f"{given.real} real": (real, None)} if given.real else {}
    for folder in given.set:
        opened = CalibrationSet.open(folder)
        name = f"{len(opened)} {opened.manifest.method}"
        sets[name] = (opened, None)
        sets[f"{name} + pictures"] = (opened, probe_images(model, PROBES))
    for source, (calibration, probes) in sets.items():
        for variant in given.variants:
            print(_row(variant, source, model, calibration, probes, judge), flush=True)


if __name__ == "__main__":
    main()
