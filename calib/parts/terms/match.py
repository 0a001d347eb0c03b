"""Gradients of a quantized student that stay the same in the neighbourhood of an image (SADAG)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zsq_deploy.calib.parts.parametrisations import LatentImages
from zsq_deploy.calib.parts.student import Answer, Student
from zsq_deploy.calib.parts.terms.base import BoundTerm, Context, Look

__all__ = ["NeighbourMatch", "student_answer", "towards_difference"]

_KEY = "student"


def student_answer(student: Student, context: Context, look: Look, scores: str) -> Answer:
    """What teacher and student make of the images of a step; computed once a step."""
    if _KEY not in look.shared:
        look.shared[_KEY] = student.look(context.space.to_network(look.images), look.values[scores])
    found: Answer = look.shared[_KEY]
    return found


def towards_difference(answer: Answer, latents: Tensor, radius: float) -> Tensor:
    """The step of length `radius`, for each latent, along which the match of its image's gradient with itself grows fastest [N, latent].

    The gradient of the reconstruction loss in the last layer's weights is the outer product of residual r and feature f, so two images'
    gradients have the product (f . f')(r . r'). Its gradient is taken with f' and r' held.
    """
    f, r = answer.features, answer.residuals
    match = ((f * f.detach()).sum(1) * (r * r.detach()).sum(1)).sum()
    (direction,) = torch.autograd.grad(match, latents, retain_graph=True)
    return radius * F.normalize(direction, dim=1)


@dataclass(frozen=True)
class _Bound:
    """The term with one network and its student."""

    term: NeighbourMatch
    context: Context
    student: Student
    scores: str

    @property
    def fetch(self) -> Sequence[str]:
        """The class scores."""
        return (self.scores,)

    def __call__(self, look: Look) -> Tensor:
        """One minus the mean match."""
        space = self.context.space
        here = student_answer(self.student, self.context, look, self.scores)
        if isinstance(look.source, LatentImages):
            step = towards_difference(here, look.source.latents, self.term.radius)
            images = look.source.network(look.source.latents - step)
        else:  # a rehearsal: any images need as much memory
            images = look.images.flip(0)
        there = self.student.look(space.to_network(space.clip(images)))
        features = F.cosine_similarity(here.features, there.features)
        residuals = F.cosine_similarity(here.residuals, there.residuals)
        return 1 - (features * residuals).sum() / look.batch


@dataclass(frozen=True)
class NeighbourMatch:
    """Ask that an image and its worst neighbour give the student the same gradient (SADAG, ICML 2024, arXiv 2510.07018).

    1 - mean over images of cos(f, f') cos(r, r'), where f is what the last layer of the student reads, r the teacher's minus the student's scores, and the
    primed ones belong to the image decoded from z - radius g / |g|; g is the gradient of :func:`towards_difference`. It needs latents and
    :func:`~zsq_deploy.calib.parts.student.quantized_student`.

    Attributes:
        weight: Its weight.
        radius: Length of the step in latents.
    """

    weight: float = 1.0
    radius: float = 1.0
    name: str = "match"
    separable: bool = False
    needs_labels: bool = True

    def bind(self, context: Context) -> BoundTerm:
        """The term with the prepared student."""
        assert context.labels is not None
        return _Bound(self, context, Student(context), context.labels.value)
