"""The job from end to end, and its stages: calibration, engines, verification, report."""

from zsq_deploy.pipeline.calibration import Images, MeasuredRanges, make_images, measure_ranges
from zsq_deploy.pipeline.deploy import Outcome, deploy
from zsq_deploy.pipeline.engines import Built, EngineSettings, build_engine
from zsq_deploy.pipeline.verification import Evidence, verify_engine

__all__ = [
    "Built",
    "EngineSettings",
    "Evidence",
    "Images",
    "MeasuredRanges",
    "Outcome",
    "build_engine",
    "deploy",
    "make_images",
    "measure_ranges",
    "verify_engine",
]
