"""Where batches are put: the CUDA runtime through a stand-in library, torch where there is a GPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from zsq_deploy.backends.tensorrt.calibrators import (
    RuntimeMemory,
    TorchMemory,
    batch_size_for,
    device_memory,
    has_calibrators,
    major_version,
)
from zsq_deploy.errors import EngineError


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler for the stand-in of the CUDA runtime")
    file = tmp_path_factory.mktemp("cudart") / "libcudart.so"
    source = Path(__file__).parent / "tensorrt_stubs" / "cudart.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(file), str(source)], check=True)
    return file


@pytest.fixture
def fake(library: Path) -> Iterator[ctypes.CDLL]:
    found = ctypes.CDLL(str(library))
    yield found
    found.pretend(1, 0)


def at(address: int, like: np.ndarray) -> np.ndarray:
    return np.frombuffer(ctypes.string_at(address, like.nbytes), like.dtype).reshape(like.shape)


def test_batches_arrive_and_buffers_are_kept_until_the_size_changes(library: Path, fake: ctypes.CDLL) -> None:
    memory = RuntimeMemory(str(library))
    rng = np.random.default_rng(0)
    images, mask = rng.normal(size=(4, 3, 5)).astype(np.float32), rng.integers(0, 9, (4, 7))
    first, other = memory.upload("images", images), memory.upload("mask", mask)
    assert np.array_equal(at(first, images), images)
    assert np.array_equal(at(other, mask), mask)
    turned = images[::-1].transpose(0, 2, 1)  # not contiguous
    assert memory.upload("images", turned) == first
    assert np.array_equal(at(first, turned), turned)
    assert fake.blocks() == 2
    memory.upload("images", images[:1])
    assert fake.blocks() == 2
    memory.free()
    memory.free()
    assert fake.blocks() == 0


def test_no_library_no_gpu_no_memory(library: Path, fake: ctypes.CDLL, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no CUDA runtime"):
        RuntimeMemory(str(tmp_path / "none.so"))
    fake.pretend(0, 0)
    with pytest.raises(EngineError, match="sees no GPU"):
        RuntimeMemory(str(library))
    fake.pretend(0, 100)
    with pytest.raises(EngineError, match=r"cudaGetDeviceCount: no CUDA-capable device is detected \(100\)"):
        RuntimeMemory(str(library))
    fake.pretend(1, 2)
    memory = RuntimeMemory(str(library))
    with pytest.raises(EngineError, match="cudaMalloc: out of memory") as refused:
        memory.upload("images", np.zeros(3, np.float32))
    assert "smaller batch" in str(refused.value)
    memory.free()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_torch_without_a_gpu() -> None:
    with pytest.raises(EngineError, match="torch sees no GPU"):
        TorchMemory()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_torch_with_a_gpu() -> None:
    memory = device_memory()
    assert isinstance(memory, TorchMemory)
    images = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    images.flags.writeable = False
    address = memory.upload("images", images)
    assert address == memory.upload("images", images + 1)  # the same buffer
    (buffer,) = memory._buffers.values()
    assert buffer.data_ptr() == address
    assert np.array_equal(buffer.cpu().numpy(), images + 1)
    memory.free()


def test_batch_sizes_divide_the_set() -> None:
    assert [batch_size_for(n) for n in (1, 7, 12, 64, 100, 101)] == [1, 7, 12, 32, 25, 1]


def test_a_module_that_is_not_tensorrt() -> None:
    assert not has_calibrators(object())
    with pytest.raises(EngineError, match="says no version"):
        major_version(object())
