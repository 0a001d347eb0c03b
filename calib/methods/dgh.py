"""DGH, "Data Generation for Hardware-Friendly Post-Training Quantization" (Dikstein et al., Sony, WACV 2025), as in its Model Compression Toolkit.

Pixels are optimised until the network sees, over *all* images of the set together, the statistics that it stored in training: a mean over a thousand images
leaves each of them free to be different, as photographs are, where statistics of each small batch make all batches alike. Only a piece of the images goes
through the network at a time, beside the remembered moments of the others (see :mod:`zsq_deploy.calib.parts.all_images`). What the network sees is
smoothed, cut out of a larger picture at random, and sometimes mirrored; a weak loss asks for decided outputs. No labels.

Published values (the toolkit's defaults for PyTorch): 500 steps, RAdam with step size 16, halved when the loss has not fallen for a fiftieth of the steps (the best loss is
then forgotten), batches of 32; distance = squared differences of mean and of standard deviation, over the number of channels, mean over layers, the
image itself one of them (mean 0, deviation 1); 1e-5 times minus the mean of the outputs' maximum minus minimum; N(0, 1) noise of 32 pixels more
than the image's sides (at 224); mirrored with probability 0.5, 3x3 Gaussian of deviation 1.25, random window; clipped to valid pixels with the gradient passing
through; final images are smoothed, cut out of the middle and clipped.

Deliberate deviations:

* the pieces move together at the end of a step in which each was seen once, instead of one after the other: what the others' moments are when a piece is seen is the
  same in both, because the toolkit, too, remembers a batch's moments as they were before it moved. One step size for all, and one
  window and mirroring for all pieces of a step;
* pieces stand in a fixed order; the toolkit shuffles them in every step, which changes whose moments are one step old;
* the table is first filled with what the first step sees, not with finished images;
* a set of more than `batch_size` images is made in groups of at most that many, each with the statistics by itself, so that memory stays bounded;
* the margin is a seventh of the sides at any size (32 of 224 pixels);
* true float32, no automatic half precision;
* `steps` is 300, with the patience scaled to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from zsq_deploy.calib.parts.augment import Flip
from zsq_deploy.calib.parts.bn_loss import BNLoss
from zsq_deploy.calib.parts.framed import FramedPixels, SmoothedWindow
from zsq_deploy.calib.parts.parametrisations import Start
from zsq_deploy.calib.parts.recipe import Group, Recipe
from zsq_deploy.calib.parts.schedules import Plateau
from zsq_deploy.calib.parts.terms.output import OutputRange

__all__ = ["DEFAULTS", "LOSS", "MEANINGS", "recipe"]

#: Standard deviations over all images, the image itself a layer.
LOSS = BNLoss(moment="std", norm="l2sq", divide_by="channels", eps=1e-6, reduce="mean", input_layer=True)

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "steps": 300,
        "rate": 16.0,
        "piece": 32,
        "batch_size": 1024,
        "output_weight": 1e-5,
        "margin": 1 / 7,
        "smoothing": 1.25,
    }
)


#: What parameters of this method alone mean.
MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "piece": "images that go through the network at a time",
        "batch_size": "most images that share their statistics",
        "output_weight": "weight of the loss that asks for decided outputs",
        "margin": "pixels around the image while it is optimised, as a share of its sides",
        "smoothing": "width in pixels of the Gaussian that the pixels are smoothed with",
    }
)


def recipe(parameters: Mapping[str, Any]) -> Recipe:
    """DGH with resolved `parameters` (see :data:`DEFAULTS`)."""
    margin, sigma = parameters["margin"], parameters["smoothing"]

    def framed(start: Start) -> FramedPixels:
        return FramedPixels(start, margin, sigma)

    schedule = Plateau(max(1, parameters["steps"] // 50), 0.5, 1e-4, reset=True)
    return Recipe(
        loss=LOSS,
        terms=(OutputRange(parameters["output_weight"]),),
        augment=(Flip(0.5), SmoothedWindow(margin, sigma)),
        parametrise=framed,
        groups={"images": Group(parameters["rate"], schedule=schedule, optimiser="radam")},
        steps=parameters["steps"],
        batch_size=parameters["batch_size"],
        clip=False,
        clip_seen=True,
        piece=parameters["piece"],
    )
