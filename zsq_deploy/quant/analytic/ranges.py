"""Ranges of all activations from the network's parameters alone."""

from __future__ import annotations

from zsq_deploy.model.model import Model
from zsq_deploy.quant.analytic.walk import propagate_model
from zsq_deploy.quant.ranges import Ranges

__all__ = ["analytic_ranges"]


def analytic_ranges(model: Model, sigmas: float = 6.0) -> Ranges:
    """The range of every activation from the network's parameters alone (method ``bn-analytic``).

    Args:
        model: The network with its batch normalizations.
        sigmas: How many standard deviations activations reach.
    """
    found = propagate_model(model, sigmas=sigmas)
    notes = found.notes
    if not model.batch_norms():
        warning = (
            "there is no batch normalization: ranges follow from the weights alone, take channels as independent, and become "
            "too narrow layer by layer; measure them on images instead"
        )
        notes = (warning, *notes)
    return Ranges(
        {name: channels.reach for name, channels in found.channels.items()},
        f"bn-analytic {sigmas:g} sigma",
        model.digest,
        "",
        notes,
    )
