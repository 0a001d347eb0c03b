"""SynQ's images (Kim et al., ICLR 2025, "Accurate Zero-shot Quantization by Synthesis-aware Fine-tuning").

Two stages. One calibration image of every class as in TexQ (without textures) gives the centre; then images are optimised as in HAST, towards their classes with
most weight on the hard ones, and towards batch-norm statistics: the stored ones, and in deep layers those of the centre. The finished images are
low-pass filtered, because synthetic images carry more high frequencies than photographs.

Published values (the released code): centres: N(0, 1) noise, Adam with step size 0.5, divided by 10 when the loss has not fallen for 50 steps, down to 0.05, 1,500
steps; cross entropy times 5 + squared gaps of mean and of biased variance, mean over channels and layers, times 0.2 in the shallow half and
1.1 in the deep one. Images: batches of 256 (32 by default in the script), the same noise and optimiser (down to 1e-4), 1,000 steps; loss = 0.4
times the batch-norm distance (mean over layers) + 0.1 times (1 - p)^0.5 times cross entropy + 0.02 times the distance of the deep layers from the centre, divided by the
numbers of layers and of images; crops of 0.4 to 1 of the area and mirroring with probability 0.5 a step (ImageNet). Filter: exp(-r^2 / (2 D0^2))
in the frequency domain, D0 80 (20 to 100 were searched).

Deliberate deviations:

* the released script makes images without the centre unless a switch is given, and its configuration then reads images from a folder named after the switch; here the
  centre counts, as in the paper;
* at most `centres` (100) classes get a calibration image: with 1,000 classes the centre would cost more than the set;
* the shallow half is that of this project's layer weights (floor of half of the layers; the release counts one layer less);
* the filter is applied once, to the finished images, while the release filters what it reads for fine-tuning: the same pixels. D0 counts periods per
  image, so at 32 x 32 pixels D0 80 does next to nothing: lower it there (`cutoff`; 0: no filter);
* `steps` and `centre_steps` are 300, step sizes fall after 30 steps without progress, and that of the images starts at 0.1, as :mod:`.hast` does here, and like
  there images are not cropped (`crop=0.5`: as ImageNet's are);
* `relative=True` measures gaps in units of each layer's spread, for networks that take 0..255, where the published squares drown the label;
* pixels are clipped to valid values after each step (``clip``), and once more behind the filter;
* perturbation, Grad-CAM alignment and the soft-label gate belong to fine-tuning and are not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from zsq_deploy.calib.methods.texq import CENTRE_LOSS, LOSS
from zsq_deploy.calib.parts.augment import RandomResizedCrop
from zsq_deploy.calib.parts.centres import ClassPixels, centre_statistics, one_each
from zsq_deploy.calib.parts.labels import uniform
from zsq_deploy.calib.parts.lowpass import FilteredPixels
from zsq_deploy.calib.parts.parametrisations import Start
from zsq_deploy.calib.parts.recipe import Group, Recipe
from zsq_deploy.calib.parts.schedules import Plateau
from zsq_deploy.calib.parts.terms import CrossEntropy
from zsq_deploy.calib.parts.terms.centres import CentreStatistics

__all__ = ["DEFAULTS", "LOSS", "MEANINGS", "recipe"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "centres": 100,
        "centre_steps": 300,
        "centre_rate": 0.5,
        "centre_label_weight": 5.0,
        "steps": 300,
        "rate": 0.1,
        "patience": 30,
        "batch_size": 128,
        "bn_weight": 0.4,
        "label_weight": 0.1,
        "focus": 0.5,
        "centre_weight": 0.02,
        "crop": 0.0,
        "crop_area": 0.4,
        "relative": False,
        "cutoff": 80.0,
        "clip": True,
    }
)


#: What parameters of this method alone mean.
MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "centres": "most classes that get an image of the centre, evenly spaced among all",
        "centre_steps": "optimisation steps of the images whose statistics are the centre",
        "centre_rate": "their step size at the start",
        "centre_label_weight": "weight of the label loss for them",
        "centre_weight": "weight of the distance from the centre's statistics",
        "cutoff": "width of the low-pass filter on finished images, in periods per image; 0: no filter",
    }
)


def recipe(parameters: Mapping[str, Any]) -> tuple[Recipe, ...]:
    """SynQ's stages with resolved `parameters` (see :data:`DEFAULTS`)."""

    def filtered(start: Start) -> FilteredPixels:
        return FilteredPixels(start, parameters["cutoff"])

    patience, relative = parameters["patience"], parameters["relative"]
    centres = Recipe(
        loss=replace(CENTRE_LOSS, relative=relative),
        terms=(CrossEntropy(parameters["centre_label_weight"]),),
        parametrise=lambda start: ClassPixels(start, parameters["centres"]),
        groups={"images": Group(parameters["centre_rate"], schedule=Plateau(patience, 0.1, 0.05))},
        steps=parameters["centre_steps"],
        batch_size=parameters["batch_size"],
        clip=parameters["clip"],
        images=one_each(parameters["centres"]),
    )
    images = Recipe(
        loss=replace(LOSS, relative=relative),
        loss_weight=parameters["bn_weight"],
        terms=(
            CrossEntropy(parameters["label_weight"], parameters["focus"]),
            CentreStatistics(parameters["centre_weight"], per_image=True, relative=relative),
        ),
        augment=(RandomResizedCrop((parameters["crop_area"], 1.0), share=parameters["crop"]),),
        targets=uniform,
        parametrise=filtered,
        groups={"images": Group(parameters["rate"], schedule=Plateau(patience, 0.1, 1e-4))},
        steps=parameters["steps"],
        batch_size=parameters["batch_size"],
        clip=parameters["clip"],
        prepare=centre_statistics,
    )
    return centres, images
