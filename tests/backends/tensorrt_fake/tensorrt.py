"""Stands in for NVIDIA's ``tensorrt`` package: NVIDIA's own bindings, and a hand-written builder, parser, runtime and engine behind them.

Enumerations, ``Dims``, data types and the classes that are derived from (``ILogger``, ``IProfiler``, ``IProgressMonitor``, the calibrators)
are NVIDIA's. Everything that only TensorRT's library can make is written here, and may only have what NVIDIA's class of the same name
has: names and, where the bindings tell them, arguments are compared when this module is loaded. What is asked for and not written here
is an error, not an empty answer.

An "engine" is the ONNX file itself, executed by ONNX Runtime on host memory (``libcudart`` is a stand-in too). So numbers are right, times
mean nothing, and which layers "compute in 8 bits" is read off the graph by the simplest rule. ``PRETEND_TENSORRT`` sets the version:
8 is pretended with the bindings of 10, which know all of its names.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import time

import numpy as np
import onnx
import onnxruntime
import tensorrt_bindings as real

__version__ = os.environ.get("PRETEND_TENSORRT", real.__version__)
GENERATION = int(__version__.split(".")[0])
_MAGIC = b"pretended engine\n"


_NOT_YET = {8: ("IProgressMonitor",)}
"""What the bindings of 10 have and those of 8 do not."""


def __getattr__(name):
    """Everything that is not written here is NVIDIA's."""
    if name in _NOT_YET.get(GENERATION, ()):
        raise AttributeError(name)
    return getattr(real, name)


def _arguments(method) -> list[str] | None:
    """Names of the arguments of one of NVIDIA's methods, as far as its documentation tells them."""
    first = (method.__doc__ or "").strip().splitlines()[:1]
    found = re.match(r"\w+\(self: [\w.]+(?:, (.*))?\) -> ", first[0]) if first else None
    if found is None:
        return None
    return re.findall(r"(?:^|, )(\w+): ", found[1] or "")


class Strict:
    """Has what NVIDIA's class has, and nothing else."""

    def __init_subclass__(cls, like: type) -> None:
        cls.like = like
        for name, member in vars(cls).items():
            if name.startswith("_") or name == "like":
                continue
            assert hasattr(like, name), f"NVIDIA's {like.__name__} has no {name}"
            wanted = _arguments(getattr(like, name)) if callable(member) else None
            if wanted is not None:
                given = list(member.__code__.co_varnames[1 : member.__code__.co_argcount])
                assert given == wanted, f"{like.__name__}.{name} takes {wanted}, not {given}"

    def __getattr__(self, name):
        assert name.startswith("_") or hasattr(self.like, name), f"NVIDIA's {self.like.__name__} has no {name}"
        raise NotImplementedError(f"the stand-in of {self.like.__name__} has no {name}")

    def __setattr__(self, name, value):
        assert name.startswith("_") or hasattr(self.like, name), f"NVIDIA's {self.like.__name__} has no {name}"
        super().__setattr__(name, value)


class ParserError(Strict, like=real.ParserError):
    def __init__(self, text):
        self._text = text

    def desc(self):
        return self._text


class _Input(Strict, like=real.ITensor):
    def __init__(self, name, shape):
        self.name, self.shape = name, real.Dims(shape)


class INetworkDefinition(Strict, like=real.INetworkDefinition):
    def __init__(self, flags):
        self._flags, self._model = flags, None

    @property
    def num_inputs(self):
        return len(self._model.graph.input)

    def get_input(self, index):
        value = self._model.graph.input[index]
        return _Input(
            value.name, [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim]
        )

    def _is(self, name):
        flag = getattr(real.NetworkDefinitionCreationFlag, name, None)
        return flag is not None and bool(self._flags & (1 << int(flag)))


class OnnxParser(Strict, like=real.OnnxParser):
    def __init__(self, network, logger):
        assert isinstance(logger, real.ILogger)
        self._network, self._logger, self._errors = network, logger, []

    def parse_from_file(self, model):
        assert isinstance(model, str)
        found = onnx.load(model)
        if GENERATION == 8 and not self._network._is("EXPLICIT_BATCH"):
            self._errors.append(
                "This version of the ONNX parser only supports networks with an explicit batch dimension"
            )
        stored = {node.input[0] for node in found.graph.node if node.op_type == "DequantizeLinear"}
        for tensor in found.graph.initializer:
            if GENERATION == 8 and tensor.name in stored:
                self._errors.append(f"INT8 weights are not supported: {tensor.name}")
        for node in found.graph.node:
            if node.op_type == "NonZero":
                self._errors.append(f"no importer for {node.op_type} ({node.name})")
        for text in self._errors:
            self._logger.log(real.ILogger.ERROR, text)
        self._network._model = found
        return not self._errors

    @property
    def num_errors(self):
        return len(self._errors)

    def get_error(self, index):
        return ParserError(self._errors[index])


class _Times(Strict, like=real.ITimingCache):
    def __init__(self, data):
        self._data = bytes(data)

    def serialize(self):
        return b"times of " + __version__.encode()


class IOptimizationProfile(Strict, like=real.IOptimizationProfile):
    def __init__(self):
        self._shapes = {}

    def set_shape(self, input, min, opt, max):  # noqa: A002
        self._shapes[input] = [list(real.Dims(one)) for one in (min, opt, max)]


class IBuilderConfig(Strict, like=real.IBuilderConfig):
    def __init__(self):
        self._flags, self._profiles, self._times, self._limits = {real.BuilderFlag.TF32}, [], None, {}
        self.profiling_verbosity = real.ProfilingVerbosity.LAYER_NAMES_ONLY
        self.builder_optimization_level = 3

    def set_flag(self, flag):
        assert isinstance(flag, real.BuilderFlag)
        self._flags.add(flag)

    def clear_flag(self, flag):
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool, pool_size):
        self._limits[pool.name] = pool_size

    def add_optimization_profile(self, profile):
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache):
        return _Times(serialized_timing_cache)

    def set_timing_cache(self, cache, ignore_mismatch):
        if cache._data and cache._data != b"times of " + __version__.encode():
            return ignore_mismatch
        self._times = cache
        return True

    def get_timing_cache(self):
        return self._times


class Builder(Strict, like=real.Builder):
    def __init__(self, logger):
        assert isinstance(logger, real.ILogger)
        if os.environ.get("PRETEND_NO_BUILDER"):
            logger.log(real.ILogger.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def create_network(self, flags):
        return INetworkDefinition(flags)

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        names = {flag.name for flag in config._flags}
        rounds = any(node.op_type == "QuantizeLinear" for node in network._model.graph.node)
        weak = GENERATION < 11 and not network._is("STRONGLY_TYPED")
        shapes = config._profiles[0]._shapes if config._profiles else {}
        calibrator = vars(config).get("int8_calibrator")
        said = ""
        if not weak and names & {"INT8", "FP16", "BF16"}:
            said = "precision flags cannot be set for a strongly typed network"
        elif weak and rounds and "INT8" not in names:
            said = "QuantizeLinear needs the INT8 flag"
        elif weak and "INT8" in names and not rounds and calibrator is None:
            said = "calibration failure: neither calibrator nor scales"
        for place in range(network.num_inputs):
            tensor = network.get_input(place)
            if -1 in tuple(tensor.shape) and tensor.name not in shapes:
                said = f"{tensor.name} is dynamic, and no optimization profile says its shape"
        if os.environ.get("PRETEND_NO_BUILD"):
            said = "Could not find any implementation for node n_left"
        self._logger.log(real.ILogger.WARNING, "a warning of the builder")
        self._logger.log(real.ILogger.VERBOSE, "not kept")
        monitor = vars(config).get("progress_monitor")
        if monitor is not None:
            monitor.phase_start("Building", None, 2)
            monitor.phase_start("inner", "Building", 7)
            done = monitor.step_complete("inner", 0)
            monitor.phase_finish("inner")
            done = done and monitor.step_complete("Building", 0)
            monitor.phase_finish("Building")
            if not done:
                return None
        if said:
            self._logger.log(real.ILogger.ERROR, said)
            return None
        scales = self._calibrated(calibrator) if calibrator is not None else None
        head = {
            "version": __version__,
            "flags": sorted(names),
            "network": network._flags,
            "shapes": shapes,
            "limits": config._limits,
            "effort": config.builder_optimization_level,
            "detailed": config.profiling_verbosity == real.ProfilingVerbosity.DETAILED,
            "scales": scales,
            "times": None if config._times is None else config._times._data.decode(),
        }
        return _MAGIC + json.dumps(head).encode() + b"\n" + network._model.SerializeToString()

    def _calibrated(self, calibrator):
        """As TensorRT does: a cache of another version is not used, and the calibrator is asked for images."""
        assert isinstance(calibrator, real.IInt8Calibrator)
        data = calibrator.read_calibration_cache()
        numbers = [int(part) for part in __version__.split(".")[:3]]
        number = numbers[0] * (10000 if numbers[0] >= 10 else 1000) + numbers[1] * 100 + numbers[2]
        algorithm = "".join(word.capitalize() for word in calibrator.get_algorithm().name.split("_"))
        header = f"TRT-{number}-{algorithm}".replace("CALIBRATION", "Calibration").encode()
        if data is None or bytes(data).split(b"\n")[0] != header:
            self._logger.log(
                real.ILogger.WARNING,
                f"the calibration cache is not used: {bytes(data or b'')[:40]!r} is not {header!r}",
            )
            return []
        return [line.split(b": ")[0].decode() for line in bytes(data).split(b"\n")[1:] if line]


class EngineInspector(Strict, like=real.EngineInspector):
    def __init__(self, engine):
        self._engine = engine

    def get_engine_information(self, format):  # noqa: A002
        assert format == real.LayerInformationFormat.JSON
        engine, context = self._engine, vars(self).get("execution_context")
        if not engine._head["detailed"]:
            return json.dumps({"Layers": [row["Name"] for row in engine._rows(True)]})
        open_shapes = any(-1 in engine._shape(name) for name in engine._names)
        rows = engine._rows(context is not None or not open_shapes)
        names = (
            {"I/O Tensors": [{"Name": name} for name in engine._names]}
            if GENERATION >= 11
            else {"Bindings": engine._names}
        )
        return json.dumps({"Layers": rows, **names})


class ICudaEngine(Strict, like=real.ICudaEngine):
    def __init__(self, head, data):
        self._head = head
        self._model = onnx.load_from_string(data)
        options = onnxruntime.SessionOptions()
        # The level above crashes ONNX Runtime on some float16 graphs.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self._names = [value.name for value in (*self._session.get_inputs(), *self._session.get_outputs())]
        self.name = "pretended"

    @property
    def num_layers(self):
        return len(self._rows(True))

    @property
    def num_io_tensors(self):
        return len(self._names)

    def get_tensor_name(self, index):
        return self._names[index]

    def get_tensor_mode(self, name):
        inputs = {value.name for value in self._session.get_inputs()}
        return real.TensorIOMode.INPUT if name in inputs else real.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        value = next(one for one in (*self._session.get_inputs(), *self._session.get_outputs()) if one.name == name)
        if GENERATION == 8 and value.type == "tensor(int64)":
            return real.DataType.INT32
        return {
            "tensor(float)": real.DataType.FLOAT,
            "tensor(int64)": real.DataType.INT64,
            "tensor(float16)": real.DataType.HALF,
        }[value.type]

    def get_tensor_location(self, name):
        return real.TensorLocation.DEVICE

    def _shape(self, name):
        value = next(one for one in (*self._session.get_inputs(), *self._session.get_outputs()) if one.name == name)
        return [size if isinstance(size, int) else -1 for size in value.shape]

    def get_tensor_shape(self, name):
        return real.Dims(self._shape(name))

    def get_tensor_profile_shape(self, name, profile_index):
        return [real.Dims(one) for one in self._head["shapes"][name]]

    def create_execution_context(self):
        return IExecutionContext(self)

    def create_engine_inspector(self):
        return EngineInspector(self)

    def _rows(self, shaped):
        """One layer a node: in 8 bits where its input comes from DequantizeLinear."""
        graph = self._model.graph
        makers = {name: node for node in graph.node for name in node.output}
        rounded = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
        half = "Half" if "FP16" in self._head["flags"] else "Float"
        rows = []
        for node in graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                maker = makers.get(node.input[0])
                if node.op_type == "QuantizeLinear" and maker is None and node.input[0] in self._names:
                    rows.append(self._row(node, "Reformat", "Float", "Int8", shaped, origin="QDQ"))
                continue
            whole = bool(node.input) and (node.input[0] in rounded)
            product = node.op_type in ("Conv", "Gemm", "MatMul", "ConvTranspose")
            kind = {"Conv": "CaskConvolution", "Gemm": "CaskGemmConvolution", "MatMul": "gemm"}.get(
                node.op_type, node.op_type
            )
            reads = "Int8" if whole else half
            readers = [one.op_type for one in graph.node if node.output and node.output[0] in one.input]
            writes = "Int8" if whole and readers == ["QuantizeLinear"] else half
            row = self._row(node, kind, reads, writes, shaped)
            if product and kind.startswith("Cask"):
                row["Weights"] = {"Type": reads, "Count": 1}
                row["TacticName"] = (
                    "sm87_xmma_fprop_"
                    + ("i8i8_i8i32_f32_nchw" if whole else "f32f32_f32f32_f32_nchw")
                    + "_tilesize64x64"
                )
            rows.append(row)
        return rows

    def _row(self, node, kind, reads, writes, shaped, origin=""):
        def tensor(name, dtype):
            if not shaped:
                dtype = "N/A due to dynamic shapes"
            if GENERATION >= 11:
                return {
                    "Name": name,
                    "Location": "Device",
                    "Dimensions": [1],
                    "Format": "Row major linear",
                    "DataType": dtype,
                }
            sentence = f"Thirty-two wide channel vectorized row major {dtype} format" if GENERATION == 8 else dtype
            return {"Name": name, "Location": "Device", "Dimensions": [1], "Format/Datatype": sentence}

        name = node.name if GENERATION >= 10 else f"w_{node.name} + QuantizeLinear_{node.name} + {node.name}"
        row = {
            "Name": name,
            "LayerType": kind,
            "Inputs": [tensor(node.input[0], reads)] if node.input else [],
            "Outputs": [tensor(node.output[0], writes)],
        }
        if GENERATION >= 10:
            row["Metadata"] = f"[ONNX Layer: {node.name}_QuantizeLinear]\x1e[ONNX Layer: {node.name}]"
        return {**row, "Origin": origin} if origin else row


class IExecutionContext(Strict, like=real.IExecutionContext):
    def __init__(self, engine):
        self._engine, self._at, self._shapes, self._profiler = engine, {}, {}, None

    @property
    def profiler(self):
        return self._profiler

    @profiler.setter
    def profiler(self, value):
        assert isinstance(value, real.IProfiler), "TensorRT refuses to take a profiler away"
        self._profiler = value

    def set_input_shape(self, name, shape):
        shape = list(real.Dims(shape))
        low, _, high = self._engine._head["shapes"].get(name, [shape] * 3)
        fixed = self._engine._shape(name)
        fits = len(shape) == len(fixed) and all(
            size == given if size != -1 else a <= given <= b
            for size, given, a, b in zip(fixed, shape, low, high, strict=True)
        )
        if fits:
            self._shapes[name] = shape
        return fits

    def set_tensor_address(self, name, memory):
        assert isinstance(memory, int)
        assert memory
        self._at[name] = memory
        return True

    def get_tensor_shape(self, name):
        if name in self._shapes:
            return real.Dims(self._shapes[name])
        batch = next(iter(self._shapes.values()), [-1])[0]
        return real.Dims([batch if size == -1 else size for size in self._engine._shape(name)])

    def _memory(self, name):
        shape = [int(size) for size in self.get_tensor_shape(name)]
        dtype = np.dtype(real.nptype(self._engine.get_tensor_dtype(name)))
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer((ctypes.c_uint8 * size).from_address(self._at[name]), dtype).reshape(shape)

    def execute_async_v3(self, stream_handle):
        assert isinstance(stream_handle, int)
        assert stream_handle
        engine = self._engine
        feeds = {value.name: self._memory(value.name) for value in engine._session.get_inputs()}
        if GENERATION == 8:
            feeds = {k: v.astype(np.int64) if v.dtype == np.int32 else v for k, v in feeds.items()}
        started = time.perf_counter()
        for value, found in zip(engine._session.get_outputs(), engine._session.run(None, feeds), strict=True):
            if "FP16" in engine._head["flags"]:
                found = found.astype(np.float16).astype(found.dtype)
            self._memory(value.name)[...] = found
        spent = (time.perf_counter() - started) * 1e3
        rows = engine._rows(True)
        for place, row in enumerate(rows) if self._profiler is not None else ():
            self._profiler.report_layer_time(row["Name"], spent * (place + 1) / len(rows))
        return True


class Runtime(Strict, like=real.Runtime):
    def __init__(self, logger):
        assert isinstance(logger, real.ILogger)
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine):
        data = bytes(serialized_engine)
        head, _, model = data.removeprefix(_MAGIC).partition(b"\n")
        if not data.startswith(_MAGIC) or json.loads(head)["version"] != __version__:
            self._logger.log(real.ILogger.ERROR, "The engine plan file is not compatible with this version of TensorRT")
            return None
        return ICudaEngine(json.loads(head), model)
