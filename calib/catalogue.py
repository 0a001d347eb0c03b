"""What each synthesis method is, needs and takes, read from the method itself: its row, its recipe, its module's docstring.

Nothing is written down twice: a method that is added (one file and a row in :mod:`zsq_deploy.calib.methods`) is listed and explained without a
change here. What a parameter means is looked up in the method's module (a mapping ``MEANINGS``), then in :data:`GLOSSARY`.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from zsq_deploy.calib.methods import METHODS, Method
from zsq_deploy.calib.parts.recipe import stages
from zsq_deploy.errors import UsageError

__all__ = ["GLOSSARY", "MethodFacts", "Parameter", "facts", "method_named"]

GLOSSARY: Mapping[str, str] = MappingProxyType(
    {
        "steps": "most optimisation steps a batch of images",
        "rate": "step size at the start",
        "latent_rate": "step size of the latents at the start",
        "generator_rate": "step size of the generator's weights at the start",
        "patience": "steps without progress after which the step size falls",
        "warmup": "steps over which the step size rises",
        "latent": "length of the latent of one image",
        "upsamplings": "how often the generator doubles its map; 0: as fits the image size",
        "swing": "reach of swing convolution in pixels; 0: off",
        "batch_size": "images that are optimised together",
        "stop_patience": "steps without progress after which a batch ends early; 0: never",
        "stop_threshold": "relative fall of the loss that counts as progress for ending early",
        "clip": "keep pixels within valid values at every step",
        "bn_weight": "weight of the batch-norm distance",
        "label_weight": "weight of the label loss",
        "smooth_weight": "weight of the total variation, which keeps images smooth",
        "size_weight": "weight of the norm of the images",
        "jitter": "largest random shift in front of the network, as a share of the shorter side",
        "mirror": "probability that an image is mirrored in front of the network",
        "crop": "probability that an image is cropped and enlarged in front of the network",
        "crop_area": "smallest share of the image's area that such a crop keeps",
        "sigma": "width of the blur in pixels that images are kept close to",
        "slack": "quantile of the gaps of noise below which a gap costs nothing",
        "noise": "noise images that the slack is measured on",
        "emphasis": "each image counts one layer of its own twice",
        "relative": "measure gaps in units of each layer's spread",
        "variety_weight": "weight of the term that keeps images different from each other",
        "soft": "smallest probability that a target class may have",
        "lower": "smallest cosine distance of a feature to its class's centre",
        "upper": "largest cosine distance of a feature to its class's centre",
        "margin_weight": "weight of these two margins",
        "focus": "exponent of the weight that hard images get in the label loss",
    }
)
"""What parameters that several methods share mean."""

Kind = Literal["optimises images", "draws images", "ranges only", "your images"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        name: What ``--param NAME=VALUE`` calls it.
        default: Its default.
        meaning: One line; empty if nobody wrote one.
    """

    name: str
    default: Any
    meaning: str


@dataclass(frozen=True)
class MethodFacts:
    """A method as a user wants to know it.

    Attributes:
        name: What ``--method`` calls it.
        summary: One line.
        paper: Where it was published.
        kind: What it does.
        needs_bn: It needs batch-norm statistics.
        needs_labels: It needs a classifier.
        generator: It trains a generator.
        several_networks: It can fit images to several networks.
        stages: Number of its stages; 0 for what optimises nothing.
        steps: Most optimisation steps an image, all stages together; 0 for what optimises nothing.
        batch_size: Images that are made together; 0 where that does not matter.
        parameters: All parameters.
        explanation: Its module's docstring.
        fallback: What is used where it cannot be.
    """

    name: str
    summary: str
    paper: str
    kind: Kind
    needs_bn: bool
    needs_labels: bool
    generator: bool
    several_networks: bool
    stages: int
    steps: int
    batch_size: int
    parameters: tuple[Parameter, ...]
    explanation: str
    fallback: str | None

    @property
    def needs(self) -> tuple[str, ...]:
        """What it cannot do without, in words."""
        words = {
            "batch norm": self.needs_bn,
            "a classifier": self.needs_labels,
            "your images": self.kind == "your images",
        }
        return tuple(word for word, true in words.items() if true)

    @property
    def deviations(self) -> tuple[str, ...]:
        """The deliberate deviations from the paper that the docstring lists."""
        _, found, rest = self.explanation.partition("Deliberate deviations:")
        if not found:
            return ()
        items = re.split(r"^[*-] ", rest, flags=re.MULTILINE)[1:]
        # The list ends at the first paragraph that is not indented below an item.
        return tuple(" ".join(re.split(r"\n\s*\n(?=\S)", item)[0].split()).rstrip(";") for item in items)


def _module(method: Method) -> str | None:
    """The module that explains a method: its own under ``methods``, or that of what makes its images."""
    name = f"zsq_deploy.calib.methods.{method.name.replace('-', '_')}"
    for candidate in (name, getattr(method.run, "__module__", None), getattr(method.baseline, "__module__", None)):
        if candidate is None:
            continue
        try:
            importlib.import_module(candidate)
        except ModuleNotFoundError:
            continue
        return candidate
    return None


def _plain(text: str) -> str:
    """A docstring without the marks that documentation tools read."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?([\w]+)`", r"\1", text)
    return text.replace("``", "").strip()


def _explanation(method: Method) -> str:
    found = _module(method)
    doc = inspect.getdoc(sys.modules[found]) if found is not None else None
    if method.baseline is not None and method.run is None and method.name not in (found or ""):
        doc = inspect.getdoc(method.baseline)  # several baselines live in one module
        doc = None if doc is None else doc.partition("\nArgs:")[0]
    return _plain(doc) if doc else f"{method.summary[0].upper()}{method.summary[1:]}."


def facts(method: Method) -> MethodFacts:
    """Everything about a method."""
    parts = () if method.run is None else stages(method.run(method.defaults))
    found = _module(method)
    own: Mapping[str, str] = getattr(sys.modules[found], "MEANINGS", {}) if found is not None else {}
    kind: Kind = "optimises images" if parts else "draws images" if method.baseline is not None else "ranges only"
    return MethodFacts(
        method.name,
        method.summary,
        method.paper,
        "your images" if method.name == "real" else kind,
        method.needs_bn,
        any(part.needs_labels for part in parts),
        any("generator" in group for part in parts for group in part.groups),
        method.several_networks,
        len(parts),
        sum(part.steps for part in parts),
        max((part.batch_size for part in parts), default=0),
        tuple(Parameter(name, value, own.get(name, GLOSSARY.get(name, ""))) for name, value in method.defaults.items()),
        _explanation(method),
        method.fallback,
    )


def method_named(name: str) -> MethodFacts:
    """The facts of one method.

    Raises:
        UsageError: There is no such method.
    """
    if name not in METHODS:
        raise UsageError(
            f"there is no synthesis method {name!r}", where="NAME", remedy=f"choose one of {', '.join(METHODS)}"
        )
    return facts(METHODS[name])
