"""Loss terms beside the batch-norm statistics, one small module a subject. A term is a frozen value; see :mod:`.base`."""

from zsq_deploy.calib.parts.terms.base import BoundTerm, Context, Look, Term
from zsq_deploy.calib.parts.terms.image import GramSpectrum, LikeBlurred, PixelNorm, TotalVariation
from zsq_deploy.calib.parts.terms.label import CrossEntropy, OwnProbability

__all__ = [
    "BoundTerm",
    "Context",
    "CrossEntropy",
    "GramSpectrum",
    "LikeBlurred",
    "Look",
    "OwnProbability",
    "PixelNorm",
    "Term",
    "TotalVariation",
]
