"""POT itself: run by the interpreter of the environment ``pot``, never imported by this package.

It knows nothing but its own interpreter's packages (NumPy, OpenVINO 2023.3 and its tools) and one job folder::

    job.json            what to do, see `main`
    float.onnx          the float network (or float.xml and float.bin: the same as an IR)
    calibration-*.npz   inputs by name, first axis = images
    validation-*.npz    the same for the metric of AccuracyAwareQuantization, with `labels.npy` beside them if there are labels

It leaves ``quantized.xml`` (weights as floats behind FakeQuantize), ``compressed.xml`` (weights as integers: POT's finished model) and their
``.bin`` files in the same folder.

On standard output it writes one JSON object a line, and nothing else; everything that the libraries print goes to standard error.
Events: ``phase``, ``total``, ``step``, ``sample``, ``log``, ``done``, ``error``. It ends when its standard input is closed, so that it does not
outlive the process that started it. Syntax and library use are those of Python 3.8.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

METRIC_ACCURACY = "accuracy"
METRIC_SIMILARITY = "similarity"


class Channel:
    """One JSON object a line to the parent, from a copy of standard output that no library knows of."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._lock = threading.Lock()

    def send(self, event: str, **fields: Any) -> None:
        """Write one event; a parent that is gone ends this process."""
        try:
            with self._lock:
                self._file.write(json.dumps({"event": event, **fields}, default=float) + "\n")
                self._file.flush()
        except (BrokenPipeError, ValueError):
            os._exit(3)


def end_with_parent() -> None:
    """Leave as soon as the parent closes our standard input (or dies)."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(3)

    threading.Thread(target=watch, daemon=True).start()


def import_pot(channel: Channel, threads: int) -> None:
    """Import POT with telemetry off, float32 inference, a fixed number of threads, and its progress going to the parent."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # POT and the converter then use stubs that do nothing
    import openvino.runtime as runtime

    plain = runtime.Core

    class Core(plain):  # type: ignore[misc,valid-type]
        """Every core that POT makes: bfloat16 is the default of some processors and would blur the statistics."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.set_property(
                "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1"}
            )

    runtime.Core = Core
    import logging

    import openvino.tools.pot  # noqa: F401
    from openvino.tools.pot.utils import logger as pot_logger

    class Forward(logging.Handler):
        """POT's messages to the parent; those that it repeats for every layer are left out."""

        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage().strip(" =\n")
            if text and not text.startswith(("Inference Engine version", "Model Optimizer version", "Post-training")):
                channel.send("log", level=record.levelname.lower(), message=text[:2000])

    pot_logger._is_logging_initialized = True
    pot_logger.root.setLevel(logging.INFO)
    pot_logger.root.addHandler(Forward())
    regular = pot_logger.RegularLogger

    def step(_: object, count: float) -> None:
        channel.send("step", count=float(count))

    def total(_: object, count: float, __: float) -> None:
        channel.send("total", count=float(count))

    regular.update_progress, regular.reset_progress_total = step, total


class Images:
    """Batches of a set, read file by file; `labels` are the annotations."""

    def __init__(self, folder: Path, files: list[str], batch: int, labels: Any = None) -> None:
        import numpy as np

        self._np = np
        self._files = [folder / name for name in files]
        self._batch = batch
        self._labels = labels
        self._index = []
        for number, file in enumerate(self._files):
            with np.load(str(file), allow_pickle=False) as arrays:
                count = len(arrays[arrays.files[0]])
            self._index += [(number, start) for start in range(0, count - batch + 1, batch)]
        self._cached: tuple[int, dict[str, Any]] = (-1, {})
        self.watch: Callable[[int], None] = lambda _: None

    def __len__(self) -> int:
        return len(self._index)

    def feeds(self, item: int) -> dict[str, Any]:
        """Inputs by name."""
        self.watch(item)
        number, start = self._index[item]
        if self._cached[0] != number:
            self._cached = (-1, {})
            with self._np.load(str(self._files[number]), allow_pickle=False) as arrays:
                self._cached = (number, {name: arrays[name] for name in arrays.files})
        return {name: array[start : start + self._batch] for name, array in self._cached[1].items()}

    def annotation(self, item: int) -> Any:
        """What the metric compares with: the labels or reference outputs of one batch; ``None`` without."""
        return None if self._labels is None else self._labels[item]

    def __getitem__(self, item: int) -> tuple[Any, ...]:
        """A sample as POT wants it, with its own number so that samples can be told apart."""
        return (item, self.annotation(item)), self.feeds(item)


def use_one_scale_before_depthwise(folder: Path) -> None:
    """Change what POT knows of devices: an activation in front of a depthwise convolution has one scale, as everywhere else.

    With a scale per channel, which is what its lists say, the CPU plugin computes these convolutions in float.
    """
    from openvino.tools.pot.configs.hardware_config import HardwareConfig

    original = HardwareConfig.from_json

    def changed(path: str, *args: Any) -> Any:
        known = json.loads(Path(path).read_text(encoding="utf-8"))
        common = [one["quantization"]["activations"] for one in known["operations"] if one["type"] == "Convolution"]
        for one in known["operations"]:
            if one["type"] == "DepthWiseConvolution" and common:
                one["quantization"]["activations"] = common[0]
        copy = folder / "device.json"
        copy.write_text(json.dumps(known), encoding="utf-8")
        return original(copy.as_posix(), *args)

    HardwareConfig.from_json = changed


def convert(job: dict[str, Any], folder: Path) -> Path:
    """The float network as an IR of this OpenVINO."""
    import openvino as ov

    source = folder / str(job["model"])
    if source.suffix == ".xml":
        return source
    model = ov.convert_model(str(source))
    shapes = job.get("shapes")
    if shapes:
        model.reshape({name: ov.PartialShape(shape) for name, shape in shapes.items()})
    path = folder / "float.xml"
    ov.save_model(model, str(path), compress_to_fp16=False)
    return path


def compiled(path: Path) -> Any:
    """A network that runs in float32."""
    from openvino.runtime import Core

    return Core().compile_model(str(path), "CPU")


def outputs_of(model: Any, results: Any) -> dict[str, Any]:
    """Outputs by the name of the network's result, as POT's engine calls them."""
    named = {}
    for port in model.outputs:
        named[re.sub(r"/sink_port_\d+", "", port.get_node().friendly_name)] = results[port].copy()
    return named


def float_outputs(path: Path, images: Images) -> list[dict[str, Any]]:
    """All outputs of the float network by name, batch by batch."""
    model = compiled(path)
    request = model.create_infer_request()
    return [outputs_of(model, request.infer(images.feeds(item))) for item in range(len(images))]


def check_conversion(path: Path, images: Images, folder: Path) -> float:
    """Largest difference between the converted network and the parent's own float outputs, relative to their largest value."""
    import numpy as np

    file = folder / "expected.npz"
    if not file.exists():
        return 0.0
    with np.load(str(file), allow_pickle=False) as arrays:
        expected = [arrays[name] for name in arrays.files]
    got = compiled(path).create_infer_request().infer(images.feeds(0))
    worst = 0.0
    for index, want in enumerate(expected):
        scale = max(float(np.abs(want).max()), 1e-12)
        worst = max(worst, float(np.abs(got[index] - want).max()) / scale)
    return worst


def make_metric(kind: str) -> Any:
    """A metric of POT's kind: top-1 against labels, or how similar outputs are to the float network's."""
    import numpy as np
    from openvino.tools.pot import Metric

    class Measured(Metric):  # type: ignore[misc]
        """Mean over samples, higher is better."""

        def __init__(self) -> None:
            self._values: list[float] = []
            super().__init__()

        @property
        def value(self) -> dict[str, list[float]]:
            return {kind: [self._values[-1]]}

        @property
        def avg_value(self) -> dict[str, float]:
            return {kind: float(np.mean(self._values)) if self._values else 0.0}

        def update(self, output: dict[str, Any], target: list[Any]) -> None:
            if kind == METRIC_SIMILARITY:
                power = sum(float(np.square(want.astype(np.float64)).sum()) for want in target[0].values())
                noise = sum(
                    float(np.square(output[name].astype(np.float64) - want).sum()) for name, want in target[0].items()
                )
                self._values.append(1.0 - noise / max(power, 1e-30))
            else:
                got = next(iter(output.values())).argmax(axis=-1)
                self._values.append(float((got.reshape(-1) == np.asarray(target[0]).reshape(-1)).mean()))

        def reset(self) -> None:
            self._values = []

        def get_attributes(self) -> dict[str, dict[str, str]]:
            return {kind: {"direction": "higher-better", "type": "accuracy"}}

    return Measured()


def make_engine(images: Images, validation: Any, metric: Any, statistics: int) -> Any:
    """POT's engine: statistics come from the calibration set, metrics from the validation samples."""
    from addict import Dict  # type: ignore[import-not-found]
    from openvino.tools.pot import IEEngine
    from openvino.tools.pot.samplers.batch_sampler import BatchSampler

    class Engine(IEEngine):  # type: ignore[misc]
        """Feeds whole batches by input name, whatever their shape."""

        def predict(self, stats_layout: Any = None, sampler: Any = None, *args: Any, **kwargs: Any) -> Any:
            if validation is not None and stats_layout:
                sampler = BatchSampler(images, subset_indices=range(statistics))
            return super().predict(stats_layout, sampler, *args, **kwargs)

        def _fill_input(self, _: Any, image_batch: list[Any]) -> dict[str, Any]:
            return dict(image_batch[0])

        @staticmethod
        def postprocess_output(outputs: dict[str, Any], _: Any) -> dict[str, Any]:
            return outputs  # by name: their order is not that of the float network

    config = Dict({"device": "CPU", "stat_requests_number": 1, "eval_requests_number": 1})
    return Engine(config, data_loader=images if validation is None else validation, metric=metric)


def quantize(job: dict[str, Any], folder: Path, channel: Channel) -> dict[str, Any]:
    """Run the job; what is worth recording."""
    import numpy as np
    from addict import Dict
    from openvino.tools.pot import compress_model_weights, create_pipeline, load_model, save_model

    batch = int(job.get("batch", 1))
    images = Images(folder, job["calibration"], batch)
    images.watch = watcher(channel, len(images))
    started = time.monotonic()
    channel.send("phase", name="convert")
    path = convert(job, folder)
    difference = check_conversion(path, images, folder)
    if not difference < float(job.get("tolerance", 1e-3)):
        raise RuntimeError(
            f"the converted network computes something else: its outputs differ by {difference:.2g} of their largest value"
        )
    record: dict[str, Any] = {"conversion_difference": difference}
    validation = metric = None
    if job.get("metric"):
        validation = Images(folder, job["validation"], batch)
        kind = job["metric"]
        if kind == METRIC_ACCURACY:
            labels = np.load(str(folder / "labels.npy"), allow_pickle=False)
            annotations = [labels[start : start + batch] for start in range(0, len(labels) - batch + 1, batch)]
        else:
            outputs = float_outputs(path, validation)
            top = [np.asarray(next(iter(one.values()))).argmax(axis=-1) for one in outputs]
            annotations = outputs if kind == METRIC_SIMILARITY else top
        validation._labels = annotations
        validation.watch = watcher(channel, len(validation))
        metric = make_metric(kind)
    channel.send("phase", name="quantize")
    if job.get("one_scale_before_depthwise"):
        use_one_scale_before_depthwise(folder)
    np.random.seed(int(job.get("seed", 0)))  # noqa: NPY002
    import random

    random.seed(int(job.get("seed", 0)))
    algorithms = []
    sizes = []
    for one in job["algorithms"]:
        params = dict(one.get("params", {}))
        size = int(params.get("stat_subset_size") or len(images) * batch)
        params["stat_subset_size"] = max(1, min(size // batch, len(images)))
        sizes.append(params["stat_subset_size"])
        params["exec_log_dir"] = str(folder)
        algorithms.append(Dict({"name": one["name"], "params": params}))
    engine = make_engine(images, validation, metric, max(sizes))
    model = load_model(
        Dict({"model_name": "network", "model": str(path), "weights": str(path.with_suffix(".bin"))}),
        target_device=job.get("target_device", "ANY"),
    )
    pipeline = create_pipeline(algorithms, engine)
    model = pipeline.run(model)
    channel.send("phase", name="write")
    save_model(model, str(folder), "quantized")
    compress_model_weights(model)
    save_model(model, str(folder), "compressed")
    record["seconds"] = time.monotonic() - started
    return record


def last_words(error: BaseException) -> str:
    """An exception in one or two lines, without the paths of this machine."""
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = " ".join(lines[-3:] if len(lines) > 3 else lines)
    said = re.sub(r"(?<![\w.-])/[^\s:'\"]*/([^\s/:'\"]+)", r"\1", said)
    return f"{type(error).__name__}: {said}"[:600]


def watcher(channel: Channel, count: int) -> Any:
    """Tell the parent which sample is looked at, a few times a second."""
    last = [0.0]

    def watch(item: int) -> None:
        now = time.monotonic()
        if now - last[0] > 0.3:
            last[0] = now
            channel.send("sample", number=int(item) + 1, count=count)

    return watch


def main() -> int:
    """Do the job in the folder named on the command line: ``model``, ``shapes``, ``batch``, ``calibration``, ``validation``, ``metric``,
    ``algorithms``, ``target_device``, ``threads``, ``seed``, ``tolerance``.
    """
    channel = Channel()
    end_with_parent()
    folder = Path(sys.argv[1])
    phase = "import"
    try:
        job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        channel.send("phase", name="import")
        import_pot(channel, int(job.get("threads", 1)))
        phase = "work"
        record = quantize(job, folder, channel)
    except BaseException as error:  # whatever it is, the parent hears of it
        traceback.print_exc()
        kind = "import" if phase == "import" and isinstance(error, ImportError) else "work"
        channel.send("error", kind=kind, message=last_words(error))
        sys.stderr.flush()
        os._exit(1)
    channel.send("done", record=record)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
