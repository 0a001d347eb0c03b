"""Batch-norm statistics against those of calibration centres instead of the stored ones (TexQ, SynQ)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from zsq_deploy.calib.parts.bn_loss import BNLoss, BNMatcher
from zsq_deploy.calib.parts.centres import targets_of
from zsq_deploy.calib.parts.terms.base import BoundTerm, Context, Look

__all__ = ["CentreStatistics"]


@dataclass(frozen=True)
class _Bound:
    """The term with the targets of one network."""

    term: CentreStatistics
    matcher: BNMatcher

    @property
    def fetch(self) -> Sequence[str]:
        """Nothing: the statistics are taken anyway."""
        return ()

    def __call__(self, look: Look) -> Tensor:
        """The distance."""
        found = self.matcher(look.observed, batch=look.batch).total
        return found / look.batch if self.term.per_image else found


@dataclass(frozen=True)
class CentreStatistics:
    """Distance of the batch's statistics from those of the centres (layered batch-norm-statistics alignment).

    The layers' squared gaps of mean and of biased variance, each a mean over channels; their weighted sum over the number of all layers. It needs
    :func:`~zsq_deploy.calib.parts.centres.centre_statistics` as the recipe's `prepare`, and a batch-norm loss over the batch.

    Attributes:
        weight: Its weight.
        layers: Name of a rule in :data:`~zsq_deploy.calib.parts.bn_loss.LAYER_WEIGHTS`; the deeper half alone in SynQ's released code.
        per_image: Divide by the number of images, as that code does.
        relative: In units of each layer's spread, see :class:`~zsq_deploy.calib.parts.bn_loss.BNLoss`.
    """

    weight: float = 1.0
    layers: str = "shallow_0_deep_1"
    per_image: bool = False
    relative: bool = False
    name: str = "centres"
    separable: bool = False
    needs_labels: bool = False

    def bind(self, context: Context) -> BoundTerm:
        """The term with the prepared targets."""
        loss = BNLoss(moment="var", norm="mse", reduce="mean", layer_weight=self.layers, relative=self.relative)
        layers = []
        for index, layer in enumerate(context.network.layers):
            mean, var = (value.double().cpu().numpy() for value in targets_of(context.prepared, index))
            layers.append(replace(layer, mean=mean, var=var))
        return _Bound(self, BNMatcher(loss, layers, device=context.device, dtype=context.dtype))
