"""How much faster integer engines are than float32, side by side, on networks of ResNet-18's and MobileNetV2's size at 224.

Random weights, ranges from a few noise images (speed does not depend on either), one thread. Beside the engine that this project
chooses stands what plain ``quantize_static`` makes with the right types (u8 x s8 per channel, everything else by default).

    python tools/bench_engines.py [--threads 1] [--rounds 60] [--size 224] [--json FILE]

``calm x`` compares the 5 % quantiles: on a machine that does other work as well, medians tell how busy it was.
Goals on a machine with VNNI, one thread: at least 3.0x (ResNet-18) and 1.9x (MobileNetV2).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnxruntime as ort
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

sys.path.insert(0, str(Path(__file__).parent))
from _networks import mobilenet_v2, resnet18

from zsq_deploy.backends import get_target
from zsq_deploy.backends.onnxruntime.choose import choose, paired_latency
from zsq_deploy.backends.onnxruntime.proof import kernels
from zsq_deploy.backends.onnxruntime.runner import OrtRunner, missing_features
from zsq_deploy.model import load_model

GOALS = {"resnet18": 3.0, "mobilenet_v2": 1.9}


class _Reader(CalibrationDataReader):
    def __init__(self, name: str, images: np.ndarray) -> None:
        self._left = iter([{name: image[None]} for image in images])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def _ranges(path: Path, images: np.ndarray) -> dict[str, tuple[float, float]]:
    """Plain minima and maxima of all float values, by running the float model with every value as an output."""
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    present = {value.name for value in model.graph.output}
    model.graph.output.extend(
        value
        for value in model.graph.value_info
        if value.name not in present and value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    found = {name: (float(images.min()), float(images.max()))}
    names = [value.name for value in session.get_outputs()]
    for image in images:
        for value, array in zip(names, session.run(None, {name: image[None]}), strict=True):
            low, high = found.get(value, (np.inf, -np.inf))
            found[value] = (min(low, float(array.min())), max(high, float(array.max())))
    return found


def measure(name: str, network: torch.nn.Module, size: int, threads: int, rounds: int) -> dict[str, object]:
    """Build, measure in turns, and return one row of the table."""
    target = get_target("ort-x86-vnni")
    model = load_model(network, input_shape=(1, 3, size, size), name=name)
    images = np.random.default_rng(0).normal(size=(4, 3, size, size)).astype(np.float32)
    feed = model.inputs[0].name
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = folder / "float.onnx"
        source.write_bytes(model.folded().graph.proto.SerializeToString())
        choice = choose(
            model,
            _ranges(source, images),
            target,
            folder / "engine",
            images=[{feed: images}],
            threads=threads,
            rounds=rounds,
        )
        plain = folder / "plain.onnx"
        quantize_static(
            source,
            plain,
            _Reader(feed, images),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        runners = [
            OrtRunner(choice.engine.float_path, target, threads=threads, mode="float"),
            OrtRunner(plain, target, threads=threads),
            OrtRunner(choice.engine.path, target, threads=threads),
        ]
        times = paired_latency(runners, {feed: images[:1]}, rounds=rounds)
        calm = paired_latency(runners, {feed: images[:1]}, rounds=rounds, quantile=0.05)
        executed = kernels(choice.engine.path, target, {feed: images[:1]}, threads=threads)
    macs = sum(record.macs for record in executed)
    return {
        "network": name,
        "float32_ms": times[0],
        "plain_ms": times[1],
        "engine_ms": times[2],
        "plain_speedup": times[0] / times[1],
        "speedup": times[0] / times[2],
        "calm_speedup": calm[0] / calm[2],
        "goal": GOALS[name],
        "choice": choice.chosen.options.label,
        "integer_macs_share": sum(record.macs for record in executed if record.integer) / macs,
        "sqnr_db": choice.chosen.sqnr_db,
    }


def main() -> int:
    """Print the table; the exit code is 1 if a goal is missed on a machine that can reach it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lacking = missing_features(get_target("ort-x86-vnni"))
    rows = []
    print(
        f"{'network':14} {'float32':>9} {'plain':>9} {'engine':>9} {'plain x':>8} {'x':>6} {'calm x':>7} {'goal':>5}  integer  choice"
    )
    for name, network in (("resnet18", resnet18), ("mobilenet_v2", mobilenet_v2)):
        row = measure(name, network(size=arguments.size), arguments.size, arguments.threads, arguments.rounds)
        rows.append(row)
        print(
            f"{row['network']:14} {row['float32_ms']:6.2f} ms {row['plain_ms']:6.2f} ms {row['engine_ms']:6.2f} ms "
            f"{row['plain_speedup']:7.2f}x {row['speedup']:5.2f}x {row['calm_speedup']:6.2f}x {row['goal']:4.1f}x  {row['integer_macs_share']:6.1%}  "
            f"{row['choice']}"
        )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"threads": arguments.threads, "lacking": lacking, "rows": rows}, indent=2)
        )
    if lacking:
        print(f"this machine lacks {', '.join(lacking)}: the goals do not hold here")
        return 0
    return int(any(max(row["speedup"], row["calm_speedup"]) < row["goal"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
