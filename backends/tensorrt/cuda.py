"""The CUDA runtime through ctypes: device memory, streams and events, and which GPU there is.

TensorRT needs this library, so it is there wherever an engine runs, also where torch was built without CUDA (most Jetsons); nothing
has to be installed for it. All calls use the current device of the calling thread, which is the first one that ``CUDA_VISIBLE_DEVICES``
leaves.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from zsq_deploy.errors import EngineError

__all__ = ["Cuda", "Gpu", "host_view"]

Array = npt.NDArray[Any]

_NAMES = ("libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so.10.2")
_FOLDERS = ("nvidia/cu13/lib", "nvidia/cuda_runtime/lib")
"""Where NVIDIA's wheels put the library, below a folder of ``sys.path``; the loader does not look there."""

_TO_DEVICE, _TO_HOST = 1, 2
_MAJOR, _MINOR = 75, 76
"""``cudaDevAttrComputeCapabilityMajor`` and ``...Minor``."""

_PROPERTIES = 4096
"""Room for ``cudaDeviceProp`` of every version (CUDA 12: 1032 bytes); the device's name stands at its beginning."""

_SIGNATURES: dict[str, Sequence[Any]] = {
    "cudaGetDeviceCount": (ctypes.POINTER(ctypes.c_int),),
    "cudaGetDevice": (ctypes.POINTER(ctypes.c_int),),
    "cudaDeviceGetAttribute": (ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int),
    "cudaGetDeviceProperties": (ctypes.c_void_p, ctypes.c_int),
    "cudaRuntimeGetVersion": (ctypes.POINTER(ctypes.c_int),),
    "cudaDriverGetVersion": (ctypes.POINTER(ctypes.c_int),),
    "cudaMemGetInfo": (ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)),
    "cudaMalloc": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t),
    "cudaFree": (ctypes.c_void_p,),
    "cudaHostAlloc": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_uint),
    "cudaFreeHost": (ctypes.c_void_p,),
    "cudaMemcpy": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    "cudaMemcpyAsync": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p),
    "cudaStreamCreate": (ctypes.POINTER(ctypes.c_void_p),),
    "cudaStreamDestroy": (ctypes.c_void_p,),
    "cudaStreamSynchronize": (ctypes.c_void_p,),
    "cudaEventCreate": (ctypes.POINTER(ctypes.c_void_p),),
    "cudaEventDestroy": (ctypes.c_void_p,),
    "cudaEventRecord": (ctypes.c_void_p, ctypes.c_void_p),
    "cudaEventSynchronize": (ctypes.c_void_p,),
    "cudaEventElapsedTime": (ctypes.POINTER(ctypes.c_float), ctypes.c_void_p, ctypes.c_void_p),
}


@dataclass(frozen=True)
class Gpu:
    """A GPU, as far as an engine depends on it.

    Attributes:
        name: As the driver says it, ``Orin``.
        capability: Compute capability, ``(8, 7)``.
        runtime: Version of the CUDA runtime, ``12.6``.
        driver: Newest CUDA version that the driver knows.
    """

    name: str
    capability: tuple[int, int]
    runtime: str
    driver: str

    def __str__(self) -> str:
        """``Orin (compute capability 8.7)``."""
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


class Cuda:
    """The CUDA runtime of the current device.

    Args:
        library: The library's file or name; ``None``: the usual names, then the folders of NVIDIA's wheels.
        remedy: What to do where there is no GPU, for the errors.

    Raises:
        EngineError: The library is not there, or it sees no GPU.
    """

    def __init__(self, library: str | None = None, *, remedy: str = "run this where a GPU is") -> None:
        self._remedy = remedy
        self._library = self._load(library)
        count = ctypes.c_int(0)
        self.call("cudaGetDeviceCount", ctypes.byref(count))
        if count.value < 1:
            raise EngineError("the CUDA runtime sees no GPU", where="CUDA", remedy=remedy)

    def _load(self, library: str | None) -> ctypes.CDLL:
        for name in _places() if library is None else (library,):
            try:
                found = ctypes.CDLL(name)
            except OSError:
                continue
            found.cudaGetErrorString.restype = ctypes.c_char_p
            found.cudaGetErrorString.argtypes = (ctypes.c_int,)
            for function, types in _SIGNATURES.items():
                getattr(found, function).argtypes = types
            return found
        raise EngineError(
            "there is no CUDA runtime (libcudart), and TensorRT needs a GPU",
            where=library or "libcudart.so",
            remedy=f"{self._remedy}; if CUDA is installed, put its lib64 folder on LD_LIBRARY_PATH",
        )

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the runtime.

        Raises:
            EngineError: It returned an error; the message is CUDA's.
        """
        status = int(getattr(self._library, name)(*arguments))
        if status != 0:
            text = self._library.cudaGetErrorString(status)
            full = name in ("cudaMalloc", "cudaHostAlloc")
            raise EngineError(
                f"CUDA refused {name}: {text.decode(errors='replace') if text else 'error'} ({status})",
                where="CUDA",
                remedy="free GPU memory or use a smaller batch" if full else self._remedy,
            )

    def gpu(self) -> Gpu:
        """The current device."""
        index, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
        self.call("cudaGetDevice", ctypes.byref(index))
        self.call("cudaDeviceGetAttribute", ctypes.byref(major), _MAJOR, index)
        self.call("cudaDeviceGetAttribute", ctypes.byref(minor), _MINOR, index)
        properties = ctypes.create_string_buffer(_PROPERTIES)
        self.call("cudaGetDeviceProperties", properties, index)
        name = properties.value.decode(errors="replace").strip()
        return Gpu(name, (major.value, minor.value), self._version("Runtime"), self._version("Driver"))

    def _version(self, of: str) -> str:
        number = ctypes.c_int(0)
        self.call(f"cuda{of}GetVersion", ctypes.byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and bytes that the device has."""
        free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
        self.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    # -- memory --

    def allocate(self, size: int) -> int:
        """Device memory of `size` bytes (at least one): its address."""
        return self._handle("cudaMalloc", ctypes.c_size_t(max(1, size)))

    def free(self, address: int) -> None:
        """Give device memory back."""
        self.call("cudaFree", address)

    def pinned(self, size: int) -> int:
        """Page-locked host memory of `size` bytes, which the GPU copies at full speed: its address."""
        return self._handle("cudaHostAlloc", ctypes.c_size_t(max(1, size)), ctypes.c_uint(0))

    def free_pinned(self, address: int) -> None:
        """Give page-locked memory back."""
        self.call("cudaFreeHost", address)

    def upload(self, address: int, array: Array) -> None:
        """Copy a contiguous array to the device; when the call returns, it is there."""
        self.call("cudaMemcpy", address, array.ctypes.data, array.nbytes, _TO_DEVICE)

    def send(self, address: int, host: int, size: int, stream: int) -> None:
        """Copy to the device in the order of a stream."""
        self.call("cudaMemcpyAsync", address, host, size, _TO_DEVICE, stream)

    def fetch(self, host: int, address: int, size: int, stream: int) -> None:
        """Copy from the device in the order of a stream."""
        self.call("cudaMemcpyAsync", host, address, size, _TO_HOST, stream)

    # -- order and time --

    def stream(self) -> int:
        """A new stream."""
        return self._handle("cudaStreamCreate")

    def free_stream(self, stream: int) -> None:
        """Give a stream back."""
        self.call("cudaStreamDestroy", stream)

    def wait(self, stream: int) -> None:
        """Wait until everything in a stream is done."""
        self.call("cudaStreamSynchronize", stream)

    def event(self) -> int:
        """A new event, with which times are taken."""
        return self._handle("cudaEventCreate")

    def free_event(self, event: int) -> None:
        """Give an event back."""
        self.call("cudaEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        """Note the time when a stream comes to this place."""
        self.call("cudaEventRecord", event, stream)

    def milliseconds(self, start: int, end: int) -> float:
        """Time on the GPU between two recorded events."""
        found = ctypes.c_float(0.0)
        self.call("cudaEventSynchronize", end)
        self.call("cudaEventElapsedTime", ctypes.byref(found), start, end)
        return found.value

    def _handle(self, name: str, *arguments: Any) -> int:
        made = ctypes.c_void_p()
        self.call(name, ctypes.byref(made), *arguments)
        return int(made.value or 0)


def host_view(address: int, size: int) -> Array:
    """Host memory at an address as bytes (uint8); it is the caller's to keep the memory."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _places() -> Iterator[str]:
    yield from _NAMES
    yield "/usr/local/cuda/lib64/libcudart.so"
    for folder in sys.path:
        for inner in _FOLDERS:
            yield from (str(file) for file in sorted((Path(folder) / inner).glob("libcudart.so*")))
