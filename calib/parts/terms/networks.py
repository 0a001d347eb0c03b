"""The same images for several networks at once (MixMix)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from zsq_deploy.calib.parts.bn_loss import BNLoss, BNMatcher, Observed
from zsq_deploy.calib.parts.labels import LabelSpace, Targets, find_labels
from zsq_deploy.calib.parts.network import prepare
from zsq_deploy.calib.parts.priors import InputSpace
from zsq_deploy.calib.parts.terms.base import BoundTerm, Context, Look
from zsq_deploy.errors import CalibrationError
from zsq_deploy.model import Model, Twin

__all__ = ["Zoo"]


class _Member:
    """A further network: what it makes of images, as the losses need it."""

    def __init__(self, model: Model, context: Context, loss: BNLoss) -> None:
        labels = find_labels(model.graph, model.outputs)
        problem = _unfit(model, labels, context)
        if problem is not None:
            raise CalibrationError(
                f"network {model.name!r} cannot share images with {context.model.name!r}: {problem}",
                where="others",
                remedy="leave it away, or give one that was trained for the same classes on images of the same size, with batch norm",
            )
        assert labels is not None
        self.scores, self._input = labels.value, model.inputs[0].name
        self._space = InputSpace.of(model.inputs[0], model.preprocess, context.device)
        network = prepare(model)
        self._twin = Twin(network.graph, dtype=context.dtype, device=context.device)
        self.matcher = BNMatcher(
            loss,
            network.layers,
            device=context.device,
            dtype=context.dtype,
            affine=network.affine,
            bounds=network.bounds,
            joins=network.joins,
            owned=network.owned,
        )

    def look(self, images: Tensor) -> tuple[Tensor, dict[str, Observed]]:
        """Class scores, and moments at the batch norms, for images in standard space."""
        store: dict[str, Observed] = {}
        feeds = {self._input: self._space.to_network(images)}
        return self._twin.run(feeds, fetch=(self.scores,), taps=self.matcher.taps(store))[self.scores], store


def _unfit(model: Model, labels: LabelSpace | None, context: Context) -> str | None:
    """Why a network cannot be shown the same images and classes."""
    if len(model.inputs) != 1 or tuple(model.inputs[0].shape[1:]) != tuple(context.spec.shape[1:]):
        shapes = ", ".join(str(list(spec.shape)) for spec in model.inputs)
        return f"its input is {shapes}, not {list(context.spec.shape)}"
    if labels is None:
        return "it is no classifier"
    if context.labels is None or labels.classes != context.labels.classes:
        return f"it knows {labels.classes} classes, not {context.labels.classes if context.labels else 'any'}"
    if not model.batch_norms():
        return "it holds no batch-norm statistics"
    return None


@dataclass(frozen=True)
class _Bound:
    """The term with all networks."""

    term: Zoo
    scores: str
    matcher: BNMatcher
    members: tuple[_Member, ...]

    @property
    def fetch(self) -> Sequence[str]:
        """The first network's class scores."""
        return (self.scores,)

    def _loss(self, matcher: BNMatcher, observed: dict[str, Observed], scores: Tensor, look: Look) -> Tensor:
        assert look.targets is not None
        return self.term.bn_weight * matcher(
            observed, batch=look.batch
        ).total + self.term.label_weight * _cross_entropy(scores, look.targets)

    def __call__(self, look: Look) -> Tensor:
        """The mean over networks."""
        total = self._loss(self.matcher, dict(look.observed), look.values[self.scores], look)
        for member in self.members:
            scores, observed = member.look(look.seen)
            total = total + self._loss(member.matcher, observed, scores, look)
        return total / (1 + len(self.members))


def _cross_entropy(scores: Tensor, targets: Targets) -> Tensor:
    scores = scores.flatten(1)
    return F.cross_entropy(scores, targets.probabilities(scores.shape[1]).to(scores))


@dataclass(frozen=True)
class Zoo:
    """Batch-norm statistics and classes for several networks that see the same images, mean over networks (MixMix's feature mixing).

    The first network is the one of the recipe, whose batch-norm loss (with a `loss_weight` of 0) takes the statistics; the others are those of
    ``synthesize(others=...)``. None of them is fine: then it is the first one's loss.

    Attributes:
        loss: The batch-norm-statistics loss, the recipe's own; over the batch.
        bn_weight: Its weight.
        label_weight: Weight of the cross entropy of the (mixed) classes.
        weight: Weight of all.
    """

    loss: BNLoss
    bn_weight: float = 1.0
    label_weight: float = 1.0
    weight: float = 1.0
    name: str = "networks"
    separable: bool = False
    needs_labels: bool = True

    def bind(self, context: Context) -> BoundTerm:
        """The term with the networks of the context.

        Raises:
            CalibrationError: One of them has another input, other classes or no batch norm.
        """
        assert context.labels is not None
        matcher = BNMatcher(self.loss, context.network.layers, device=context.device, dtype=context.dtype)
        members = tuple(_Member(model, context, self.loss) for model in context.others)
        return _Bound(self, context.labels.value, matcher, members)
