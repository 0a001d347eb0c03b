"""Images whose gradients for a quantized student differ from each other (SADAG)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq_deploy.calib.parts.recipe import Finished
from zsq_deploy.calib.parts.student import Answer, Student
from zsq_deploy.calib.parts.terms.base import BoundTerm, Context, Look
from zsq_deploy.calib.parts.terms.match import student_answer

__all__ = ["GradientDiversity", "closest_other", "remember_answers"]

_FEATURES, _RESIDUALS = "student.features", "student.residuals"
_AT_A_TIME = 32


def closest_other(answer: Answer, before: Answer | None = None) -> Tensor:
    """For each image, how much its gradient agrees with that of the image, in the batch or before it, that agrees most [N].

    |cos(f, f') cos(r, r')|, with no gradient through the other image; 0 when there is none.
    """
    f, r = F.normalize(answer.features, dim=1), F.normalize(answer.residuals, dim=1)
    others = [(f.detach(), r.detach())]
    if before is not None:
        others.append((F.normalize(before.features, dim=1), F.normalize(before.residuals, dim=1)))
    match = torch.cat([(f @ a.T) * (r @ b.T) for a, b in others], 1).abs()
    itself = torch.eye(len(f), match.shape[1], dtype=torch.bool, device=match.device)
    return match.masked_fill(itself, 0).amax(1)


@dataclass(frozen=True)
class _Bound:
    """The term with one network and its student."""

    context: Context
    student: Student
    scores: str

    @property
    def fetch(self) -> Sequence[str]:
        """The class scores."""
        return (self.scores,)

    def __call__(self, look: Look) -> Tensor:
        """The mean over images."""
        here = student_answer(self.student, self.context, look, self.scores)
        before = Answer(look.memory[_FEATURES], look.memory[_RESIDUALS]) if _FEATURES in look.memory else None
        return closest_other(here, before).sum() / look.batch


@dataclass(frozen=True)
class GradientDiversity:
    """Keep each image's gradient for the student away from the closest other one, also among finished batches (SADAG).

    Mean over images of :func:`closest_other`. It needs :func:`~zsq_deploy.calib.parts.student.quantized_student`, and :func:`remember_answers` as the
    recipe's `remember` for batches to know each other.

    Attributes:
        weight: Its weight.
    """

    weight: float = 1.0
    name: str = "alike"
    separable: bool = False
    needs_labels: bool = True

    def bind(self, context: Context) -> BoundTerm:
        """The term with the prepared student."""
        assert context.labels is not None
        return _Bound(context, Student(context), context.labels.value)


@torch.no_grad()
def remember_answers(finished: Finished) -> Mapping[str, Tensor]:
    """For `Recipe.remember`: what the student makes of all finished images."""
    student = Student(finished.context)
    model = finished.context.model
    piece = _AT_A_TIME if model.dynamic_batch else int(finished.context.spec.shape[0] or 1)
    answers = [student.look(part) for part in torch.split(finished.images, piece)]
    features = [answer.features for answer in answers]
    residuals = [answer.residuals for answer in answers]
    if _FEATURES in finished.memory:
        features.insert(0, finished.memory[_FEATURES])
        residuals.insert(0, finished.memory[_RESIDUALS])
    return {_FEATURES: torch.cat(features), _RESIDUALS: torch.cat(residuals)}
