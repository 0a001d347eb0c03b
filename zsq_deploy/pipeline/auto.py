"""``--method auto``: the synthesis method and its budget, chosen from what was measured."""

from __future__ import annotations

from zsq_deploy.calib.recommend import Recommendation, recommend
from zsq_deploy.errors import UsageError
from zsq_deploy.model import Model
from zsq_deploy.progress import SILENT, Progress
from zsq_deploy.recipe import Recipe

__all__ = ["AUTO", "check_auto", "with_method"]

AUTO = "auto"
"""What a recipe says when the method is to be chosen."""


def check_auto(recipe: Recipe) -> None:
    """Refuse what makes no sense together with a chosen method, and a time limit that nothing reads.

    Raises:
        UsageError: Parameters are given for a method that is not chosen yet, or a time limit without ``auto``.
    """
    spec = recipe.calibration
    if spec.method == AUTO and spec.parameters and not spec.set:
        raise UsageError(
            f"parameters belong to a method, and auto has yet to choose one (given: {', '.join(spec.parameters)})",
            where="--param",
            remedy="name a method, or leave the parameters out",
        )
    if spec.time_limit is not None and (spec.method != AUTO or spec.set):
        raise UsageError(
            "nothing keeps to it: only --method auto chooses by time",
            where="--time-limit",
            remedy="say --method auto, or leave it out",
        )


def with_method(recipe: Recipe, model: Model, *, progress: Progress = SILENT) -> tuple[Recipe, Recommendation | None]:
    """The recipe with the method that ``auto`` stands for, and why; any other recipe as it is.

    The choice depends on the network, the bits, the number of images, the time limit and the table of evidence, on nothing that is measured
    here and now; so the same command gives the same recipe again.
    """
    check_auto(recipe)
    spec = recipe.calibration
    if spec.method != AUTO or spec.set:
        return recipe, None
    found = recommend(model, bits=recipe.quantization.bits, images=spec.images, time_limit=spec.time_limit)
    progress.say(f"auto chose {found.method}: {found.reasons[-1]}")
    chosen = recipe.replace(
        {
            "calibration.method": found.method,
            "calibration.parameters": dict(found.parameters),
            "calibration.images": found.images,
            "calibration.time_limit": None,
        }
    )
    return chosen, found
