"""The Knowledge Within, KW (Haroush et al., CVPR 2020, arXiv 1912.01274, section 3).

Pixels are optimised until every batch-norm layer sees, over the batch, a Gaussian that is near to the stored one in the sense of the
Kullback-Leibler divergence; on top of that ("BNS + inception") each image is asked to be of a class, to be smooth, and to keep both
under small changes of the image.

What the paper says, as far as it could be read: nobody released code for it, and its text was not at hand, so the following is second-hand, from
its abstract and from papers that describe it. Three ways to make samples are compared: Gaussian noise; "inception" (a class score and a
prior of smoothness, the squared difference to a copy blurred with a Gaussian); and batch-norm statistics (the sum over layers of the
divergence between the stored and the measured Gaussian, in closed form). The last one is the best, also together with the second. Images
are augmented in front of the network. Step sizes, weights, batch sizes and the kinds of augmentation could not be verified.

Deliberate deviations, and what is ours because it is not known:

* the divergence is taken from the measured to the stored Gaussian and averaged over channels and layers (form B1e), so that the weights hold for any network;
* the class score is the cross entropy of the class, not the bare score, which has no bound;
* augmentation: a roll by up to `jitter` of the shorter side, and mirroring;
* Adam with step size `rate`, `label_weight`, `smooth_weight` and `sigma` were chosen on the networks at hand so that every part of the loss falls;
* `label_weight=0, smooth_weight=0` is the paper's method on batch-norm statistics alone, and then takes networks that are no classifiers;
* pixels are clipped to valid values after each step (``clip``).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from zsq_deploy.calib.parts.augment import Flip, Jitter
from zsq_deploy.calib.parts.bn_loss import BNLoss
from zsq_deploy.calib.parts.labels import uniform
from zsq_deploy.calib.parts.parametrisations import pixels
from zsq_deploy.calib.parts.recipe import Group, Recipe
from zsq_deploy.calib.parts.schedules import Plateau
from zsq_deploy.calib.parts.terms import CrossEntropy, LikeBlurred, Term

__all__ = ["DEFAULTS", "LOSS", "recipe"]

#: Form B1e of the batch-norm-statistics loss.
LOSS = BNLoss(norm="kl", reduce="mean")

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "steps": 300,
        "rate": 0.1,
        "patience": 30,
        "batch_size": 128,
        "label_weight": 0.1,
        "smooth_weight": 0.1,
        "sigma": 1.0,
        "jitter": 0.0625,
        "mirror": 0.5,
        "clip": True,
    }
)


def recipe(parameters: Mapping[str, Any]) -> Recipe:
    """KW with resolved `parameters` (see :data:`DEFAULTS`)."""
    terms: list[Term] = []
    if parameters["label_weight"]:
        terms.append(CrossEntropy(parameters["label_weight"]))
    if parameters["smooth_weight"]:
        terms.append(LikeBlurred(parameters["smooth_weight"], parameters["sigma"]))
    return Recipe(
        loss=LOSS,
        terms=tuple(terms),
        augment=(Jitter(parameters["jitter"]), Flip(parameters["mirror"], each=True)),
        targets=uniform if parameters["label_weight"] else None,
        parametrise=pixels,
        groups={"images": Group(parameters["rate"], schedule=Plateau(parameters["patience"], 0.1, 1e-4))},
        steps=parameters["steps"],
        batch_size=parameters["batch_size"],
        clip=parameters["clip"],
    )
