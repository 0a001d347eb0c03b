"""Losses of synthesis papers as one writes them down: hooked inputs of batch norms, `torch.var`, one image after the other where images differ.

Nothing of the parts under test is used, but for the random choices of a step, which both sides have to share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Answer = tuple[Tensor, Tensor]
"""What the student's last weights read [N, F], and the teacher's minus its class scores [N, C]."""


@dataclass(frozen=True)
class Given:
    """What a loss is computed from.

    Attributes:
        norms: Batch norms, in order.
        entered: What entered each of them.
        images: The pixels.
        seen: What the network was given.
        scores: Class scores.
        features: What the last weights read.
        classes: What the images are asked to be.
        soft: The probabilities they are asked for.
        memory: What earlier batches left.
        slack: What each layer is forgiven, for DSG.
        options: The method's parameters.
        centre: Mean and variance of the calibration centre at each layer, for TexQ and SynQ.
        neighbours: For SADAG, from an answer to what student and teacher make of the neighbours; see :func:`sadag`.
        answer: What they make of the images.
    """

    norms: Sequence[nn.BatchNorm2d]
    entered: Sequence[Tensor]
    images: Tensor
    seen: Tensor
    scores: Tensor
    features: Tensor
    classes: Tensor | None
    soft: Tensor | None
    memory: Mapping[str, Tensor]
    slack: Tensor | None
    options: Mapping[str, Any]
    centre: Sequence[tuple[Tensor, Tensor]] = ()
    neighbours: Callable[[Answer], Answer] | None = None
    answer: Callable[[Tensor, Tensor], Answer] | None = None

    @property
    def entropy(self) -> Tensor:
        """Cross entropy of each image's class."""
        assert self.classes is not None
        return F.cross_entropy(self.scores, self.classes, reduction="none")

    @property
    def own(self) -> Tensor:
        """Probability of each image's class."""
        assert self.classes is not None
        return F.softmax(self.scores, 1).gather(1, self.classes[:, None])[:, 0]


def _running(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _each_image(given: Given, gap: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """The input's own distance, and `gap` of mean and standard deviation of each image at each layer."""
    x = given.images
    total = x.mean((2, 3)).square().sum() + ((x.var((2, 3)) + 1e-6).sqrt() - 1).square().sum()
    total = total / len(x)
    for layer, (norm, z) in enumerate(zip(given.norms, given.entered, strict=True)):
        mean, var = _running(norm)
        total = total + gap(layer, z.mean((2, 3)) - mean, (z.var((2, 3)) + 1e-6).sqrt() - (var + 1e-6).sqrt())
    return total


def zeroq(given: Given) -> Tensor:
    """Cai et al., CVPR 2020."""
    return _each_image(given, lambda _, a, b: (a.square().sum() + b.square().sum()) / a.shape[1])


def genie(given: Given) -> Tensor:
    """Jeon et al., CVPR 2023."""
    x = given.images
    total = x.mean((2, 3)).square().sum() + ((x.var((2, 3)) + 1e-6).sqrt() - 1).square().sum()
    for norm, z in zip(given.norms, given.entered, strict=True):
        mean, var = _running(norm)
        std = (z.var((0, 2, 3)) + 1e-6).sqrt() - (var + 1e-6).sqrt()
        total = total + ((z.mean((0, 2, 3)) - mean).square().sum() + std.square().sum()) / z.shape[1]
    return total


def dsg(given: Given) -> Tensor:
    """Zhang et al., CVPR 2021, without the parts of the later version."""
    layers = len(given.norms)

    def gap(layer: int, a: Tensor, b: Tensor) -> Tensor:
        assert given.slack is not None
        weight = torch.ones(len(a), 1)
        weight[layer::layers] = 2
        mean, std = given.slack[layer]
        over = (a.abs() - mean).clamp_min(0).square() + (b.abs() - std).clamp_min(0).square()
        return (weight * over).sum() / len(a)

    return _each_image(given, gap)


def _batch_moments(given: Given) -> list[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
    """Mean and biased variance over the batch, the stored ones, and the epsilon of each layer."""
    return [
        (z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False), *_running(norm), norm.eps)
        for norm, z in zip(given.norms, given.entered, strict=True)
    ]


def kw(given: Given) -> Tensor:
    """Haroush et al., CVPR 2020."""
    parts = []
    for mean, var, stored_mean, stored_var, eps in _batch_moments(given):
        var, stored_var = var + eps, stored_var + eps
        gap = (mean - stored_mean).square()
        parts.append((((stored_var / var).log() + (var + gap) / stored_var - 1) / 2).mean())
    x, sigma = given.images, given.options["sigma"]
    reach = int(-(-3 * sigma // 1))
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    soft = F.conv2d(padded, kernel.expand(x.shape[1], 1, -1, -1), groups=x.shape[1])
    smooth = (x - soft).square().mean()
    weights = given.options
    total = torch.stack(parts).mean() + weights["smooth_weight"] * smooth
    return total + weights["label_weight"] * given.entropy.mean()


def _squares(given: Given) -> Tensor:
    """Mean squares of both gaps, mean over layers (GDFQ and its descendants)."""
    parts = [F.mse_loss(m, a) + F.mse_loss(v, b) for m, v, a, b, _ in _batch_moments(given)]
    return torch.stack(parts).mean()


def intraq(given: Given) -> Tensor:
    """Zhong et al., CVPR 2022."""
    assert given.classes is not None
    assert given.soft is not None
    count = given.memory["feature_count"][given.classes]
    centres = (given.memory["feature_sum"][given.classes] / count.clamp_min(1)[:, None]).to(given.features)
    distance = 1 - F.cosine_similarity(given.features, centres, eps=1e-6)
    lower, upper = given.options["lower"], given.options["upper"]
    hinges = (lower - distance).clamp_min(0) + (distance - upper).clamp_min(0)
    asked = given.soft.gather(1, given.classes[:, None])[:, 0]
    known = (count > 0).float()
    return _squares(given) + (given.own - asked).square().mean() + (hinges * known).sum() / known.sum().clamp_min(1)


def hast(given: Given) -> Tensor:
    """Li et al., CVPR 2023."""
    focused = (1 - given.own).pow(given.options["focus"]) * given.entropy
    return _squares(given) + given.options["label_weight"] * focused.mean()


def _plain_norms(given: Given) -> Tensor:
    """Plain norms of both gaps, summed over layers, the first ten times."""
    matched = torch.zeros(())
    for layer, (mean, var, stored_mean, stored_var, _) in enumerate(_batch_moments(given)):
        unit = stored_var.mean() if given.options["relative"] else torch.ones(())
        gap = (mean - stored_mean).norm() / unit.sqrt() + (var - stored_var).norm() / unit
        matched = matched + (10 if layer == 0 else 1) * gap
    return matched


def _variation(x: Tensor) -> Tensor:
    """Plain norms of the differences to four neighbours."""
    steps = (x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1])
    across = (x[..., 1:, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, 1:])
    return torch.stack([d.norm() for d in (*steps, *across)]).sum()


def deepinversion(given: Given) -> Tensor:
    """Yin et al., CVPR 2020."""
    size = given.seen.flatten(1).norm(dim=1).mean()
    weights = [given.options[f"{name}_weight"] for name in ("bn", "label", "smooth", "size")]
    parts = (_plain_norms(given), given.entropy.mean(), _variation(given.seen), size)
    return sum((w * p for w, p in zip(weights, parts, strict=True)), given.seen.new_zeros(()))


def _whole(given: Given, *, relative: bool) -> Tensor:
    """Means and standard deviations over all images, what the network is given being one more layer of mean 0 and deviation 1."""
    channels = given.seen.shape[1]
    wanted = [(torch.zeros(channels), torch.ones(channels)), *(_running(norm) for norm in given.norms)]
    parts = []
    for z, (mean, var) in zip((given.seen, *given.entered), wanted, strict=True):
        unit = var.mean().sqrt() if relative else torch.ones(())
        a = (z.mean((0, 2, 3)) - mean) / unit
        b = ((z.var((0, 2, 3), unbiased=False) + 1e-6).sqrt() - (var + 1e-6).sqrt()) / unit
        parts.append((a.square().sum() + b.square().sum()) / len(mean))
    return torch.stack(parts).mean()


def fast(given: Given) -> Tensor:
    """This project's preset."""
    return _whole(given, relative=True)


def dgh(given: Given) -> Tensor:
    """Dikstein et al., WACV 2025, over all images at once."""
    decided = (given.scores.amax(1) - given.scores.amin(1)).mean()
    return _whole(given, relative=False) - given.options["output_weight"] * decided


def mixmix(given: Given) -> Tensor:
    """Li et al., ICCV 2021, with one network."""
    assert given.soft is not None
    known = given.options["bn_weight"] * _plain_norms(given)
    named = given.options["label_weight"] * F.cross_entropy(given.scores, given.soft)
    size = given.seen.flatten(1).norm(dim=1).mean()
    return known + named + given.options["smooth_weight"] * _variation(given.seen) + given.options["size_weight"] * size


def _to_centre(given: Given) -> Tensor:
    """Mean squares of both gaps to the centre in the deeper half, over the number of all layers."""
    layers = len(given.norms)
    parts = [
        F.mse_loss(moments[0], a) + F.mse_loss(moments[1], b)
        for layer, (moments, (a, b)) in enumerate(zip(_batch_moments(given), given.centre, strict=True))
        if layer >= layers // 2
    ]
    return torch.stack(parts).sum() / layers


def texq(given: Given) -> Tensor:
    """Chen et al., NeurIPS 2023: what its generator is trained with."""
    weights = given.options
    total = weights["bn_weight"] * _squares(given) + weights["label_weight"] * given.entropy.mean()
    return total + weights["centre_weight"] * _to_centre(given)


def synq(given: Given) -> Tensor:
    """Kim et al., ICLR 2025: what its images are made with."""
    weights = given.options
    focused = (1 - given.own).pow(weights["focus"]) * given.entropy
    total = weights["bn_weight"] * _squares(given) + weights["label_weight"] * focused.mean()
    return total + weights["centre_weight"] * _to_centre(given) / len(given.images)


def sadag(given: Given) -> Tensor:
    """Dung et al., ICML 2024: what its images are refined with."""
    assert given.answer is not None
    assert given.neighbours is not None
    known = genie(given)
    here = given.answer(given.images, given.scores)
    there = given.neighbours(here)
    alike = F.cosine_similarity(here[0], there[0]) * F.cosine_similarity(here[1], there[1])
    f, r = F.normalize(here[0], dim=1), F.normalize(here[1], dim=1)
    agreement = ((f @ f.detach().T) * (r @ r.detach().T)).abs()
    closest = agreement.masked_fill(torch.eye(len(f), dtype=torch.bool), 0).amax(1)
    total = known + given.options["match_weight"] * (1 - alike.mean())
    return total + given.options["diversity_weight"] * closest.mean()


LOSSES: Mapping[str, Callable[[Given], Tensor]] = {
    "zeroq": zeroq,
    "genie": genie,
    "kw": kw,
    "dsg": dsg,
    "intraq": intraq,
    "hast": hast,
    "deepinversion": deepinversion,
    "fast": fast,
    "dgh": dgh,
    "mixmix": mixmix,
    "texq": texq,
    "synq": synq,
    "sadag": sadag,
}


def augmented(images: Tensor, plans: Sequence[Mapping[str, Tensor]], options: Mapping[str, Any]) -> Tensor:
    """The images changed as the choices of a step say: the batch where all are changed alike, else image by image."""
    for plan in plans:
        if "partner" in plan:
            images = _pasted(images, plan)
        elif "box" in plan:
            images = _cropped(images, plan)
        elif "shift" in plan:
            images = torch.roll(images, plan["shift"][0].tolist(), (2, 3))
        elif "window" in plan:
            images = _window(images, plan, options["smoothing"])
        elif "mirror" in plan:
            mirror = plan["mirror"]
            if bool(mirror.all()) or not bool(mirror.any()):
                images = images.flip(3) if bool(mirror.all()) else images
            else:
                images = torch.stack([x.flip(2) if bool(m) else x for x, m in zip(images, mirror, strict=True)])
    return images


def _cropped(images: Tensor, plan: Mapping[str, Tensor]) -> Tensor:
    """A box of each image, enlarged, and mirrored where asked."""
    if not bool(plan["cropped"].any()):
        return images
    made = []
    for image, (top, left, tall, wide), mirrored in zip(images, plan["box"].tolist(), plan["mirror"], strict=True):
        part = image[None, :, top : top + tall, left : left + wide]
        part = F.interpolate(part, images.shape[2:], mode="bilinear", align_corners=False)
        made.append(part.flip(3) if bool(mirrored) else part)
    return torch.cat(made)


def _pasted(images: Tensor, plan: Mapping[str, Tensor]) -> Tensor:
    """Each image's partner, made smaller, in a box of it."""
    if not bool((plan["area"] > 0).any()):
        return images
    made = []
    for image, partner, (top, left, tall, wide) in zip(images, plan["partner"], plan["box"].tolist(), strict=True):
        small = F.interpolate(images[partner][None], (tall, wide), mode="bilinear", align_corners=False)
        image = image.clone()
        image[:, top : top + tall, left : left + wide] = small[0]
        made.append(image)
    return torch.stack(made)


def _window(images: Tensor, plan: Mapping[str, Tensor], sigma: float) -> Tensor:
    """A window of the smoothed images, the same for all."""
    line = torch.exp(-0.5 * (torch.arange(-1.0, 2.0) / sigma) ** 2)
    kernel = torch.outer(line, line) / line.sum() ** 2
    channels = images.shape[1]
    smooth = F.conv2d(images, kernel.expand(channels, 1, 3, 3), padding=1, groups=channels)
    top, left, tall, wide = plan["window"][0].tolist()
    return smooth[:, :, top : top + tall, left : left + wide]
