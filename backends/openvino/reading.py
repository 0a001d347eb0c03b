"""Reading an IR or an ONNX file into OpenVINO, and saying in one line what is wrong with it.

Nothing here needs the network's own tools (or torch), so that a process that only runs an engine starts quickly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zsq_deploy.backends.openvino.runtime import core, version
from zsq_deploy.errors import EngineError

__all__ = ["BARE", "FAKE_QUANT", "IR_VERSIONS", "first_line", "read", "read_fake_quant", "set_shapes", "weights_of"]

IR_VERSIONS = (10, 11)
"""Versions of the IR that OpenVINO 2022 and later read."""

BARE = "/WithoutBiases"
"""What OpenVINO appends to the name of a convolution or product whose bias became an operator of its own."""

FAKE_QUANT = ("zsq_deploy", "fake_quant")
"""Where an engine names the file beside it that is its fake-quant form, if the engine itself is not (runtime information of the IR)."""

_AROUND = (
    "Exception from",
    "Check '",
    "FrontEnd API failed",
    "Model wasn't fully converted",
    "Summary:",
    "While validating",
    "[ONNX Frontend]",
    "[ GENERAL_ERROR ]",
)
_PLACE = re.compile(r"^\S*src/\S+:\d+|with a message:$")
_HEAD = 4096
_NET = re.compile(rb'<net\s[^>]*?\bversion="(\d+)"')


def first_line(error: BaseException, limit: int = 300) -> str:
    """What OpenVINO says in an exception: its reasons, without the places in its sources and the words around them."""
    lines = [line.strip().removeprefix("-- ") for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(_AROUND) and not _PLACE.search(line)]
    text = "; ".join(dict.fromkeys(said[:3])) or " ".join(line for line in lines if line)
    return (text or type(error).__name__)[:limit]


def weights_of(path: Path) -> Path:
    """The file with the weights of an IR: the ``.bin`` beside the ``.xml``."""
    return path.with_suffix(".bin")


def read(path: Path) -> Any:
    """Read an IR or an ONNX file.

    Returns:
        The ``openvino.Model``.

    Raises:
        EngineError: The file is missing, damaged, of a version that this OpenVINO does not read, or holds what it cannot do.
    """
    path = Path(path)
    _check_file(path)
    try:
        model = core().read_model(str(path))
    except Exception as error:  # OpenVINO raises plain RuntimeError for everything
        raise EngineError(
            f"OpenVINO {version()} cannot read this file: {first_line(error)}",
            where=str(path),
            remedy="build the engine again"
            if path.suffix == ".xml"
            else "look for the operator that the message names; `zsq inspect` lists all of them",
        ) from error
    return model


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise EngineError("the engine's file does not exist", where=str(path), remedy="build the engine again")
    if path.suffix != ".xml":
        return
    head = path.read_bytes()[:_HEAD]
    found = _NET.search(head)
    if found is None:
        raise EngineError(
            "this is no OpenVINO IR: its XML does not begin with a <net> of a version",
            where=str(path),
            remedy="name the .xml file that OpenVINO, NNCF or POT wrote, or build the engine again",
        )
    if int(found.group(1)) not in IR_VERSIONS:
        raise EngineError(
            f"this IR is of version {int(found.group(1))}, and OpenVINO {version()} reads versions "
            f"{' and '.join(str(number) for number in IR_VERSIONS)}",
            where=str(path),
            remedy="convert the network again with OpenVINO 2022.1 or later",
        )
    weights = weights_of(path)
    if not weights.is_file():
        raise EngineError(
            "the weights of this IR are missing",
            where=str(weights),
            remedy=f"put the .bin file beside {path.name}, or build the engine again",
        )
    needed = _weight_bytes(path)
    if weights.stat().st_size < needed:
        raise EngineError(
            f"the weights of this IR are cut short: {weights.stat().st_size} bytes, and {needed} are named in {path.name}",
            where=str(weights),
            remedy="copy the file again, or build the engine again",
        )


def _weight_bytes(path: Path) -> int:
    """The end of the last constant that an IR names."""
    last = 0
    for found in re.finditer(
        rb'\boffset="(\d+)"[^>]*?\bsize="(\d+)"|\bsize="(\d+)"[^>]*?\boffset="(\d+)"', path.read_bytes()
    ):
        offset, size = (found.group(1), found.group(2)) if found.group(1) else (found.group(4), found.group(3))
        last = max(last, int(offset) + int(size))
    return last


def read_fake_quant(path: Path) -> Any:
    """Read the fake-quant form of an engine: the file that it names, or the engine itself.

    Raises:
        EngineError: As :func:`read`.
    """
    model = read(path)
    if not model.has_rt_info(list(FAKE_QUANT)):
        return model
    return read(Path(path).parent / str(model.get_rt_info(list(FAKE_QUANT)).astype(str)))


def set_shapes(model: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """Fix the shapes of a model's inputs, in place.

    Raises:
        EngineError: The network does not accept these shapes.
    """
    wanted = {port: list(shapes[name]) for port in model.inputs for name in port.get_names() if name in shapes}
    try:
        model.reshape(wanted)
    except Exception as error:
        shown = ", ".join(f"{name}: {list(shape)}" for name, shape in shapes.items())
        raise EngineError(
            f"the network does not accept these shapes: {first_line(error)}",
            where=shown,
            remedy="check the input's shape against `zsq inspect`; export the network with an open batch for batches",
        ) from error
