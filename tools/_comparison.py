"""What the comparison tools share: the networks of the assets, real images in two halves, and the counting."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from zsq_deploy.artifact import write_json
from zsq_deploy.calib import CalibrationManifest, CalibrationSet
from zsq_deploy.evaldata import EvalData, load_eval_data, load_images
from zsq_deploy.model import Model, Preprocess

__all__ = [
    "NETWORKS",
    "SIGNALS",
    "Network",
    "Tally",
    "cell",
    "finished_sets",
    "keep_row",
    "open_data",
    "real_halves",
    "real_set",
]


@dataclass(frozen=True)
class Network:
    """A network of the assets, how images become its input, and what it is scored on.

    `classes`: its first output holds one score a class; else it is scored by the signal to noise of its outputs. `noise`: standard deviation of
    what is added to the images, in units of their brightest pixel.
    """

    file: str
    preprocess: Preprocess
    data: str
    labelled: bool = True
    resize: bool = False
    input_shape: tuple[int, ...] | None = None
    images: int = 128
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    classes: bool = True
    noise: float = 0.0


IMAGENET = Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NETWORKS = {
    "resnet20_cifar10": Network("resnet20_cifar10.onnx", IMAGENET, "cifar10_test.npz"),
    "mlperf_tiny_resnet8_cifar10": Network(
        "mlperf_tiny_resnet8_cifar10.onnx", Preprocess(raw_pixels=True), "cifar10_test.npz"
    ),
    "mobilenet_v1_025_imagenet": Network(
        "mobilenet_v1_025_imagenet.onnx",
        Preprocess((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        "imagenet_like_224",
        parameters={"genie": {"steps": 300}},
    ),
    "squeezenet11_imagenet": Network("squeezenet11_imagenet.onnx", IMAGENET, "imagenet_like_224"),
    "mlperf_tiny_mobilenet_v1_025_vww": Network(
        "mlperf_tiny_mobilenet_v1_025_vww.onnx",
        Preprocess((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        "imagenet_like_224",
        labelled=False,
        resize=True,
        parameters={"genie": {"steps": 300}},
    ),
    "vit_cifar10": Network(
        "vit_cifar10.onnx", Preprocess((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)), "cifar10_test.npz"
    ),
}

SIGNALS = {
    "ultraface_rfb320": Network(
        "ultraface_rfb320.onnx",
        Preprocess((127 / 255,) * 3, (128 / 255,) * 3),
        "imagenet_like_224",
        labelled=False,
        resize=True,
        images=16,
        classes=False,
    ),
    "dncnn25": Network(
        "dncnn25.onnx",
        Preprocess(),
        "set12_gray.npz",
        labelled=False,
        input_shape=(1, 1, 64, 64),
        images=16,
        classes=False,
        noise=25 / 255,
    ),
}
"""Networks that give no classes."""


def open_data(network: Network, model: Model, assets: Path, limit: int | None = None) -> EvalData:
    """The images that a network is scored on, at most `limit`; labels are -1 where they may not be used.

    A network that takes noisy patches gets them as a camera would give them: cut to the size that it was loaded with, noise of a fixed seed
    added, rounded to 8 bits.
    """
    source = assets / "data" / network.data
    if not network.noise:
        return load_eval_data(source, model.inputs[0], resize=network.resize, limit=limit)
    side, rng, patches = int(model.inputs[0].shape[-1] or 64), np.random.default_rng(0), list[np.ndarray]()
    with np.load(source) as held:
        for name in sorted(held.files):
            clean = held[name].astype(np.float64)
            dirty = np.clip(np.rint(clean + rng.normal(0, 255 * network.noise, clean.shape)), 0, 255).astype(np.uint8)
            rows, columns = (length // side for length in dirty.shape)
            cut = dirty[: rows * side, : columns * side].reshape(rows, side, columns, side).swapaxes(1, 2)
            patches.extend(cut.reshape(-1, side, side))
    with TemporaryDirectory() as scratch:
        np.savez(file := Path(scratch) / "patches.npz", x=np.stack(patches))
        return load_images(file, model.inputs[0], limit=limit)


def real_set(model: Model, data: EvalData, indices: np.ndarray) -> CalibrationSet:
    """Real images as a calibration set (for the baseline only)."""
    pixels, _ = next(data.take(indices).batches(len(indices)))
    arrays = {model.inputs[0].name: model.preprocess.apply(pixels)}
    return CalibrationSet.from_arrays(arrays, CalibrationManifest.of(model, method="real", seed=0))


def real_halves(model: Model, data: EvalData, count: int, seed: int) -> Iterator[tuple[CalibrationSet, EvalData]]:
    """Images of one half to calibrate with, and the other half to score on; then the other way round."""
    order = np.random.default_rng(seed).permutation(len(data))
    first, second = order[: len(data) // 2], order[len(data) // 2 :]
    for chosen, scored in ((first, second), (second, first)):
        yield real_set(model, data, chosen[: min(count, len(chosen))]), data.take(scored)


def finished_sets(folders: Sequence[Path]) -> Iterator[CalibrationSet]:
    """Calibration sets that were made before (those of held-out images are left out)."""
    for folder in folders:
        for manifest in sorted(folder.rglob("manifest.json")):
            if manifest.parent.name == "calibration":
                yield CalibrationSet.open(manifest.parent, verify=False)


class Tally:
    """Right answers and differences, added up over engines and images."""

    def __init__(self) -> None:
        self.right_float = self.right_engine = self.same = self.total = 0
        self.signal = self.noise = 0.0

    def add(self, model: Model, engine: Any, floating: Any, data: EvalData, size: int = 32) -> None:
        """Run both on all images and count."""
        for pixels, labels in data.batches(size):
            feeds = {model.inputs[0].name: model.preprocess.apply(pixels)}
            got = next(iter(engine.run(feeds).values()))
            wanted = next(iter(floating.run(feeds).values()))
            a, b = got.argmax(1), wanted.argmax(1)
            self.right_float += int((b == labels).sum())
            self.right_engine += int((a == labels).sum())
            self.same += int((a == b).sum())
            self.total += len(labels)
            self.signal += float(np.square(wanted, dtype=np.float64).sum())
            self.noise += float(np.square(got.astype(np.float64) - wanted).sum())

    def row(self, labelled: bool) -> dict[str, Any]:
        """JSON values; accuracies are ``None`` without labels."""
        return {
            "float": self.right_float / self.total if labelled else None,
            "engine": self.right_engine / self.total if labelled else None,
            "agreement": self.same / self.total,
            "sqnr_db": 10 * float(np.log10(self.signal / max(self.noise, 1e-30))),
            "images": self.total,
        }


def keep_row(results: dict[str, Any], out: Path, name: str, key: str, make: Callable[[], dict[str, Any]]) -> None:
    """Make a row of the results, keep it in the file and show it; a row that is there already is not made again."""
    rows = results.setdefault(name, {})
    if key in rows:
        return
    started = time.monotonic()
    try:
        row = make()
    except Exception as error:  # a row that fails is a result too, and must not take the others with it
        row = {"error": f"{type(error).__name__}: {error}"}
    row["seconds"] = time.monotonic() - started
    rows[key] = row
    write_json(out, results)
    print(name, key, json.dumps(row), flush=True)


def cell(rows: list[dict[str, Any]]) -> str:
    """``accuracy % (agreement %)`` of some rows (several seeds), or that it failed, or that there is none."""
    found = [row for row in rows if "error" not in row]
    if not found:
        return "failed" if rows else "-"
    agreement = 100 * float(np.mean([row["agreement"] for row in found]))
    if found[0]["engine"] is None:
        return f"({agreement:.1f})"
    return f"{100 * float(np.mean([row['engine'] for row in found])):.2f} ({agreement:.1f})"
