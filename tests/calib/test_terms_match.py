"""The match of an image's gradient with its neighbour's: direction, value and student, against closed forms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional as F

from zsq_deploy.calib.parts.labels import find_labels
from zsq_deploy.calib.parts.network import prepare
from zsq_deploy.calib.parts.parametrisations import LatentImages
from zsq_deploy.calib.parts.priors import InputSpace
from zsq_deploy.calib.parts.recipe import Preparation
from zsq_deploy.calib.parts.student import STUDENT, Answer, Student, quantized_student
from zsq_deploy.calib.parts.terms.base import Context, Look
from zsq_deploy.calib.parts.terms.match import NeighbourMatch, towards_difference
from zsq_deploy.model import Graph, Model, Twin

from .method_checks import random

CPU = torch.device("cpu")


def context(model: Model, dtype: torch.dtype = torch.float32) -> Context:
    space = InputSpace.of(model.inputs[0], model.preprocess)
    labels = find_labels(model.graph, model.outputs)
    return Context(model, prepare(model, fast=False), model.inputs[0], space, labels, CPU, dtype)


def with_student(model: Model, bits: int, dtype: torch.dtype = torch.float32) -> Context:
    bare = context(model, dtype)
    images = torch.randn((24, 3, 12, 10), generator=random(5))
    prepared = quantized_student(bits, bits)(Preparation(bare, 24, 24, [{"images": images}]))
    return replace(bare, prepared=prepared)


def test_the_direction_is_that_of_the_product_of_gradients() -> None:
    """For f = A z and r = B z: the gradient of (f . f')(r . r') with the primed held is |r|^2 A'f + |f|^2 B'r."""
    a, b = (torch.randn((n, 4), generator=random(n), dtype=torch.float64) for n in (6, 3))
    z = torch.randn((5, 4), generator=random(1), dtype=torch.float64, requires_grad=True)
    f, r = z @ a.T, z @ b.T
    step = towards_difference(Answer(f, r), z, 0.7)
    expected = r.square().sum(1, keepdim=True) * (f @ a) + f.square().sum(1, keepdim=True) * (r @ b)
    torch.testing.assert_close(step, 0.7 * F.normalize(expected, dim=1).detach())
    torch.testing.assert_close(step.norm(dim=1), torch.full((5,), 0.7, dtype=torch.float64))


def test_normalised_gradients_have_no_direction() -> None:
    """Why this project does not normalise first: a unit vector's product with itself does not change."""
    a, b = (torch.randn((n, 4), generator=random(n), dtype=torch.float64) for n in (6, 3))
    z = torch.randn((5, 4), generator=random(1), dtype=torch.float64, requires_grad=True)
    f, r = F.normalize(z @ a.T, dim=1), F.normalize(z @ b.T, dim=1)
    match = ((f * f.detach()).sum(1) * (r * r.detach()).sum(1)).sum()
    (gradient,) = torch.autograd.grad(match, z)
    assert float(gradient.abs().max()) < 1e-14


def test_the_student_is_a_rounded_network(classifier: Callable[..., Model]) -> None:
    model = classifier()
    images = torch.randn((8, 3, 12, 10), generator=random(6))
    errors = {}
    for bits in (8, 4, 2):
        found = with_student(model, bits)
        graph = Graph(onnx.load_from_string(found.prepared[STUDENT].numpy().tobytes()))
        assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in graph}
        student = Student(found)
        answer = student.look(images)
        assert answer.features.shape == (8, 6)
        float_scores = Twin(model.graph, device="cpu")(images)
        rounded = Twin(graph, device="cpu")(images)
        torch.testing.assert_close(answer.residuals, float_scores - rounded, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(student.look(images, float_scores).residuals, float_scores - rounded)
        errors[bits] = float(answer.residuals.square().mean())
    assert errors[8] < 0.1 * errors[4] < 0.1 * errors[2]


def test_the_term_is_the_definition(classifier: Callable[..., Model]) -> None:
    found = with_student(classifier(), 4)
    student, term = Student(found), NeighbourMatch(radius=0.5)
    source = LatentImages((4, 3, 12, 10), random(2), latent=8)
    images = found.space.clip(source.images())
    bound = term.bind(found)
    (scores_name,) = bound.fetch
    scores = Twin(found.model.graph, device="cpu").run({"image": images}, fetch=(scores_name,))[scores_name]
    look = Look(images, images, {scores_name: scores}, {}, None, 0, 1, 4, 0, {}, source)
    value = bound(look)

    here = student.look(images, scores)
    f, r = here.features, here.residuals
    self_match = ((f * f.detach()).sum(1) * (r * r.detach()).sum(1)).sum()
    (gradient,) = torch.autograd.grad(self_match, source.latents, retain_graph=True)
    step = 0.5 * gradient / gradient.norm(dim=1, keepdim=True)
    with torch.no_grad():
        there = student.look(found.space.clip(source.network(source.latents - step)))
    pairs = []
    for i in range(4):
        a, b, c, d = (x[i].detach().double().numpy() for x in (f, there.features, r, there.residuals))
        pairs.append((a @ b) / np.sqrt((a @ a) * (b @ b)) * (c @ d) / np.sqrt((c @ c) * (d @ d)))
    assert float(value.detach()) == pytest.approx(1 - np.mean(pairs), abs=1e-4)
    value.backward()
    assert float(source.latents.grad.abs().max()) > 0
    assert all(parameter.grad is not None for parameter in source.network.parameters())


def test_without_latents_it_rehearses(classifier: Callable[..., Model]) -> None:
    found = with_student(classifier(), 4)
    bound = NeighbourMatch().bind(found)
    images = torch.randn((4, 3, 12, 10), generator=random(3)).requires_grad_()
    scores = Twin(found.model.graph, device="cpu")(images)
    value = bound(Look(images, images, {bound.fetch[0]: scores}, {}, None, 0, 1, 4, 0, {}))
    assert 0 < float(value.detach()) < 2
