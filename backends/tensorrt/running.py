"""A loaded engine: buffers, shapes and one run, through TensorRT's named tensors and the CUDA runtime."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends.tensorrt.cuda import Cuda, host_view
from zsq_deploy.backends.tensorrt.watching import Log
from zsq_deploy.errors import EngineError

__all__ = ["Running", "Signature"]

Array = npt.NDArray[Any]


class Signature:
    """What an engine reads and writes.

    Args:
        trt: The ``tensorrt`` module.
        engine: The ``ICudaEngine``.
        where: The plan, for errors.

    Attributes:
        inputs: Names of the inputs.
        outputs: Names of the outputs.
        shapes: Sizes by name; -1 where they are open.
        dtypes: Types by name.
        most: The largest batch that it takes in one run; ``None`` if its inputs have no common batch.
        open_batch: Whether smaller batches run too.
        whole: Outputs that are one for all samples of a run, so that samples cannot be run in several.

    Raises:
        EngineError: It has inputs or outputs of types that numpy does not know, or that have to be in host memory.
    """

    def __init__(self, trt: Any, engine: Any, where: Path) -> None:
        names = [str(engine.get_tensor_name(place)) for place in range(engine.num_io_tensors)]
        self.inputs = tuple(name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT)
        self.outputs = tuple(name for name in names if name not in self.inputs)
        self.shapes = {name: tuple(int(size) for size in engine.get_tensor_shape(name)) for name in names}
        self.dtypes: dict[str, np.dtype[Any]] = {}
        for name in names:
            kind = engine.get_tensor_dtype(name)
            try:
                self.dtypes[name] = np.dtype(trt.nptype(kind))
            except TypeError as error:
                raise EngineError(
                    f"{name!r} has the type {kind}, which numpy does not know",
                    where=str(where),
                    remedy="give the network inputs and outputs in float32",
                ) from error
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise EngineError(
                    f"{name!r} decides about shapes, and has to be in host memory",
                    where=str(where),
                    remedy="fix the network's shapes with --input-shape",
                )
        firsts = []
        self.open_batch = False
        for name in self.inputs:
            shape = self.shapes[name]
            if shape and shape[0] < 0:
                self.open_batch = True
                firsts.append(int(engine.get_tensor_profile_shape(name, 0)[2][0]))
            elif shape:
                firsts.append(shape[0])
        self.most = firsts[0] if firsts and len(set(firsts)) == 1 and len(firsts) == len(self.inputs) else None
        first = -1 if self.open_batch else self.most
        self.whole = tuple(name for name in self.outputs if self.shapes[name][:1] != (first,))

    def check(self, feeds: Mapping[str, Array], where: Path) -> dict[str, Array]:
        """The feeds in the engine's types and contiguous.

        Raises:
            EngineError: An input is missing or unknown, or its shape or type does not fit.
        """
        problem = ""
        found: dict[str, Array] = {}
        if set(feeds) != set(self.inputs):
            problem = f"the network's inputs are {', '.join(self.inputs)}"
        for name in self.inputs if not problem else ():
            value, wanted = np.asarray(feeds[name]), self.shapes[name]
            first = 1 if self.most is not None else 0
            if len(value.shape) != len(wanted) or any(
                size not in (-1, given) for size, given in zip(wanted[first:], value.shape[first:], strict=True)
            ):
                problem = f"{name} has the shape {list(wanted)}"
            elif value.dtype != self.dtypes[name] and not _narrows(value, self.dtypes[name]):
                problem = f"{name} has the type {self.dtypes[name]}"
            else:
                found[name] = np.ascontiguousarray(value, self.dtypes[name])
        if not problem and self.most is not None:
            counts = {len(value) for value in found.values()}
            count = next(iter(counts), 0)
            if len(counts) > 1:
                problem = "the inputs have different numbers of samples"
            elif not count or (not self.open_batch and count % self.most):
                problem = f"the engine takes batches of {self.most}"
            elif count > self.most and self.whole:
                problem = f"{self.whole[0]} is one number for all samples, and the engine takes {self.most} at once"
        if problem:
            raise EngineError(
                f"TensorRT could not run this input: {problem}",
                where=f"{where} with "
                + ", ".join(f"{k}: {np.asarray(v).dtype}{list(np.shape(v))}" for k, v in feeds.items()),
                remedy="check the input's shape and type against `zsq inspect` of the network",
            )
        return found


def _narrows(value: Array, wanted: np.dtype[Any]) -> bool:
    """Whether whole numbers fit in the narrower type in which TensorRT 8 reads them."""
    if value.dtype != np.int64 or wanted != np.int32:
        return False
    limits = np.iinfo(np.int32)
    return value.size == 0 or (int(value.min()) >= limits.min and int(value.max()) <= limits.max)


class Running:
    """An execution context with its buffers and its stream.

    Args:
        engine: The ``ICudaEngine``; it is kept alive.
        signature: What it reads and writes.
        cuda: The CUDA runtime.
        log: What TensorRT says, for errors.
        where: The plan, for errors.
        profiler: Collects the times of layers (:func:`~zsq_deploy.backends.tensorrt.watching.make_times`); a context keeps it for life.

    Attributes:
        context: The ``IExecutionContext``.
        device_ms: Time of the last run on the GPU, without the copies; of several batches together.

    Raises:
        EngineError: There is not enough memory for the context.
    """

    def __init__(
        self, engine: Any, signature: Signature, cuda: Cuda, log: Log, where: Path, profiler: Any = None
    ) -> None:
        self._engine, self._signature, self._cuda, self._log, self._where = engine, signature, cuda, log, where
        self.context = engine.create_execution_context()
        if self.context is None:
            raise EngineError(
                f"TensorRT cannot prepare this engine: {log.why() or 'it gives no reason'}",
                where=str(where),
                remedy="close other programs that use the GPU's memory",
            )
        self._profiler = profiler
        if profiler is not None:
            self.context.profiler = profiler
        self.device_ms = 0.0
        self._held = _Held(cuda)
        self._close = weakref.finalize(self, self._held.free)
        self._shapes: dict[str, tuple[int, ...]] = {}

    def close(self) -> None:
        """Give memory, stream and events back. Safe to call twice; it happens by itself in the end."""
        self._close()

    def prepare(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Set the shapes of the inputs and the addresses of everything; the shapes of the outputs.

        Raises:
            EngineError: TensorRT refuses the shapes, or an output's size depends on numbers.
        """
        signature, context = self._signature, self.context
        if dict(shapes) != self._shapes:
            for name in signature.inputs:
                if not context.set_input_shape(name, shapes[name]):
                    raise EngineError(
                        f"the engine was not built for {name} of shape {list(shapes[name])}: {self._log.why()}",
                        where=str(self._where),
                        remedy="use a smaller batch, or build the engine for a larger one",
                    )
            self._shapes = dict(shapes)
        found = {name: tuple(int(size) for size in context.get_tensor_shape(name)) for name in signature.outputs}
        for name, shape in (*shapes.items(), *found.items()):
            if min(shape, default=1) < 0:
                raise EngineError(
                    f"the size of the output {name!r} depends on the numbers that the network computes",
                    where=str(self._where),
                    remedy="take the operator that selects (NonZero, non-maximum suppression) out of the network",
                )
            size = int(np.prod(shape, dtype=np.int64)) * signature.dtypes[name].itemsize
            if self._held.make(name, size) and not context.set_tensor_address(name, self._held.device[name]):
                raise EngineError(
                    f"TensorRT does not take the memory of {name!r}: {self._log.why()}",
                    where=str(self._where),
                    remedy="report this with the version of TensorRT",
                )
        return found

    def once(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """One run of one batch that the engine takes as it is; adds to :attr:`device_ms`."""
        outputs = self.prepare({name: tuple(value.shape) for name, value in feeds.items()})
        held, cuda, signature = self._held, self._cuda, self._signature
        for name, value in feeds.items():
            host_view(held.host[name], value.nbytes)[:] = value.reshape(-1).view(np.uint8)
            cuda.send(held.device[name], held.host[name], value.nbytes, held.stream)
        cuda.record(held.start, held.stream)
        done = self.context.execute_async_v3(held.stream)
        cuda.record(held.end, held.stream)
        sizes = {
            name: int(np.prod(shape, dtype=np.int64)) * signature.dtypes[name].itemsize
            for name, shape in outputs.items()
        }
        for name, size in sizes.items():
            cuda.fetch(held.host[name], held.device[name], size, held.stream)
        cuda.wait(held.stream)
        if not done:
            raise EngineError(
                f"TensorRT could not run the engine: {self._log.why() or 'it gives no reason'}",
                where=str(self._where),
                remedy="build it again on this device",
            )
        self.device_ms += cuda.milliseconds(held.start, held.end)
        return {
            name: host_view(held.host[name], sizes[name]).copy().view(signature.dtypes[name]).reshape(shape)
            for name, shape in outputs.items()
        }

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs; more samples than the engine takes at once are run batch by batch.

        Raises:
            EngineError: The inputs do not fit the engine, or it cannot be run.
        """
        given = self._signature.check(feeds, self._where)
        self.device_ms = 0.0
        most = self._signature.most
        count = len(next(iter(given.values()))) if given and most is not None else 0
        if most is None or count <= most:
            return self.once(given)
        parts = [
            self.once({name: value[start : start + most] for name, value in given.items()})
            for start in range(0, count, most)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in self._signature.outputs}


class _Held:
    """Memory, stream and events of one context; apart from it, so that they can be given back when it is gone."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self.device: dict[str, int] = {}
        self.host: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self.stream = cuda.stream()
        self.start, self.end = cuda.event(), cuda.event()

    def make(self, name: str, size: int) -> bool:
        """Have room for a tensor; says whether its place is new."""
        if name in self._sizes and self._sizes[name] >= size:
            return False
        self._drop(name)
        self.device[name] = self._cuda.allocate(size)
        self.host[name] = self._cuda.pinned(size)
        self._sizes[name] = size
        return True

    def _drop(self, name: str) -> None:
        self._sizes.pop(name, None)
        for kept, free in ((self.device, self._cuda.free), (self.host, self._cuda.free_pinned)):
            if name in kept:
                free(kept.pop(name))

    def free(self) -> None:
        """Give everything back."""
        for name in list(self.device):
            self._drop(name)
        self._cuda.free_stream(self.stream)
        for event in (self.start, self.end):
            self._cuda.free_event(event)
