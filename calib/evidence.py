"""What was measured about synthesis methods: ``evidence.json`` beside this module, and what a row of it means.

One row a network, method and protocol: time, accuracy of engines made from the images, and what kind of network it was.
``tools/compare_methods.py --evidence`` writes the file; nobody's taste goes in. :mod:`zsq_deploy.calib.recommend` reads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

from zsq_deploy.errors import CalibrationError
from zsq_deploy.model import Model, node_macs

__all__ = ["Evidence", "Kind", "Measured", "Row", "kind_of", "load_evidence"]

_SCHEMA = 1
_LARGE = 64 * 64


@dataclass(frozen=True)
class Kind:
    """What counts when two networks are called alike.

    Attributes:
        batch_norm: It has batch-norm statistics.
        classifier: Its only output is ``[images, classes]``.
        depthwise: At least a quarter of its convolutions are depthwise.
        pixels: Height times width of its input; 0 for inputs that are no images.
        macs: Multiply-accumulates of one image.
    """

    batch_norm: bool
    classifier: bool
    depthwise: bool
    pixels: int
    macs: int

    @property
    def large(self) -> bool:
        """Its images have more than 64 x 64 pixels."""
        return self.pixels > _LARGE

    def text(self) -> str:
        """In words."""
        parts = [
            "batch norm" if self.batch_norm else "no batch norm",
            "depthwise layers" if self.depthwise else "no depthwise layers",
        ]
        parts.append("large images" if self.large else "small images")
        return ", ".join([*parts, "a classifier" if self.classifier else "no classifier"])


def kind_of(model: Model) -> Kind:
    """The kind of a network."""
    graph = model.folded().graph
    convs = [node for node in graph.nodes if node.op_type == "Conv"]
    shapes = [shape for node in convs if (shape := graph.shape(node.input[1])) is not None]
    depthwise = sum(len(shape) > 2 and shape[1] == 1 and (shape[0] or 0) > 1 for shape in shapes)
    spec, out = model.inputs[0], model.outputs
    pixels = int((spec.shape[2] or 0) * (spec.shape[3] or 0)) if len(spec.shape) == 4 else 0
    return Kind(
        bool(model.batch_norms()),
        len(out) == 1 and len(out[0].shape) == 2 and (out[0].shape[1] or 0) > 1,
        bool(convs) and 4 * depthwise >= len(convs),
        pixels,
        int(sum(node_macs(graph).values())),
    )


@dataclass(frozen=True)
class Measured:
    """Accuracy at one choice of bits.

    Attributes:
        drop: Accuracy of float minus that of the quantized network, as a share; ``None`` without labels.
        agreement: Share of the images with float's class.
        images: Number of images it was measured on.
        seeds: Number of seeds it is averaged over.
        spread: Standard deviation of the drop over seeds (of the agreement, without labels); 0 for one seed.
    """

    drop: float | None
    agreement: float
    images: int
    seeds: int = 1
    spread: float = 0.0

    @property
    def error(self) -> float:
        """Standard error of the loss: of the paired difference on so many images, and of the mean over seeds."""
        return math.sqrt(max(1.0 - self.agreement, 1.0 / self.images) / self.images + self.spread**2 / self.seeds)

    @property
    def agreement_error(self) -> float:
        """Standard error of the agreement."""
        share = max(1.0 - self.agreement, 1.0 / self.images)
        return math.sqrt(share * (1.0 - share) / self.images + self.spread**2 / self.seeds)

    @property
    def loss(self) -> float:
        """What the rule compares."""
        return self.drop if self.drop is not None else 1.0 - self.agreement


@dataclass(frozen=True)
class Row:
    """One method on one network.

    Attributes:
        network: Its name.
        kind: Its kind.
        method: The method.
        protocol: With which quantizer accuracy was measured.
        engines: Accuracy is that of engines as they are deployed, not of a simulated quantizer.
        images: Size of the set.
        seconds: Time that making the set took, on one core; ``None`` where it was not measured.
        parameters: The method's parameters, where they differ from its defaults.
        results: Bits (``w8a8``) -> accuracy.
        quality: Coverage, batch-norm distance and the like.
    """

    network: str
    kind: Kind
    method: str
    protocol: str
    images: int
    seconds: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Measured] = field(default_factory=dict)
    engines: bool = False
    quality: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("parameters", "results", "quality"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        plain = {
            name: getattr(self, name) for name in ("network", "method", "protocol", "engines", "images", "seconds")
        }
        return {
            **plain,
            "kind": asdict(self.kind),
            "parameters": dict(self.parameters),
            "results": {bits: asdict(found) for bits, found in self.results.items()},
            "quality": dict(self.quality),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Row:
        """What :meth:`to_json` gave."""
        found = dict(value)
        found["kind"] = Kind(**found["kind"])
        found["results"] = {bits: Measured(**measured) for bits, measured in found["results"].items()}
        return cls(**found)

    def text(self) -> str:
        """One line for a person."""
        parts = [f"{self.images} images" + (f" in {self.seconds:.0f} s" if self.seconds is not None else "")]
        for bits, found in self.results.items():
            lost = "" if found.drop is None else f"loses {100 * found.drop:+.2f} points, "
            parts.append(f"{bits}: {lost}agrees {100 * found.agreement:.1f} %")
        return "; ".join(parts) + f" ({self.protocol})"


@dataclass(frozen=True)
class Evidence:
    """All rows, and how they were measured."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"schema_version": _SCHEMA, "notes": list(self.notes), "rows": [row.to_json() for row in self.rows]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Evidence:
        """What :meth:`to_json` gave.

        Raises:
            CalibrationError: It is something else.
        """
        try:
            if value["schema_version"] != _SCHEMA:
                raise ValueError(f"schema version {value['schema_version']}")
            return cls(tuple(Row.from_json(row) for row in value["rows"]), tuple(value["notes"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"this is no table of evidence ({type(error).__name__}: {error})",
                where="evidence.json",
                remedy="write it again with tools/compare_methods.py",
            ) from error


@cache
def load_evidence() -> Evidence:
    """The table that comes with this program."""
    text = (resources.files("zsq_deploy.calib") / "evidence.json").read_text(encoding="utf-8")
    return Evidence.from_json(json.loads(text))
