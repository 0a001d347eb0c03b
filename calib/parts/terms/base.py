"""What a loss term is: a frozen value with a weight that is bound to a network and then looks at every step.

A paper's loss is the batch-norm-statistics loss (which has a fast path of its own, see :mod:`zsq_deploy.calib.parts.bn_loss`) plus a sum of
terms. A term says which values of the network it wants to see and whether it is a sum over images; the engine hands it what one step saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from zsq_deploy.calib.parts.bn_loss import Observed
from zsq_deploy.calib.parts.labels import LabelSpace, Targets
from zsq_deploy.calib.parts.network import SynthesisNetwork
from zsq_deploy.calib.parts.parametrisations import Parametrisation
from zsq_deploy.calib.parts.priors import InputSpace
from zsq_deploy.model import Model
from zsq_deploy.model.graph import TensorSpec

__all__ = ["BoundTerm", "Context", "Look", "Term", "describe_value"]


@dataclass(frozen=True)
class Context:
    """What terms are bound to.

    Attributes:
        model: The network as it came, batch norms in place.
        network: As synthesis runs it.
        spec: Its input.
        space: Where the input's pixels live.
        labels: Its classes; ``None``: it is no classifier.
        device: Where the loss is computed.
        dtype: In what precision.
        seed: The run's seed.
        prepared: What the recipe's `prepare` left, by name.
        others: Further networks for the same images (MixMix), the first one not among them.
    """

    model: Model
    network: SynthesisNetwork
    spec: TensorSpec
    space: InputSpace
    labels: LabelSpace | None
    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    prepared: Mapping[str, Tensor] = field(default_factory=dict)
    others: Sequence[Model] = ()


@dataclass(frozen=True)
class Look:
    """What one step saw of a batch, or of a piece of it.

    Attributes:
        images: In standard space, before augmentation [n, C, ...].
        seen: What the network was given: augmented, in standard space.
        values: The values of the network that terms asked for, by name.
        observed: Moments at the batch norms, by value name.
        targets: What these images are asked to be; ``None`` without labels.
        number: Steps done before this one.
        steps: Most steps of the batch.
        batch: Images in the whole batch.
        first: Index of the first of these in the batch.
        memory: What earlier batches left (see ``Recipe.remember``).
        source: What the images come from, for terms that look at its neighbourhood; ``None`` in a rehearsal.
        shared: What a term leaves for the other terms of the same step, so that it is computed once.
    """

    images: Tensor
    seen: Tensor
    values: Mapping[str, Tensor]
    observed: Mapping[str, Observed]
    targets: Targets | None
    number: int
    steps: int
    batch: int
    first: int
    memory: Mapping[str, Tensor]
    source: Parametrisation | None = None
    shared: dict[str, Any] = field(default_factory=dict)


class BoundTerm(Protocol):
    """A term that knows its network."""

    @property
    def fetch(self) -> Sequence[str]:
        """The values of the network that it wants to see."""

    def __call__(self, look: Look) -> Tensor:
        """Its loss, a scalar, without its weight.

        A term that is ``separable`` returns, for a piece, its share of the whole batch's loss: a mean over images divides by ``look.batch``.
        """


class Term(Protocol):
    """One part of a paper's loss, not yet bound to a network. Implementations are frozen dataclasses."""

    @property
    def name(self) -> str:
        """What it is called in progress lines and manifests."""

    @property
    def weight(self) -> float:
        """What it is multiplied with."""

    @property
    def separable(self) -> bool:
        """Whether it is a sum over images, so that a batch can be worked through in pieces with the same result."""

    @property
    def needs_labels(self) -> bool:
        """Whether it needs a classifier."""

    def bind(self, context: Context) -> BoundTerm:
        """The term for one network and device."""


def describe_value(value: Any) -> Any:
    """A part of a recipe as plain values for a manifest: its kind and its fields; a function by its name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe_value(item) for item in value]
    fields = getattr(value, "__dataclass_fields__", None)
    if fields is not None:
        return {"kind": type(value).__name__, **{name: describe_value(getattr(value, name)) for name in fields}}
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return getattr(value, "__name__", type(value).__name__)
    return repr(value)
