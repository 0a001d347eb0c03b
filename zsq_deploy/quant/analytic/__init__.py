"""Moments and ranges of activations without any image, from the network's parameters alone.

:func:`propagate` carries mean, variance and reach through a graph (:mod:`~zsq_deploy.quant.analytic.walk`); :func:`analytic_ranges` makes ranges of them.
"""

from zsq_deploy.quant.analytic.channels import Channels, Kind
from zsq_deploy.quant.analytic.normals import clipped_normal
from zsq_deploy.quant.analytic.ranges import analytic_ranges
from zsq_deploy.quant.analytic.walk import Propagated, propagate, propagate_model

__all__ = ["Channels", "Kind", "Propagated", "analytic_ranges", "clipped_normal", "propagate", "propagate_model"]
