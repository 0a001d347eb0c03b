"""MixMix (Li et al., ICCV 2021, arXiv 2011.09899): images mixed into each other, inverted from several networks at once.

Data mixing: in each step another image of the batch is scaled down and pasted into a random box of each, and the network is asked for both classes, each
by its area; so the wanted output is exact for what is shown, parts of images and cuts included. Feature mixing: batch-norm statistics and classes
are matched for several networks that share the input and the classes (``synthesize(others=[...])``, ``zsq synth --also``), so that the images hold what
all of them know. One network alone is fine.

No code was released, and only the abstract and summaries of the paper could be read. Known is the composition: cross entropy of the mixed labels, batch-norm
statistics averaged over a zoo of networks, total variation and L2 priors, and that the images serve block reconstruction (1,024 of them).
Not known: all weights, step size, number of steps, the box's distribution.

Deliberate deviations:

* optimiser, schedule, form of the batch-norm distance (in units of each layer's spread), and weights are DeepInversion's in this project (see
  :mod:`.deepinversion`), whose line the paper continues; networks of a zoo that take different pixels are then weighed alike;
* half of the steps are mixed (`mix`), because the images that come out are whole ones, and their statistics count too;
* the box has between 0.2 and 0.7 of the image's sides (`box_least`, `box_most`);
* images are mirrored as in DeepInversion, but not rolled: boxes already move what the network sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from zsq_deploy.calib.methods.deepinversion import LOSS, RELATIVE_LOSS
from zsq_deploy.calib.parts.augment import Flip
from zsq_deploy.calib.parts.labels import uniform
from zsq_deploy.calib.parts.mixing import Paste
from zsq_deploy.calib.parts.parametrisations import pixels
from zsq_deploy.calib.parts.recipe import Group, Recipe
from zsq_deploy.calib.parts.schedules import Cosine
from zsq_deploy.calib.parts.terms import PixelNorm, TotalVariation
from zsq_deploy.calib.parts.terms.networks import Zoo

__all__ = ["DEFAULTS", "MEANINGS", "recipe"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "steps": 500,
        "rate": 0.1,
        "warmup": 25,
        "batch_size": 128,
        "bn_weight": 0.3,
        "relative": True,
        "label_weight": 1.0,
        "smooth_weight": 1e-4,
        "size_weight": 1e-5,
        "mix": 0.5,
        "box_least": 0.2,
        "box_most": 0.7,
        "clip": True,
    }
)


#: What parameters of this method alone mean.
MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "mix": "share of the steps in which images are pasted into each other",
        "box_least": "least side of the pasted box, as a share of the image's",
        "box_most": "largest side of it",
    }
)


def recipe(parameters: Mapping[str, Any]) -> Recipe:
    """MixMix with resolved `parameters` (see :data:`DEFAULTS`)."""
    schedule = Cosine(parameters["steps"], parameters["warmup"])
    loss = RELATIVE_LOSS if parameters["relative"] else LOSS
    return Recipe(
        loss=loss,
        loss_weight=0.0,  # the statistics are matched by the term, for all networks
        terms=(
            Zoo(loss, parameters["bn_weight"], parameters["label_weight"]),
            TotalVariation(parameters["smooth_weight"]),
            PixelNorm(parameters["size_weight"], of="image"),
        ),
        augment=(Flip(0.5), Paste(parameters["mix"], parameters["box_least"], parameters["box_most"])),
        targets=uniform,
        parametrise=pixels,
        groups={"images": Group(parameters["rate"], betas=(0.5, 0.9), schedule=schedule)},
        steps=parameters["steps"],
        batch_size=parameters["batch_size"],
        clip=parameters["clip"],
    )
