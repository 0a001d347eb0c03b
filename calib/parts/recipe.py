"""A synthesis paper as a value: what is optimised, towards what, with which steps, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from zsq_deploy.calib.parts.augment import Augment
from zsq_deploy.calib.parts.bn_loss import BNLoss
from zsq_deploy.calib.parts.labels import LabelSpace, TargetRule, Targets
from zsq_deploy.calib.parts.parametrisations import Parametrisation, Start
from zsq_deploy.calib.parts.schedules import Constant, EarlyStop, Schedule
from zsq_deploy.calib.parts.terms.base import Context, Term, describe_value
from zsq_deploy.errors import UsageError
from zsq_deploy.progress import SILENT, Progress

__all__ = ["Finished", "Group", "Preparation", "Recipe", "describe", "resolve", "stages"]


@dataclass(frozen=True)
class Group:
    """How one group of parameters is moved.

    Attributes:
        rate: Step size at the start.
        betas: The optimiser's two decay rates.
        schedule: How the step size goes on.
        optimiser: ``adam``, or ``radam`` (Liu et al., ICLR 2020, arXiv 1908.03265).
    """

    rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Schedule = field(default_factory=Constant)
    optimiser: Literal["adam", "radam"] = "adam"


@dataclass(frozen=True)
class Preparation:
    """What a recipe's `prepare` may use, once, before its first batch.

    Attributes:
        context: The network, without anything prepared.
        images: How many images the run is to make.
        batch_size: Most of them in one batch.
        previous: The finished batches of the stage before, each with ``images`` [n, C, ...] in the network's input space and
            ``parameters.*`` (what its parametrisation's ``state`` gave); empty in the first stage.
        progress: Where to report.
    """

    context: Context
    images: int
    batch_size: int
    previous: Sequence[Mapping[str, Tensor]] = ()
    progress: Progress = SILENT


@dataclass(frozen=True)
class Finished:
    """A finished batch, as a recipe's `remember` sees it.

    Attributes:
        images: In the network's input space, on the device [n, C, ...].
        targets: What they were asked to be.
        memory: What earlier batches left.
        values: Computes values of the network for these images, by name, without gradients.
        context: The network, whose value names `values` takes.
    """

    images: Tensor
    targets: Targets | None
    memory: Mapping[str, Tensor]
    values: Callable[[Sequence[str]], Mapping[str, Tensor]]
    context: Context


@dataclass(frozen=True)
class Recipe:
    """One way to make images from a network, or one stage of it.

    Attributes:
        loss: The batch-norm-statistics loss; ``None``: none. With a `loss_weight` of 0 the statistics are taken for the terms to see.
        parametrise: Makes the parameters of a batch.
        groups: Optimiser settings per parameter group.
        steps: Most steps per batch; 0: the parameters give the images as they are (a trained generator).
        batch_size: Images that are made together.
        stop: When to stop before `steps`; ``None``: never.
        clip: Keep images within the bounds of valid pixels.
        clip_seen: Instead, bring what the network is given within them, with the gradient as if it were not, and leave the parameters alone.
        swing: Reach of swing convolution in pixels; 0: off.
        loss_weight: Weight of the batch-norm-statistics loss.
        terms: Further parts of the loss.
        augment: Changes of the images in front of the network, in this order.
        targets: What the images of a batch are asked to be; ``None``: nothing.
        prepare: What is computed once before the first batch; terms find it in their context, parameters in their start.
        remember: What a finished batch leaves to the later ones; terms find it in every look. Batches then depend on their order.
        images: Images that this stage makes, from those asked for and the network's classes; ``None``: those asked for.
        piece: Images that are worked through at a time, each piece beside the remembered moments of the others, so that statistics are those of
            the whole batch and memory is that of a piece (see :mod:`~zsq_deploy.calib.parts.all_images`); 0: off.
        passes: Runs of the network over a batch whose activations are kept at once, if a later stage keeps more of them than this one.
        follows: Make the batches of the stage before again, image by image, instead of cutting anew.
        single: Make one batch of `batch_size` images, or of as many as fit, whatever was asked for (it trains a generator).
    """

    loss: BNLoss | None
    parametrise: Callable[[Start], Parametrisation]
    groups: Mapping[str, Group]
    steps: int
    batch_size: int
    stop: EarlyStop | None = None
    clip: bool = True
    clip_seen: bool = False
    swing: int = 0
    loss_weight: float = 1.0
    terms: tuple[Term, ...] = ()
    augment: tuple[Augment, ...] = ()
    targets: TargetRule | None = None
    prepare: Callable[[Preparation], Mapping[str, Tensor]] | None = None
    remember: Callable[[Finished], Mapping[str, Tensor]] | None = None
    images: Callable[[int, LabelSpace | None], int] | None = None
    piece: int = 0
    passes: int = 1
    follows: bool = False
    single: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", MappingProxyType(dict(self.groups)))
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names) or {"loss", "mean", "spread", "input"} & set(names):
            raise ValueError(f"the names of a recipe's terms have to differ: {names}")
        if self.loss is None and not self.terms and self.steps:
            raise ValueError("a recipe needs something to optimise")
        if self.piece:
            sums = all(term.separable for term in self.terms) and not self._mixes
            if self.loss is None or self.loss.per_sample or self.loss.unbiased or not sums:
                raise ValueError(
                    "pieces beside remembered moments need (biased) statistics of the batch, and terms that are sums over images"
                )

    @property
    def separable(self) -> bool:
        """Whether the loss is a sum over images, so that a batch can be worked through in pieces with the same result."""
        sums = (self.loss is None or self.loss.separable) and all(term.separable for term in self.terms)
        return sums and not self._mixes

    @property
    def _mixes(self) -> bool:
        """Whether an augmentation puts one image of the batch into another."""
        return any(hasattr(augment, "mix") for augment in self.augment)

    @property
    def needs_labels(self) -> bool:
        """Whether the network has to be a classifier."""
        return self.targets is not None or any(term.needs_labels for term in self.terms)


def stages(made: Recipe | Sequence[Recipe]) -> tuple[Recipe, ...]:
    """The stages of a method, one or several."""
    return (made,) if isinstance(made, Recipe) else tuple(made)


def resolve(method: str, defaults: Mapping[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """A method's parameters: its defaults, with what the user gave on top.

    Raises:
        UsageError: A name is unknown, or a value has the wrong type.
    """
    resolved = dict(defaults)
    for name, value in (given or {}).items():
        if name not in resolved:
            raise UsageError(
                f"method {method!r} has no parameter {name!r}",
                where=name,
                remedy=f"its parameters are {', '.join(sorted(resolved))}" if resolved else "it has no parameters",
            )
        resolved[name] = _cast(method, name, value, resolved[name])
    return resolved


def _cast(method: str, name: str, value: Any, default: Any) -> Any:
    wanted = type(default)
    ok = isinstance(value, wanted) and not (isinstance(value, bool) and wanted is not bool)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not ok:
        raise UsageError(
            f"parameter {name!r} of method {method!r} has to be {wanted.__name__}, not {value!r}",
            where=name,
            remedy=f"the default is {default!r}",
        )
    return value


def describe(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe as plain values, for a manifest."""
    described: dict[str, Any] = {
        "loss": None if recipe.loss is None else recipe.loss.as_parameters(),
        "groups": {
            name: {
                "rate": group.rate,
                "betas": list(group.betas),
                "optimiser": group.optimiser,
                "schedule": {
                    **describe_value(group.schedule),
                    "kind": type(group.schedule).__name__.lower(),
                },
            }
            for name, group in recipe.groups.items()
        },
        "early_stop": None
        if recipe.stop is None
        else {name: value for name, value in describe_value(recipe.stop).items() if name != "kind"},
    }
    if recipe.terms:
        described["loss_weight"] = recipe.loss_weight
        described["terms"] = describe_value(recipe.terms)
    if recipe.augment:
        described["augment"] = describe_value(recipe.augment)
    if recipe.targets is not None:
        described["targets"] = describe_value(recipe.targets)
    return described
