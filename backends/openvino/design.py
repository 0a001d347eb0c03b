"""What every way to quantize for OpenVINO gives: a Q/DQ graph, and how it came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zsq_deploy.backends.base import ValidationData
from zsq_deploy.model.graph import Graph

__all__ = ["Design", "ValidationData"]


@dataclass(frozen=True)
class Design:
    """A quantized network before it becomes an engine.

    Attributes:
        qdq: The Q/DQ graph. Node and value names are those of the float graph. A weight is an integer initializer behind a
            DequantizeLinear, or a float initializer behind a Quantize/Dequantize pair (not yet stored as integers).
        vendor_ir: The IR exactly as the vendor's tool wrote it (the ``.xml``; its ``.bin`` is beside it); ``None`` for our own Q/DQ
            graph.
        corrects_biases: The vendor's tool has corrected the biases already.
        record: JSON values for the manifest: what was decided (preset, ignored scope, layers returned to float with reasons, ...).
        notes: What the user should read, one sentence each.
    """

    qdq: Graph
    vendor_ir: Path | None = None
    corrects_biases: bool = False
    record: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
