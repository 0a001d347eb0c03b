"""TensorRT's own calibrators, fed by a calibration set: for TensorRT 8 and 10, which calibrate while they build an engine.

NVIDIA's classes come from the ``tensorrt`` module that the caller imported, so that this file can be read, tested and documented
without it. :func:`make_calibrator` returns an instance of a real subclass of one of them.

Three things that TensorRT does not do are done here:

* **No stale scales.** A cache is bound to the network and to the set (:mod:`zsq_deploy.backends.tensorrt.cache`). One that belongs to
  something else, or that TensorRT would ignore because of its first line, is refused before the build begins.
* **No swallowed errors.** TensorRT prints an exception that a callback raises and goes on, possibly with a half-calibrated network.
  Here it is kept, calibration ends, and :meth:`Calibrator.check` raises it after the build. :meth:`Calibrator.check` also finds a build
  that never asked for images, which happens when the builder was not told to use int8.
* **No images lost.** All batches of a calibration have the same size; the default is the largest one that divides the set.

TensorRT 11 has no calibrators: they were superseded by explicit Q/DQ in 10.1 and removed in 11.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from zsq_deploy.backends.tensorrt.cache import (
    ALGORITHMS,
    CacheBinding,
    CalibrationCache,
    check_binding,
    write_cache,
)
from zsq_deploy.backends.tensorrt.cuda import Cuda
from zsq_deploy.errors import CalibrationError, EngineError, UsageError, ZsqError
from zsq_deploy.progress import SILENT, Progress

__all__ = [
    "CLASSES",
    "Calibrator",
    "DeviceMemory",
    "RuntimeMemory",
    "TorchMemory",
    "batch_size_for",
    "device_memory",
    "has_calibrators",
    "major_version",
    "make_calibrator",
]

Array = npt.NDArray[Any]

CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "entropy-2": "IInt8EntropyCalibrator2",
        "minmax": "IInt8MinMaxCalibrator",
        "legacy": "IInt8LegacyCalibrator",
        "entropy": "IInt8EntropyCalibrator",
    }
)
"""Names on the command line -> NVIDIA's classes. The algorithm that each writes into its cache is in ``cache.ALGORITHMS``."""

_MOST_IMAGES = 32


class DeviceMemory(Protocol):
    """Where batches are put for TensorRT to read."""

    def upload(self, name: str, array: Array) -> int:
        """Copy an array to the device and return its address, which stays valid until the next upload under the same name."""

    def free(self) -> None:
        """Give the memory back."""


_REMEDY_GPU = "calibrate on the device that the engine is for; without a GPU write the cache from ranges, which needs neither GPU nor TensorRT"


class TorchMemory:
    """Device memory that belongs to torch, one buffer an input.

    Args:
        device: Index of the GPU that the engine is built on.

    Raises:
        EngineError: torch sees no GPU.
    """

    def __init__(self, device: int = 0) -> None:
        import torch

        if not torch.cuda.is_available():
            raise EngineError("torch sees no GPU, and TensorRT calibrates on one", where="CUDA", remedy=_REMEDY_GPU)
        self._torch = torch
        self._device = torch.device("cuda", device)
        self._buffers: dict[str, Any] = {}

    def upload(self, name: str, array: Array) -> int:
        """Copy an array to the GPU, wait for the copy, and return its address."""
        host = self._torch.from_numpy(np.array(array, order="C"))  # a copy: sets hand out read-only views
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != host.shape or buffer.dtype != host.dtype:
            self._buffers[name] = buffer = self._torch.empty(host.shape, dtype=host.dtype, device=self._device)
        buffer.copy_(host)
        self._torch.cuda.synchronize(self._device)
        return int(buffer.data_ptr())

    def free(self) -> None:
        """Give the buffers back to torch."""
        self._buffers.clear()


class RuntimeMemory:
    """Device memory of the CUDA runtime itself, for machines whose torch was built without CUDA (most Jetsons).

    Args:
        library: The library's file or name; ``None``: the usual ones (:class:`~zsq_deploy.backends.tensorrt.cuda.Cuda`).

    Raises:
        EngineError: The library is not there, or it sees no GPU.
    """

    def __init__(self, library: str | None = None) -> None:
        self._buffers: dict[str, tuple[int, int]] = {}
        self._cuda = Cuda(library, remedy=_REMEDY_GPU)

    def upload(self, name: str, array: Array) -> int:
        """Copy an array to the GPU (the call returns when it is there) and return its address."""
        host = np.ascontiguousarray(array)
        address, size = self._buffers.get(name, (0, 0))
        if size != host.nbytes:
            self._release(name)
            address = self._cuda.allocate(host.nbytes)
            self._buffers[name] = (address, host.nbytes)
        self._cuda.upload(address, host)
        return address

    def _release(self, name: str) -> None:
        address, _ = self._buffers.pop(name, (0, 0))
        if address:
            self._cuda.free(address)

    def free(self) -> None:
        """Give all buffers back."""
        for name in list(self._buffers):
            self._release(name)


def device_memory() -> DeviceMemory:
    """Device memory by torch where it sees a GPU, else by the CUDA runtime.

    Raises:
        EngineError: Neither sees one.
    """
    import torch

    return TorchMemory() if torch.cuda.is_available() else RuntimeMemory()


class Calibrator(Protocol):
    """What :func:`make_calibrator` returns, besides being one of NVIDIA's calibrators.

    Attributes:
        cache_used: Whether TensorRT was handed a cache.
        batches_read: Batches that TensorRT has taken.
        notes: What a reader of the report should know, one sentence each.
    """

    cache_used: bool
    batches_read: int
    notes: list[str]

    def get_batch_size(self) -> int:
        """Images a batch."""

    def get_batch(self, names: Sequence[str]) -> list[int] | None:
        """Device addresses of the next batch, in the order of the names; ``None`` at the end."""

    def read_calibration_cache(self) -> bytes | None:
        """The content of the cache, or ``None``."""

    def write_calibration_cache(self, cache: Any) -> None:
        """Keep what TensorRT found."""

    def check(self) -> None:
        """Raise what went wrong in a callback; to be called after the build.

        Raises:
            CalibrationError: A callback failed, or neither images nor a cache were asked for.
        """

    def close(self) -> None:
        """Free the device memory and end the progress bar. Safe to call twice."""


def major_version(trt: Any) -> int:
    """The major version of an imported ``tensorrt`` module.

    Raises:
        EngineError: The module says no version.
    """
    found = re.match(r"(\d+)\.", str(getattr(trt, "__version__", "")))
    if found is None:
        raise EngineError(
            "the tensorrt module says no version", where="tensorrt.__version__", remedy="install NVIDIA's tensorrt"
        )
    return int(found[1])


def has_calibrators(trt: Any) -> bool:
    """Whether this TensorRT can calibrate (8 to 10 can, 11 cannot)."""
    return all(hasattr(trt, name) for name in CLASSES.values())


def batch_size_for(images: int, most: int = _MOST_IMAGES) -> int:
    """The largest batch size up to `most` that divides the number of images, so that none is left over."""
    return max(size for size in range(1, min(images, most) + 1) if images % size == 0)


def make_calibrator(
    trt: Any,
    calibration: Any,
    *,
    model_digest: str,
    algorithm: str = "entropy-2",
    batch_size: int | None = None,
    cache: Path | None = None,
    memory: DeviceMemory | None = None,
    quantile: float = 0.9999,
    regression_cutoff: float = 1.0,
    progress: Progress = SILENT,
) -> Any:
    """A calibrator for ``IBuilderConfig.int8_calibrator``: NVIDIA's class, our images.

    Args:
        trt: The imported ``tensorrt`` module (8 or 10).
        calibration: The :class:`~zsq_deploy.calib.CalibrationSet`.
        model_digest: Digest of the network that is calibrated.
        algorithm: A key of :data:`CLASSES`.
        batch_size: Images a batch; ``None``: :func:`batch_size_for`. A network with a fixed batch size needs that one. Images that
            do not fill the last batch are left out, and a note says so.
        cache: File of the calibration cache: read if it is there, written after a calibration. ``None``: neither.
        memory: Where batches are put; ``None``: :func:`device_memory`, asked when the first batch is asked for.
        quantile: Share of magnitudes kept, of the legacy calibrator.
        regression_cutoff: Share of the maximum where its regression begins; 1 turns the regression off.
        progress: Where to report.

    Returns:
        An instance of a subclass of NVIDIA's class that offers what :class:`Calibrator` says. TensorRT does not keep it alive: hold
        it until the engine is built. It may serve several builds, one after the other.

    Raises:
        EngineError: This TensorRT has no calibrators.
        UsageError: Unknown algorithm, or a batch size that the set cannot fill.
        StaleArtifactError: The cache belongs to another network, set, version or algorithm.
        CalibrationError: The cache is damaged.
    """
    if algorithm not in CLASSES:
        raise UsageError(
            f"TensorRT has no calibrator {algorithm!r}", where="ranges", remedy=f"choose one of {', '.join(CLASSES)}"
        )
    if not has_calibrators(trt):
        raise EngineError(
            f"TensorRT {getattr(trt, '__version__', '?')} has no calibrators: implicit quantization was removed in 11",
            where=CLASSES[algorithm],
            remedy="build from the explicit Q/DQ graph (--target tensorrt-11), or use TensorRT 8 or 10 (JetPack 5 and 6)",
        )
    images = len(calibration)
    size = batch_size_for(images) if batch_size is None else batch_size
    if not 1 <= size <= images:
        raise UsageError(
            f"the calibration set holds {images} images, which do not fill a batch of {size}",
            where="batch size",
            remedy="make a larger set, or choose a smaller batch",
        )
    if cache is not None and cache.exists():
        _check_cache(cache, trt, algorithm, model_digest, str(calibration.digest))
    made = _subclass(getattr(trt, CLASSES[algorithm]), trt, legacy=algorithm == "legacy")()
    made.configure(
        calibration=calibration,
        size=size,
        cache=cache,
        binding=CacheBinding(
            model_digest, str(calibration.digest), f"tensorrt-{algorithm}", f"TensorRT {trt.__version__}"
        ),
        memory=memory,
        progress=progress,
        title=f"calibrate ({CLASSES[algorithm]})",
    )
    if algorithm == "legacy":
        for title, value in (("quantile", quantile), ("regression_cutoff", regression_cutoff)):
            if not 0.0 < value <= 1.0:
                raise UsageError(f"{title} is {value}", where=title, remedy="choose a number above 0, up to 1")
        made.quantile, made.regression_cutoff = quantile, regression_cutoff
    return made


def _check_cache(cache: Path, trt: Any, algorithm: str, model_digest: str, set_digest: str) -> None:
    """Refuse a cache that TensorRT would take although it must not, or would ignore although it is there."""
    check_binding(cache, model_digest=model_digest, set_digest=set_digest)
    # TensorRT's own files hold zeros, for tensors that it leaves in float; what stands in a bound cache is what it wrote.
    content = CalibrationCache.parse(cache.read_bytes(), where=str(cache), zeros=True)
    content.check_reader(str(trt.__version__), ALGORITHMS[algorithm], where=str(cache))


def _subclass(base: Any, trt: Any, *, legacy: bool) -> Any:
    """A subclass of one of NVIDIA's classes; they have to be subclassed at run time, where the module is known."""

    class SetCalibrator(base):  # type: ignore[misc]
        """One of NVIDIA's calibrators, fed from a calibration set."""

        def __init__(self) -> None:
            base.__init__(self)  # pybind11 insists on the explicit call
            self.cache_used = False
            self.batches_read = 0
            self.notes: list[str] = []
            self._failure: BaseException | None = None
            self._content: bytes | None = None

        def configure(
            self,
            *,
            calibration: Any,
            size: int,
            cache: Path | None,
            binding: CacheBinding,
            memory: DeviceMemory | None,
            progress: Progress,
            title: str,
        ) -> None:
            self._calibration = calibration
            self._size = size
            self._cache = cache
            self._binding = binding
            self._memory = memory
            self._progress = progress
            self._title = title
            self._whole = len(calibration) // size
            self._batches: Iterator[Mapping[str, Array]] | None = None
            self._open = ExitStack()
            self._task: Any = None
            left = len(calibration) - self._whole * size
            if left:
                self.notes.append(
                    f"{left} of {len(calibration)} images did not fill a batch of {size} and were left out"
                )

        # -- what TensorRT calls; an exception must not reach it --

        def get_batch_size(self) -> int:
            return int(self._size)

        def get_batch(self, names: Sequence[str]) -> list[int] | None:
            if self._failure is not None:
                return None
            try:
                return self._next(list(names))
            except BaseException as error:
                self._failure = error
                self.close()
                return None

        def read_calibration_cache(self) -> bytes | None:
            # TensorRT asks for the cache at the beginning of every calibration: a second build reads the images again.
            self._batches, self.batches_read, self.cache_used = None, 0, False
            try:
                if self._cache is None or not self._cache.is_file():
                    return None
                _check_cache(
                    self._cache, trt, _algorithm_of(base), self._binding.model_digest, self._binding.set_digest
                )
                content = self._cache.read_bytes()
            except BaseException as error:
                self._failure = self._failure or error
                return None
            self.cache_used = True
            self._content = content  # TensorRT gets a pointer into it
            return content

        def write_calibration_cache(self, cache: Any) -> None:
            if self._cache is None or self._failure is not None:
                return
            try:
                content = bytes(cache)
                CalibrationCache.parse(content, where="what TensorRT found", zeros=True)
                write_cache(self._cache, content, self._binding)
            except BaseException as error:
                self._failure = error

        if legacy:
            # NVIDIA's documentation speaks of two attributes; its bindings call these methods.
            def get_quantile(self) -> float:
                return float(self.quantile)

            def get_regression_cutoff(self) -> float:
                return float(self.regression_cutoff)

            # It can keep its histograms as well; this project does not.
            def read_histogram_cache(self, *_: Any) -> None:
                return None

            def write_histogram_cache(self, *_: Any) -> None:
                return None

        # -- ours --

        def _next(self, names: list[str]) -> list[int] | None:
            if self._batches is None:
                have = list(self._calibration.input_names)
                if set(names) != set(have):
                    raise CalibrationError(
                        f"TensorRT asks for the inputs {names}, the calibration set has {have}",
                        where="calibration",
                        remedy="make a set for this network",
                    )
                if self._memory is None:
                    self._memory = device_memory()
                self._batches = iter(self._calibration.batches(self._size))
                self._task = self._open.enter_context(self._progress.task(self._title, float(self._whole * self._size)))
            batch = next(self._batches, None) if self.batches_read < self._whole else None
            if batch is None:
                self.close()
                return None
            assert self._memory is not None
            narrow = major_version(trt) < 10
            addresses = [self._memory.upload(name, _device_form(name, batch[name], narrow=narrow)) for name in names]
            self.batches_read += 1
            self._task.advance(self._size)
            return addresses

        def check(self) -> None:
            self.close()
            failure = self._failure
            if isinstance(failure, ZsqError):
                raise failure
            if failure is not None and not isinstance(failure, Exception):
                raise failure  # the user interrupted the build
            if failure is not None:
                raise CalibrationError(
                    f"calibration stopped: {type(failure).__name__}: {str(failure)[:300]}",
                    where=type(self).__name__,
                    remedy="see the cause above; the engine that was built is not calibrated and must not be used",
                ) from failure
            if not self.cache_used and self.batches_read < self._whole:
                raise CalibrationError(
                    f"TensorRT read {self.batches_read} of {self._whole} batches and no cache: the engine is not calibrated",
                    where=type(self).__name__,
                    remedy="set BuilderFlag.INT8 and the calibrator in the builder's configuration; see TensorRT's log",
                )

        def close(self) -> None:
            self._batches = iter(())  # whoever asks again is at the end
            self._open.close()
            if self._memory is not None:
                with suppress(EngineError):  # the build's own error says more than that memory could not be given back
                    self._memory.free()

    SetCalibrator.__name__ = SetCalibrator.__qualname__ = f"Zsq{base.__name__}"
    return SetCalibrator


def _algorithm_of(base: Any) -> str:
    return next(name for name, title in CLASSES.items() if title == base.__name__)


def _device_form(name: str, array: Array, *, narrow: bool) -> Array:
    """An input in the type in which TensorRT reads it.

    Double precision becomes single. TensorRT 8 (`narrow`) turns the int64 inputs of an ONNX network into int32; 10 keeps them.
    """
    if array.dtype == np.float64:
        return array.astype(np.float32)
    if narrow and array.dtype == np.int64:
        limits = np.iinfo(np.int32)
        if array.min() < limits.min or array.max() > limits.max:
            raise CalibrationError(
                f"input {name!r} holds numbers beyond int32, in which TensorRT 8 reads it",
                where=name,
                remedy="use TensorRT 10, or inputs that fit",
            )
        return array.astype(np.int32)
    return array
