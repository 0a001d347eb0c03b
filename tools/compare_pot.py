"""What POT is told, and what comes of it: POT's own defaults against ours, on one network and one calibration set.

    python tools/compare_pot.py network.onnx --set DIR --data DATA [--mean .. --std ..] [--images 24] [--probes 16] [--count 150]

prints one row a setting: signal-to-noise ratio against the float network, top-1 agreement with it, and accuracy, of POT's finished model under
the current OpenVINO. `DIR` is a calibration set (`zsq synth`); the labelled data are only looked at afterwards.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from zsq_deploy.backends import get_target
from zsq_deploy.backends.openvino.convert import convert, read
from zsq_deploy.backends.openvino.options import BuildOptions, PotOptions
from zsq_deploy.backends.openvino.pot import design_pot
from zsq_deploy.backends.openvino.runtime import core
from zsq_deploy.calib import CalibrationSet
from zsq_deploy.evaldata import load_eval_data
from zsq_deploy.model import load_model
from zsq_deploy.model.preprocess import Preprocess
from zsq_deploy.pipeline.calibration import probe_images

SETTINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "ours": ({}, True),
    "POT's own ranges": ({"config": {"range_estimator": {"preset": "default"}}}, True),
    "without structured pictures": ({}, False),
    "full bias correction": ({"use_fast_bias": False}, True),
    "preset performance": ({"preset": "performance"}, True),
}
"""Row -> (options of POT, whether structured pictures are shown)."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--set", required=True, type=Path, help="calibration set")
    parser.add_argument("--data", required=True, type=Path, help="labelled images")
    parser.add_argument("--mean", type=float, nargs="+")
    parser.add_argument("--std", type=float, nargs="+")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--count", type=int, default=150, help="labelled images to score on")
    given = parser.parse_args()
    preprocess = Preprocess(mean=tuple(given.mean), std=tuple(given.std)) if given.mean else Preprocess()
    model = load_model(given.model, preprocess=preprocess)
    images = CalibrationSet.open(given.set).take(0, given.images)
    pictures = probe_images(model, given.probes)
    data = load_eval_data(given.data, model.inputs[0], limit=given.count)
    x = preprocess.apply(data.images(0, len(data))).astype(np.float32)
    y = np.asarray(data.labels)
    wanted = _outputs(convert(model.folded().graph), x)
    print(f"float: {100 * (wanted.argmax(1) == y).mean():.2f} % of {len(y)}")
    print("| POT is told | dB | agreement % | accuracy % |\n|---|---|---|---|")
    for name, (told, shown) in SETTINGS.items():
        with tempfile.TemporaryDirectory() as scratch:
            design = design_pot(
                model,
                images,
                get_target("openvino-cpu"),
                BuildOptions(quantizer="pot", pot=PotOptions(**told)),
                Path(scratch),
                probes=pictures if shown else None,
            )
            assert design.vendor_ir is not None
            got = _outputs(read(design.vendor_ir), x)
        noise = 10 * np.log10(np.square(wanted).sum() / np.square(got - wanted).sum())
        same = 100 * (got.argmax(1) == wanted.argmax(1)).mean()
        print(f"| {name} | {noise:.1f} | {same:.1f} | {100 * (got.argmax(1) == y).mean():.1f} |", flush=True)


def _outputs(model: Any, x: np.ndarray) -> np.ndarray:
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.concatenate([np.array(compiled(x[row : row + 1])[0]) for row in range(len(x))])


if __name__ == "__main__":
    main()
