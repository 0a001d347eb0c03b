"""Margins about class centres: against plain numpy, what earlier batches leave, and the gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from zsq_deploy.calib.parts.labels import Targets, find_labels
from zsq_deploy.calib.parts.recipe import Finished
from zsq_deploy.calib.parts.terms import Look
from zsq_deploy.calib.parts.terms.feature import ClassMargins, remember_class_features
from zsq_deploy.model import Model, Twin

COUNT = 8


@pytest.fixture(scope="module")
def context(classifier: Callable[..., Model]) -> Any:
    model = classifier()
    labels = find_labels(model.graph, model.outputs)
    return SimpleNamespace(model=model, network=SimpleNamespace(graph=model.graph), labels=labels)


def look(features: torch.Tensor, classes: list[int], memory: Mapping[str, torch.Tensor]) -> Look:
    nothing = torch.zeros(len(features), 1)
    return Look(
        images=nothing,
        seen=nothing,
        values={"features": features},
        observed={},
        targets=Targets(torch.tensor(classes)),
        number=0,
        steps=1,
        batch=len(features),
        first=0,
        memory=memory,
    )


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.05


def finished(context: Any, features: torch.Tensor, classes: list[int], memory: Mapping[str, torch.Tensor]) -> Finished:
    return Finished(
        images=torch.zeros(len(features), 3, 4, 4),
        targets=Targets(torch.tensor(classes)),
        memory=memory,
        values=lambda names: dict.fromkeys(names, features),
        context=context,
    )


CLASSES = [0, 1, 1, 3, 0, 1, 3, 0]


def test_memory_is_the_mean_of_all_batches(context: Any) -> None:
    memory: Mapping[str, torch.Tensor] = {}
    seen: dict[int, list[np.ndarray]] = {}
    for number in range(3):
        features, classes = random(COUNT, 6, seed=number), [(label + number) % 3 for label in CLASSES]
        memory = remember_class_features(finished(context, features, classes, memory))
        for row, label in zip(features.numpy(), classes, strict=True):
            seen.setdefault(label, []).append(row)
    assert memory["feature_count"].tolist() == [len(seen.get(label, [])) for label in range(4)]
    for label, rows in seen.items():
        centre = memory["feature_sum"][label] / memory["feature_count"][label]
        np.testing.assert_allclose(centre.numpy(), np.mean(rows, 0), rtol=1e-12)
    assert float(memory["feature_sum"][3].abs().sum()) == 0


@pytest.mark.parametrize(("lower", "upper"), [(0.05, 0.1), (0.2, 0.25), (0.0, 2.0)])
def test_margins_against_numpy(context: Any, lower: float, upper: float) -> None:
    earlier = random(COUNT, 6, seed=1)
    memory = remember_class_features(finished(context, earlier, [0, 0, 1, 1, 1, 2, 2, 2], {}))
    x = random(COUNT, 6, seed=2).requires_grad_()
    bound = ClassMargins(lower=lower, upper=upper).bind(context)
    assert bound.fetch == ("features",)
    centres = [earlier[:2].mean(0).numpy(), earlier[2:5].mean(0).numpy(), earlier[5:].mean(0).numpy()]
    hinges = []
    for row, label in zip(x.detach().numpy(), CLASSES, strict=True):
        if label == 3:
            continue  # never seen: no centre, and not counted
        centre = centres[label]
        distance = 1 - row @ centre / np.linalg.norm(row) / np.linalg.norm(centre)
        hinges.append(max(lower - distance, 0) + max(distance - upper, 0))
    assert float(bound(look(x, CLASSES, memory))) == pytest.approx(np.mean(hinges), rel=1e-9, abs=1e-12)
    assert bool(np.mean(hinges) == 0) is (upper == 2.0)
    assert torch.autograd.gradcheck(lambda y: bound(look(y, CLASSES, memory)), x)


def test_maps_are_pooled(context: Any) -> None:
    memory = remember_class_features(finished(context, random(COUNT, 6, seed=1), CLASSES, {}))
    maps = random(COUNT, 6, 3, 2, seed=5)
    bound = ClassMargins(lower=0.2, upper=0.3).bind(context)
    assert float(bound(look(maps, CLASSES, memory))) == pytest.approx(
        float(bound(look(maps.mean((2, 3)), CLASSES, memory))), rel=1e-12
    )
    again = remember_class_features(finished(context, maps, CLASSES, {}))
    assert torch.equal(again["feature_count"], memory["feature_count"])
    pooled = remember_class_features(finished(context, maps.mean((2, 3)), CLASSES, {}))
    torch.testing.assert_close(again["feature_sum"], pooled["feature_sum"])


def test_nothing_is_asked_of_the_first_batch_or_of_new_classes(context: Any) -> None:
    x = random(COUNT, 6).requires_grad_()
    bound = ClassMargins(lower=1.0, upper=1.0).bind(context)
    assert float(bound(look(x, CLASSES, {}))) == 0
    memory = remember_class_features(finished(context, random(2, 6, seed=1), [2, 2], {}))
    assert float(bound(look(x, CLASSES, memory))) == 0
    assert float(bound(look(x, [2] * COUNT, memory))) > 0


def test_features_of_a_real_pass_are_found(context: Any) -> None:
    model = context.model
    x = torch.randn(model.inputs[0].with_batch(4))
    bound = ClassMargins().bind(context)
    values = Twin(model.graph).run({model.inputs[0].name: x}, fetch=tuple(bound.fetch))
    assert values["features"].shape == (4, 6)


@pytest.mark.parametrize("margins", [(-0.1, 0.5), (0.6, 0.5), (0.5, 2.1)])
def test_margins_that_make_no_sense_are_refused(margins: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="between 0 and 2"):
        ClassMargins(1.0, *margins)
