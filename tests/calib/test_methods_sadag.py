"""SADAG: Genie's images refined with a simulated student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zsq_deploy.calib.methods import METHODS
from zsq_deploy.calib.parts.labels import find_labels
from zsq_deploy.calib.parts.network import prepare
from zsq_deploy.calib.parts.priors import InputSpace
from zsq_deploy.calib.parts.recipe import Finished, Preparation, stages
from zsq_deploy.calib.parts.student import Student, quantized_student
from zsq_deploy.calib.parts.terms.base import Context
from zsq_deploy.calib.parts.terms.diversity import remember_answers
from zsq_deploy.model import Model

from . import method_checks as checks
from .method_checks import random

QUICK = {"steps": 5, "refine_steps": 4, "latent": 8}
# Step sizes at which a few steps of a small network show.
LOUD = {**QUICK, "refine_latent_rate": 0.02, "refine_generator_rate": 2e-3}


def test_it_refines_genies_images(classifier: Callable[..., Model]) -> None:
    """The first stage is Genie's; with no step sizes the second gives its images back, with published ones it moves a little."""
    model = classifier()
    genie = checks.pixels(model, "genie", {"steps": 5, "latent": 8})
    still = {**QUICK, "refine_latent_rate": 0.0, "refine_generator_rate": 0.0}
    assert np.allclose(checks.pixels(model, "sadag", still), genie, atol=1e-5)
    moved = np.abs(checks.pixels(model, "sadag", QUICK) - genie)
    assert 1e-5 < moved.mean() < 0.1


def test_each_part_of_the_loss_has_effect(classifier: Callable[..., Model]) -> None:
    model = classifier()
    base = checks.pixels(model, "sadag", LOUD)
    for change in ({"match_weight": 0.0}, {"diversity_weight": 0.0}, {"radius": 0.1}, {"student_activations": 2}):
        assert not np.allclose(checks.pixels(model, "sadag", {**LOUD, **change}), base, atol=1e-6), change


def test_match_and_diversity_improve(classifier: Callable[..., Model]) -> None:
    parameters = {**LOUD, "steps": 10, "refine_steps": 40, "match_weight": 5.0, "diversity_weight": 5.0}
    first, last = checks.losses(classifier(), "sadag", parameters)
    assert last["match"] + last["alike"] < 0.97 * (first["match"] + first["alike"])
    assert last["loss"] < first["loss"]


def test_finished_batches_stay_among_the_others(classifier: Callable[..., Model]) -> None:
    model = classifier()
    space, labels = InputSpace.of(model.inputs[0], model.preprocess), find_labels(model.graph, model.outputs)
    context = Context(model, prepare(model), model.inputs[0], space, labels, torch.device("cpu"), torch.float32)
    batches = [torch.randn((n, 3, 12, 10), generator=random(n)) for n in (4, 3)]
    prepared = quantized_student(4, 4)(Preparation(context, 7, 4, [{"images": batches[0]}]))
    context = replace(context, prepared=prepared)
    memory: dict[str, torch.Tensor] = {}
    for images in batches:
        memory = dict(remember_answers(Finished(images, None, memory, lambda names: {}, context)))
    expected = Student(context).look(torch.cat(batches))
    torch.testing.assert_close(memory["student.features"], expected.features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(memory["student.residuals"], expected.residuals, rtol=1e-4, atol=1e-4)


def test_batches_of_the_second_stage_are_those_of_the_first(classifier: Callable[..., Model]) -> None:
    first, second = stages(METHODS["sadag"].run(METHODS["sadag"].defaults))  # type: ignore[misc]
    assert (first.passes, second.follows, first.swing, second.swing) == (4, True, 1, 0)
    said = checks.made(classifier(), "sadag", 7, parameters=QUICK).manifest.parameters
    assert said["outcome"]["batches"] == said["earlier_stages"][0]["outcome"]["batches"] == [3, 2, 2]


def test_same_seed_same_bits(classifier: Callable[..., Model]) -> None:
    checks.check_same_seed_same_bits(classifier(), "sadag", QUICK)


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 99))
def test_it_resumes_exactly(
    at: int, classifier: Callable[..., Model], recorder: Callable, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also in the second stage's second batch, which knows the first one's gradients."""
    checks.check_resumes_exactly(classifier(), "sadag", QUICK, recorder, Path(tmp_path_factory.mktemp("sadag")), at)


def test_any_picture(classifier: Callable[..., Model]) -> None:
    checks.check_any_picture(classifier, "sadag", QUICK)


@pytest.mark.parametrize("form", [{"batch": 2}, {"softmax": True}])
def test_other_classifiers(classifier: Callable[..., Model], form: dict) -> None:
    assert len(checks.made(classifier(**form), "sadag", 4, batch_size=None, parameters=QUICK)) == 4


def test_a_network_without_classes_is_refused(classifier: Callable[..., Model]) -> None:
    checks.check_needs_classes(checks.without_classes(classifier()), "sadag")
