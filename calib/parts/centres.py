"""Calibration centres: one image of every class, and the batch-norm statistics that they leave together (TexQ, SynQ)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from zsq_deploy.calib.parts.labels import LabelSpace, Targets
from zsq_deploy.calib.parts.moments import reduced_axes
from zsq_deploy.calib.parts.parametrisations import Pixels, Start
from zsq_deploy.calib.parts.recipe import Preparation

__all__ = ["ClassPixels", "centre_statistics", "one_each"]

_AT_A_TIME = 64


class ClassPixels(Pixels):
    """Pixels that start as noise, each image with the class of its place in the set.

    Args:
        start: What they start from.
        most: Most classes that get an image; fewer than there are: evenly spaced ones.

    Attributes:
        targets: Image i of the set is asked to be class i, beginning again behind the last class.
    """

    def __init__(self, start: Start, most: int) -> None:
        super().__init__(start.shape, start.generator, start.device)
        assert start.labels is not None
        chosen = one_each(most)(0, start.labels)
        place = (torch.arange(start.shape[0]) + start.offset) % chosen
        self.targets = Targets((place * start.labels.classes // chosen).to(start.device))


def one_each(most: int) -> Callable[[int, LabelSpace | None], int]:
    """For `Recipe.images`: one image a class, of at most so many classes."""

    def count(_asked: int, labels: LabelSpace | None) -> int:
        assert labels is not None
        return min(labels.classes, max(1, most))

    return count


def centre_statistics(preparation: Preparation) -> dict[str, Tensor]:
    """For `Recipe.prepare`: mean and (biased) variance that the images of the stage before have together in front of each batch norm.

    Returns:
        ``centre.mean.I`` and ``centre.var.I`` [C], float64, for layer I of the synthesis network.
    """
    from zsq_deploy.model import Twin

    context = preparation.context
    twin = Twin(context.model.graph, dtype=context.dtype, device=context.device)
    layers = context.network.layers
    names = tuple(dict.fromkeys(layer.value for layer in layers))
    # Sums about the stored mean: nothing cancels where the mean is large against the spread.
    centre = {layer.value: torch.as_tensor(layer.mean, dtype=torch.float64, device=context.device) for layer in layers}
    count, first, second = dict.fromkeys(names, 0), dict[str, Tensor](), dict[str, Tensor]()
    with torch.no_grad():
        for batch in preparation.previous:
            images = batch["images"]
            for piece in torch.split(images, _piece(preparation, len(images))):
                for name, value in twin.run({context.spec.name: piece.to(context.device)}, fetch=names).items():
                    x = value.double() - centre[name].view(1, -1, *(1,) * (value.dim() - 2))
                    axes = reduced_axes(value.dim(), False)
                    first[name] = first.get(name, 0) + x.sum(axes)
                    second[name] = second.get(name, 0) + x.square().sum(axes)
                    count[name] += value.numel() // value.shape[1]
    made: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        mean = first[layer.value] / count[layer.value]
        made[f"centre.mean.{index}"] = mean + centre[layer.value]
        made[f"centre.var.{index}"] = second[layer.value] / count[layer.value] - mean.square()
    return made


def _piece(preparation: Preparation, count: int) -> int:
    """Images at a time: a few, or what a network with one batch size takes."""
    model = preparation.context.model
    return min(_AT_A_TIME, count) if model.dynamic_batch else int(preparation.context.spec.shape[0] or 1)


def targets_of(prepared: Mapping[str, Tensor], index: int) -> tuple[Tensor, Tensor]:
    """Mean and variance that :func:`centre_statistics` left for a layer."""
    return prepared[f"centre.mean.{index}"], prepared[f"centre.var.{index}"]
