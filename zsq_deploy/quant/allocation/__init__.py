"""Mixed bits: which layer gets how many, from what each one loses alone (the Pareto frontier of ZeroQ).

Cai et al. 2020, ZeroQ (arXiv:2001.00281), section 3.3: the loss of a choice of bits is taken to be the sum of what each layer alone makes the
output lose; then the best choices for every size follow from dynamic programming. :func:`separability` measures how far that assumption holds.
"""

from zsq_deploy.quant.allocation.allocate import Allocation, Separability, allocate, choose, cost_of, separability
from zsq_deploy.quant.allocation.frontier import Point, best_within, pareto
from zsq_deploy.quant.allocation.sensitivity import LayerSensitivity, Prober, Sensitivities, divergence

__all__ = [
    "Allocation",
    "LayerSensitivity",
    "Point",
    "Prober",
    "Sensitivities",
    "Separability",
    "allocate",
    "best_within",
    "choose",
    "cost_of",
    "divergence",
    "pareto",
    "separability",
]
