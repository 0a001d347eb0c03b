"""Running an engine, its fake-quant form or a float model in OpenVINO, with the properties of the target."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends.base import KernelRecord, Target
from zsq_deploy.backends.openvino.reading import first_line, read, read_fake_quant, set_shapes
from zsq_deploy.backends.openvino.runtime import core, cpu_features, devices, version
from zsq_deploy.backends.openvino.targets import DEVICE
from zsq_deploy.errors import EngineError, UsageError

__all__ = [
    "Mode",
    "OvRunner",
    "device_facts",
    "device_of",
    "float_modes",
    "missing_features",
    "open_runner",
    "properties",
    "runner",
]

Array = npt.NDArray[Any]
Mode = Literal["engine", "unfused", "float"]

_MODES: tuple[str, ...] = ("engine", "unfused", "float")
_KEPT = 3
"""Compiled forms (one a shape of the inputs) that a runner keeps."""


def device_of(target: Target) -> str:
    """The device that a target's engine runs on here: its own where OpenVINO finds one, else the CPU."""
    wanted = target.session.get(DEVICE, "CPU")
    return wanted if any(name.split(".")[0] == wanted for name in devices()) else "CPU"


def properties(
    target: Target, *, threads: int = 1, mode: str = "engine", session: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """OpenVINO's properties for a target on the device that it runs on here.

    ``engine``: the low-precision transformations are on and what stays in float has the target's precision (float32 on a CPU; the
    plugin's own default would be bfloat16 on some). ``unfused``: the same file with those transformations off, so that every
    FakeQuantize is computed in float: the runtime's own fake-quant reference. ``float``: a float network in float32.

    Args:
        target: The target.
        threads: Threads inside an operator (CPU only).
        mode: One of the three.
        session: More properties, such as those of :func:`float_modes`; they win.

    Raises:
        UsageError: Unknown mode, or a number of threads below 1.
    """
    if mode not in _MODES:
        raise UsageError(f"unknown mode {mode!r}", where="mode", remedy=f"choose one of {', '.join(_MODES)}")
    if threads < 1:
        raise UsageError(f"{threads} threads cannot run anything", where="--threads", remedy="give 1 or more")
    device = device_of(target)
    found: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if device == "CPU":
        # Without pinning: several processes on one machine would all be pinned to the same cores.
        found.update(INFERENCE_NUM_THREADS=threads, NUM_STREAMS=1, ENABLE_CPU_PINNING=False)
    if mode == "engine" and device == target.session.get(DEVICE):
        found.update({name: value for name, value in target.session.items() if name != DEVICE})
    if mode == "unfused":
        found["LP_TRANSFORMS_MODE"] = "NO"
        # Stored integer weights would otherwise have the plugin round activations to 8 bits a second time, on the fly.
        found["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    found.update(session or {})
    return found


class OvRunner:
    """A model loaded in OpenVINO.

    A model with an open batch is compiled once for every batch size that it meets, which gives the kernels of fixed shapes; the
    first one, at loading, is for batch 1.

    Args:
        path: The IR (``.xml``) or ONNX file.
        target: Whose device and properties to use.
        threads: Threads inside an operator.
        mode: ``engine``, ``unfused`` or ``float``, see :func:`properties`.
        session: More properties, such as those of :func:`float_modes`.

    Attributes:
        input_names: Names of the inputs.
        output_names: Names of the outputs.
        load_ms: Milliseconds that reading and compiling took.
        device: The device that it runs on.

    Raises:
        EngineError: The file is missing, damaged or cannot be run.
    """

    def __init__(
        self,
        path: Path,
        target: Target,
        *,
        threads: int = 1,
        mode: Mode = "engine",
        session: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.target = target
        self.threads = threads
        self.mode: Mode = mode
        self.session = dict(session or {})
        self.device = device_of(target)
        self._properties = properties(target, threads=threads, mode=mode, session=session)
        started = time.perf_counter()
        self._model = read_fake_quant(self.path) if mode == "unfused" else read(self.path)
        self.input_names: Sequence[str] = tuple(_name(port) for port in self._model.inputs)
        self.output_names: Sequence[str] = tuple(_name(port) for port in self._model.outputs)
        self._requests: OrderedDict[tuple[tuple[int, ...], ...], Any] = OrderedDict()
        first = self._first_shapes()
        if first is not None:
            self._request(first)
        self.load_ms = (time.perf_counter() - started) * 1e3

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the file insists on, or ``None``."""
        if not self._model.inputs or not len(self._model.inputs[0].partial_shape):
            return None
        batch = self._model.inputs[0].partial_shape[0]
        return batch.get_length() if batch.is_static else None

    def _first_shapes(self) -> tuple[tuple[int, ...], ...] | None:
        """The input shapes with batch 1; ``None`` if more than the batch is open."""
        found = []
        for port in self._model.inputs:
            sizes = [size.get_length() if size.is_static else None for size in port.partial_shape]
            if any(size is None for size in sizes[1:]):
                return None
            found.append(tuple(1 if size is None else int(size) for size in sizes))
        return tuple(found)

    def compiled(self, feeds: Mapping[str, Array], **more: Any) -> tuple[Any, Any]:
        """The model in the shapes of `feeds`, and its compiled form with further properties; not kept."""
        return self._compile(self._shapes(feeds), **more)

    def _compile(self, shapes: tuple[tuple[int, ...], ...], **more: Any) -> tuple[Any, Any]:
        model = self._model
        if model.is_dynamic():
            model = model.clone()
            set_shapes(model, dict(zip(self.input_names, shapes, strict=True)))
        try:
            return model, core().compile_model(model, self.device, {**self._properties, **more})
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(
                f"OpenVINO {version()} cannot compile this network for {self.device}: {first_line(error)}",
                where=str(self.path),
                remedy="look for the operator that the message names, or take another target",
            ) from error

    def _request(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        request = self._requests.get(shapes)
        if request is None:
            request = self._compile(shapes)[1].create_infer_request()
            self._requests[shapes] = request
            while len(self._requests) > _KEPT:
                self._requests.popitem(last=False)
        else:
            self._requests.move_to_end(shapes)
        return request

    def _shapes(self, feeds: Mapping[str, Array]) -> tuple[tuple[int, ...], ...]:
        """The shapes of the feeds in the order of the inputs.

        Raises:
            EngineError: An input is missing or unknown, or its shape or type does not fit.
        """
        problem = ""
        missing = [name for name in self.input_names if name not in feeds]
        unknown = [name for name in feeds if name not in self.input_names]
        if missing or unknown:
            problem = f"the network's inputs are {', '.join(self.input_names)}"
        else:
            for port, name in zip(self._model.inputs, self.input_names, strict=True):
                shape, wanted = feeds[name].shape, port.partial_shape
                fits = len(shape) == len(wanted) and all(
                    size.is_dynamic or size.get_length() == given for size, given in zip(wanted, shape, strict=True)
                )
                if not fits:
                    problem = f"{name} has the shape {wanted.to_string()}"
                elif np.dtype(port.element_type.to_dtype()) != feeds[name].dtype:
                    problem = f"{name} has the type {np.dtype(port.element_type.to_dtype())}"
        if problem:
            raise EngineError(
                f"OpenVINO could not run this input: {problem}",
                where=f"{self.path} with " + ", ".join(f"{k}: {v.dtype}{list(v.shape)}" for k, v in feeds.items()),
                remedy="check the input's shape and type against `zsq inspect`",
            )
        return tuple(tuple(feeds[name].shape) for name in self.input_names)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs for one batch. A file whose batch is fixed to 1 (for an NPU) takes larger ones sample by sample.

        Raises:
            EngineError: The inputs do not fit the model.
        """
        count = self.samples_apart(feeds)
        if count > 1:
            parts = [
                self.run({name: value[place : place + 1] for name, value in feeds.items()}) for place in range(count)
            ]
            return {name: np.concatenate([part[name] for part in parts]) for name in self.output_names}
        request = self._request(self._shapes(feeds))
        try:
            found = request.infer([np.ascontiguousarray(feeds[name]) for name in self.input_names], share_inputs=True)
        except Exception as error:
            raise EngineError(
                f"OpenVINO could not run this input: {first_line(error)}",
                where=f"{self.path} with " + ", ".join(f"{k}: {v.dtype}{list(v.shape)}" for k, v in feeds.items()),
                remedy="check the input's shape and type against `zsq inspect`",
            ) from error
        return {name: np.asarray(found[place]) for place, name in enumerate(self.output_names)}

    def samples_apart(self, feeds: Mapping[str, Array]) -> int:
        """How many samples have to be run one after the other: more than 1 only if every input insists on a batch of 1."""
        if not feeds or any(value.ndim == 0 for value in feeds.values()):
            return 1
        for port in self._model.inputs:
            shape = port.partial_shape
            if not len(shape) or shape[0].is_dynamic or shape[0].get_length() != 1:
                return 1
        sizes = {len(value) for value in feeds.values()}
        return sizes.pop() if len(sizes) == 1 else 1

    def kernels(self, feeds: Mapping[str, Array]) -> Sequence[KernelRecord]:
        """What OpenVINO executed for one batch, from its profile (see :mod:`zsq_deploy.backends.openvino.proof`)."""
        from zsq_deploy.backends.openvino.proof import kernels

        return kernels(self, feeds)


def _name(port: Any) -> str:
    """The name of an input or output. Where one tensor has several, it is that of the node that stands for it."""
    names = sorted(str(name) for name in port.get_names())
    own = str(port.get_node().get_friendly_name())
    for name in names:
        if own in (name, f"{name}/sink_port_0"):
            return name
    return names[0] if names else own.removesuffix("/sink_port_0")


def runner(
    path: Path,
    target: Target,
    *,
    threads: int = 1,
    mode: Mode = "engine",
    session: Mapping[str, str] | None = None,
) -> OvRunner:
    """Load a model; see :class:`OvRunner`."""
    return OvRunner(path, target, threads=threads, mode=mode, session=session)


def open_runner(
    path: str, target: str, threads: int = 1, mode: Mode = "engine", session: Mapping[str, str] | None = None
) -> OvRunner:
    """A runner from plain values, for a fresh process that measures latency.

    Args:
        path: File of the model.
        target: Name of the target.
        threads: Threads inside an operator.
        mode: As for :class:`OvRunner`.
        session: Further properties (of :func:`float_modes`).
    """
    from zsq_deploy.backends import get_target

    return OvRunner(Path(path), get_target(target), threads=threads, mode=mode, session=session)


def float_modes(target: Target) -> dict[str, dict[str, str]]:
    """The float modes that the device offers: a name -> properties on top of ``mode="float"``.

    OpenVINO lists what a device computes natively; a CPU with bfloat16 products uses them for float32 networks unless told otherwise,
    so its best float mode is the fairer opponent.
    """
    modes: dict[str, dict[str, str]] = {"float32": {}}
    offered = core().get_property(device_of(target), "OPTIMIZATION_CAPABILITIES")
    for capability, hint in (("BF16", "bf16"), ("FP16", "f16")):
        if capability in offered:
            modes[f"{hint} products"] = {"INFERENCE_PRECISION_HINT": hint}
    return modes


def device_facts(target: Target, *, threads: int = 1) -> dict[str, Any]:
    """What OpenVINO says of the device that the target is measured on here, for the report.

    The precision hint is what layers that stay in float are computed in; the modes are those of :func:`float_modes`.
    """
    device = device_of(target)
    session = properties(target, threads=threads)
    return {
        "device": device,
        "name": str(core().get_property(device, "FULL_DEVICE_NAME")).strip(),
        "capabilities": [str(item) for item in core().get_property(device, "OPTIMIZATION_CAPABILITIES")],
        "precision of float": session["INFERENCE_PRECISION_HINT"],
        "float modes": list(float_modes(target)),
        "session": {name: value if isinstance(value, int | bool) else str(value) for name, value in session.items()},
    }


def missing_features(target: Target) -> tuple[str, ...]:
    """What the target wants and this machine does not have: CPU features (alternatives joined with ``|``), or the device itself."""
    wanted = target.session.get(DEVICE, "CPU")
    if wanted != "CPU":
        return () if device_of(target) == wanted else (f"an OpenVINO {wanted} device",)
    have = cpu_features()
    return tuple(want for want in target.requires if not any(one in have for one in want.split("|")))
