"""Reading an IR from disk, with one clear error for each way in which that can fail."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import openvino as ov

from zsq_deploy.errors import ModelError, UsageError

__all__ = ["load_ir"]

_VERSIONS = ("10", "11")


def load_ir(path: Path) -> ov.Model:
    """Read ``model.xml`` and the ``model.bin`` beside it.

    Raises:
        UsageError: There is no such file.
        ModelError: It is no IR, of another version, cut short, or its ``.bin`` is missing or does not belong to it.
    """
    if not path.is_file():
        raise UsageError("there is no such file", where=str(path), remedy="check the path")
    if path.suffix != ".xml":
        raise ModelError(
            "this is no OpenVINO IR: the name of an IR ends in .xml",
            where=str(path),
            remedy="give the .xml file of the model",
        )
    needed = _scan(path)
    weights = path.with_suffix(".bin")
    if needed and not weights.is_file():
        raise ModelError(
            "the IR comes without its weights",
            where=str(path),
            remedy=f"put {weights.name} beside it",
        )
    if needed and weights.stat().st_size < needed:
        raise ModelError(
            f"the weights are cut short: {weights.stat().st_size} bytes, the IR speaks of {needed}",
            where=str(weights),
            remedy="copy both files of the IR again, or write it anew",
        )
    try:
        return ov.Core().read_model(str(path))
    except RuntimeError as error:
        raise ModelError(
            f"OpenVINO {ov.__version__.split('-')[0]} cannot read this IR: {_reason(error)}",
            where=str(path),
            remedy="write it again with the OpenVINO that made it, or report this file",
        ) from error


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (telling or lines or ["no reason given"])[-1][:300]


def _scan(path: Path) -> int:
    """Go through the file once: its version, and how many bytes of weights it speaks of."""
    needed, version, seen = 0, "", False
    try:
        for event, element in ET.iterparse(path, events=("start", "end")):  # noqa: S314 - only attributes are read, and read_model would read the same file
            if not seen:
                seen = True
                if element.tag != "net":
                    raise ModelError(
                        f"this is no OpenVINO IR: its root element is <{element.tag[:40]}>",
                        where=str(path),
                        remedy="give the .xml file of the model",
                    )
                version = element.get("version", "")
                if version not in _VERSIONS:
                    raise ModelError(
                        f"this IR has version {version or 'unknown'}; versions {' and '.join(_VERSIONS)} are read",
                        where=str(path),
                        remedy="convert the network again with a current OpenVINO",
                    )
            if event == "end":
                if element.tag == "data" and element.get("offset") and element.get("size"):
                    needed = max(needed, int(element.get("offset", 0)) + int(element.get("size", 0)))
                element.clear()
    except (ET.ParseError, UnicodeDecodeError) as error:
        raise ModelError(
            f"the IR is cut short or damaged ({error})", where=str(path), remedy="copy or write it again"
        ) from error
    except ValueError as error:
        raise ModelError(f"the IR is damaged: {error}", where=str(path), remedy="copy or write it again") from error
    return needed
