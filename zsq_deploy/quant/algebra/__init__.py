"""Data-free weight algebra: what can be done for quantized weights with the network's parameters alone.

:func:`equalize` and :func:`absorb` (together with analytic ranges and bias correction: :func:`dfq`) change the float network,
:func:`squant` and :func:`round_by_moments` the rounding, :func:`udfc` the next layer. All take graphs and give graphs with the same names.
"""

from zsq_deploy.quant.algebra.absorb import Absorbed, absorb
from zsq_deploy.quant.algebra.dfq import Clips, Dfq, dfq, equalized_model
from zsq_deploy.quant.algebra.equalize import Equalized, clips_to_relu, equalize
from zsq_deploy.quant.algebra.moments import (
    LayerMoments,
    Rounded,
    analytic_moments,
    measured_moments,
    recode_by_moments,
    round_by_moments,
)
from zsq_deploy.quant.algebra.sites import Reader, Site, find_sites
from zsq_deploy.quant.algebra.squant import flip, float_weights_of, squant
from zsq_deploy.quant.algebra.udfc import Compensated, combine, udfc

__all__ = [
    "Absorbed",
    "Clips",
    "Compensated",
    "Dfq",
    "Equalized",
    "LayerMoments",
    "Reader",
    "Rounded",
    "Site",
    "absorb",
    "analytic_moments",
    "clips_to_relu",
    "combine",
    "dfq",
    "equalize",
    "equalized_model",
    "find_sites",
    "flip",
    "float_weights_of",
    "measured_moments",
    "recode_by_moments",
    "round_by_moments",
    "squant",
    "udfc",
]
