"""How good a calibration set is: what can be read from it without real data, and what real data say if there are any.

``measure_quality(model, images)`` gives everything; the parts stand in modules of their own: :mod:`~zsq_deploy.calib.quality.reach`
(coverage of the activation ranges), :mod:`~zsq_deploy.calib.quality.batch_norm`, :mod:`~zsq_deploy.calib.quality.diversity`,
:mod:`~zsq_deploy.calib.quality.agreement` and :mod:`~zsq_deploy.calib.quality.real`.
"""

from zsq_deploy.calib.quality.agreement import Agreement, agreement
from zsq_deploy.calib.quality.batch_norm import BatchNormDistance, LayerDistance, batch_norm_distance
from zsq_deploy.calib.quality.diversity import Diversity, DiversityBuilder, diversity, feature_of
from zsq_deploy.calib.quality.measure import Quality, lines, measure_quality
from zsq_deploy.calib.quality.reach import Reach, TensorReach, measure_reach, outside
from zsq_deploy.calib.quality.real import RangeError, TensorError, range_error

__all__ = [
    "Agreement",
    "BatchNormDistance",
    "Diversity",
    "DiversityBuilder",
    "LayerDistance",
    "Quality",
    "RangeError",
    "Reach",
    "TensorError",
    "TensorReach",
    "agreement",
    "batch_norm_distance",
    "diversity",
    "feature_of",
    "lines",
    "measure_quality",
    "measure_reach",
    "outside",
    "range_error",
]
