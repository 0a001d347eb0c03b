"""Diverse sample generation, DSG (Zhang et al., CVPR 2021, arXiv 2103.01049; Qin et al., TPAMI 2023, arXiv 2109.00212).

ZeroQ's distance makes all images alike, because all are pulled to the same numbers. DSG lets go in two ways: slack distribution alignment forgives each layer
the gap that noise produces there (the `slack` quantile over images and channels), and layerwise sample enhancement lets image i count
layer i (modulo the number of layers) twice.

Published values: CVPR: quantile 0.9 (1.0 is worse), as many images in a batch as there are batch-norm layers, loss matrix "ones + identity".
The released code (TPAMI, post-training): 500 steps, Adam with step size 0.9, divided by 10 when the loss has not fallen for 260
steps, down to 1e-4; distances are squared, summed over channels and images and divided by the number of images, per layer summed, plus the
same for the input image against mean 0 and standard deviation 1 without slack; plus 2 times the cross entropy of uniformly
drawn classes, 0.01 times total variation and 0.01 times the mean plain norm of an image, and a term on the correlations between the images of a
batch (eigenvalues of their Gram matrix against those of fresh noise, times 1e-4 / layers, and the eigenvectors likewise).
The code doubles the *gap* of the layer that an image counts (its square fourfold) and does so for the first 20 images only; the CVPR text
doubles the loss, and so does this. The slacks that it loads are not in the release: how many noise images they came from is not known; here `noise` many.

Deliberate deviations:

* `label_weight`, `smooth_weight`, `size_weight` and `variety_weight` (TPAMI) are 0 by default, which is the CVPR method and needs no labels
  (TPAMI: 2, 0.01, 0.01, and 1e-4 divided by the number of batch norms);
* the correlation term takes eigenvalues only, against the same noise in every step: eigenvectors have no sign of their own, and no
  gradient where eigenvalues are equal;
* step size 0.5, divided by 10 after 20 steps without progress, at most 200 steps, as for ZeroQ: at 0.9 the loss swings for most of the 500 steps;
* batches of 64 instead of the number of batch norms; with the rule "i modulo layers" any size works;
* statistics are taken at the input of each batch norm instead of pairing convolutions with batch norms by their order; pixels are clipped to
  valid values after each step (``clip``); a batch ends early as ZeroQ's does.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from zsq_deploy.calib.parts.bn_loss import BNLoss
from zsq_deploy.calib.parts.labels import uniform
from zsq_deploy.calib.parts.parametrisations import pixels
from zsq_deploy.calib.parts.recipe import Group, Recipe
from zsq_deploy.calib.parts.schedules import EarlyStop, Plateau
from zsq_deploy.calib.parts.slack import noise_slack
from zsq_deploy.calib.parts.terms import CrossEntropy, GramSpectrum, PixelNorm, Term, TotalVariation

__all__ = ["DEFAULTS", "loss", "recipe"]

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "steps": 200,
        "rate": 0.5,
        "patience": 20,
        "batch_size": 64,
        "slack": 0.9,
        "noise": 64,
        "emphasis": True,
        "label_weight": 0.0,
        "smooth_weight": 0.0,
        "size_weight": 0.0,
        "variety_weight": 0.0,
        "stop_patience": 50,
        "stop_threshold": 0.02,
        "clip": True,
    }
)


def loss(slack: float, *, emphasis: bool) -> BNLoss:
    """Form B1f of the batch-norm-statistics loss."""
    return BNLoss(
        hook="bn_in",
        per_sample=True,
        moment="std",
        unbiased=True,
        norm="hinge",
        divide_by="batch",
        eps=1e-6,
        reduce="sum",
        input_prior=True,
        slack_quantile=slack,
        emphasis=emphasis,
    )


def recipe(parameters: Mapping[str, Any]) -> Recipe:
    """DSG with resolved `parameters` (see :data:`DEFAULTS`)."""
    form = loss(parameters["slack"], emphasis=parameters["emphasis"])
    offered: tuple[Term, ...] = (
        CrossEntropy(parameters["label_weight"]),
        TotalVariation(parameters["smooth_weight"]),
        PixelNorm(parameters["size_weight"], of="image"),
        GramSpectrum(parameters["variety_weight"]),
    )
    stop = EarlyStop(parameters["stop_patience"], parameters["stop_threshold"]) if parameters["stop_patience"] else None
    return Recipe(
        loss=form,
        terms=tuple(term for term in offered if term.weight),
        targets=uniform if parameters["label_weight"] else None,
        prepare=noise_slack(form, parameters["noise"]),
        parametrise=pixels,
        groups={"images": Group(parameters["rate"], schedule=Plateau(parameters["patience"], 0.1, 1e-4))},
        steps=parameters["steps"],
        batch_size=parameters["batch_size"],
        stop=stop,
        clip=parameters["clip"],
    )
