"""The methods that make calibration images, by name. One short file a paper; adding one is adding a file and a row here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from zsq_deploy.calib.baselines import Baseline, gaussian, ones, uniform
from zsq_deploy.calib.fractal import fractal
from zsq_deploy.calib.methods import (
    deepinversion,
    dgh,
    dsg,
    fast,
    genie,
    hast,
    intraq,
    kw,
    mixmix,
    sadag,
    synq,
    texq,
    zeroq,
)
from zsq_deploy.calib.parts.recipe import Recipe

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """One way to come by calibration images.

    Attributes:
        name: What the user calls it.
        summary: One line for a list.
        paper: Where it was published.
        needs_bn: It lives on batch-norm statistics.
        images: It makes images; the others give ranges only, or take what the user hands over.
        defaults: Its parameters with their default values.
        run: For methods that optimise images: makes the recipe, or one recipe a stage, from resolved parameters.
        baseline: For methods that draw images without looking at the network.
        fallback: What is used for a network without batch-norm statistics.
        several_networks: It can make images that fit several networks at once.
        pictures: It takes inputs of shape [N, C, H, W] only.
    """

    name: str
    summary: str
    paper: str
    needs_bn: bool = False
    images: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)
    run: Callable[[Mapping[str, Any]], Recipe | Sequence[Recipe]] | None = None
    baseline: Baseline | None = None
    fallback: str | None = None
    several_networks: bool = False
    pictures: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "defaults", MappingProxyType(dict(self.defaults)))


_ALL = (
    Method(
        "zeroq",
        "pixels optimised until every batch-norm layer sees the statistics it was trained on, image by image",
        "Cai et al., ZeroQ, CVPR 2020, arXiv 2001.00281",
        needs_bn=True,
        defaults=zeroq.DEFAULTS,
        run=zeroq.recipe,
        fallback="fractal",
    ),
    Method(
        "genie",
        "latents and a generator optimised towards the batch-norm statistics, with swing convolution",
        "Jeon et al., Genie, CVPR 2023, arXiv 2212.04780",
        needs_bn=True,
        defaults=genie.DEFAULTS,
        run=genie.recipe,
        fallback="fractal",
        pictures=True,
    ),
    Method(
        "deepinversion",
        "pixels optimised until the network sees a class in a smooth image with the batch's statistics as stored",
        "Yin et al., DeepInversion, CVPR 2020, arXiv 1912.08795",
        needs_bn=True,
        defaults=deepinversion.DEFAULTS,
        run=deepinversion.recipe,
        fallback="fractal",
        pictures=True,
    ),
    Method(
        "kw",
        "pixels optimised until every batch norm sees a Gaussian near the stored one, with a class and smoothness",
        "Haroush et al., The Knowledge Within, CVPR 2020, arXiv 1912.01274",
        needs_bn=True,
        defaults=kw.DEFAULTS,
        run=kw.recipe,
        fallback="fractal",
        pictures=True,
    ),
    Method(
        "dsg",
        "ZeroQ with slack: gaps that noise has too are forgiven, and every image stresses another layer",
        "Zhang et al., DSG, CVPR 2021, arXiv 2103.01049",
        needs_bn=True,
        defaults=dsg.DEFAULTS,
        run=dsg.recipe,
        fallback="fractal",
    ),
    Method(
        "intraq",
        "pixels optimised for variety within a class: random crops, soft labels, distance from the class's centre",
        "Zhong et al., IntraQ, CVPR 2022, arXiv 2111.09136",
        needs_bn=True,
        defaults=intraq.DEFAULTS,
        run=intraq.recipe,
        fallback="fractal",
        pictures=True,
    ),
    Method(
        "hast",
        "pixels optimised for a class, with most weight on the images that the network finds hard",
        "Li et al., HAST, CVPR 2023, arXiv 2303.13826",
        needs_bn=True,
        defaults=hast.DEFAULTS,
        run=hast.recipe,
        fallback="fractal",
    ),
    Method(
        "mixmix",
        "pixels optimised while images are pasted into each other with mixed classes, for one network or several",
        "Li et al., MixMix, ICCV 2021, arXiv 2011.09899",
        needs_bn=True,
        defaults=mixmix.DEFAULTS,
        run=mixmix.recipe,
        fallback="fractal",
        pictures=True,
        several_networks=True,
    ),
    Method(
        "texq",
        "a generator of images by class, led by the statistics of one image a class with calibrated textures",
        "Chen et al., TexQ, NeurIPS 2023",
        needs_bn=True,
        defaults=texq.DEFAULTS,
        run=texq.recipe,
        fallback="fractal",
        pictures=True,
    ),
    Method(
        "synq",
        "hard images as HAST's, also led by the statistics of one image a class, and low-pass filtered",
        "Kim et al., SynQ, ICLR 2025",
        needs_bn=True,
        defaults=synq.DEFAULTS,
        run=synq.recipe,
        fallback="fractal",
        pictures=True,
    ),
    Method(
        "sadag",
        "Genie's latents and generators, refined until neighbouring images teach a quantized student the same",
        "Dung et al., SADAG, ICML 2024, arXiv 2510.07018",
        needs_bn=True,
        defaults=sadag.DEFAULTS,
        run=sadag.recipe,
        fallback="fractal",
        pictures=True,
    ),
    Method(
        "dgh",
        "smoothed pixels optimised until all images together have the stored statistics, each free to differ",
        "Dikstein et al., Data Generation for Hardware-Friendly PTQ, WACV 2025",
        needs_bn=True,
        defaults=dgh.DEFAULTS,
        run=dgh.recipe,
        fallback="fractal",
        pictures=True,
    ),
    Method(
        "fast",
        "structured pictures, moved in a few steps until all together have the stored statistics",
        "composed of parts of the others, for quality a second",
        needs_bn=True,
        defaults=fast.DEFAULTS,
        run=fast.recipe,
        fallback="fractal",
        pictures=True,
    ),
    Method("gaussian", "N(0, 1) noise in the network's input space", "baseline", baseline=gaussian),
    Method("uniform", "noise, uniform over the valid pixel values", "baseline", baseline=uniform),
    Method("ones", "all ones: what an engineer in a hurry feeds", "baseline", baseline=ones),
    Method(
        "fractal",
        "coloured fractals and textures composed into pictures; knows nothing of the network",
        "after Takashima et al., Visual Atoms, CVPR 2023, arXiv 2303.01112, and iterated function systems",
        baseline=fractal,
    ),
    Method(
        "bn-analytic",
        "activation ranges computed from batch-norm parameters; no images",
        "after Nagel et al., DFQ, ICCV 2019, arXiv 1906.04721",
        needs_bn=True,
        images=False,
    ),
    Method("real", "your own images, as a baseline for comparison", "baseline", images=False),
)

#: All methods by name.
METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ALL})
